"""Stands in for a job whose batch script died with its node: `python -m slurm.runtime.failover`.

Started on another node of the job by the `slurm.runtime.rank` there, which no longer sees that
slurm.job lives; only one is elected. If the node answers after all, nothing is done.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from slurm import scheduler
from slurm.job_files import list_attempts, write_attempt
from slurm.runtime.allocation import clean, confirmed, errors_of, read_allocation, read_words
from slurm.runtime.node_probes import Probes, dead_nodes
from slurm.runtime.outcome import Ended, bury, requeue, say, settle, write_row
from unitransformer.launch.signals import SIGNALS

ARGUMENTS = "UNITRANSFORMER_JOB_ARGUMENTS"  # of slurm.job, as a JSON list
LOG = "UNITRANSFORMER_JOB_LOG"  # its own output


def main() -> int:
    """Settle the job; returns the exit code."""
    for number in SIGNALS:  # being queued again brings them, and there is more to do after it
        signal.signal(number, signal.SIG_IGN)
    with Path(os.environ[LOG]).open("a") as log, contextlib.redirect_stdout(log):
        try:
            return stand_in()
        except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            say(f"{os.environ.get('SLURMD_NODENAME')} could not stand in for the job: {error}")
            return 1


def stand_in() -> int:
    """Write down that the first node is dead, and queue the job again without it."""
    allocation = confirmed(read_allocation(os.environ))
    words = read_words(json.loads(os.environ[ARGUMENTS]), allocation)
    first = scheduler.names_of(allocation.node_list)[0]
    own = os.environ["SLURMD_NODENAME"]
    silent = Probes.start([first, own]).silent()
    *before, attempt = [
        each
        for each in list_attempts(words.folder)
        if each.job != allocation.job or each.restart <= allocation.restart
    ]
    if (
        first not in silent
        or attempt.outcome != "running"
        or scheduler.is_taken_back(allocation.name)
    ):
        return 0
    dead: dict[str, list[int]] = {first: []} | dead_nodes(
        allocation, errors_of(allocation, words), silent
    )
    reason, has_row = bury(allocation, words, dead, attempt.since_s)
    ended = Ended(exit_code=1, dead_nodes=[first], reason=reason)
    verdict = settle(attempt, ended, before=before)
    write_attempt(words.folder, verdict.attempt)
    say(f"{verdict.attempt.outcome}: {reason}")
    say(f"{own} says so, as the batch script was on {first}")
    if not has_row:
        write_row(allocation, words, attempt.since_s)
    if words.local_disk is not None:
        clean(allocation, words.local_disk, dead_nodes=list(dead))
    if not (verdict.requeue and requeue(allocation, words, verdict)):
        scheduler.insist("scancel", allocation.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

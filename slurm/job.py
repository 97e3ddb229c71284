"""What a batch script runs: starts the ranks, watches them, and settles what comes after.

0 done | 1 failed | 2 refused | 75 stopped by a signal, saved and queued again where that can be.
Python itself is the job's process here: a signal to it ends nothing, and what follows is tested.
When the node of the batch script itself dies, this process dies with it: SLURM queues the job again
once it has declared the node down, after its SlurmdTimeout (300 s unless the cluster says
otherwise: `scontrol show config`). The next start notes how the one before ended.
"""

import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from slurm import scheduler
from slurm.job_files import Attempt, began_at, list_attempts, write_attempt
from slurm.runtime.allocation import (
    Allocation,
    Words,
    check_alone,
    check_shape,
    clean,
    confirmed,
    errors_of,
    read_allocation,
    read_words,
)
from slurm.runtime.outcome import Ended, judge, requeue, say, settle, write_row
from slurm.runtime.srun import command_of, variables_of, watch
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.launch.variables import without_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    try:
        allocation = confirmed(read_allocation(os.environ))
        check_alone(allocation, os.environ)
        words = read_words(sys.argv[1:] if argv is None else argv, allocation)
        check_shape(allocation, words)
        return run_job(allocation, words)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def run_job(allocation: Allocation, words: Words) -> int:
    """Start the ranks and wait; write down how it ended; returns the exit code."""
    words.folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(
        job=allocation.job,
        array=allocation.array,
        restart=allocation.restart,
        nodes=allocation.node_list,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    )
    before = [_settle_lost(each, allocation, words) for each in list_attempts(words.folder)]
    write_attempt(words.folder, attempt)
    # Until the very end: being queued again brings another, and there is more to do after it.
    caught: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: caught.append(received))
    ended = _run_ranks(allocation, words, attempt, caught)
    verdict = settle(attempt, ended, before=before)
    write_attempt(words.folder, verdict.attempt)
    say(f"{verdict.attempt.outcome}: {verdict.attempt.reason or words.folder}")
    if not ended.has_row:
        write_row(allocation, words, attempt.since_s)
    if words.local_disk is not None:
        clean(allocation, words.local_disk, dead_nodes=ended.dead_nodes)
    if verdict.requeue:
        requeue(allocation, words, verdict)
    return verdict.exit_code


def _settle_lost(attempt: Attempt, allocation: Allocation, words: Words) -> Attempt:
    """Write down how an earlier start ended that could not do so itself, as the node of its batch
    script has died or SLURM has killed it, and SLURM has queued the job again."""
    if attempt.job != allocation.job or attempt.outcome != "running":
        return attempt
    down = scheduler.down(scheduler.names_of(attempt.nodes))
    told = f"{', '.join(down)} does not answer any more" if down else "killed without a word"
    lost = replace(
        attempt, outcome="failed", reason=told, is_requeued=True, is_node_failure=bool(down)
    )
    write_attempt(words.folder, lost)
    say(f"start {attempt.restart + 1}: {told}")
    return lost


def _run_ranks(allocation: Allocation, words: Words, attempt: Attempt, caught: list[int]) -> Ended:
    errors = errors_of(allocation, words)
    errors.mkdir(exist_ok=True)
    for old in errors.iterdir():
        old.unlink()
    # Those of a job that this one was submitted from within.
    own = without_launcher(os.environ) | variables_of(allocation, words)
    began = began_at(words.folder if allocation.task is None else words.folder.parent)
    srun = subprocess.Popen(command_of(words, began), env=own)
    watched = watch(srun, allocation, errors, caught)
    return judge(allocation, words, attempt, watched, was_asked=bool(caught))


if __name__ == "__main__":
    sys.exit(main())

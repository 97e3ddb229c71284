"""What a batch script runs: starts the ranks, watches them, and settles what comes after.

0 done | 1 failed | 2 refused | 75 stopped by a signal, saved and queued again where that can be.
Python itself is the job's process here: a signal to it ends nothing, and what follows is tested.
"""

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm import queue
from slurm.allocation import (
    FOLDER,
    Allocation,
    Words,
    check_shape,
    option_of,
    read_allocation,
    read_words,
)
from slurm.markers import RUN, Attempt, find_record, read_json, write_attempt
from slurm.nodes import Probes, silent_ranks
from unitransformer.failures import amend_record, first_failure, read_failures
from unitransformer.stop_signals import EXIT_CODE, SIGNALS

RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # of the run: the same for all ranks and every start
ERRORS = "UNITRANSFORMER_ERRORS"  # folder where ranks say why they failed
POLL_S = 0.5
GRACE_S = 3.0  # from the first rank's failure until the others are killed
PATIENCE_S = 4.0  # from that until srun itself is
MAX_RESTARTS = 5  # after failures of nodes


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    exit_code: int
    is_done: bool  # and says so itself
    is_cancelled: bool
    reason: str = ""
    is_refused: bool = False
    dead_nodes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes after."""

    attempt: Attempt
    exit_code: int
    requeue: bool = False
    exclude: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    try:
        allocation = read_allocation(os.environ)
        words = read_words(sys.argv[1:] if argv is None else argv, allocation)
        check_shape(allocation, words)
        return run_job(allocation, words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# ------------------------------------------------------------------------------------ running


def run_job(allocation: Allocation, words: Words) -> int:
    """Start the ranks and wait; write down how it ended; returns the exit code."""
    words.folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(
        job=allocation.job,
        restart=allocation.restart,
        nodes=allocation.node_list,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    if words.target != "sweep" and _is_done(words):
        _say(f"done already: {words.folder}")
        write_attempt(words.folder, replace(attempt, outcome="done"))
        return 0
    write_attempt(words.folder, attempt)
    # Until the very end: being queued again brings another, and there is more to do after it.
    caught: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, _: caught.append(received))
    ended = _run_ranks(allocation, words, caught)
    verdict = settle(attempt, ended)
    write_attempt(words.folder, verdict.attempt)
    if verdict.attempt.reason:
        _say(f"{verdict.attempt.outcome}: {verdict.attempt.reason}")
    if verdict.requeue:
        _requeue(allocation, words, verdict)
    return verdict.exit_code


def settle(attempt: Attempt, ended: Ended) -> Verdict:
    """What became of the job, and what is to be done about it."""
    if ended.is_done and ended.exit_code == 0:
        return Verdict(attempt=replace(attempt, outcome="done"), exit_code=0)
    if ended.is_cancelled:
        reason = "cancelled" + (f"; {ended.reason}" if ended.reason else "")
        return Verdict(attempt=replace(attempt, outcome="stopped", reason=reason), exit_code=75)
    if ended.exit_code == EXIT_CODE:
        return Verdict(
            attempt=replace(
                attempt, outcome="stopped", reason=ended.reason or "asked to", is_requeued=True
            ),
            exit_code=EXIT_CODE,
            requeue=True,
        )
    if ended.is_refused:
        return Verdict(
            attempt=replace(attempt, outcome="refused", reason=ended.reason), exit_code=2
        )
    reason = ended.reason or (
        "it ended with exit code 0, and no record says that it is done"
        if ended.exit_code == 0
        else f"srun ended with exit code {ended.exit_code}"
    )
    failed = replace(attempt, outcome="failed", reason=reason)
    if ended.dead_nodes and attempt.restart < MAX_RESTARTS:
        return Verdict(
            attempt=replace(failed, is_requeued=True),
            exit_code=1,
            requeue=True,
            exclude=",".join(ended.dead_nodes),
        )
    return Verdict(attempt=failed, exit_code=1)


def _run_ranks(allocation: Allocation, words: Words, caught: list[int]) -> Ended:
    errors = words.folder / f"errors-{allocation.job}-{allocation.restart}"
    errors.mkdir(exist_ok=True)
    for old in errors.iterdir():
        old.unlink()
    since_s = time.time() - 1  # file systems round
    srun = subprocess.Popen(
        command_of(words), env={**os.environ, **_variables(allocation, words, errors)}
    )
    code, probes = _watch(srun, allocation, errors, caught)
    if code == 0 and any(errors.glob("*.stopped")):
        code = EXIT_CODE
    is_cancelled = code != 0 and queue.is_cancelled(allocation.name)
    told = Ended(
        exit_code=code,
        is_done=_is_done(words),
        is_cancelled=is_cancelled,
    )
    if code in (0, EXIT_CODE):
        return replace(told, reason=_why_stopped(words)) if code else told
    dead = [] if is_cancelled or probes is None else probes.dead()
    for number, node in silent_ranks(allocation, errors, dead):
        _write_error(
            errors / f"{number}.failure", "NodeFailure", f"{node} does not answer any more"
        )
    failures = read_failures(errors)
    return replace(
        told,
        is_refused=any(f.is_bad_usage for f in failures) or (code == 2 and not failures),
        dead_nodes=dead,
        reason=_write_row(allocation, words, errors, since_s),
    )


def command_of(words: Words) -> list[str]:
    """What starts the ranks, or the one process of a sweep."""
    srun = ["srun", "--kill-on-bad-exit=1", *words.srun]
    if words.target == "sweep":
        srun += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
        own = ["scaling", "sweep", *words.arguments, "--max-cells", "1"]
    else:
        own = [words.target, *words.arguments]
        if not any(word.partition("=")[0] == "--resume" for word in words.arguments):
            own += ["--resume", "auto"]
    return [*srun, words.python, "-m", "slurm.rank", words.python, "-m", *own]


def _variables(allocation: Allocation, words: Words, errors: Path) -> dict[str, str]:
    variables = {ERRORS: str(errors), "PYTHONUNBUFFERED": "1"}
    if words.target != "sweep":
        variables[RUN_FOLDER] = str(words.folder / RUN)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        variables["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it from sbatch
    if words.local_disk is not None:
        # Of this job alone: what is left of another cannot be taken for its own.
        place = words.local_disk / f"unitransformer-{allocation.job}"
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "TRITON_CACHE_DIR": str(place / "triton"),
        }
    return variables


def _watch(
    srun: "subprocess.Popen[bytes]", allocation: Allocation, errors: Path, caught: list[int]
) -> tuple[int, Probes | None]:
    """Wait for srun; hand on what only this process was sent; kill what a failed rank leaves.

    Returns:
        Its exit code, and what asks the nodes whether they are alive, if a rank has failed.
    """
    step = f"{allocation.name}.0"
    num_handed_on, failed_at_s = 0, math.inf
    probes: Probes | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(POLL_S)
            if code and failed_at_s == math.inf:
                probes = Probes.start(allocation)
            return (code if code >= 0 else 128 - code), probes
        if len(caught) > num_handed_on:
            num_handed_on = len(caught)
            # Not every signal to a job reaches its ranks; twice is as good as once.
            _signal(step, "USR1")
        if failed_at_s == math.inf and any(errors.glob("*.failure")):
            failed_at_s = time.monotonic()
            probes = Probes.start(allocation)
        if time.monotonic() > failed_at_s + GRACE_S:
            _signal(step, "KILL")
            try:
                srun.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                srun.kill()  # its node is gone


def _signal(step: str, name: str) -> None:
    """To all ranks; not waited for, as scancel waits for nodes that are dead."""
    subprocess.Popen(["scancel", f"--signal={name}", step], stderr=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------ settling


def _is_done(words: Words) -> bool:
    """By what the run itself has written, not by an exit code."""
    if words.target == "sweep":
        return True  # a cell's own outcome says what became of it
    return bool(_record(words).get("status") == "ok")


def _record_path(words: Words) -> Path | None:
    named = option_of(words.arguments, "--record")
    return Path(named) if named else find_record(words.folder / RUN)


def _record(words: Words) -> Mapping[str, Any]:
    path = _record_path(words)
    return (path and read_json(path)) or {}


def _why_stopped(words: Words) -> str:
    if words.target == "sweep":
        return "the cell under way is given back"
    error = _record(words).get("error") or {}
    return str(error.get("message") or "asked to stop before training began")


def _write_error(path: Path, kind: str, message: str) -> None:
    failure = {"type": kind, "message": message, "lines": [], "at_s": 0.0}
    path.write_text(json.dumps({"failure": failure}))


def _write_row(allocation: Allocation, words: Words, errors: Path, since_s: float) -> str:
    """Put what failed first into the record of the run; in words."""
    failures = read_failures(errors)
    if words.target == "sweep":
        return "its cell failed, and the report of the sweep says why"
    if not failures:
        return ""
    failure = first_failure(failures)
    path = _record_path(words)
    if path is None or not amend_record(path, failure, since_s=since_s):
        _write_whole_row(allocation, words, errors, since_s)
    return f"rank {failure.rank} of {allocation.tasks}: {' '.join(failure.message.split())}"


def _write_whole_row(allocation: Allocation, words: Words, errors: Path, since_s: float) -> None:
    """The record of ranks that have written none: only the recipe can tell what was to run."""
    variables = {
        **os.environ,
        RUN_FOLDER: str(words.folder / RUN),
        "RANK": "0",
        "WORLD_SIZE": str(allocation.tasks),
        "LOCAL_WORLD_SIZE": str(allocation.tasks_per_node[0]),
    }
    recipe = words.target.removeprefix("recipes.")
    done = subprocess.run(
        [
            *(words.python, "-m", "recipes.failed", recipe, errors, str(since_s)),
            *("--", *words.arguments),
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        _say(f"the record could not be written: {(done.stderr.strip() or '?').splitlines()[-1]}")


def _requeue(allocation: Allocation, words: Words, verdict: Verdict) -> None:
    """Queue this job or task again; where that cannot be, say how to go on."""
    # Said before: what follows ends this process.
    _say("to be queued again" + (f", without {verdict.exclude}" if verdict.exclude else ""))
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # as what is started from here on does, too
    refused = queue.requeue(allocation.name, exclude=verdict.exclude)
    if refused is None:
        return
    write_attempt(words.folder, replace(verdict.attempt, is_requeued=False))
    script = words.folder / "job.sbatch"
    how = (
        f"sbatch {script}"
        if script.exists()
        else f"{FOLDER}={words.folder} sbatch, with the same script and options"
    )
    _say(f"not queued again ({refused}); go on with: {how}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What a batch script runs: starts the ranks, watches them, and settles what comes after.

0 done | 1 failed | 2 refused | 75 stopped by a signal, saved and queued again where that can be.
Python itself is the job's process here: a signal to it ends nothing, and what follows is tested.
"""

import contextlib
import datetime
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import queue
from slurm.allocation import (
    FOLDER,
    Allocation,
    Words,
    check_shape,
    confirmed,
    read_allocation,
    read_words,
)
from slurm.markers import RUN, SCRIPT, Attempt, find_record, list_attempts, read_json, write_attempt
from slurm.nodes import Probes, dead_nodes
from slurm.rank import ERRORS
from unitransformer.checkpoint_names import LOCAL_DISK
from unitransformer.failures import (
    BAD_USAGE,
    Failure,
    amend_record,
    first_failure,
    read_failures,
    write_failure,
)
from unitransformer.launchers import without_launcher
from unitransformer.records import PROGRESS
from unitransformer.stop_signals import EXIT_CODE, SIGNALS

RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # of the run: the same for all ranks and every start
POLL_S = 0.5
GRACE_S = 3.0  # from the first rank's failure until the others are killed
PATIENCE_S = 4.0  # from that until srun itself is
CLEAN_S = 20.0
MAX_DEAD = 5  # times that the job is queued again because a node has died
MAX_IN_VAIN = 4  # times that it is stopped before it has anything to save, and tries again
NOT_BEGUN = "asked to stop before training began"
GIVEN_BACK = "the cell under way is given back"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    exit_code: int
    is_done: bool = False  # what has run says so itself
    is_taken_back: bool = False  # by whoever cancelled the job, or by SLURM
    is_refused: bool = False
    reason: str = ""
    dead_nodes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes after."""

    attempt: Attempt
    exit_code: int
    requeue: bool = False
    exclude: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    try:
        allocation = confirmed(read_allocation(os.environ))
        words = read_words(sys.argv[1:] if argv is None else argv, allocation)
        check_shape(allocation, words)
        return run_job(allocation, words)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# ------------------------------------------------------------------------------------ running


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
    before = list_attempts(words.folder)
    write_attempt(words.folder, attempt)
    # Until the very end: being queued again brings another, and there is more to do after it.
    caught: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, _: caught.append(received))
    ended = _run_ranks(allocation, words, caught)
    verdict = settle(attempt, ended, before=before)
    write_attempt(words.folder, verdict.attempt)
    _say(f"{verdict.attempt.outcome}: {verdict.attempt.reason or words.folder}")
    if verdict.requeue:
        _requeue(allocation, words, verdict)
    elif words.local_disk is not None:
        _clean(_own_folder(allocation, words.local_disk), allocation)
    return verdict.exit_code


def settle(attempt: Attempt, ended: Ended, *, before: Sequence[Attempt] = ()) -> Verdict:
    """What became of the job, and what is to be done about it.

    Args:
        before: earlier starts, the newest last.
    """
    if ended.is_done:
        return Verdict(attempt=replace(attempt, outcome="done"), exit_code=0)
    if ended.is_taken_back:
        told = "cancelled, or queued again by SLURM itself"
        reason = f"{told}; {ended.reason}" if ended.reason else told
        return Verdict(
            attempt=replace(attempt, outcome="stopped", reason=reason), exit_code=EXIT_CODE
        )
    if ended.exit_code == EXIT_CODE:
        stopped = replace(attempt, outcome="stopped", reason=ended.reason, is_requeued=True)
        same = [*itertools.takewhile(lambda each: each.reason == ended.reason, reversed(before))]
        if ended.reason in (NOT_BEGUN, GIVEN_BACK) and len(same) >= MAX_IN_VAIN:
            reason = f"{ended.reason}, {len(same) + 1} times: the time limit is too short"
            failed = replace(attempt, outcome="failed", reason=reason)
            return Verdict(attempt=failed, exit_code=1)
        return Verdict(attempt=stopped, exit_code=EXIT_CODE, requeue=True)
    if ended.is_refused:
        refused = replace(attempt, outcome="refused", reason=ended.reason)
        return Verdict(attempt=refused, exit_code=2)
    reason = ended.reason or (
        "it ended with exit code 0, and no record says that it is done"
        if ended.exit_code == 0
        else f"srun ended with exit code {ended.exit_code}"
    )
    failed = replace(attempt, outcome="failed", reason=reason)
    died = [each for each in before if each.outcome == "failed" and each.is_requeued]
    if ended.dead_nodes and len(died) < MAX_DEAD:
        return Verdict(
            attempt=replace(failed, is_requeued=True),
            exit_code=1,
            requeue=True,
            exclude=ended.dead_nodes,
        )
    return Verdict(attempt=failed, exit_code=1)


def _run_ranks(allocation: Allocation, words: Words, caught: list[int]) -> Ended:
    errors = words.folder / f"errors-{allocation.job}-{allocation.restart}"
    errors.mkdir(exist_ok=True)
    for old in errors.iterdir():
        old.unlink()
    since_s = time.time() - 1  # file systems round
    # Those of a job that this one was submitted from within.
    own = without_launcher(os.environ) | _variables(allocation, words, errors)
    srun = subprocess.Popen(command_of(words), env=own)
    code, probes = _watch(srun, allocation, errors, caught)
    failures = read_failures(errors)
    has_stopped = any(errors.glob("*.stopped"))
    # srun may have been told to end as well, and then kills what is still saving.
    if not failures and ((code == 0 and has_stopped) or (code > 128 and caught)):
        code = EXIT_CODE
    ended = Ended(exit_code=code, is_done=_is_done(words, code, since_s))
    if ended.is_done or code == 0:
        return ended
    ended = replace(ended, is_taken_back=queue.is_taken_back(allocation.name))
    if code == EXIT_CODE:
        return replace(ended, reason=_why_stopped(words, since_s))
    if code == BAD_USAGE or any(failure.is_bad_usage for failure in failures):
        told = first_failure(failures).message if failures else "what is said above"
        if words.target == "sweep":
            told = "the sweep's options are wrong, as is said above"
        return replace(ended, is_refused=True, reason=told)
    silent = [] if ended.is_taken_back or probes is None else probes.silent()
    dead = dead_nodes(allocation, errors, silent)
    for node, ranks in dead.items():
        for rank in ranks:
            told = f"{node} does not answer any more"
            dead_rank = Failure(rank=rank, type="NodeFailure", message=told, lines=[])
            write_failure(dead_rank, errors / f"{rank}.failure")
    return replace(
        ended, dead_nodes=list(dead), reason=_write_row(allocation, words, errors, since_s)
    )


def command_of(words: Words) -> list[str]:
    """What starts the ranks, or the one process of a sweep."""
    srun = ["srun", "--kill-on-bad-exit=1", "--distribution=block", *words.srun]
    if words.target == "sweep":
        srun += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
        own = ["scaling", "sweep", *words.arguments]
        given = {word.partition("=")[0] for word in words.arguments}
        if not given & {"--max-cells", "--find-max-batch"}:  # a search goes cell after cell
            own += ["--max-cells", "1"]
    else:
        own = [words.target, *words.arguments]
        if not any(word.partition("=")[0] == "--resume" for word in words.arguments):
            own += ["--resume", "auto"]
    return [*srun, words.python, "-m", "slurm.rank", words.python, "-m", *own]


def _own_folder(allocation: Allocation, local_disk: Path) -> Path:
    """Of this job alone: what is left of another cannot be taken for its own."""
    return local_disk / f"unitransformer-{allocation.job}"


def _clean(place: Path, allocation: Allocation) -> None:
    """Remove a folder from every node's own disk."""
    each = (f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1")
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["srun", "--overlap", *each, "rm", "-rf", place], timeout=CLEAN_S)


def _variables(allocation: Allocation, words: Words, errors: Path) -> dict[str, str]:
    variables = {ERRORS: str(errors), "PYTHONUNBUFFERED": "1"}
    if words.target != "sweep":
        variables[RUN_FOLDER] = str(words.folder / RUN)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        variables["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it from sbatch
    if words.local_disk is not None:
        place = _own_folder(allocation, words.local_disk)
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "TRITON_CACHE_DIR": str(place / "triton"),
            LOCAL_DISK: str(place),
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


def _is_done(words: Words, code: int, since_s: float) -> bool:
    """By what the run itself has written, not by an exit code; a cell has an outcome of its own.

    A record from before is believed where the run has found that it is its own.
    """
    if words.target == "sweep":
        return code == 0
    path = _record_path(words)
    if path is None or (code != 0 and path.stat().st_mtime < since_s):
        return False
    return (read_json(path) or {}).get("status") == "ok"


def _record_path(words: Words) -> Path | None:
    """Where the run has said that its record is, or the newest beside it."""
    told = (read_json(words.folder / RUN / PROGRESS) or {}).get("record")
    if told and Path(told).exists():
        return Path(told)
    return find_record(words.folder / RUN)


def _why_stopped(words: Words, since_s: float) -> str:
    if words.target == "sweep":
        return GIVEN_BACK
    path = _record_path(words)
    if path is None or path.stat().st_mtime < since_s:
        return NOT_BEGUN
    return str(((read_json(path) or {}).get("error") or {}).get("message") or NOT_BEGUN)


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
            *(("srun", "--overlap", "--nodes=1", "--ntasks=1", *words.srun) if words.srun else ()),
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
    _say("asks to be queued again" + "".join(f", without {name}" for name in verdict.exclude))
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # as what is started from here on does, too
    refused = queue.requeue(allocation.name, exclude=verdict.exclude)
    if refused is None:
        return
    write_attempt(words.folder, replace(verdict.attempt, is_requeued=False))
    job_folder = words.folder if allocation.task is None else words.folder.parent
    only = [] if allocation.task is None else [f"--array={allocation.task}"]
    script = job_folder / SCRIPT
    how = (
        shlex.join(["sbatch", *only, str(script)])
        if script.exists()
        else shlex.join(["env", f"{FOLDER}={job_folder}", "sbatch", *only])
        + " with the same script and options"
    )
    _say(f"not queued again ({refused}); go on with: {how}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What became of a job, by what its ranks have left; and what comes after."""

import itertools
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import scheduler
from slurm.job_files import (
    RUN,
    SCRIPT,
    Attempt,
    Swept,
    find_record,
    read_json,
    read_swept,
    write_attempt,
)
from slurm.runtime.allocation import Allocation, Words, errors_of
from slurm.runtime.node_probes import Probes, dead_nodes, write_dead
from unitransformer.launch.failures import BAD_USAGE, amend_record, first_failure, read_failures
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import JOB_FOLDER, PROGRESS_FILE, RUN_FOLDER

MAX_DEAD = 5  # times that the job is queued again because a node has died

MAX_IN_VAIN = 4  # times that it is stopped before it has anything to save, and tries again

ROW_S = 300.0

NOT_BEGUN = "asked to stop before training began"

GIVEN_BACK = "the cell under way is given back"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What whoever watched the ranks saw."""

    exit_code: int  # of srun
    probes: Probes  # asked when a rank failed
    dead: Mapping[str, Sequence[int]]  # nodes found dead meanwhile, with their ranks


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    exit_code: int
    is_done: bool = False  # what has run says so itself
    is_taken_back: bool = False  # by whoever cancelled the job, or by SLURM
    is_refused: bool = False
    reason: str = ""
    dead_nodes: Sequence[str] = ()
    has_row: bool = True  # or it is still to be written, which takes a while


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes after."""

    attempt: Attempt
    exit_code: int
    requeue: bool = False
    exclude: Sequence[str] = ()


def settle(attempt: Attempt, ended: Ended, *, before: Sequence[Attempt] = ()) -> Verdict:
    """What became of the job, and what is to be done about it.

    Args:
        before: earlier starts, the newest last.
    """
    if ended.is_done:
        done = replace(attempt, outcome="done", reason=ended.reason)
        return Verdict(attempt=done, exit_code=0)
    if ended.is_taken_back:
        told = "cancelled, or queued again by SLURM itself"
        reason = f"{told}; {ended.reason}" if ended.reason else told
        return Verdict(
            attempt=replace(attempt, outcome="stopped", reason=reason), exit_code=STOPPED_EXIT_CODE
        )
    if ended.exit_code == STOPPED_EXIT_CODE:
        stopped = replace(attempt, outcome="stopped", reason=ended.reason, is_requeued=True)
        same = [*itertools.takewhile(lambda each: each.reason == ended.reason, reversed(before))]
        if ended.reason in (NOT_BEGUN, GIVEN_BACK) and len(same) >= MAX_IN_VAIN:
            reason = f"{ended.reason}, {len(same) + 1} times: the time limit is too short"
            failed = replace(attempt, outcome="failed", reason=reason)
            return Verdict(attempt=failed, exit_code=1)
        return Verdict(attempt=stopped, exit_code=STOPPED_EXIT_CODE, requeue=True)
    if ended.is_refused:
        refused = replace(attempt, outcome="refused", reason=ended.reason)
        return Verdict(attempt=refused, exit_code=2)
    reason = ended.reason or (
        "it ended with exit code 0, and no record says that it is done"
        if ended.exit_code == 0
        else f"srun ended with exit code {ended.exit_code}"
    )
    failed = replace(attempt, outcome="failed", reason=reason)
    # What SLURM has killed and queued again itself, as a preemption, is no fault of the job's.
    died = [each for each in before if each.is_node_failure and each.is_requeued]
    if ended.dead_nodes and len(died) < MAX_DEAD:
        return Verdict(
            attempt=replace(failed, is_requeued=True, is_node_failure=True),
            exit_code=1,
            requeue=True,
            exclude=ended.dead_nodes,
        )
    return Verdict(attempt=failed, exit_code=1)


def judge(
    allocation: Allocation,
    words: Words,
    attempt: Attempt,
    watched: Watched,
    *,
    was_asked: bool,
) -> Ended:
    """How the ranks ended, by what they left; writes what they could not.

    Args:
        was_asked: a signal has asked the job to stop.
    """
    errors, since_s, code = errors_of(allocation, words), attempt.since_s, watched.exit_code
    failures = read_failures(errors)
    has_stopped = any(errors.glob("*.stopped"))
    # srun may have been told to end as well, and then kills what is still saving.
    is_told = bool(failures or watched.dead)
    if not is_told and ((code == 0 and has_stopped) or (code > 128 and was_asked)):
        code = STOPPED_EXIT_CODE
    swept = read_swept(errors) if words.target == "sweep" else None
    if swept is not None and code in (0, 1):
        return _ended(swept, code)
    ended = Ended(exit_code=code, is_done=_is_done(words, code, since_s))
    if ended.is_done or code == 0:
        return ended
    ended = replace(ended, is_taken_back=scheduler.is_taken_back(allocation.name))
    if code == STOPPED_EXIT_CODE:
        return replace(ended, reason=_why_stopped(words, since_s))
    if code == BAD_USAGE or any(failure.is_bad_usage for failure in failures):
        told = first_failure(failures).message if failures else "what is said above"
        if words.target == "sweep":
            told = "the sweep's options are wrong, as is said above"
        return replace(ended, is_refused=True, reason=told)
    dead: Mapping[str, Sequence[int]] = watched.dead
    if not dead and not ended.is_taken_back:
        dead = dead_nodes(allocation, errors, watched.probes.silent())
    reason, has_row = _write_failures(allocation, words, dead, since_s)
    return replace(ended, dead_nodes=list(dead), reason=reason, has_row=has_row)


def _ended(swept: Swept, code: int) -> Ended:
    """How a sweep ended that has come to its end; it says what became of its cells."""
    told = swept.in_words()
    if swept.is_refused:
        return Ended(exit_code=code, is_refused=True, reason=told)
    if code == 0:
        return Ended(exit_code=code, is_done=True, reason=told)
    return Ended(exit_code=code, reason=f"{told}; the report of the sweep says why")


def _is_done(words: Words, code: int, since_s: float) -> bool:
    """By what the run itself has written, not by an exit code; a sweep tells its end otherwise.

    A record from before is believed where the run has found that it is its own.
    """
    path = None if words.target == "sweep" else _record_path(words)
    if path is None or (code != 0 and path.stat().st_mtime < since_s):
        return False
    return (read_json(path) or {}).get("status") == "ok"


def _record_path(words: Words) -> Path | None:
    """Where the run has said that its record is, or the newest beside it."""
    told = (read_json(words.folder / RUN / PROGRESS_FILE) or {}).get("record")
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


def _write_failures(
    allocation: Allocation, words: Words, dead: Mapping[str, Sequence[int]], since_s: float
) -> tuple[str, bool]:
    """Write the failure of dead nodes' ranks, and what failed first into the record of the run.

    Returns:
        The reason in words, and whether there is such a record: see `write_row`.
    """
    errors = errors_of(allocation, words)
    write_dead(dead, errors)
    failures = read_failures(errors)
    if not failures:
        return "", True
    failure = first_failure(failures)
    reason = f"rank {failure.rank} of {allocation.tasks}: {' '.join(failure.message.split())}"
    if words.target == "sweep":  # its cells have records, it has none
        return reason, True
    path = _record_path(words)
    has_row = path is not None and amend_record(path, failure, since_s=since_s)
    return reason, has_row


def write_row(allocation: Allocation, words: Words, since_s: float) -> None:
    """The record of ranks that have written none: only the recipe can tell what was to run."""
    variables = {
        **os.environ,
        RUN_FOLDER: str(words.folder / RUN),
        "RANK": "0",
        "WORLD_SIZE": str(allocation.tasks),
        "LOCAL_WORLD_SIZE": str(allocation.tasks_per_node[0]),
    }
    here = ("--nodes=1", "--ntasks=1", f"--nodelist={os.environ.get('SLURMD_NODENAME', '')}")
    command = [
        *(("srun", "--overlap", *here, *words.srun) if words.srun else ()),
        *(
            words.python,
            "-m",
            "recipes.service.failure_record",
            words.target.removeprefix("recipes."),
        ),
        *(str(errors_of(allocation, words)), str(since_s), "--", *words.arguments),
    ]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=ROW_S)
    except subprocess.TimeoutExpired:
        say(f"the record could not be written within {ROW_S:.0f} s")
        return
    if done.returncode:
        say(f"the record could not be written: {(done.stderr.strip() or '?').splitlines()[-1]}")


def requeue(allocation: Allocation, words: Words, verdict: Verdict) -> None:
    """Queue this job or task again; where that cannot be, say how to go on."""
    # Said before: what follows ends this process.
    say("asks to be queued again" + "".join(f", without {name}" for name in verdict.exclude))
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # as what is started from here on does, too
    refused = scheduler.requeue(allocation.name, restart=allocation.restart)
    if refused is None:
        if verdict.exclude and (why := scheduler.avoid(allocation.name, verdict.exclude)):
            say(f"queued again, and may start on {', '.join(verdict.exclude)}: {why}")
        return
    write_attempt(words.folder, replace(verdict.attempt, is_requeued=False))
    job_folder = words.folder if allocation.task is None else words.folder.parent
    only = [] if allocation.task is None else [f"--array={allocation.task}"]
    script = job_folder / SCRIPT
    how = (
        shlex.join(["sbatch", *only, str(script)])
        if script.exists()
        else shlex.join(["env", f"{JOB_FOLDER}={job_folder}", "sbatch", *only])
        + " with the same script and options"
    )
    say(f"not queued again ({refused}); go on with: {how}")


def say(line: str) -> None:
    print(line, flush=True)

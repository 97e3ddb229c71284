"""Decides how a job ended, from the files of its ranks, and whether to requeue it."""

import itertools
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm import job_files, scheduler
from slurm.job_files import (
    JOB_END,
    RUN,
    SCRIPT,
    SIGNAL,
    SWEEP_STATE,
    Attempt,
    read_json,
)
from slurm.runtime.allocation import Allocation, JobArgs
from slurm.runtime.node_health import find_dead_nodes, write_node_failures
from slurm.runtime.srun import NO_STEPS, WatchResult, why_no_steps
from unitransformer.launch.failures import (
    BAD_USAGE,
    RankFailure,
    amend_record,
    first_failure,
    read_failures,
)
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import JOB_FOLDER, PROGRESS_FILE, RUN_FOLDER
from unitransformer.record.slurm_job import JobOutcome
from unitransformer.record.units import format_count

# How often a job is requeued: after node failures, after stops in a row that saved nothing, and
# after starts in a row in which SLURM started no step.
MAX_NODE_FAILURES, MAX_EMPTY_STOPS, MAX_WITHOUT_STEPS = 5, 4, 3
WRITE_RECORD_S = 300.0  # timeout

NOT_STARTED = "stopped before training began"
CELL_RELEASED = "stopped, and the current cell was released"

# What the record of a run says whose first rank has lost the connection to an interrupted one.
INTERRUPTED = RankFailure(rank=0, type="Stopped", message=NOT_STARTED, lines=[])

EXIT_CODES = {"done": 0, "failed": 1, "refused": 2, "stopped": STOPPED_EXIT_CODE}


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """How the ranks ended."""

    outcome: JobOutcome
    reason: str = ""
    is_cancelled: bool = False  # by a user; or SLURM has already requeued the job
    dead_nodes: Sequence[str] = ()
    has_record: bool = True  # False: `write_record` must write it


def decide(attempt: Attempt, end: JobEnd, *, before: Sequence[Attempt] = ()) -> Attempt:
    """Returns the attempt with its outcome; `before` (oldest first) limits how often to requeue."""
    decided = replace(attempt, outcome=end.outcome, reason=end.reason)
    if end.is_cancelled:
        return decided
    if end.outcome == "stopped":
        same = itertools.takewhile(lambda past: past.reason == end.reason, reversed(before))
        repeats = len([*same])
        if end.reason in (NOT_STARTED, CELL_RELEASED) and repeats >= MAX_EMPTY_STOPS:
            reason = f"{end.reason}, {repeats + 1} times in a row; give a longer time limit"
            return replace(decided, outcome="failed", reason=reason)
        return replace(decided, is_requeued=True)
    if end.reason.startswith(NO_STEPS):
        return replace(decided, is_requeued=count_without_steps(before) < MAX_WITHOUT_STEPS)
    # Attempts that SLURM killed and requeued itself, as in a preemption, do not count.
    node_failures = [past for past in before if past.is_node_failure and past.is_requeued]
    if end.dead_nodes and len(node_failures) < MAX_NODE_FAILURES:
        return replace(decided, is_requeued=True, is_node_failure=True)
    return decided


def count_without_steps(before: Sequence[Attempt]) -> int:
    """Returns in how many of the last starts, in a row, SLURM started no step."""
    same = itertools.takewhile(lambda past: past.reason.startswith(NO_STEPS), reversed(before))
    return len([*same])


def was_interrupted(
    allocation: Allocation, watched: WatchResult, args: JobArgs, run: Path, *, since_s: float
) -> bool:
    """Returns whether a signal to stop ended the ranks.

    Before training, it is the cause of failures that come after it: a rank without handlers dies,
    and others lose their connection to it. After a failure, srun itself signals the other ranks.
    If SLURM has preempted the job before the ranks were started, srun fails without any.

    Args:
        run: folder of the run.
        since_s: clock time at which the ranks were started.
    """
    failed = _times(args.errors, "*.failure")
    if watched.dead:
        return False
    if not failed:
        if watched.exit_code in (0, BAD_USAGE, STOPPED_EXIT_CODE):
            return watched.exit_code == 0 and any(args.errors.glob("*.stopped"))
        # A preemption signals no batch script. SLURM starts steps until the grace time is over, and
        # none from then until it ends the job, which is up to half a minute later.
        return watched.is_stopped_early or scheduler.is_preempted(allocation.name)
    progress = _times(run, PROGRESS_FILE)
    has_trained = bool(progress) and progress[0] >= since_s
    signaled = _times(args.errors, f"{SIGNAL}*")
    if has_trained or not signaled or min(failed) < min(signaled):
        return False
    if any(failure.is_bad_usage for failure in read_failures(args.errors)):
        return False
    return not find_dead_nodes(allocation, args.errors, watched.probes.silent())


def _times(folder: Path, pattern: str) -> list[float]:
    return [path.stat().st_mtime for path in folder.glob(pattern)]


def find_end(
    allocation: Allocation, args: JobArgs, watched: WatchResult, *, since_s: float, signaled: bool
) -> JobEnd:
    """Returns how the ranks ended. Writes the first failure into the record of the run.

    Files older than `since_s`, the clock time at which the ranks were started, are not theirs.
    `signaled` says whether a signal has asked the job to stop.
    """
    code, failures = watched.exit_code, read_failures(args.errors)
    # A signal may reach srun too, which then kills ranks that are still saving.
    was_killed = code > 128 and signaled and not failures and not watched.dead
    run = args.folder / RUN
    if was_killed or was_interrupted(allocation, watched, args, run, since_s=since_s):
        code = STOPPED_EXIT_CODE
    is_sweep = args.target == "sweep"
    has_to_end = is_sweep and code == STOPPED_EXIT_CODE  # else no cell was left
    if has_to_end and (job_end := read_json(args.errors / JOB_END)):
        end = JobEnd(**job_end)
        if end.outcome == "refused":
            return end
        # SLURM may have declared the node down, and requeued the job, before this process ended.
        is_cancelled = scheduler.is_cancelled_or_requeued(allocation.name)
        return _cancelled(end) if is_cancelled else end
    if is_sweep and code in (0, 1) and (sweep := job_files.read_sweep_end(args.errors)):
        if code == 1 and not sweep.is_refused:
            return JobEnd(outcome="failed", reason=f"{sweep.format()}; see the report of the sweep")
        return JobEnd(outcome="refused" if sweep.is_refused else "done", reason=sweep.format())
    # The record of the run decides, not the exit code. A sweep has none.
    path = None if is_sweep else record_path(run)
    is_new = path is not None and path.stat().st_mtime >= since_s
    record = {} if path is None else read_json(path)
    if record.get("status") == "ok" and (code == 0 or is_new):
        return JobEnd(outcome="done")
    if code == 0:
        return JobEnd(outcome="failed", reason="exit code 0, but no record says that it is done")
    is_cancelled = scheduler.is_cancelled_or_requeued(allocation.name)
    if code == STOPPED_EXIT_CODE:
        if failures and path is not None:  # which follow from the signal
            is_new = is_new and not amend_record(path, INTERRUPTED, since_s=since_s)
        error = (record.get("error") if is_new else None) or {}
        reason = str(error.get("message") or NOT_STARTED)
        if is_sweep:
            finished = read_json(args.errors / SWEEP_STATE).get("finished")
            after = f" after {format_count(finished, 'cell')}" if finished else ""
            reason = CELL_RELEASED.replace(",", f"{after},")
        end = JobEnd(outcome="stopped", reason=reason)
    elif code == BAD_USAGE or any(failure.is_bad_usage for failure in failures):
        reason = first_failure(failures).message if failures else "see the error above"
        if is_sweep:
            reason = "the options of the sweep are invalid; see the error above"
        end = JobEnd(outcome="refused", reason=reason)
    else:
        dead = watched.dead
        if not dead and not is_cancelled:
            dead = find_dead_nodes(allocation, args.errors, watched.probes.silent())
        write_node_failures(dead, args.errors)
        end = JobEnd(outcome="failed", reason=f"srun exited with code {code}", dead_nodes=[*dead])
        if failures := read_failures(args.errors):
            first = first_failure(failures)
            reason = f"rank {first.rank} of {allocation.tasks}: {' '.join(first.message.split())}"
            is_recorded = path is not None and amend_record(path, first, since_s=since_s)
            end = replace(end, reason=reason, has_record=is_recorded or is_sweep)
        elif not is_cancelled:
            end = replace(end, reason=why_no_steps(allocation, args.errors) or end.reason)
    return _cancelled(end) if is_cancelled else end


def _cancelled(end: JobEnd) -> JobEnd:
    """Returns the end of a job that this process must not requeue."""
    reason = f"cancelled, or already requeued by SLURM; {end.reason}"
    return replace(end, outcome="stopped", reason=reason, is_cancelled=True)


def record_path(run: Path) -> Path | None:
    """Returns the path that the run's progress file names, or else the newest record."""
    path = read_json(run / PROGRESS_FILE).get("record")
    return Path(path) if path and Path(path).exists() else job_files.find_record(run)


def write_record(allocation: Allocation, args: JobArgs, run: Path, since_s: float) -> None:
    """Writes the record of ranks that wrote none: the recipe knows what was to run.

    Args:
        run: folder of the run.
    """
    variables = {
        **os.environ,
        RUN_FOLDER: str(run),
        "RANK": "0",
        "WORLD_SIZE": str(allocation.tasks),
        "LOCAL_WORLD_SIZE": str(allocation.tasks_per_node[0]),
    }
    recipe = args.target.removeprefix("recipes.")
    command = [args.python, "-m", "recipes.service.failure_record", recipe]
    command += [str(args.errors), str(since_s), "--", *args.arguments]
    if args.srun:  # as for the ranks, for example in their container
        node = f"--nodelist={os.environ.get('SLURMD_NODENAME', '')}"
        command = ["srun", "--overlap", "--nodes=1", "--ntasks=1", node, *args.srun, *command]
    try:
        writer = subprocess.run(
            command,
            env=variables,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=WRITE_RECORD_S,
        )
    except subprocess.TimeoutExpired:
        print(f"no record: writing it took more than {WRITE_RECORD_S:.0f} s", flush=True)
        return
    if writer.returncode:
        error = (writer.stderr.strip() or "unknown error").splitlines()[-1]
        print(f"no record: {error}", flush=True)


def requeue(
    allocation: Allocation, args: JobArgs, attempt: Attempt, exclude: Sequence[str]
) -> None:
    """Requeues the job without the nodes `exclude`; prints how to continue if SLURM refuses."""
    # Printed first, since requeueing ends this process.
    print(f"requeueing this job{' without ' if exclude else ''}{', '.join(exclude)}", flush=True)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # child processes inherit it
    try:
        scheduler.requeue(allocation.name, restart=allocation.restart)
    except (ValueError, RuntimeError) as error:
        job_files.write_attempt(args.folder, replace(attempt, is_requeued=False))
        command = _continue_command(allocation, args)
        print(f"not requeued ({error}); continue with: {command}", flush=True)
        return
    try:
        if exclude:
            scheduler.exclude_nodes(allocation.name, exclude)
    except (ValueError, RuntimeError) as error:
        print(f"requeued, but possibly on {', '.join(exclude)} again: {error}", flush=True)


def _continue_command(allocation: Allocation, args: JobArgs) -> str:
    folder, command = args.folder, ["sbatch"]
    if allocation.task is not None:
        folder, command = args.folder.parent, ["sbatch", f"--array={allocation.task}"]
    if (folder / SCRIPT).exists():
        return shlex.join([*command, str(folder / SCRIPT)])
    variable = f"{JOB_FOLDER}={folder}"
    return f"{shlex.join(['env', variable, *command])} with the same script and options"

"""Runs one cell of a sweep on all nodes of a job; the sweep starts it in the batch script.

    python -m slurm.runtime.cell --job 7 --devices 8 gpt -- options of the recipe

Exit code: 0 done | 1 failed | 2 refused | 75 the job has to stop, and the cell runs again: a signal
arrived, a node died, or SLURM starts no step; `JOB_END` then says why.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slurm import scheduler
from slurm.job_files import JOB_END, list_attempts, read_json
from slurm.runtime.allocation import Allocation, JobArgs, read_allocation
from slurm.runtime.node_health import (
    find_dead_nodes,
    find_unheard_nodes,
    is_blind,
    list_nodes,
    write_node_failures,
)
from slurm.runtime.outcome import (
    MAX_WITHOUT_STEPS,
    count_without_steps,
    was_interrupted,
    write_record,
)
from slurm.runtime.rank import UNSHARED
from slurm.runtime.srun import WatchResult, signal_step, srun_command, watch, why_no_steps
from unitransformer.cli import fail
from unitransformer.files import write_atomically
from unitransformer.launch.failures import (
    BAD_USAGE,
    RankFailure,
    amend_record,
    first_failure,
    read_failures,
    write_failure,
)
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE
from unitransformer.launch.variables import ERRORS_FOLDER, RUN_FOLDER, SHARED_FILE
from unitransformer.record.slurm_job import JobOutcome

LOG = "log.txt"  # of a cell: the sweep opens it before the ranks start


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the ranks and waits for them; returns the exit code."""
    allocation, args = _read(sys.argv[1:] if argv is None else argv)
    run = Path(os.environ[RUN_FOLDER])
    if job_end := read_json(args.errors.parent / JOB_END):  # for example, a node has died since
        return fail(job_end["reason"], STOPPED_EXIT_CODE)
    shutil.rmtree(args.errors, ignore_errors=True)
    args.errors.mkdir(parents=True)
    since_s = time.time() - 1  # file systems round times
    variables = {
        **os.environ,
        ERRORS_FOLDER: str(args.errors),
        SHARED_FILE: str(run / LOG),
    }
    shape = (
        f"--nodes={allocation.nodes}",
        f"--ntasks={allocation.tasks}",
        f"--ntasks-per-node={allocation.tasks_per_node[0]}",
    )
    caught: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        caught.append(number)
        for srun in started:
            signal_step(allocation, args.errors, "KILL")
            srun.terminate()  # which may still wait for its step

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    srun = subprocess.Popen(srun_command(args, *shape), env=variables)
    started.append(srun)
    if caught:  # while srun was started
        srun.terminate()
    watched = watch(srun, allocation, args.errors, ())
    return _end(allocation, args, watched, run, since_s=since_s, is_stopped=bool(caught))


def _read(argv: Sequence[str]) -> tuple[Allocation, JobArgs]:
    end = argv.index("--")
    parser = argparse.ArgumentParser(prog="python -m slurm.runtime.cell")
    parser.add_argument("recipe")
    parser.add_argument("--job", required=True, help="id for SLURM's commands")
    parser.add_argument("--devices", type=int, required=True, help="ranks per node")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the ranks")
    parser.add_argument("--srun", action="append", default=[], help="a further option of srun")
    given = parser.parse_args(argv[:end])
    # A task of an array has a name of its own: its job id may be that of the whole array.
    array, _, task = given.job.partition("_")
    allocation = read_allocation(os.environ)
    allocation = replace(
        allocation,
        tasks_per_node=(given.devices,) * allocation.nodes,
        array=array if task else None,
        task=task or None,
    )
    run = Path(os.environ[RUN_FOLDER])
    args = JobArgs(
        target=f"recipes.{given.recipe}",
        arguments=argv[end + 1 :],
        folder=run,
        errors=Path(os.environ[ERRORS_FOLDER]) / f"ranks-{run.name}",
        python=given.python,
        srun=given.srun,
        local_disk=None,
    )
    return allocation, args


def _end(
    allocation: Allocation,
    args: JobArgs,
    watched: WatchResult,
    run: Path,
    *,
    since_s: float,
    is_stopped: bool,
) -> int:
    """Returns the exit code. Writes into the record which rank failed first, and where."""
    failures, dead = read_failures(args.errors), watched.dead
    if is_stopped:
        return STOPPED_EXIT_CODE
    if was_interrupted(allocation, watched, args, run, since_s=since_s):
        return STOPPED_EXIT_CODE
    if not failures and not dead and watched.exit_code == 0:
        return 0
    if unshared := [failure for failure in failures if failure.type == UNSHARED]:
        return _end_job(args, unshared[0].message)
    if not dead:
        dead = find_dead_nodes(allocation, args.errors, watched.probes.silent())
    if dead:
        was_done = any(_is_done(path, since_s) for path in run.glob("*.json"))
        write_node_failures(dead, args.errors)
        first = first_failure(sorted(read_failures(args.errors), key=lambda failure: failure.rank))
        reason = f"rank {first.rank} of {allocation.tasks}: {first.message}"
        code = _end_job(args, reason, outcome="failed", dead_nodes=[*dead])
        return 0 if was_done else code
    if not failures:
        refusal = why_no_steps(allocation, args.errors)
        if scheduler.is_cancelled_or_requeued(allocation.name):
            return STOPPED_EXIT_CODE
        if refusal is not None:
            return _end_without_steps(args, refusal)
        unheard = find_unheard_nodes(allocation, args.errors)
        if unheard and is_blind(unheard[0], args.errors):
            reason = (
                f"{unheard[0]} does not see {args.errors}; put the folder of the job on a file "
                "system that all nodes share, with --folder"
            )
            return _end_job(args, reason)
        code = BAD_USAGE if watched.exit_code == BAD_USAGE else 1
        where = f"; no heartbeat has arrived from {', '.join(unheard)}" if unheard else ""
        return fail(f"srun exited with code {watched.exit_code}{where}", code)
    first = _name_node(first_failure(failures), allocation)
    fail(f"rank {first.rank} of {allocation.tasks}: {first.message}", 1)
    if any(failure.is_bad_usage for failure in failures):
        return BAD_USAGE
    write_failure(first, args.errors / f"{first.rank}.failure")
    records = [*run.glob("*.json")]
    if not any(amend_record(path, first, since_s=since_s) for path in records):
        write_record(allocation, args, run, since_s)
    return 1


def _is_done(record: Path, since_s: float) -> bool:
    return record.stat().st_mtime >= since_s and read_json(record).get("status") == "ok"


def _name_node(failure: RankFailure, allocation: Allocation) -> RankFailure:
    index = failure.rank // allocation.tasks_per_node[0]  # ranks are numbered node by node
    node = "".join(list_nodes(allocation)[index : index + 1])  # empty: SLURM does not say
    if node in failure.message:
        return failure
    return replace(failure, message=f"on {node}: {failure.message}")


def _end_without_steps(args: JobArgs, reason: str) -> int:
    """Gives the cell back to the sweep, unless its job has already been requeued often for it."""
    folder = args.errors.parent.parent  # of the job
    before = [past for past in list_attempts(folder) if past.outcome != "running"]
    repeats = count_without_steps(before)
    if repeats >= MAX_WITHOUT_STEPS:
        reason = f"{reason}, {repeats + 1} times in a row"
    code = _end_job(args, reason, outcome="failed")
    return code if repeats < MAX_WITHOUT_STEPS else 1


def _end_job(
    args: JobArgs, reason: str, *, outcome: JobOutcome = "refused", dead_nodes: Sequence[str] = ()
) -> int:
    """Asks the job to end: its nodes are at fault, not the cell."""
    content = {"outcome": outcome, "reason": reason, "dead_nodes": dead_nodes}
    write_atomically(args.errors.parent / JOB_END, json.dumps(content).encode())
    return fail(reason, STOPPED_EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main())

"""Runs inside the batch script: starts the ranks with srun, watches them, and decides what is next.

Exit code: 0 done | 1 failed | 2 refused | 75 stopped by a signal, saved, requeued where possible.
If the node of the batch script dies, this process dies too. SLURM requeues the job after it has
declared the node down: after its SlurmdTimeout, 300 s by default (`scontrol show config`). The next
start then records how the previous one ended.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from slurm import scheduler
from slurm.job_files import RUN, Attempt, first_started_at, list_attempts, write_attempt
from slurm.runtime.allocation import (
    Allocation,
    JobArgs,
    check_shape,
    check_shared,
    check_single_process,
    delete_local_files,
    drop_inherited_array,
    read_allocation,
    read_args,
)
from slurm.runtime.outcome import EXIT_CODES, JobEnd, decide, find_end, requeue, write_record
from slurm.runtime.srun import (
    rank_variables,
    srun_command,
    sweep_command,
    wait_for_sweep,
    watch,
)
from slurm.runtime.times import ask_queued_at, now, write_times
from unitransformer.cli import run_main
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.launch.variables import without_launcher
from unitransformer.record.slurm_job import seconds_of

NUM_TASKS = ("SLURM_NTASKS", "SLURM_NPROCS")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    try:
        allocation = drop_inherited_array(read_allocation(os.environ))
        check_single_process(allocation, os.environ)
        args = read_args(sys.argv[1:] if argv is None else argv, allocation)
        try:
            check_shape(allocation, args)
            if args.shared is not None:
                check_shared(args.shared)
        except ValueError as error:
            refused = replace(_start(allocation), outcome="refused", reason=str(error))
            with contextlib.suppress(OSError):  # this node may not see the folder either
                args.folder.mkdir(exist_ok=True)
                write_attempt(args.folder, replace(refused, ended_at=now()))
            raise
        return run_job(allocation, args)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _start(allocation: Allocation) -> Attempt:
    return Attempt(
        job=allocation.job,
        array=allocation.array,
        restart=allocation.restart,
        nodes=allocation.node_list,
        started_at=now(),
        queued_at=ask_queued_at(allocation.name),
    )


def run_job(allocation: Allocation, args: JobArgs) -> int:
    """Starts the ranks, waits, and records the outcome; returns the exit code."""
    # For the whole life of this process: requeueing sends another signal, and work remains.
    caught: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: caught.append(received))
    args.folder.mkdir(parents=True, exist_ok=True)
    attempt = _start(allocation)
    before = [
        _close_if_lost(past, allocation, args, ended_at=attempt.queued_at)
        for past in list_attempts(args.folder)
    ]
    attempt = _queued_after(before, attempt)
    write_attempt(args.folder, attempt)
    write_times(allocation, args)
    end = _run_ranks(allocation, args, attempt, caught)
    decided = replace(decide(attempt, end, before=before), ended_at=now())
    write_attempt(args.folder, decided)
    print(f"{decided.outcome}: {decided.reason or args.folder}", flush=True)
    if not end.has_record:
        write_record(allocation, args, args.folder / RUN, attempt.since_s)
    write_times(allocation, args)
    if args.local_disk is not None:
        delete_local_files(allocation, args.local_disk, dead_nodes=end.dead_nodes)
    if decided.is_requeued:
        requeue(allocation, args, decided, end.dead_nodes)
    return EXIT_CODES[decided.outcome]


def _close_if_lost(
    attempt: Attempt, allocation: Allocation, args: JobArgs, *, ended_at: str | None = None
) -> Attempt:
    """Records the outcome of an earlier start that died with its node or was killed by SLURM.

    Args:
        ended_at: when SLURM queued the job again, which is the latest that the start can have run.
    """
    if attempt.job != allocation.job or attempt.outcome != "running":
        return attempt
    down = scheduler.down_nodes(scheduler.expand_nodes(attempt.nodes))
    reason = f"{', '.join(down)} stopped responding" if down else "killed before it could report"
    lost = replace(
        attempt,
        outcome="failed",
        reason=reason,
        ended_at=ended_at,
        is_requeued=True,
        is_node_failure=bool(down),
    )
    write_attempt(args.folder, lost)
    print(f"start {attempt.restart + 1}: {reason}", flush=True)
    return lost


def _queued_after(before: Sequence[Attempt], attempt: Attempt) -> Attempt:
    """Returns the attempt, queued no earlier than the last start of its job ended.

    SLURM 22.05 keeps the time of the submission if the job is requeued while a node is dead.
    """
    ends = [past.ended_at for past in before if past.job == attempt.job and past.ended_at]
    if attempt.queued_at is None or not ends:
        return attempt
    return replace(attempt, queued_at=max(attempt.queued_at, *ends, key=seconds_of))


def _run_ranks(
    allocation: Allocation, args: JobArgs, attempt: Attempt, caught: Sequence[int]
) -> JobEnd:
    args.errors.mkdir(exist_ok=True)
    for old in args.errors.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    # sbatch may have been called inside another job, whose variables name other ranks.
    variables = without_launcher(os.environ) | rank_variables(args, allocation.name)
    if args.target == "sweep":
        folder = args.folder if allocation.task is None else args.folder.parent
        first = first_started_at(folder)
        command = sweep_command(args, nodes=allocation.nodes, first_started_at=first)
    else:
        command = srun_command(args)
    starts_ranks_itself = args.target == "sweep" and allocation.nodes > 1
    if starts_ranks_itself:
        for name in NUM_TASKS:  # the sweep plans as one process
            variables.pop(name, None)
    process = subprocess.Popen(command, env=variables)
    if starts_ranks_itself:
        watched = wait_for_sweep(process, caught)
    else:
        watched = watch(process, allocation, args.errors, caught)
    return find_end(allocation, args, watched, since_s=attempt.since_s, signaled=bool(caught))


if __name__ == "__main__":
    sys.exit(run_main(main))

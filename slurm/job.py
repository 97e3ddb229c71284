"""Runs inside the batch script: starts the ranks with srun, watches them, and decides what is next.

Exit code: 0 done | 1 failed | 2 refused | 75 stopped by a signal, saved, requeued where possible.
If the node of the batch script dies, this process dies too. SLURM requeues the job after it has
declared the node down: after its SlurmdTimeout, 300 s by default (`scontrol show config`). The next
start then records how the previous one ended.
"""

import datetime
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
from unitransformer.cli import run_main
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.launch.variables import without_launcher

NUM_TASKS = ("SLURM_NTASKS", "SLURM_NPROCS")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code."""
    try:
        allocation = drop_inherited_array(read_allocation(os.environ))
        check_single_process(allocation, os.environ)
        args = read_args(sys.argv[1:] if argv is None else argv, allocation)
        check_shape(allocation, args)
        if args.shared is not None:
            check_shared(args.shared)
        return run_job(allocation, args)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def run_job(allocation: Allocation, args: JobArgs) -> int:
    """Starts the ranks, waits, and records the outcome; returns the exit code."""
    args.folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(
        job=allocation.job,
        array=allocation.array,
        restart=allocation.restart,
        nodes=allocation.node_list,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
    )
    before = [_close_if_lost(past, allocation, args) for past in list_attempts(args.folder)]
    write_attempt(args.folder, attempt)
    # For the whole life of this process: requeueing sends another signal, and work remains.
    caught: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: caught.append(received))
    end = _run_ranks(allocation, args, attempt, caught)
    decided = decide(attempt, end, before=before)
    write_attempt(args.folder, decided)
    print(f"{decided.outcome}: {decided.reason or args.folder}", flush=True)
    if not end.has_record:
        write_record(allocation, args, args.folder / RUN, attempt.since_s)
    if args.local_disk is not None:
        delete_local_files(allocation, args.local_disk, dead_nodes=end.dead_nodes)
    if decided.is_requeued:
        requeue(allocation, args, decided, end.dead_nodes)
    return EXIT_CODES[decided.outcome]


def _close_if_lost(attempt: Attempt, allocation: Allocation, args: JobArgs) -> Attempt:
    """Records the outcome of an earlier start that died with its node or was killed by SLURM."""
    if attempt.job != allocation.job or attempt.outcome != "running":
        return attempt
    down = scheduler.down_nodes(scheduler.expand_nodes(attempt.nodes))
    reason = f"{', '.join(down)} stopped responding" if down else "killed before it could report"
    lost = replace(
        attempt, outcome="failed", reason=reason, is_requeued=True, is_node_failure=bool(down)
    )
    write_attempt(args.folder, lost)
    print(f"start {attempt.restart + 1}: {reason}", flush=True)
    return lost


def _run_ranks(
    allocation: Allocation, args: JobArgs, attempt: Attempt, caught: Sequence[int]
) -> JobEnd:
    args.errors.mkdir(exist_ok=True)
    for old in args.errors.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    # sbatch may have been called inside another job, whose variables name other ranks.
    variables = without_launcher(os.environ) | rank_variables(args, allocation.name)
    if args.target != "sweep":
        srun = subprocess.Popen(srun_command(args), env=variables)
        watched = watch(srun, allocation, args.errors, caught)
        return find_end(allocation, args, watched, since_s=attempt.since_s, signaled=bool(caught))
    started_at = first_started_at(args.folder if allocation.task is None else args.folder.parent)
    command = sweep_command(args, nodes=allocation.nodes, first_started_at=started_at)
    if allocation.nodes > 1:
        for name in NUM_TASKS:  # the sweep plans as one process
            variables.pop(name, None)
        watched = wait_for_sweep(subprocess.Popen(command, env=variables), caught)
    else:
        watched = watch(subprocess.Popen(command, env=variables), allocation, args.errors, caught)
    return find_end(allocation, args, watched, since_s=attempt.since_s, signaled=bool(caught))


if __name__ == "__main__":
    sys.exit(run_main(main))

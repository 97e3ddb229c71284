"""Starts the ranks of a job with srun and watches them until the last one has ended."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import scheduler
from slurm.job_files import RUN, STEP, SWEEP_STATE
from slurm.runtime.allocation import Allocation, JobArgs, flags_of
from slurm.runtime.node_health import Heartbeats, Probes, find_dead_nodes, list_nodes
from unitransformer.files import read_if_there
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.launch.variables import (
    ERRORS_FOLDER,
    LOCAL_DISK,
    RANKS_COMMAND,
    RUN_FOLDER,
    SWEEP_FILE,
)

POLL_S = 0.5
GRACE_S = 3.0  # from the first failure until the other ranks are killed
KILL_S = 4.0  # from then until srun itself is killed
TRY_S = 10.0  # timeout of a trivial step
REFUSED_STEP = re.compile(r"Unable to create step for job \S+: (.+)")
NO_STEPS = "SLURM starts no step"  # begins the reason


@dataclass(frozen=True, kw_only=True)
class WatchResult:
    """What happened until srun ended."""

    exit_code: int  # of srun
    probes: Probes  # started when a rank failed
    dead: Mapping[str, Sequence[int]]  # nodes that died before any failure, with their ranks

    @property
    def is_stopped_early(self) -> bool:
        """Whether a signal to stop ended a rank that had not yet installed its handlers.

        A preemption signals the ranks and not the batch script. srun then returns 128 + signal.
        """
        return self.exit_code - 128 in STOP_SIGNALS


def srun_command(args: JobArgs, *options: str) -> list[str]:
    """Returns the command that starts the ranks, with further options of srun."""
    srun = ["srun", "--kill-on-bad-exit=1", "--distribution=block", *args.srun, *options]
    is_open = not flags_of(args.arguments) & {"--resume", "--no-checkpoint"}
    resume = ["--resume", "auto"] if is_open else []
    return [*srun, *_wrapped(args, [args.target, *args.arguments, *resume])]


def sweep_command(args: JobArgs, *, nodes: int, first_started_at: str) -> list[str]:
    """Returns the command of the one process of a sweep.

    In a job of several nodes it runs in the batch script, and starts the ranks of a cell itself.
    """
    flags = flags_of(args.arguments)
    command = ["scaling", "sweep", *args.arguments]
    if not flags & {"--max-cells", "--find-max-batch"}:  # a search needs several cells
        command += ["--max-cells", "1"]
    if "--retry" in flags and "--retry-before" not in flags:
        # Do not retry what an earlier task or start has already retried.
        command += ["--retry-before", first_started_at]
    if nodes > 1:
        return [sys.executable, "-m", *command]
    srun = ["srun", "--kill-on-bad-exit=1", "--distribution=block", *args.srun]
    srun += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    return [*srun, *_wrapped(args, command)]


def _wrapped(args: JobArgs, command: Sequence[str]) -> list[str]:
    return [args.python, "-m", "slurm.runtime.rank", args.python, "-m", *command]


def rank_variables(args: JobArgs, name: str) -> dict[str, str]:
    """Returns the environment variables that ranks need in addition to SLURM's.

    Args:
        name: of the job, for SLURM's commands.
    """
    variables = {ERRORS_FOLDER: str(args.errors), "PYTHONUNBUFFERED": "1"}
    if args.target == "sweep":
        variables[SWEEP_FILE] = str(args.errors / SWEEP_STATE)
        ranks = [sys.executable, "-m", "slurm.runtime.cell", f"--job={name}"]
        ranks += [f"--python={args.python}", *(f"--srun={option}" for option in args.srun)]
        variables[RANKS_COMMAND] = json.dumps(ranks)
    else:
        variables[RUN_FOLDER] = str(args.folder / RUN)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        variables["SRUN_CPUS_PER_TASK"] = cpus  # srun does not inherit it from sbatch
    if args.local_disk is not None:
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(args.local_disk / "inductor"),
            "TRITON_CACHE_DIR": str(args.local_disk / "triton"),
            LOCAL_DISK: str(args.local_disk),
        }
    return variables


def watch(
    srun: "subprocess.Popen[bytes]", allocation: Allocation, errors: Path, caught: Sequence[int]
) -> WatchResult:
    """Waits for srun, and kills what remains after a rank has failed or a node has died.

    `caught` grows when this process receives a signal, which is then sent to the ranks.
    """
    nodes = list_nodes(allocation) if allocation.nodes > 1 else []
    heartbeats = Heartbeats(folder=errors, nodes=nodes)
    num_forwarded, failed_at_s = 0, math.inf
    failure_probes, suspect_probes = Probes(), Probes()
    dead: dict[str, list[int]] = {}
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(POLL_S)
            if code and failed_at_s == math.inf:
                failure_probes.ask(nodes)
            code = code if code >= 0 else 128 - code
            return WatchResult(exit_code=code, probes=failure_probes, dead=dead)
        if len(caught) > num_forwarded:
            num_forwarded = len(caught)
            # SLURM does not send every signal to the ranks; a second one does no harm.
            signal_step(allocation, errors, "USR1")
        if failed_at_s == math.inf and any(errors.glob("*.failure")):
            failed_at_s = time.monotonic()
            failure_probes.ask(nodes)
        suspects = heartbeats.suspects()
        if failed_at_s == math.inf and (suspects or suspect_probes.asked):
            suspect_probes.ask([*suspects, *nodes[:1]])  # the first is this node, as a control
            if suspect_probes.are_over():
                dead = find_dead_nodes(allocation, errors, suspect_probes.silent())
                failed_at_s = -math.inf if dead else math.inf
                heartbeats.forget(list(suspect_probes.asked))
                suspect_probes = Probes()
        if time.monotonic() > failed_at_s + GRACE_S:
            signal_step(allocation, errors, "KILL")
            try:
                srun.wait(POLL_S if dead else KILL_S)
            except subprocess.TimeoutExpired:
                srun.kill()


def wait_for_sweep(process: "subprocess.Popen[bytes]", caught: Sequence[int]) -> WatchResult:
    """Waits for a sweep in the batch script, and sends it the first signal that arrives here.

    `caught` grows when this process receives a signal.
    """
    is_forwarded = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_S)
            code = code if code >= 0 else 128 - code
            return WatchResult(exit_code=code, probes=Probes(), dead={})
        if caught and not is_forwarded:
            is_forwarded = True
            process.send_signal(caught[0])


def why_no_steps(allocation: Allocation, errors: Path) -> str | None:
    """Returns SLURM's reason if the job has started no rank and starts no trivial step either.

    A reason means that the allocation is at fault, not the ranks. SLURM 22.05 forgets the GPUs of a
    job that was requeued while one of its nodes was dead (findings/slurm_requeue_loses_gpus.sh).
    """
    if (errors / STEP).exists():
        return None
    shape = (f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1")
    with contextlib.suppress(ValueError, RuntimeError):
        step = ("srun", "--overlap", "--chdir=/", *shape, "true")
        if refused := REFUSED_STEP.search(scheduler.call(*step, timeout_s=TRY_S).stderr):
            where = f"in job {allocation.name} on {allocation.node_list}"
            return f"{NO_STEPS} {where}: {refused[1]}"
    return None


def signal_step(allocation: Allocation, errors: Path, name: str) -> None:
    """Signals all ranks, without waiting: scancel itself waits for dead nodes."""
    step = f"{allocation.name}.{read_if_there(errors / STEP) or 0}"
    subprocess.Popen(["scancel", f"--signal={name}", step], stderr=subprocess.DEVNULL)

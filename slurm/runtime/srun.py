"""Starts the ranks of a job and watches them until the last has ended."""

import contextlib
import math
import os
import subprocess
import time
from pathlib import Path

from slurm import scheduler
from slurm.job_files import FILE, RUN
from slurm.runtime.allocation import Allocation, Words, errors_of, own_folder
from slurm.runtime.heartbeat import Heartbeats
from slurm.runtime.node_probes import Probes, dead_nodes
from slurm.runtime.outcome import Watched
from unitransformer.launch.variables import ERRORS_FOLDER, LOCAL_DISK, RUN_FOLDER, SWEEP_FILE

POLL_S = 0.5
GRACE_S = 3.0  # from the first rank's failure until the others are killed
PATIENCE_S = 4.0  # from that until srun itself is


def command_of(words: Words, began_at: str) -> list[str]:
    """What starts the ranks, or the one process of a sweep.

    Args:
        began_at: when the job, or the first task of its array, was started for the first time.
    """
    srun = ["srun", "--kill-on-bad-exit=1", "--distribution=block", *words.srun]
    if words.target == "sweep":
        srun += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
        own = ["scaling", "sweep", *words.arguments]
        given = {word.partition("=")[0] for word in words.arguments}
        if not given & {"--max-cells", "--find-max-batch"}:  # a search goes cell after cell
            own += ["--max-cells", "1"]
        if "--retry" in given and "--retry-before" not in given:
            # What an earlier task or start has tried again is not tried once more.
            own += ["--retry-before", began_at]
    else:
        own = [words.target, *words.arguments]
        if not any(word.partition("=")[0] == "--resume" for word in words.arguments):
            own += ["--resume", "auto"]
    return [*srun, words.python, "-m", "slurm.runtime.rank", words.python, "-m", *own]


def variables_of(allocation: Allocation, words: Words) -> dict[str, str]:
    """What ranks are told beside what SLURM tells them."""
    variables = {ERRORS_FOLDER: str(errors_of(allocation, words)), "PYTHONUNBUFFERED": "1"}
    if words.target == "sweep":
        variables[SWEEP_FILE] = str(errors_of(allocation, words) / FILE)
    else:
        variables[RUN_FOLDER] = str(words.folder / RUN)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        variables["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it from sbatch
    if words.local_disk is not None:
        place = own_folder(allocation, words.local_disk)
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "TRITON_CACHE_DIR": str(place / "triton"),
            LOCAL_DISK: str(place),
        }
    return variables


def watch(
    srun: "subprocess.Popen[bytes]", allocation: Allocation, errors: Path, caught: list[int]
) -> Watched:
    """Wait for srun; hand on what only this process was sent; kill what a failed rank or a dead
    node leaves."""
    step = f"{allocation.name}.0"
    names = scheduler.names_of(allocation.node_list) if allocation.nodes > 1 else []
    heartbeats = Heartbeats(folder=errors, nodes=names)
    num_handed_on, failed_at_s = 0, math.inf
    probes, doubts = Probes(), Probes()
    dead: dict[str, list[int]] = {}
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(POLL_S)
            if code and failed_at_s == math.inf:
                probes.ask(names)
            return Watched(exit_code=code if code >= 0 else 128 - code, probes=probes, dead=dead)
        if len(caught) > num_handed_on:
            num_handed_on = len(caught)
            # Not every signal to a job reaches its ranks; twice is as good as once.
            _signal(step, "USR1")
        if failed_at_s == math.inf and any(errors.glob("*.failure")):
            failed_at_s = time.monotonic()
            probes.ask(names)
        suspects = heartbeats.suspects()
        if failed_at_s == math.inf and (suspects or doubts.asked):
            doubts.ask([*suspects, *names[:1]])  # the first is this one
            if doubts.are_over():
                dead = dead_nodes(allocation, errors, doubts.silent())
                failed_at_s = -math.inf if dead else math.inf
                heartbeats.clear(list(doubts.asked))
                doubts = Probes()
        if time.monotonic() > failed_at_s + GRACE_S:
            _signal(step, "KILL")
            try:
                srun.wait(POLL_S if dead else PATIENCE_S)
            except subprocess.TimeoutExpired:
                srun.kill()  # its node is gone


def _signal(step: str, name: str) -> None:
    """To all ranks; not waited for, as scancel waits for nodes that are dead."""
    subprocess.Popen(["scancel", f"--signal={name}", step], stderr=subprocess.DEVNULL)

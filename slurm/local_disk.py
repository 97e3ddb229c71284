"""What a job has on its nodes' own disks: compile caches, and checkpoints that pass by."""

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slurm.allocation import Allocation

CLEAN_S = 20.0


def own_folder(allocation: Allocation, local_disk: Path) -> Path:
    """Of this job alone: what is left of another cannot be taken for its own."""
    return local_disk / f"unitransformer-{allocation.job}"


def clean(allocation: Allocation, local_disk: Path, *, dead_nodes: Sequence[str]) -> None:
    """Remove it on every node that still answers: a job that is queued again may start on others,
    and nobody comes back to these."""
    nodes = allocation.nodes - len(dead_nodes)
    if nodes < 1:
        return
    each = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    if dead_nodes:
        each.append(f"--exclude={','.join(dead_nodes)}")
    place = own_folder(allocation, local_disk)
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["srun", "--overlap", *each, "rm", "-rf", place], timeout=CLEAN_S)

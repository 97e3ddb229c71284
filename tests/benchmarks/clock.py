"""The clock of the benchmarks, and what it stands on."""

import time
from pathlib import Path

import torch

from unitransformer.machine.host import Machine, describe_machine

PACKAGES = ("torch", "lightning", "deepspeed")


def now_s() -> float:
    """A monotonic clock that waits for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> Machine:
    """This one, without asking CUDA: ranks are forked from this process later, which CUDA does not
    survive.
    """
    about = Path("/proc/driver/nvidia/gpus").glob("*/information")
    models = [path.read_text().partition("\n")[0].partition(":")[2].strip() for path in about]
    return describe_machine(sorted(models))

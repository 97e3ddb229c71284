"""The clock of the benchmarks, and a description of the machine that they run on."""

import time
from pathlib import Path

import torch

from unitransformer.machine.host import Machine, describe_machine

PACKAGES = ("torch", "lightning", "deepspeed")


def now_s() -> float:
    """Seconds of a monotonic clock, read after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> Machine:
    """This machine, described without initializing CUDA, which would break later forks."""
    about = Path("/proc/driver/nvidia/gpus").glob("*/information")
    models = [path.read_text().partition("\n")[0].partition(":")[2].strip() for path in about]
    return describe_machine(sorted(models))

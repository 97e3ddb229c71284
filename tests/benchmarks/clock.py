"""The clock of the benchmarks, and what it stands on."""

import time
from typing import Any

import torch

from unitransformer.hardware import describe_host

PACKAGES = ("torch", "lightning", "deepspeed")


def now_s() -> float:
    """A monotonic clock that waits for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> dict[str, Any]:
    """What times depend on: GPU, processor, cores, threads."""
    host = describe_host()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "processor": host["cpu"],
        "cores": host["cpu_cores"],
        "threads": torch.get_num_threads(),
    }

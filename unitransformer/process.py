"""This process: which device and rank it has, and what it needs before its first tensor."""

import os
from typing import Literal

import torch

from unitransformer.config import ParallelConfig
from unitransformer.hardware import available_cores


def count_gpus() -> int:
    """GPUs this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def find_device(parallel: ParallelConfig) -> Literal["cpu", "cuda"]:
    """ "cuda" or "cpu" for `parallel`, checked against this machine.

    Raises:
        ValueError: more GPUs than there are, or a precision the device does not have.
    """
    found = count_gpus()
    is_cuda = parallel.accelerator == "cuda" or (parallel.accelerator == "auto" and found > 0)
    device: Literal["cpu", "cuda"] = "cuda" if is_cuda else "cpu"
    if is_cuda and parallel.devices > found:
        cure = f"use --devices {found}" if found else "use --accelerator cpu"
        raise ValueError(f"devices is {parallel.devices} and this machine has {found} GPUs; {cure}")
    check_precision(parallel, device)
    return device


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 by itself: not a V100 or T4, which emulate it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def check_precision(parallel: ParallelConfig, device: str) -> None:
    """Raises ValueError for a precision that `device` would replace or emulate."""
    if device == "cpu" and parallel.precision == "16-mixed":
        raise ValueError("precision 16-mixed is not for a CPU; use bf16-mixed or 32-true")
    if device == "cuda" and parallel.precision.startswith("bf16") and not has_bf16():
        name = torch.cuda.get_device_name()
        raise ValueError(f"precision {parallel.precision}: {name} has none; use 16-mixed")


def set_up_process(parallel: ParallelConfig, device: str) -> None:
    """What each rank needs before its first tensor."""
    # Saturated softmaxes fill gradients with denormal floats, which a CPU multiplies slowly.
    torch.set_flush_denormal(True)
    if device == "cpu":
        share = max(1, available_cores() // parallel.devices)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    else:
        torch.set_float32_matmul_precision("highest")  # 32-true means float32, not TF32


def process_rank(parallel: ParallelConfig) -> int:
    """Rank of this process over all nodes, in its launcher's words; 0 if it was started by hand."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    # A batch job's shell has a SLURM_PROCID too, which ranks that Lightning starts inherit.
    if "LOCAL_RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_PROCID"])
    node, local = (int(os.environ.get(name, 0)) for name in ("NODE_RANK", "LOCAL_RANK"))
    return node * parallel.devices + local

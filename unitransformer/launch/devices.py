"""Chooses the device and strategy of a run, and checks them against this machine."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.memory import choose_strategy
from unitransformer.launch.environment import TORCHRUN_MARK, check_launched, launched_shape
from unitransformer.machine.host import available_cores, driver_versions, memory_bytes

# Oldest NVIDIA driver of a CUDA version, and a wheel of torch that is built for it. Source:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {13: (580, "cu130"), 12: (525, "cu126")}
WHEELS = "https://download.pytorch.org/whl"

# Options of glibc's mallopt (malloc.h), and the variables by which a user sets the same.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A config whose device and strategy are decided and checked against this machine."""

    config: RunConfig
    strategy_reason: str


def resolve(config: RunConfig) -> ResolvedConfig:
    """Decides device and strategy; raises ValueError for what this machine lacks."""
    device = choose_device(config.parallel)
    choose_num_threads(config.parallel, device)  # refuses a wrong OMP_NUM_THREADS now
    config = replace(config, parallel=replace(config.parallel, accelerator=device))
    config, reason = choose_strategy(config, device_memory_bytes(config.parallel, device))
    return ResolvedConfig(config=config, strategy_reason=reason)


def count_gpus() -> int:
    """Returns the number of GPUs this process can use.

    Initializes the driver, after which a forked process cannot use it: not for runs on a CPU.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_software() -> dict[str, str]:
    """Returns the versions of CUDA or HIP and of NCCL; empty where torch is built for CPUs only."""
    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    versions = {name: version for name, version in built.items() if version is not None}
    if count_gpus():
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        versions["NCCL"] = ".".join(map(str, nccl))
    return versions


def choose_device(parallel: ParallelConfig) -> Literal["cpu", "cuda"]:
    """Returns the device type of `parallel`.

    Raises ValueError for too few GPUs or GPUs that torch cannot use, a precision that the device
    lacks, or missing DeepSpeed.
    """
    is_cuda, num_gpus = False, 0
    if parallel.accelerator != "cpu":
        num_gpus = count_gpus()
        if num_gpus == 0:
            check_driver()
        is_cuda = parallel.accelerator == "cuda" or num_gpus > 0
    check_launched(parallel)
    device: Literal["cpu", "cuda"] = "cuda" if is_cuda else "cpu"
    if is_cuda and parallel.devices > num_gpus:
        fix = f"use --devices {num_gpus}" if num_gpus else "use --accelerator cpu"
        if num_gpus and launched_shape() is not None:
            fix = (
                f"let each rank see all GPUs of its node (srun --gpus-per-node={parallel.devices} "
                f"--gpu-bind=none), or start {num_gpus} per node"
            )
            raise ValueError(
                f"the launcher has started {parallel.devices} ranks on this node, and this rank "
                f"sees {num_gpus} of its GPUs; {fix}"
            )
        raise ValueError(
            f"devices is {parallel.devices} and this machine has {num_gpus} GPUs; {fix}"
        )
    if is_cuda:
        check_kernels(parallel.devices)
    check_precision(parallel, device)
    if parallel.cpu_offload and device == "cpu":
        raise ValueError("cpu-offload is for GPUs: on a CPU everything is in host memory already")
    if parallel.uses_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"strategy {parallel.strategy} needs DeepSpeed, which is not installed: "
            "pip install 'deepspeed>=0.19', or choose fsdp"
        )
    return device


def check_driver() -> None:
    """Raises ValueError, where torch finds no GPU, if this machine has an NVIDIA driver."""
    driver = driver_versions().get("nvidia driver")
    if driver is None:
        return
    visible, cuda = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.version.cuda
    installed = int(driver.split(".")[0])
    needed, _ = DRIVERS.get(int((cuda or "0").split(".")[0]), (0, ""))
    wheel = next((name for least, name in DRIVERS.values() if installed >= least), None)
    fix = f"pip install --force-reinstall torch torchvision --index-url {WHEELS}/{wheel}"
    if wheel is None:
        fix = f"update the driver to {min(least for least, _ in DRIVERS.values())} or newer"
    if cuda is None:
        why = "for ROCm" if torch.version.hip else "without CUDA"
        why = f"is built {why}; {fix}"
    elif installed < needed:
        why = f"is built for CUDA {cuda}, which needs driver {needed} or newer; {fix}"
    elif visible is not None:
        why = f"finds no GPU, and CUDA_VISIBLE_DEVICES is {visible!r}; unset it"
    else:
        why = "finds no GPU; see what nvidia-smi says, and give a container its GPUs"
    raise ValueError(
        f"this machine has NVIDIA driver {driver}, but torch {torch.__version__} {why}, or use "
        "--accelerator cpu"
    )


def check_kernels(num_gpus: int) -> None:
    """Raises ValueError for the first GPU for which this build of torch has no kernels.

    Kernels run on later GPUs of the same major version, and PTX (`compute_`) on all later ones.
    Source: https://docs.nvidia.com/cuda/blackwell-compatibility-guide
    """
    built = torch.cuda.get_arch_list()
    if torch.version.hip is not None or not built:
        return
    for index in range(num_gpus):
        capability = torch.cuda.get_device_capability(index)
        for architecture in built:
            kind, _, number = architecture.partition("_")
            code = divmod(int(number.rstrip("af")), 10)
            if code <= capability and (kind == "compute" or code[0] == capability[0]):
                break
        else:
            name, number = torch.cuda.get_device_name(index), "".join(map(str, capability))
            raise ValueError(
                f"{name} is of architecture sm_{number}, and torch {torch.__version__} has kernels "
                f"for {' '.join(built)} only; install torch for another CUDA version "
                f"(sm_70: from {WHEELS}/cu126), or use --accelerator cpu"
            )


def device_memory_bytes(parallel: ParallelConfig, device: str) -> int | None:
    """Returns the memory of one GPU, or a CPU rank's share of the host's; None if unknown."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    memory = memory_bytes()
    return memory and memory // parallel.devices


def has_bf16() -> bool:
    """Whether the GPU has bf16 arithmetic; a V100 or T4 only emulates it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_float16() -> bool:
    """Whether the CPU has float16 arithmetic (AVX512-FP16). DeepSpeed makes the same check."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def check_precision(parallel: ParallelConfig, device: str) -> None:
    """Raises ValueError for a precision that `device` would replace, emulate or refuse."""
    is_zero_in_float16 = parallel.uses_deepspeed and parallel.precision == "16-mixed"
    if device == "cpu" and is_zero_in_float16 and not has_float16():
        raise ValueError(
            f"precision 16-mixed is not for strategy {parallel.strategy} on this CPU: DeepSpeed "
            "needs float16 arithmetic (AVX512-FP16); use bf16-mixed, or strategy ddp or fsdp1"
        )
    if device == "cuda" and parallel.precision.startswith("bf16") and not has_bf16():
        name = torch.cuda.get_device_name()
        raise ValueError(f"precision {parallel.precision}: {name} has no bf16; use 16-mixed")


def set_up_process(parallel: ParallelConfig, device: str) -> None:
    """Sets torch's global switches; each rank calls this before it creates a tensor."""
    # Saturated softmaxes fill gradients with denormal floats, which a CPU multiplies slowly.
    can_flush = torch.set_flush_denormal(True)
    torch.set_num_threads(choose_num_threads(parallel, device))
    if device != "cpu":
        torch.set_float32_matmul_precision("highest")  # 32-true means float32, not TF32
        return
    if can_flush and keeps_denormals():
        _flush_denormals_in_pool()
        if keeps_denormals():
            warnings.warn(
                "threads that were started before this run keep denormal floats: steps may take "
                "several times longer, and losses differ; run in a new process or a new kernel",
                stacklevel=3,  # where `run` is called
            )


def keep_freed_memory(device: str) -> None:
    """Makes glibc reuse the memory of freed tensors on a CPU, instead of returning it.

    By default it returns tensors above 32 MiB to the system, and the next step waits while the
    system maps and clears their pages again. Changes nothing where the user has set one of
    `MALLOC_VARIABLES`, for tensors above 1 GiB, and with other libraries than glibc.
    """
    if device != "cpu" or any(name in os.environ for name in MALLOC_VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, 2**30):  # 0: an old glibc allows less
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the largest int


def choose_num_threads(parallel: ParallelConfig, device: str) -> int:
    """Returns OMP_NUM_THREADS, or this rank's share of the cores; raises ValueError for no number.

    On GPUs the optimizer of `cpu_offload` uses the threads, and every launcher gives the same
    number: torchrun sets 1 where the user has set nothing, and srun may bind each rank to its
    cores. On a CPU the number stays as it is, since losses depend on it.
    """
    cores, chosen = available_cores(), _given_threads()
    share = max(1, cores // parallel.devices)
    if device == "cuda" and TORCHRUN_MARK in os.environ:
        chosen = None if chosen == 1 else chosen
    elif device == "cuda" and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        share = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", share)))
    return chosen or share


def _given_threads() -> int | None:
    """Returns OMP_NUM_THREADS; of one number for each level of nesting, the first."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    first = text.partition(",")[0].strip()
    if text and not (first.isdecimal() and int(first) > 0):
        raise ValueError(f"OMP_NUM_THREADS is {text!r}; set it to a number above 0, or unset it")
    return int(first) if first else None


def keeps_denormals() -> bool:
    """Whether some thread of torch's pool does not flush denormal floats to zero."""
    share = 2**16  # floats for each thread; torch divides no fewer than 2**15
    bits = torch.ones(share * torch.get_num_threads(), dtype=torch.int32)
    return bool((bits.view(torch.float32) * 1.0).view(torch.int32).any())


def _flush_denormals_in_pool() -> None:
    """Sets the switch in pool threads that exist already: only new ones inherit it."""
    set_switch = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: torch.set_flush_denormal(True))
    with contextlib.suppress(OSError, AttributeError):  # a system without /proc, another pool
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
        mapped = {line.split()[-1] for line in maps.splitlines()}
        for library in (path for path in mapped if "omp" in Path(path).name):
            # Calls a function in every thread of an OpenMP pool, as compiled code does.
            ctypes.CDLL(library).GOMP_parallel(set_switch, None, torch.get_num_threads(), 0)

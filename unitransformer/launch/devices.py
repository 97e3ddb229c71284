"""This process: which device and rank it has, and what it needs before its first tensor."""

import datetime
import importlib.util
import os
import shlex
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch._C._distributed_c10d import TCPStore

from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.memory import choose_strategy
from unitransformer.launch.environment import check_launched, launched_shape, process_rank
from unitransformer.machine.host import available_cores, memory_bytes

TORCHRUN_PORT = 29_500  # torch's default

FOLDER_WAIT = datetime.timedelta(minutes=10)  # for the ranks of other nodes to be started

FOLDER_KEY = "unitransformer/folder"


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A run whose device and strategy are decided, and checked against this machine."""

    config: RunConfig
    strategy_reason: str


def resolve(config: RunConfig) -> ResolvedConfig:
    """Decide the device and the strategy that `config` leaves open.

    Raises:
        ValueError: what this machine does not have, naming field, value and fix.
    """
    device = find_device(config.parallel)
    config = replace(config, parallel=replace(config.parallel, accelerator=device))
    config, reason = choose_strategy(config, device_memory_bytes(config.parallel, device))
    return ResolvedConfig(config=config, strategy_reason=reason)


def check_deepspeed(parallel: ParallelConfig) -> None:
    """Raises ValueError, with the line that installs it, if DeepSpeed is needed and absent."""
    if parallel.uses_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"strategy {parallel.strategy} needs DeepSpeed, which is not installed: "
            "pip install 'deepspeed>=0.19', or choose fsdp"
        )


def count_gpus() -> int:
    """GPUs this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_software() -> dict[str, str]:
    """Versions of what runs GPUs and what connects them; nothing where torch is built for none."""
    built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    told = {name: version for name, version in built.items() if version is not None}
    if count_gpus():
        told["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return told


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
    check_launched(parallel)
    check_precision(parallel, device)
    if parallel.cpu_offload and device == "cpu":
        raise ValueError("cpu_offload is for GPUs: on a CPU everything is in host memory already")
    check_deepspeed(parallel)
    return device


def device_memory_bytes(parallel: ParallelConfig, device: str) -> int | None:
    """Memory of one device; on CPUs a rank's part of the machine's. None: not known."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    memory = memory_bytes()
    return memory and memory // parallel.devices


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 by itself: not a V100 or T4, which emulate it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_float16() -> bool:
    """Whether the CPU multiplies float16 by itself (AVX512-FP16), as DeepSpeed asks torch too."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def check_precision(parallel: ParallelConfig, device: str) -> None:
    """Raises ValueError for a precision that `device` would replace, emulate or refuse."""
    is_zero_in_float16 = parallel.uses_deepspeed and parallel.precision == "16-mixed"
    if device == "cpu" and is_zero_in_float16 and not has_float16():
        raise ValueError(
            f"precision 16-mixed is not for strategy {parallel.strategy} on this CPU: DeepSpeed "
            "wants one that multiplies float16 by itself; use bf16-mixed, or strategy ddp or fsdp1"
        )
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


def check_nodes(parallel: ParallelConfig, module: str, arguments: Sequence[str]) -> None:
    """Raises ValueError, with the command to start instead, for several nodes without a launcher.

    Args:
        module: what was started with `python -m`, with `arguments`.
    """
    if parallel.num_nodes == 1 or launched_shape() is not None:
        return
    last = parallel.num_nodes - 1
    torchrun = [
        *("torchrun", "--nnodes", str(parallel.num_nodes), "--node-rank", "0"),
        *("--nproc-per-node", str(parallel.devices)),
        *("--master-addr", socket.gethostname(), "--master-port", str(TORCHRUN_PORT)),
        *("-m", module, *arguments),
    ]
    others = "1 on the other node" if last == 1 else f"1 to {last} on the other nodes"
    raise ValueError(
        f"num-nodes is {parallel.num_nodes} and this command starts ranks on one machine only; run "
        f"here, and with --node-rank {others}: {shlex.join(torchrun)}"
    )


def agree_on_folder(choose: Callable[[], str]) -> str:
    """The folder that the first rank chooses, on every rank that `torchrun` or `srun` has started.

    torchrun keeps a store at MASTER_ADDR and MASTER_PORT. srun keeps none: the first rank opens
    one there, which the process group uses as well.

    Raises:
        RuntimeError: the first rank does not answer.
    """
    is_first = process_rank() == 0
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first and not has_store,
        wait_for_workers=False,
        timeout=FOLDER_WAIT,
    )
    _open_stores.append(store)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    key = f"{FOLDER_KEY}/{os.environ.setdefault('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_first:
        store.set(key, choose())
    return store.get(key).decode()


_open_stores: list[TCPStore] = []  # until this process ends: the other ranks need it

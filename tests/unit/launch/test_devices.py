"""Tests devices: which one a run uses, what it refuses, threads, and that all flush denormals."""

import itertools
import multiprocessing
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.processes import PATIENCE_S
from unitransformer.config import Accelerator, ParallelConfig
from unitransformer.launch import devices
from unitransformer.launch.devices import (
    MALLOC_VARIABLES,
    choose_device,
    keep_freed_memory,
    keeps_denormals,
    set_up_process,
)
from unitransformer.launch.environment import TORCHRUN_MARK

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpus: int = 0,
    driver: str | None = None,
    cuda: str | None = None,
    hip: str | None = None,
    architectures: Sequence[str] = (),
    capability: tuple[int, int] = (9, 0),
) -> None:
    """Replaces what torch and the driver say about this machine."""
    versions = {} if driver is None else {"nvidia driver": driver}
    monkeypatch.setattr(devices, "count_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "driver_versions", lambda: versions)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# ---- a driver, and no GPU that torch can use


@pytest.mark.parametrize(
    ("driver", "cuda", "hip", "reason"),
    [
        (
            "535.104.05",
            "13.0",
            None,
            "is built for CUDA 13.0, which needs driver 580 or newer; pip "
            "install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
            "cu126, or use --accelerator cpu",
        ),
        (
            "470.82.01",
            "13.2",
            None,
            "is built for CUDA 13.2, which needs driver 580 or newer; "
            "update the driver to 525 or newer, or use --accelerator cpu",
        ),
        ("470.82.01", "12.6", None, "is built for CUDA 12.6, which needs driver 525 or newer; "),
        (
            "580.65.06",
            None,
            None,
            "is built without CUDA; pip install --force-reinstall torch "
            "torchvision --index-url https://download.pytorch.org/whl/cu130, or use",
        ),
        ("580.65.06", None, "7.1", "is built for ROCm; pip install --force-reinstall torch "),
        ("580.65.06", "13.0", None, "finds no GPU; see what nvidia-smi says, and give a container"),
        ("550.54.15", "12.6", None, "finds no GPU; see what nvidia-smi says, and give a container"),
    ],
)
@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_a_driver_without_a_usable_gpu_is_refused_and_the_fitting_wheel_named(
    driver: str,
    cuda: str | None,
    hip: str | None,
    reason: str,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, driver=driver, cuda=cuda, hip=hip)
    start = f"this machine has NVIDIA driver {driver}, but torch {torch.__version__} {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        choose_device(ParallelConfig(accelerator=accelerator))
    assert choose_device(ParallelConfig(accelerator="cpu")) == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_named_as_hidden(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver="580.65.06", cuda="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES is '{visible}'; unset it, or use"):
        choose_device(ParallelConfig())


def test_a_machine_without_a_driver_uses_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda="13.0")
    assert choose_device(ParallelConfig()) == "cpu"


# ---- a GPU that torch has no kernels for


@pytest.mark.parametrize(
    ("capability", "architectures", "hip", "is_refused"),
    [
        ((7, 0), CUDA_13, None, True),  # V100
        ((7, 0), CUDA_12_6, None, False),
        ((7, 5), CUDA_13, None, False),
        ((8, 9), CUDA_13, None, False),  # runs the kernels of 8.6
        ((8, 0), ["sm_86"], None, True),
        ((9, 0), ["sm_90a"], None, False),
        ((10, 3), CUDA_13, None, False),
        ((10, 0), CUDA_12_6, None, True),  # B200
        ((12, 1), CUDA_13, None, False),
        ((13, 0), CUDA_13, None, False),  # compiles its PTX
        ((13, 0), CUDA_13[:-1], None, True),
        ((9, 4), ["gfx90a", "gfx942"], "7.1", False),
        ((9, 0), [], None, False),
    ],
)
def test_a_gpu_is_refused_if_torch_has_no_kernels_for_it(
    capability: tuple[int, int],
    architectures: list[str],
    hip: str | None,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, gpus=2, hip=hip, architectures=architectures, capability=capability)
    config = ParallelConfig(devices=2, strategy="ddp")
    if not is_refused:
        assert choose_device(config) == "cuda"
        return
    name = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(
        ValueError, match=f"^NVIDIA GPU is of architecture {name}, and torch .* has"
    ):
        choose_device(config)
    assert choose_device(ParallelConfig(accelerator="cpu")) == "cpu"


# ---- ranks that do not see every GPU


@pytest.mark.parametrize("visible", [1, 4])
def test_ranks_that_see_too_few_gpus_are_refused_with_the_option_of_srun(
    visible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus=visible)
    for name, value in {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="has started 8 ranks on this node, and this") as error:
        choose_device(ParallelConfig(devices=8, num_nodes=2, strategy="ddp"))
    assert f"sees {visible} of its GPUs" in str(error.value)
    assert "srun --gpus-per-node=8 --gpu-bind=none" in str(error.value)
    with pytest.raises(ValueError, match="the launcher has started 8 ranks on each of 2 nodes"):
        choose_device(ParallelConfig(devices=1, num_nodes=2, strategy="ddp"))


# ---- denormal floats


def compute_with_two_threads() -> None:
    """Starts torch's pool without the switch, as earlier work of a notebook does."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)
    (torch.ones(2**17) * 2).sum()
    assert keeps_denormals()


def flush_after_other_work() -> None:
    compute_with_two_threads()
    torch.set_flush_denormal(True)
    assert keeps_denormals(), "the second thread has its own switch"
    with warnings.catch_warnings(action="error"):
        set_up_process(ParallelConfig(), "cpu")
    assert not keeps_denormals()


def warn_where_it_is_impossible() -> None:
    compute_with_two_threads()
    devices._flush_denormals_in_pool = lambda: None
    with pytest.warns(UserWarning, match="keep denormal floats: .*; run in a new process or"):
        set_up_process(ParallelConfig(), "cpu")


@pytest.mark.parametrize("check", [flush_after_other_work, warn_where_it_is_impossible])
def test_denormals_are_flushed_in_threads_of_earlier_work_or_a_warning_says_so(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # In a fork: later forks of a process whose pool has several threads would wait for them.
    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0


# ---- memory


def count_faults_of_reuse() -> int:
    """Returns the fewest page faults of filling a tensor as large as one that was just freed."""
    torch.set_num_threads(1)
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB: 16,384 pages, or 32 huge ones
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in itertools.pairwise(counts))


def reuse_freed_memory() -> None:
    keep_freed_memory("cuda")
    returned = count_faults_of_reuse()
    keep_freed_memory("cpu")
    assert 8 * count_faults_of_reuse() < returned


def respect_the_users_setting() -> None:
    os.environ[MALLOC_VARIABLES[0]] = "131072"
    returned = count_faults_of_reuse()
    keep_freed_memory("cpu")
    assert returned < 2 * count_faults_of_reuse()


def check_reuse() -> None:
    respect_the_users_setting()
    del os.environ[MALLOC_VARIABLES[0]]
    reuse_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="sets an option of glibc")
def test_memory_of_freed_tensors_is_reused_unless_the_user_has_decided() -> None:
    # A new process: other tests of this one may have freed memory that is kept.
    process = multiprocessing.get_context("spawn").Process(target=check_reuse)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("device", "environment", "expected"),
    [
        *(("cpu", {}, 4), ("cuda", {}, 4)),
        *(("cpu", {"OMP_NUM_THREADS": "3"}, 3), ("cuda", {"OMP_NUM_THREADS": "3"}, 3)),
        ("cuda", {"OMP_NUM_THREADS": "1"}, 1),
        ("cpu", {"OMP_NUM_THREADS": "3,1"}, 3),  # one for each level of nesting
        # torchrun sets 1 for more than one rank, if nobody has set it.
        ("cuda", {"OMP_NUM_THREADS": "1", TORCHRUN_MARK: "0"}, 4),
        ("cpu", {"OMP_NUM_THREADS": "1", TORCHRUN_MARK: "0"}, 1),
        ("cuda", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "5"}, 5),
        ("cuda", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "32"}, 16),
        ("cuda", {"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ("cuda", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "16"}, 4),
        # Two nodes, on each of which torchrun starts four ranks.
        ("cuda", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "16", TORCHRUN_MARK: "0"}, 4),
    ],
)
def test_each_of_four_ranks_uses_a_quarter_of_sixteen_cores_also_beside_a_gpu(
    device: str, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(devices, "available_cores", lambda: 16)
    monkeypatch.setattr(devices, "keeps_denormals", lambda: False)
    for name in ("OMP_NUM_THREADS", TORCHRUN_MARK, "SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_up_process(ParallelConfig(devices=4, strategy="ddp"), device)
    assert used == [expected]


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", ","])
def test_a_number_of_threads_that_is_none_is_refused_before_a_run(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match=rf"OMP_NUM_THREADS is '{text}'; set it to a number above"):
        devices.choose_num_threads(ParallelConfig(), "cpu")

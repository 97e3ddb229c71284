"""Tests threads: their number, and that all of them flush denormal floats."""

import multiprocessing
import warnings
from collections.abc import Callable

import pytest
import torch

from unitransformer.config import ParallelConfig
from unitransformer.launch import devices
from unitransformer.launch.devices import keeps_denormals, set_up_process
from unitransformer.launch.environment import TORCHRUN_MARK


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
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("device", "environment", "expected"),
    [
        *(("cpu", {}, 4), ("cuda", {}, 4)),
        *(("cpu", {"OMP_NUM_THREADS": "3"}, 3), ("cuda", {"OMP_NUM_THREADS": "3"}, 3)),
        ("cuda", {"OMP_NUM_THREADS": "1"}, 1),
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

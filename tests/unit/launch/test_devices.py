"""A run flushes denormal floats in all threads that compute, also in those that exist already."""

import multiprocessing
import warnings
from collections.abc import Callable

import pytest
import torch

from unitransformer.config import ParallelConfig
from unitransformer.launch import devices
from unitransformer.launch.devices import keeps_denormals, set_up_process


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

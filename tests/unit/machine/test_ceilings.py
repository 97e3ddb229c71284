"""Tests the measured ceilings of a rank, with a fake clock where possible."""

import contextlib
import gc
import itertools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unitransformer.machine import ceilings
from unitransformer.machine.ceilings import (
    dtype_of,
    measure_ceiling,
    why_not_measured,
)
from unitransformer.machine.timing import event_clock, first_sample, repeat

CPU = torch.device("cpu")
TINY = ((8, 8, 8), (8, 16, 32))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SHAPES", TINY)
    monkeypatch.setattr(ceilings, "_copy_bytes", lambda device: 1000)


def millisecond(work: Callable[[], object], calls: int) -> float:
    work()
    return calls / 1000


def test_a_product_of_8_by_16_by_32_in_a_millisecond_is_8_million_flops_per_second() -> None:
    ceiling = measure_ceiling(CPU, "float32", budget_s=0.4, clock=millisecond)
    assert ceiling.best_product.name.startswith("8 x 16 x 32, ")
    assert ceiling.matmul_flops_per_s == pytest.approx(2 * 8 * 16 * 32 * 1000)
    assert len(ceiling.matmul) == 2 * 3  # two shapes, the three products of a linear layer
    assert ceiling.copy_bytes_per_s == pytest.approx(2 * 1000 * 1000)  # read and written


def test_the_ceiling_is_the_best_sample_and_the_median_is_kept_too() -> None:
    ticks = itertools.cycle((4.0, 2.0, 1.0, 2.0))

    def uneven(work: Callable[[], object], calls: int) -> float:
        work()
        return calls * next(ticks)

    ceiling = measure_ceiling(CPU, "float32", budget_s=0.05, clock=uneven)
    fastest = max(p.work / second for p in ceiling.matmul for second in p.seconds)
    assert ceiling.matmul_flops_per_s == fastest
    assert ceiling.best_product.median_per_s <= fastest


def test_a_product_predicted_to_take_too_long_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ceilings, "CPU_SHAPES", (*TINY, (64, 64, 64)))

    def never(work: Callable[[], object], calls: int) -> float:
        work()
        return calls * 1.0

    ceiling = measure_ceiling(CPU, "float32", budget_s=0.1, clock=never)
    assert {product.name.split(",")[0] for product in ceiling.matmul} == {"8 x 8 x 8"}


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"a call took 0\.0 s"):
        measure_ceiling(CPU, "float32", budget_s=0.1, clock=lambda work, calls: 0.0)


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_time_budget_is_refused(budget_s: float) -> None:
    with pytest.raises(ValueError, match="budget_s is"):
        measure_ceiling(CPU, "float32", budget_s=budget_s)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_measuring_restores_random_states_and_settings_and_frees_its_tensors(
    precision: Any,
) -> None:
    torch.manual_seed(3)
    random, setting, tensors = (
        torch.get_rng_state(),
        torch.get_float32_matmul_precision(),
        _tensors(),
    )
    ceiling = measure_ceiling(CPU, dtype_of(precision, CPU), budget_s=0.05)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_float32_matmul_precision() == setting
    assert _tensors() <= tensors  # threads of earlier tests may have freed theirs meanwhile
    assert ceiling.dtype == ("float32" if precision == "32-true" else "bfloat16")
    assert ceiling.threads == torch.get_num_threads()


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_gpu_multiplies_in_the_given_dtype_and_its_settings_are_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls_made: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls_made.append("emptied"))
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: calls_made.append("cleared"), raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls_made.append)
    with ceilings._matmul_settings(torch.device("cuda", 0), "tf32"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert calls_made == ["high", "highest", "cleared", "emptied"]


def test_memory_is_returned_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**28
    monkeypatch.setattr(ceilings, "_copy_bytes", lambda device: size)
    before = _resident_bytes()
    measure_ceiling(CPU, "float32", budget_s=0.05)
    assert _resident_bytes() - before < size / 4


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_real_product_has_a_plausible_rate() -> None:
    ceiling = measure_ceiling(CPU, "float32", budget_s=0.05)
    assert ceiling.matmul_flops_per_s > 0
    assert len(ceiling.best_product.seconds) >= 3
    assert ceiling.elapsed_s > 0


def test_a_sample_holds_as_many_calls_as_a_coarse_clock_needs() -> None:
    made = [0]

    def counted(work: Callable[[], object], calls: int) -> float:
        made[0] += calls
        return calls / 1000

    assert first_sample(lambda: None, counted) == (5, pytest.approx(0.005))
    assert made[0] == 2 + 5  # warm-up, trial call, and the sample
    # Three samples, although the time is over.
    assert len(repeat(lambda: None, 5, 0.0, counted)) == 3


def test_gpu_events_are_read_in_seconds_after_the_work_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls_made: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls_made.append("record")

        def synchronize(self) -> None:
            calls_made.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert event_clock(lambda: calls_made.append("work"), 2) == 0.25
    assert calls_made == ["record", "work", "work", "record", "wait"]


def test_float32_on_a_gpu_is_tf32_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert dtype_of("32-true", gpu) == "float32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert dtype_of("32-true", gpu) == "tf32"
    assert dtype_of("32-true", CPU) == "float32"
    assert [dtype_of(p, gpu) for p in ("16-mixed", "bf16-mixed", "bf16-true")] == [
        *("float16", "bfloat16", "bfloat16")
    ]


def test_an_unsupported_dtype_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [name for name, why in why_not_measured(CPU).items() if why] == ["tf32", "float16"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    left_out = why_not_measured(torch.device("cuda", 0))
    assert left_out["bfloat16"] == "the GPU emulates it"
    assert left_out["tf32"] is not None
    assert left_out["float16"] is None

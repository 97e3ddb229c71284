"""Tests the peak of tensor bytes with small sums."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unitransformer.profiling.step_events import StepEvent
from unitransformer.profiling.tensor_bytes import (
    PeakTensorBytes,
    _add_hidden_frees,
    _peak,
    find_live_tensors,
)
from unitransformer.step_counters import ModuleTrace

KB = 1000


def take(kilobytes: int) -> Tensor:
    return torch.empty(kilobytes * KB, dtype=torch.uint8)


def measure(step: Any, **options: Any) -> PeakTensorBytes:
    """Runs the step once as the previous step, and once measured."""
    with PeakTensorBytes(ignored=find_live_tensors(), **options) as peak:
        step()
        peak.begin()
        step()
    return peak


def test_bytes_of_tensors_alive_together_add_up() -> None:
    def step() -> None:
        first = take(100)
        del first
        both = take(70), take(50)
        del both
        take(110)

    assert measure(step).bytes == 120 * KB


def test_tensors_allocated_before_the_step_count() -> None:
    with PeakTensorBytes(ignored=find_live_tensors()) as peak:
        held = take(30)
        peak.begin()
        take(5)
    assert peak.bytes == 35 * KB
    assert held.numel() == 30 * KB


def test_tensors_of_the_previous_step_count_until_the_step_frees_them() -> None:
    held: list[Tensor] = []

    def step() -> None:
        held.clear()
        take(60)
        held.append(take(40))

    # The 40 of the previous step and the 60 never exist together.
    assert measure(step).bytes == 60 * KB


def test_the_peak_without_a_previous_step_is_an_upper_bound() -> None:
    ignored = find_live_tensors()
    held = [take(40)]
    with PeakTensorBytes(ignored=ignored) as peak:
        peak.begin()
        held.clear()
        both = take(30), take(30)
        del both
    # Really 60; the 40 may count too, if their address was not reused.
    assert 60 * KB <= peak.bytes <= 100 * KB


def test_a_view_takes_no_memory() -> None:
    def step() -> Tensor:
        return take(8).view(8, KB)[2:]

    assert measure(step).bytes == 8 * KB


def test_bytes_are_counted_by_kind_and_location() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(10, 100, bias=False)  # 4,000 bytes

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.wide(x)
            return out

    ignored = find_live_tensors()
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    inputs = torch.ones(50, 10)  # 2,000 bytes

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).sum().backward()  # 50 x 100 numbers, 20,000 bytes
        optimizer.step()

    step()
    trace = ModuleTrace(net)
    with PeakTensorBytes(module=net, optimizers=[optimizer], trace=trace, ignored=ignored) as peak:
        step()
        peak.begin()
        step()
    assert peak.by_kind["parameters"] == 4000
    assert peak.by_kind["optimizer"] == 2 * 4000 + 4  # moments and the number of steps
    assert peak.by_kind["other"] >= 2000 + 20_000
    assert peak.by_location["wide"] >= 20_000
    assert sum(peak.by_kind.values()) == sum(peak.by_location.values()) == peak.bytes


def test_begin_must_be_called_exactly_once() -> None:
    with pytest.raises(ValueError, match=r"begin was never called"), PeakTensorBytes():
        pass
    with PeakTensorBytes() as peak:
        peak.begin()
        with pytest.raises(ValueError, match=r"begin was called twice"):
            peak.begin()


def test_an_error_in_the_counted_step_is_raised() -> None:
    with pytest.raises(RuntimeError, match=r"ours"), PeakTensorBytes():
        raise RuntimeError("ours")
    assert measure(lambda: take(3)).bytes == 3 * KB  # no hook remains


def test_tensors_released_by_a_gloo_thread_end_with_their_collective() -> None:
    sent = SimpleNamespace(storage_data_ptr=1)
    events = [
        StepEvent(name="memory", location="step", address=1, num_bytes=30),
        StepEvent(name="c10d::broadcast_", location="step", inputs=([sent],)),
        StepEvent(name="memory", location="step", address=2, num_bytes=50),
    ]
    assert sum(size for size, _ in _peak({}, _add_hidden_frees(events, {})).values()) == 50
    # Tensors that Python still references were not freed.
    held = _add_hidden_frees(events, {1: (30, "other")})
    assert sum(size for size, _ in _peak({}, held).values()) == 80

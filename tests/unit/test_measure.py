"""The clock: spans, their parts, and what it costs to be wrong."""

import time
from typing import Any

import pytest
import torch

from unitransformer.measuring.clock import StepClock


def test_the_clock_reads_the_span_between_start_and_stop() -> None:
    clock = StepClock()
    clock.start()
    time.sleep(0.05)
    clock.stop()
    time.sleep(0.05)
    clock.start()
    clock.stop()
    first, second = clock.step_s()
    assert 0.05 <= first
    assert second < 0.05


def test_a_step_under_way_goes_on_unless_it_begins_again() -> None:
    clock = StepClock()
    clock.start()
    time.sleep(0.02)
    clock.start()
    clock.stop()
    clock.start()
    time.sleep(0.02)
    clock.start(again=True)
    clock.stop()
    under_way, again = clock.step_s()
    assert under_way >= 0.02 > again


def test_the_parts_of_a_step_add_up_to_it() -> None:
    clock = StepClock()
    clock.start()
    for part in ("data", "forward_backward", "data", "forward_backward"):  # two micro-batches
        time.sleep(0.01)
        clock.mark(part)  # type: ignore[arg-type]
    clock.stop()
    (step,) = clock.steps()
    assert step.data_s >= 0.02
    assert step.forward_backward_s >= 0.02
    assert step.data_s + step.forward_backward_s + step.optimizer_s == pytest.approx(step.step_s)


def test_waiting_costs_no_processor_time_and_computing_does() -> None:
    clock = StepClock()
    clock.start()
    time.sleep(0.2)
    clock.stop()
    clock.start()
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    clock.stop()
    waiting, computing = clock.steps()
    assert waiting.cpu_s < 0.1 <= computing.cpu_s


class FakeEvent:
    """A CUDA event of a device that is half a second behind whoever records it."""

    now_s = 0.0
    is_done = False
    num_waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_s = FakeEvent.now_s

    def synchronize(self) -> None:
        FakeEvent.is_done, FakeEvent.num_waits = True, FakeEvent.num_waits + 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.is_done, "read before the device was done"
        return 1000 * (end.at_s - self.at_s)


def test_on_a_gpu_events_are_read_at_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = StepClock(on_gpu=True)
    marks: list[tuple[float, Any]] = [
        *((0.0, clock.start), (1.0, lambda: clock.mark("data"))),
        *((4.0, lambda: clock.mark("forward_backward")), (5.0, clock.stop)),
    ]
    for _ in range(3):
        for now_s, call in marks:
            FakeEvent.now_s = now_s
            call()
    assert FakeEvent.num_waits == 0
    for step in clock.steps():
        assert (step.step_s, step.data_s) == (5.0, 1.0)
        assert (step.forward_backward_s, step.optimizer_s) == (3.0, 1.0)
    assert FakeEvent.num_waits == 1

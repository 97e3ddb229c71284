"""Tests the step clock: spans and their parts, on CPUs and GPUs."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as functional_collectives

from unitransformer.config import ParallelConfig
from unitransformer.measure import communication
from unitransformer.measure.clock import HOST_BOUND, StepClock
from unitransformer.measure.communication import timed_waits, why_communication_missing


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


def test_starting_the_clock_again_restarts_the_step() -> None:
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


def test_waiting_is_subtracted_from_the_part_in_which_it_happens() -> None:
    clock = StepClock()
    clock.begin_wait()  # no step is under way
    clock.end_wait()
    clock.start()
    time.sleep(0.01)
    clock.begin_wait()
    clock.begin_wait()  # nested waits count once
    time.sleep(0.02)
    clock.end_wait()
    time.sleep(0.01)
    clock.end_wait()
    time.sleep(0.01)
    clock.mark("forward_backward")
    clock.stop()
    (step,) = clock.steps()
    assert step.communication_s is not None
    assert step.communication_s >= 0.03
    assert step.forward_backward_s >= 0.02
    parts = (step.data_s, step.forward_backward_s, step.optimizer_s, step.communication_s)
    assert sum(parts) == pytest.approx(step.step_s)


def test_communication_that_is_not_measured_is_missing_rather_than_zero() -> None:
    clock = StepClock(measures_communication=False)
    clock.start()
    clock.stop()
    assert clock.steps()[0].communication_s is None


def test_time_between_steps_is_recorded_for_every_step_but_the_first() -> None:
    clock = StepClock()
    for _ in range(2):
        clock.start()
        clock.stop()
        time.sleep(0.02)
    clock.start()
    time.sleep(0.1)
    clock.start(again=True)  # a validation ran
    clock.stop()
    first, second, third = (step.between_steps_s for step in clock.steps())
    assert first is None
    assert second is not None
    assert third is not None
    assert second >= 0.02
    assert 0.02 <= third < 0.1


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
    """A CUDA event of a device that is half a second behind the host."""

    now_s = 0.0
    is_done = False
    num_waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_s = FakeEvent.now_s

    def synchronize(self) -> None:
        FakeEvent.is_done, FakeEvent.num_waits = True, FakeEvent.num_waits + 1

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.is_done, "read before the device was done"
        return 1000 * (end.at_s - self.at_s)


def test_gpu_events_are_read_only_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = StepClock(on_gpu=True)
    marks: list[tuple[float, Any]] = [
        *((0.0, clock.start), (1.0, lambda: clock.mark("data"))),
        *((4.0, lambda: clock.mark("forward_backward")), (5.0, clock.stop)),
    ]
    for begin_s in (0.0, 7.0, 14.0):
        for now_s, call in marks:
            FakeEvent.now_s = begin_s + now_s
            call()
    assert FakeEvent.num_waits == 0
    for step in clock.steps():
        assert (step.step_s, step.data_s) == (5.0, 1.0)
        assert (step.forward_backward_s, step.optimizer_s) == (3.0, 1.0)
    assert [step.between_steps_s for step in clock.steps()] == [None, 2.0, 2.0]
    assert FakeEvent.num_waits == 1


@pytest.mark.parametrize(
    ("cpu_s", "is_up_to_date", "host_runs_ahead", "is_flagged"),
    [
        (5.0, True, True, True),  # launching takes as long as the step, and the GPU waits
        (5.0, False, True, False),  # the processor waits for room in the queue of the GPU
        (1.0, True, True, False),  # both wait for data
        (5.0, True, False, False),  # every step waits for the GPU, with a busy processor
    ],
)
def test_steps_are_host_bound_if_the_processor_is_busy_and_the_gpu_is_not_behind(
    cpu_s: float,
    is_up_to_date: bool,
    host_runs_ahead: bool,
    is_flagged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queried: list[float] = []

    def query(event: FakeEvent) -> bool:
        queried.append(event.at_s)
        return is_up_to_date

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "query", query)
    processor_s = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: processor_s[0])
    clock = StepClock(on_gpu=True, host_runs_ahead=host_runs_ahead)
    for step in range(12):
        for now_s, call in (
            (0.0, clock.start),
            *((micro + 1.0, lambda: clock.mark("forward_backward")) for micro in range(2)),
            (5.0, clock.stop),
        ):
            FakeEvent.now_s = 10.0 * step + now_s
            processor_s[0] += cpu_s if now_s == 5.0 else 0.0
            call()
        if step == 8:
            assert clock.flags() == [], "too few steps"
    assert clock.flags() == ([HOST_BOUND] if is_flagged else [])
    # In each step, the end of the last backward pass.
    assert queried == ([10.0 * step + 2.0 for step in range(12)] if host_runs_ahead else [])


def test_a_cpu_is_never_host_bound() -> None:
    clock = StepClock()
    for _ in range(12):
        clock.start()
        clock.mark("forward_backward")
        clock.stop()
    assert clock.flags() == []


class FakeStream:
    """A CUDA stream whose every wait takes a second."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_event(self, event: object) -> None:
        FakeEvent.now_s += 1


def test_only_the_compute_stream_of_a_gpu_is_measured_as_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute, sends = FakeStream("compute"), FakeStream("sends")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: compute)
    current = [compute]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    FakeEvent.now_s = 0.0
    clock = StepClock(on_gpu=True)
    with timed_waits(clock, ParallelConfig(devices=2, strategy="fsdp"), "cuda"):
        clock.start()
        sends.wait_event(None)
        current[0] = sends
        sends.wait_event(None)
        current[0] = compute
        compute.wait_event(None)
        clock.mark("forward_backward")
        clock.stop()
    compute.wait_event(None)
    (step,) = clock.steps()
    assert (step.communication_s, step.forward_backward_s, step.step_s) == (1.0, 2.0, 3.0)


def test_a_wait_in_another_thread_does_not_count_for_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(functional_collectives, "wait_tensor", time.sleep)
    clock = StepClock()
    with timed_waits(clock, ParallelConfig(devices=2, strategy="ddp"), "cpu"):
        clock.start()
        checkpointing = threading.Thread(target=lambda: functional_collectives.wait_tensor(0.1))
        checkpointing.start()
        functional_collectives.wait_tensor(0.02)
        checkpointing.join()
        clock.stop()
    (step,) = clock.steps()
    assert step.communication_s is not None
    assert 0.02 <= step.communication_s < 0.1 <= step.step_s


@pytest.mark.parametrize(
    ("strategy", "device", "is_measured"),
    [
        *(("ddp", "cuda", True), ("fsdp", "cuda", True), ("hsdp", "cuda", True)),
        *(("fsdp1", "cpu", True), ("zero3", "cpu", True), ("single", "cuda", True)),
        *(("fsdp1", "cuda", False), ("zero2", "cuda", False)),
    ],
)
def test_a_backend_without_measured_waits_names_the_alternative(
    strategy: Any, device: str, is_measured: bool
) -> None:
    devices = 1 if strategy == "single" else 2
    reason = why_communication_missing(ParallelConfig(devices=devices, strategy=strategy), device)
    assert (reason is None) == is_measured
    if reason is not None:
        assert "--trace" in reason


def test_the_backward_pass_has_ended_before_ddp_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "DistributedDataParallel", SimpleNamespace)
    clock = StepClock()
    clocks = communication.TimeGradientReduction(clock)
    weight = torch.ones(1, requires_grad=True)
    order: list[str] = []

    def later(_: torch.Tensor) -> None:  # as DDP does when the last bucket is full
        torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("ddp"))

    monkeypatch.setattr(clock, "begin_wait", lambda: order.append("begin"))
    monkeypatch.setattr(clock, "end_wait", lambda: order.append("end"))
    for reduces in (False, True):
        loss = 2 * weight
        model = SimpleNamespace(require_backward_grad_sync=reduces)
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(model=model))
        clocks.on_before_backward(trainer, None, loss)
        weight.register_hook(later)
        loss.backward()
        clocks.on_after_backward()
        assert order == (["begin", "ddp", "ddp", "end"] if reduces else ["ddp"])
        order.clear()

"""Two functions run in turn, and the clock counts their work alone."""

import sys
from types import SimpleNamespace

import pytest

from scaling.comparison import paired_calls
from scaling.comparison.paired_calls import PairedCalls
from tests.builders.clocks import FakeTime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(paired_calls, "time", fake)
    return fake


def test_blocks_of_both_functions_have_equally_many_calls(clock: FakeTime) -> None:
    # The shorter one needs eleven calls of a thousandth to fill a block of 10 ms.
    calls = PairedCalls(lambda: clock.work(2 / 1024), lambda: clock.work(1 / 1024))
    base, candidate = calls.measure(3)
    assert calls.calls_per_block == 11
    assert base == [22 / 1024] * 3
    assert candidate == [11 / 1024] * 3


def test_both_orders_occur_inside_pairs(clock: FakeTime) -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        clock.work(0.01)

    calls = PairedCalls(lambda: run("base"), lambda: run("candidate"))
    order.clear()
    calls.measure(20)
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert set(pairs) == {("base", "candidate"), ("candidate", "base")}


def test_waiting_is_time_of_the_wall_and_not_of_the_processor(clock: FakeTime) -> None:
    def work_and_wait() -> None:
        clock.work(1 / 64)  # fills a block
        clock.sleep(3 / 64)

    (processor, *_), _ = PairedCalls(work_and_wait, work_and_wait).measure(1)
    (wall, *_), _ = PairedCalls(work_and_wait, work_and_wait, "wall").measure(1)
    assert (processor, wall) == (1 / 64, 4 / 64)


def test_functions_that_use_cuda_are_measured_by_its_events(
    clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_ms = [0.0]
    waited: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = gpu_ms[0]

        def synchronize(self) -> None:
            waited.append(self.ms)

        def elapsed_time(self, end: "Event") -> float:
            assert waited[-1] == end.ms
            return end.ms - self.ms

    def launch() -> None:
        clock.work(0.001)
        gpu_ms[0] += 20

    cuda = SimpleNamespace(is_initialized=lambda: True, Event=Event)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    calls = PairedCalls(launch, launch)
    assert calls.clock == "gpu"
    assert calls.measure(2) == ([0.02, 0.02], [0.02, 0.02])

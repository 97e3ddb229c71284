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


class FakeCuda:
    """torch.cuda with a GPU that still works for an earlier test."""

    def __init__(self, clock: FakeTime) -> None:
        self.clock, self.ms = clock, 0.0
        self.allocations, self.is_busy = 7, True
        self.num_gpus = 1

    def launch(self, *, allocates: bool = False, waits: bool = False) -> None:
        self.clock.work(0.001)
        self.ms += 20
        self.allocations += allocates
        self.is_busy = not waits

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.num_gpus

    def memory_stats(self, gpu: int) -> dict[str, int]:
        if gpu > 0:
            return {"allocation.all.allocated": 0, "reserved_bytes.all.current": 0}
        return {"allocation.all.allocated": self.allocations, "reserved_bytes.all.current": 2**21}

    def current_stream(self, gpu: int) -> SimpleNamespace:
        assert gpu == 0, "touching a GPU without memory creates a context on it"
        return SimpleNamespace(query=lambda: not self.is_busy)

    def synchronize(self, gpu: int) -> None:
        assert gpu == 0, "touching a GPU without memory creates a context on it"
        self.is_busy = False

    def Event(self, *, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.ms = self.cuda.ms

    def synchronize(self) -> None:
        self.cuda.is_busy = False

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert not self.cuda.is_busy
        return end.ms - self.ms


@pytest.fixture
def cuda(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(clock)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
    return fake


@pytest.mark.parametrize("how", [{"allocates": True, "waits": True}, {"waits": False}])
def test_functions_that_use_cuda_are_measured_by_its_events(
    cuda: FakeCuda, how: dict[str, bool]
) -> None:
    calls = PairedCalls(lambda: cuda.launch(**how), lambda: cuda.launch(**how))
    assert calls.clock == "gpu"
    assert calls.measure(2) == ([0.02, 0.02], [0.02, 0.02])


def test_functions_without_cuda_are_timed_by_the_processor_after_a_test_that_used_it(
    cuda: FakeCuda, clock: FakeTime
) -> None:
    calls = PairedCalls(lambda: clock.work(0.01), lambda: clock.work(0.01))
    assert calls.clock == "processor"


def test_a_gpu_on_which_torch_holds_no_memory_is_not_touched(cuda: FakeCuda) -> None:
    cuda.num_gpus = 2
    assert PairedCalls(cuda.launch, cuda.launch).clock == "gpu"


def test_no_gpu_is_looked_at_if_the_clock_is_named(
    cuda: FakeCuda, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("synchronize", "current_stream", "memory_stats"):
        monkeypatch.setattr(cuda, name, pytest.fail)
    calls = PairedCalls(lambda: clock.work(0.01), lambda: clock.work(0.01), "processor")
    base, candidate = calls.measure(1)
    assert base == pytest.approx([0.01])
    assert candidate == pytest.approx([0.01])

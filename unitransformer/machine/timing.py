"""Times work by the clock of its device, after warm-up, in samples that outlast clock ticks."""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

MIN_SAMPLES = 3
SAMPLE_S = 0.005  # least duration of a sample, much longer than the tick of any clock


# Returns the seconds that so many calls of the work take on a device.
Clock = Callable[[Callable[[], object], int], float]


def wall_clock(work: Callable[[], object], calls: int) -> float:
    """The clock of a CPU."""
    start_s = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - start_s


def event_clock(work: Callable[[], object], calls: int) -> float:
    """The clock of a GPU: two events on its stream; waits for the second."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def choose_clock(device: torch.device) -> Clock:
    return event_clock if device.type == "cuda" else wall_clock


def wait_for_others(device: torch.device) -> None:
    """Waits until all ranks, if there are several, have called this."""
    if dist.is_available() and dist.is_initialized():
        arrived = torch.zeros(1, device=device)
        dist.all_reduce(arrived)  # not a barrier, which needs to know the GPU of each rank
        arrived.item()


def first_sample(work: Callable[[], object], clock: Clock) -> tuple[int, float]:
    """Warms up; returns the number of calls per sample, and the seconds of the first sample."""
    clock(work, 1)
    once_s = clock(work, 1)
    if not once_s > 0:
        raise RuntimeError(f"the clock does not advance: a call took {once_s} s")
    calls = max(1, math.ceil(SAMPLE_S / once_s))
    return (calls, clock(work, calls)) if calls > 1 else (1, once_s)


def repeat(work: Callable[[], object], calls: int, until_s: float, clock: Clock) -> list[float]:
    """Returns seconds of MIN_SAMPLES or more samples, until `until_s` of the monotonic clock."""
    clock(work, 1)
    seconds: list[float] = []
    while len(seconds) < MIN_SAMPLES or time.monotonic() < until_s:
        seconds.append(clock(work, calls))
    return seconds

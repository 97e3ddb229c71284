"""Work in, seconds out: by a device's own clock, warmed up, in samples long enough to be read."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

MIN_SAMPLES = 3
SAMPLE_S = 0.005  # a sample holds as many calls: no clock is coarse beside it


class Clock(Protocol):
    """Seconds of some work on a device."""

    def __call__(self, work: Callable[[], object], calls: int) -> float: ...


def wall_clock(work: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls on a CPU."""
    start_s = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - start_s


@dataclass(frozen=True, kw_only=True)
class EventClock:
    """Seconds between two events on a GPU's stream; waits for the second."""

    cuda: Any = torch.cuda

    def __call__(self, work: Callable[[], object], calls: int) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def choose_clock(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else wall_clock


def wait_for_others(device: torch.device) -> None:
    """Every rank goes on when all have come here; alone, at once."""
    if dist.is_available() and dist.is_initialized():
        arrived = torch.zeros(1, device=device)
        dist.all_reduce(arrived)  # a barrier would have to be told which GPU is whose
        arrived.item()


def first_sample(work: Callable[[], object], clock: Clock) -> tuple[int, float]:
    """Calls that a sample holds, and the seconds of the first; what warms up is not counted."""
    clock(work, 1)
    once_s = clock(work, 1)
    if not once_s > 0:
        raise RuntimeError(f"the clock says that a call took {once_s} s")
    calls = max(1, math.ceil(SAMPLE_S / once_s))
    return (calls, clock(work, calls)) if calls > 1 else (1, once_s)


def repeat(work: Callable[[], object], calls: int, until_s: float, clock: Clock) -> list[float]:
    """Seconds of samples, some at least, until the monotonic clock says `until_s`."""
    clock(work, 1)
    seconds: list[float] = []
    while len(seconds) < MIN_SAMPLES or time.monotonic() < until_s:
        seconds.append(clock(work, calls))
    return seconds

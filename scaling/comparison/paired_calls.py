"""Measures two functions in turn, in this process: pairs of blocks of calls, in random order.

Imports torch only to read the clock of a GPU.
"""

import gc
import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

Call = Callable[[], Any]
Clock = Literal["processor", "gpu", "wall"]

BLOCK_S = 0.01  # least length of a block, so that reading the clock weighs nothing
WARMUP_S = 0.1  # least time for which each function runs before it is measured
PATIENCE_S = 5.0  # until functions are suspected to wait
LEAST_SHARE = 0.02  # of the elapsed time that they must then have spent; a busy machine leaves more
SEED = 20041  # of the order inside pairs


class PairedCalls:
    """Two functions, warmed up, and the clock that measures them.

    Args:
        clock: "processor" counts the time of all threads of this process, whatever else runs on the
            machine; "gpu" is the time between two events of the current stream; "wall" is elapsed
            time. None: "gpu" if the functions used a GPU while they warmed up, otherwise
            "processor".

    Raises:
        ValueError: an unknown clock, no GPU for "gpu", or functions that mostly wait, which the
            time of the processor cannot show.
    """

    def __init__(self, base: Call, candidate: Call, clock: Clock | None = None) -> None:
        __tracebackhide__ = True  # in pytest the line of the test is what matters
        for name, call in (("base", base), ("candidate", candidate)):
            if not callable(call):
                raise ValueError(f"{name} is {call!r}; give a function that takes no arguments")
        if clock is not None and clock not in get_args(Clock):
            raise ValueError(f"clock is {clock!r}; choose one of {', '.join(get_args(Clock))}")
        self._calls = (base, candidate)
        self._order = random.Random(SEED)
        uses_gpu = False
        for call in self._calls:
            if clock is not None:
                _warm_up(call)
                continue
            before = _gpu_allocations()
            _warm_up(call)
            uses_gpu |= _gpu_is_busy() or _gpu_allocations() != before
        self.clock: Clock = clock or ("gpu" if uses_gpu else "processor")
        self._time = {"processor": _processor_s, "gpu": _gpu_s, "wall": _wall_s}[self.clock]
        if self.clock == "gpu" and not _gpus()[1]:
            raise ValueError("clock is 'gpu', but neither function has used a GPU through torch")
        self.calls_per_block = max(map(self._count_calls, self._calls))

    def measure(self, pairs: int) -> tuple[list[float], list[float]]:
        """Measures further pairs; returns the seconds of each block of base and of candidate."""
        seconds: tuple[list[float], list[float]] = ([], [])
        gc.collect()
        for _ in range(pairs):
            for side in self._order.sample((0, 1), 2):
                seconds[side].append(self._time(self._calls[side], self.calls_per_block))
        return seconds

    def _count_calls(self, call: Call) -> int:
        """Returns how many calls take at least `BLOCK_S`."""
        __tracebackhide__ = True
        count, started_s, spent_s = 1, time.perf_counter(), 0.0
        while (block_s := self._time(call, count)) < BLOCK_S:
            spent_s += block_s
            elapsed_s = time.perf_counter() - started_s
            if elapsed_s > PATIENCE_S and spent_s < LEAST_SHARE * elapsed_s:
                raise ValueError(
                    f"the functions mostly wait: {spent_s:.4f} s of the clock {self.clock!r} "
                    f"passed in {elapsed_s:.1f} s; give clock='wall'"
                )
            count *= 2
        return math.ceil(count * BLOCK_S / block_s)


def _warm_up(call: Call) -> None:
    started_s = time.perf_counter()
    call()
    while time.perf_counter() - started_s < WARMUP_S:
        call()


def _gpus() -> Any:
    """Returns torch's module `cuda`, and the GPUs; none if it has not used any yet."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None, ()
    return torch.cuda, range(torch.cuda.device_count())


def _gpus_in_use() -> list[int]:
    """Returns the GPUs on which torch holds memory.

    Waiting for another one would create a context on it, or fail if it belongs to another process.
    """
    cuda, gpus = _gpus()
    return [gpu for gpu in gpus if cuda.memory_stats(gpu).get("reserved_bytes.all.current", 0)]


def _gpu_allocations() -> list[int]:
    """Waits for each GPU in use and returns how often torch has allocated memory on each."""
    cuda, gpus = _gpus()
    for gpu in _gpus_in_use():
        cuda.synchronize(gpu)
    return [cuda.memory_stats(gpu).get("allocation.all.allocated", 0) for gpu in gpus]


def _gpu_is_busy() -> bool:
    """Whether a GPU still works: calls return before their kernels end."""
    cuda, _ = _gpus()
    return any(not cuda.current_stream(gpu).query() for gpu in _gpus_in_use())


def _processor_s(call: Call, count: int) -> float:
    started_s = time.process_time()
    for _ in range(count):
        call()
    return time.process_time() - started_s


def _wall_s(call: Call, count: int) -> float:
    started_s = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started_s


def _gpu_s(call: Call, count: int) -> float:
    cuda = sys.modules["torch"].cuda  # loaded by the functions
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000

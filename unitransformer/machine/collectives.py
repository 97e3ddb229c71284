"""Measures every collective on all ranks, in seconds of the slowest rank, from KiB to MiB.

All ranks make the same calls: they agree on every decision that depends on a clock.
"""

import math
import time
from collections.abc import Callable
from typing import assert_never, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from unitransformer.machine.alpha_beta import MIN_SIZES, Collective, CollectiveTiming
from unitransformer.machine.timing import MIN_SAMPLES, Clock, choose_clock, wait_for_others

SMALLEST_BYTES = 2**10
LARGEST_BYTES = {"cpu": 2**24, "cuda": 2**28}
SAMPLE_S = 0.002  # least duration of a sample, unless it has MAX_CALLS
MAX_CALLS = 50
MAX_CALL_SHARE = 1 / 20  # of the budget
WARM_UP_CALLS = 3  # the first one connects
# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def measure_collectives(
    device: torch.device, *, budget_s: float
) -> dict[Collective, tuple[CollectiveTiming, ...]]:
    """Measures the default process group; all ranks must call this and get the same result.

    A slow network takes longer than `budget_s`, because each collective is measured for at least
    MIN_SIZES sizes, MIN_SAMPLES times.
    """
    collectives = get_args(Collective)
    return {
        collective: measure_collective(collective, device, budget_s=budget_s / len(collectives))
        for collective in collectives
    }


def measure_collective(
    collective: Collective, device: torch.device, *, budget_s: float
) -> tuple[CollectiveTiming, ...]:
    """Measures one collective, doubling the size up to what the budget allows."""
    clock = choose_clock(device)
    started_s = time.monotonic()
    works: dict[int, Callable[[], object]] = {}
    calls: dict[int, int] = {}
    unit = 4 * dist.get_world_size()  # one float32 per rank
    wanted = SMALLEST_BYTES
    while wanted <= LARGEST_BYTES[device.type]:
        size = math.ceil(wanted / unit) * unit
        work = build_call(collective, size, device)
        clock(work, WARM_UP_CALLS)
        call_s = _slowest([_sample(work, 1, device, clock)], device)[0]
        works[size] = work
        calls[size] = min(MAX_CALLS, max(1, math.ceil(SAMPLE_S / call_s)))
        if len(works) >= MIN_SIZES and 2 * call_s > budget_s * MAX_CALL_SHARE:
            break
        wanted *= 2
    # Sizes take turns, so that a temporary slowdown affects all of them.
    rounds: list[list[float]] = []
    spent_s = 0.0
    while len(rounds) < MIN_SAMPLES or _slowest([spent_s], device)[0] < budget_s:
        rounds.append([_sample(work, calls[size], device, clock) for size, work in works.items()])
        spent_s = time.monotonic() - started_s
    seconds = _slowest([second for samples in rounds for second in samples], device)
    return tuple(
        CollectiveTiming(
            size_bytes=size, calls=calls[size], seconds=tuple(seconds[index :: len(works)])
        )
        for index, size in enumerate(works)
    )


def build_call(
    collective: Collective, size_bytes: int, device: torch.device
) -> Callable[[], object]:
    """Returns a call on a whole array of `size_bytes`, a multiple of 4 times the number of ranks.

    The array holds zeros, since repeated sums of other numbers would overflow.
    """
    whole = torch.zeros(size_bytes // 4, device=device)
    part = torch.zeros(size_bytes // 4 // dist.get_world_size(), device=device)
    # Without async_op, each call returns when it has finished.
    match collective:
        case "all_reduce":
            return lambda: dist.all_reduce(whole)
        case "all_gather":
            return lambda: _all_gather(whole, part)
        case "reduce_scatter":
            return lambda: _reduce_scatter(part, whole)
        case "broadcast":
            return lambda: dist.broadcast(whole, src=0)
        case unknown:
            assert_never(unknown)


def _sample(work: Callable[[], object], calls: int, device: torch.device, clock: Clock) -> float:
    wait_for_others(device)
    return clock(work, calls)


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Returns the maximum over the ranks of each value."""
    maximum: Tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return maximum.tolist()

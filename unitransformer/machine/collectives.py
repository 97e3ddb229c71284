"""Collectives over all ranks in, seconds of the slowest rank out, for sizes from KiB to MiB.

All ranks make the same calls: whatever depends on a clock is agreed on first.
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
SAMPLE_S = 0.002  # a sample holds as many calls, MOST_CALLS at most
MOST_CALLS = 50
LARGEST_PART = 20  # one call may take a twentieth of the budget
WARMING = 3  # calls: the first makes connections
# Their names from torch 2.13 on, and those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def measure_collectives(
    device: torch.device, *, budget_s: float
) -> dict[Collective, tuple[CollectiveTiming, ...]]:
    """Every collective over the default process group; all ranks call this and get the same.

    Args:
        budget_s: seconds for all of them together; a slow network takes more, for it is measured
            at LEAST_SIZES sizes and LEAST_SAMPLES times.
    """
    collectives = get_args(Collective)
    return {
        collective: measure_collective(collective, device, budget_s=budget_s / len(collectives))
        for collective in collectives
    }


def measure_collective(
    collective: Collective, device: torch.device, *, budget_s: float, clock: Clock | None = None
) -> tuple[CollectiveTiming, ...]:
    """Points of one collective, twice as large each, up to what the budget allows."""
    clock = clock or choose_clock(device)
    started_s = time.monotonic()
    works: dict[int, Callable[[], object]] = {}
    calls: dict[int, int] = {}
    unit = 4 * dist.get_world_size()  # a float32 of each rank
    wanted = SMALLEST_BYTES
    while wanted <= LARGEST_BYTES[device.type]:
        size = math.ceil(wanted / unit) * unit
        work = build_call(collective, size, device)
        clock(work, WARMING)
        call_s = _slowest([_sample(work, 1, device, clock)], device)[0]
        works[size] = work
        calls[size] = min(MOST_CALLS, max(1, math.ceil(SAMPLE_S / call_s)))
        if len(works) >= MIN_SIZES and 2 * call_s > budget_s / LARGEST_PART:
            break
        wanted *= 2
    # All sizes in turn: what slows a machine for a while slows all of them.
    rounds: list[list[float]] = []
    spent_s = 0.0
    while len(rounds) < MIN_SAMPLES or _slowest([spent_s], device)[0] < budget_s:
        rounds.append([_sample(work, calls[size], device, clock) for size, work in works.items()])
        spent_s = time.monotonic() - started_s
    seconds = _slowest([second for one in rounds for second in one], device)
    return tuple(
        CollectiveTiming(
            size_bytes=size, calls=calls[size], seconds=tuple(seconds[index :: len(works)])
        )
        for index, size in enumerate(works)
    )


def build_call(collective: Collective, size_bytes: int, device: torch.device) -> Callable[[], None]:
    """One call whose whole array has `size_bytes`, a multiple of 4 times the number of ranks.

    Zeros: sums of sums would overflow.
    """
    whole = torch.zeros(size_bytes // 4, device=device)
    part = torch.zeros(size_bytes // 4 // dist.get_world_size(), device=device)
    match collective:
        case "all_reduce":
            return lambda: _done(dist.all_reduce(whole))
        case "all_gather":
            return lambda: _done(_all_gather(whole, part))
        case "reduce_scatter":
            return lambda: _done(_reduce_scatter(part, whole))
        case "broadcast":
            return lambda: _done(dist.broadcast(whole, src=0))
        case unknown:
            assert_never(unknown)


def _done(_: object) -> None:
    """A call without async_op has waited already."""


def _sample(work: Callable[[], object], calls: int, device: torch.device, clock: Clock) -> float:
    wait_for_others(device)
    return clock(work, calls)


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Each on the rank that took longest; the same on all ranks."""
    told: Tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.tolist()

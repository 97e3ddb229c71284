"""Counter-based random numbers: functions of seed, epoch and sample index alone, on any device.

Each number is a counter hashed by the SplitMix64 finalizer (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"). A sample therefore gets the same numbers on any rank
and in any batch. The arithmetic uses 64-bit integers, whose products wrap around.
"""

import torch
from torch import Tensor

# SplitMix64's constants as signed integers: torch has no arithmetic on unsigned ones.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def uniform(seed: int, epochs: Tensor | int, indices: Tensor, count: int) -> Tensor:
    """Returns numbers in [0, 1), float64 (B, count), for the samples `indices` (B,)."""
    state = _mix(torch.full_like(indices, seed))
    state = _mix(state ^ epochs)
    state = _mix(state ^ indices)
    lanes = torch.arange(1, count + 1, device=indices.device) * GAMMA
    return _shift_right(_mix(state[:, None] + lanes), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + GAMMA
    x = (x ^ _shift_right(x, 30)) * FIRST
    x = (x ^ _shift_right(x, 27)) * SECOND
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts in zeros from the left even if `x` is negative."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""Random numbers that are functions of seed, epoch and sample alone, on any device.

A counter goes through the SplitMix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators"), so a batch needs no generator a sample, and how samples are spread
over ranks changes none of them. All on 64-bit integers, whose products wrap.
"""

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    return constant - (1 << 64)


GAMMA = _signed(0x9E3779B97F4A7C15)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniform(seed: int, epochs: Tensor | int, indices: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (B, `count`), for the samples `indices` (B,), on their device."""
    state = _mix(torch.full_like(indices, seed))
    state = _mix(state ^ epochs)
    state = _mix(state ^ indices)
    lanes = torch.arange(1, count + 1, device=indices.device) * GAMMA
    mixed = _mix(state[:, None] + lanes)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + GAMMA
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

"""Builds the pairs of comparisons, on a machine whose speed wanders."""

import math
import random

from scaling.comparison.interleave import Blocks, SideName, Start

Pairs = tuple[list[float], list[float]]


def on_busy_machine(count: int, slowdown: float, seed: int, *, deviation: float = 0.1) -> Pairs:
    """Returns pairs of seconds whose logarithm is AR(1) of 0.9, with 5 % of spikes."""
    rng, level = random.Random(seed), 0.0
    base, candidate = list[float](), list[float]()
    for _ in range(count):
        times = []
        for _ in range(2):
            level = 0.9 * level + math.sqrt(1 - 0.81) * deviation * rng.gauss(0, 1)
            spike = rng.random() if rng.random() < 0.05 else 0.0
            times.append(0.01 * math.exp(level + spike))
        rng.shuffle(times)
        base.append(times[0])
        candidate.append(times[1] * (1 + slowdown))
    return base, candidate


def make_start(
    count: int = 80,
    slowdown: float = 0.0,
    seed: int = 0,
    *,
    devices: tuple[str, str] = ("cpu", "cpu"),
    builds: tuple[str, str] = ("CPU", "CPU"),
    losses: tuple[list[float], list[float]] = ([1.0], [1.0]),
) -> Start:
    """Returns a start whose wall times are twice its processor times."""
    sides = [
        Blocks(
            processor_s=seconds,
            wall_s=[2 * s for s in seconds],
            losses=side_losses,
            peak_bytes=2**30,
        )
        for seconds, side_losses in zip(on_busy_machine(count, slowdown, seed), losses, strict=True)
    ]
    first: list[SideName] = ["base"] * count
    names: tuple[SideName, SideName] = ("base", "candidate")
    return Start(
        steps_per_block=1,
        first=tuple(first),
        base=sides[0],
        candidate=sides[1],
        about={
            name: {
                "versions": {"python": "3.11.7", "torch": "2.13.0", "torch build": build},
                "device": device,
                "clock": "processor",
            }
            for name, device, build in zip(names, devices, builds, strict=True)
        },
    )

"""Builds the times of a self-test of comparisons."""

import random
from collections.abc import Mapping
from typing import Any

from scaling.comparison.self_test import CLOCKS, Times, describe
from scaling.comparison.verdict import LOOKS

SLOWDOWNS = {"base": 1.0, "equal": 1.0, "2 %": 1.02, "5 %": 1.05}


def make_times(
    trials: int = 20,
    factors: Mapping[str, float] = SLOWDOWNS,
    *,
    drift: float = 0.0,
    noise: float = 0.03,
) -> Times:
    """Returns steps of 10 ms with noise, on a machine that gets slower by `drift` in total."""
    rng = random.Random(0)
    return {
        clock: {
            arm: [
                [
                    round(
                        1e4 * steps * factor * (1 + drift * trial / trials)
                        * rng.lognormvariate(0, noise),
                        1,
                    )
                    for _ in range(LOOKS[-1] // steps)
                ]
                for trial in range(trials)
            ]
            for arm, factor in factors.items()
        }
        for clock, steps in CLOCKS.items()
    }  # fmt: skip


def make_self_test(times: Times | None = None, **changes: Any) -> dict[str, Any]:
    """Returns the content of a record."""
    about = {
        "command": "python -m scaling compare --self-test --trials 20 --out self-test.json",
        "started_at": "2026-01-01T00:00:00+00:00",
        "elapsed_s": 60.0,
        "machine": {"cpu": "a processor", "cpu_cores": 2},
        "code": {"commit": "0123456789abcdef", "is_dirty": False},
    }
    return describe(make_times() if times is None else times, about | changes)

"""Builds runs on several devices, for scaling curves."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scaling.store.run import Run
from tests.builders.records import HOST, make_config, make_record, make_run
from unitransformer.config import ParallelConfig, to_dict

NOISE = 0.1
CLEAN = {"commit": "0123456789abcdef", "is_dirty": False}


def make_spread(
    step_s: float,
    name: str = "runs/a.json",
    *,
    steps: int = 60,
    noise: float = 0.0,
    parts: tuple[float, float] = (0.1, 0.3),
    slowest: Sequence[int] = (0,),
    batch_size: int = 2,
    accumulate: int = 1,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    **parallel: Any,
) -> Run:
    """A run of `steps` steady steps on one or more devices.

    Args:
        noise: each step takes longer by a random share up to this.
        parts: shares of the step for input and optimizer; the rest is forward and backward.
        slowest: the slowest rank of each step, repeated in a cycle.
    """
    rng = random.Random(name)
    step_s_all = [0.5, 0.3] + [step_s * (1 + noise * rng.random()) for _ in range(steps)]
    record = make_record(step_s=step_s_all)
    parallel_config = ParallelConfig(**{"accelerator": "cpu"} | parallel)
    config = replace(
        make_config(),
        parallel=parallel_config,
        batch_size=batch_size,
        accumulate=accumulate,
        seed=seed,
    )
    shares = {"data_s": parts[0], "optimizer_s": parts[1], "forward_backward_s": 1 - sum(parts)}
    record["samples"] |= {
        part: [share * s for s in step_s_all] for part, share in shares.items()
    } | {"slowest_rank": [slowest[step % len(slowest)] for step in range(len(step_s_all))]}
    return make_run(
        record
        | {
            "config": to_dict(config),
            "world_size": parallel_config.world_size,
            "global_batch_size": config.global_batch_size,
            "hardware": [HOST] * parallel_config.world_size,
            "trace": [None] * parallel_config.world_size,
            "code": CLEAN,
        }
        | (changes or {}),
        name,
    )


def strong(step_s: float, devices: int, name: str = "", **changes: Any) -> Run:
    """A DDP run with a global batch of 8, for strong scaling."""
    options: dict[str, Any] = {"strategy": "ddp", "batch_size": 8 // devices}
    return make_spread(step_s, name or f"runs/{devices}.json", devices=devices, **options | changes)


def way(strategy: str, step_s: float, name: str = "", *, steps: int = 60, **changes: object) -> Run:
    """A candidate on two devices whose steps vary by `NOISE`."""
    name = name or f"runs/{strategy}.json"
    options = {"strategy": strategy, "noise": NOISE, "steps": steps}
    return strong(step_s, 2, name, **options | changes)


def repeated(strategy: str, *steps_s: float, **changes: object) -> list[Run]:
    """Launches of one candidate, each with another step time."""
    return [
        way(strategy, step_s, f"runs/{strategy}-{number}-{changes}.json", **changes)
        for number, step_s in enumerate(steps_s)
    ]


def weak(step_s: float, devices: int, **changes: Any) -> Run:
    """A DDP run with a batch of 2 per device, for weak scaling."""
    return make_spread(step_s, f"runs/{devices}.json", devices=devices, strategy="ddp", **changes)


def traced(communication: float, idle: float) -> dict[str, Any]:
    """The trace field of a record whose first rank was traced."""
    shares = {"communication": communication, "idle": idle, "other": 1 - communication - idle}
    rows = [{"part": part, "share": share} for part, share in shares.items()]
    return {"trace": [{"rows": rows, "step_s": 0.08, "steps": [40]}, None]}


def clocked(communication: float, least: float) -> dict[str, list[float]]:
    """Communication seconds of 62 steps; they are part of forward and backward."""
    return {"communication_s": [communication] * 62, "min_communication_s": [least] * 62}

"""Builds records of comparisons with peers for tests."""

import copy
from dataclasses import replace
from typing import Any

from scaling.peers.record import describe_comparison
from tests.builders.records import make_config
from unitransformer.config import ParallelConfig, Recipe, to_dict

OURS_S = (1.0, 1.1, 0.9, 1.0, 1.2, 1.0)


def make_side(wall_s: tuple[float, ...], *, mib: int, loss: float = 6.0) -> dict[str, Any]:
    """A side whose imports take 100 MiB and whose training takes `mib` beyond them."""
    return {
        "base_bytes": 100 * 2**20,
        "peak_bytes": (100 + mib) * 2**20,
        "num_parameters": 1000,
        "wall_s": list(wall_s),
        "processor_s": [2 * s for s in wall_s],
        "first_losses": [loss, loss - 0.5],
    }


def make_comparison(
    peer: str = "plain",
    *,
    recipe: Recipe = "gpt",
    factor: float = 2.0,
    form: str = "",
    mode: str = "off",
    mib: int = 200,
    peer_loss: float = 6.0,
    failure: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A record in which each block of the peer takes `factor` times as long as ours."""
    parallel = ParallelConfig(strategy="single", accelerator="cpu")
    config = to_dict(replace(make_config(recipe), parallel=parallel))
    measured: dict[str, Any] = {
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "code": {"commit": "0123456789abcdef", "is_dirty": False},
        "failure": failure,
    }
    if failure is None:
        measured |= {
            "steps_per_block": 2,
            "first": ["ours", "peer"] * 3,
            "sides": {
                "ours": make_side(OURS_S, mib=100),
                "peer": make_side(tuple(factor * s for s in OURS_S), mib=mib, loss=peer_loss),
            },
        }
    fields = {
        "config": config,
        "peer": peer,
        "form": form,
        "compile": mode,
        "machine": {"fingerprint": "f" * 12, "cpu": "a processor", "memory_gib": 8, "gpus": []},
        "command": f"python -m scaling peers --recipe {recipe}",
        "started_at": "2026-01-01T00:00:00+00:00",
        "elapsed_s": 9.0,
    }
    return copy.deepcopy(describe_comparison(fields, measured) | changes)

"""Builds parity certificates for tests."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaling.parity.cases import Case, Curves, ParityVerdict
from scaling.parity.certificate import describe_bounds, describe_result
from scaling.parity.certificate_file import read_certificate
from tests.builders.records import HOST, make_config
from unitransformer.config import ParallelConfig, Recipe, to_dict

STEPS = 20


PLAIN = Curves(loss=(2.0,) * STEPS, gradient_norm=(1.0,) * STEPS)


def scaled(loss: float, gradient_norm: float = 1.0) -> Curves:
    """The plain curves with their last step multiplied."""
    return Curves(
        loss=(*PLAIN.loss[:-1], 2.0 * loss),
        gradient_norm=(*PLAIN.gradient_norm[:-1], gradient_norm),
    )


def make_result(
    case: Case, curves: Curves | None = None, failure: tuple[ParityVerdict, str] | None = None
) -> dict[str, Any]:
    """One case of a certificate: measured against the reference `PLAIN`, or failed."""
    return describe_result(
        case,
        reference=PLAIN,
        curves=curves,
        work=None,
        num_layers=2,
        failure=failure,
        elapsed_s=1.5,
        command=f"python -m recipes.gpt --strategy {case.strategy}",
    )


DDP, FSDP = Case(strategy="ddp", devices=2), Case(strategy="fsdp", devices=2)


RESULTS = [
    make_result(Case(strategy="single"), PLAIN),
    make_result(DDP, scaled(1 + 2**-20)),  # about a millionth more
    make_result(replace(DDP, precision="bf16-mixed"), scaled(1 + 2**-10)),
    make_result(FSDP, scaled(1.0, 2.0)),
    make_result(replace(FSDP, precision="16-mixed"), failure=("refused", "no loss scaler sees it")),
    make_result(replace(FSDP, compile="default"), failure=("failed", "timeout: more than 600 s")),
]


def make_certificate(
    recipe: Recipe = "gpt", *, results: Sequence[Mapping[str, Any]] = RESULTS, **changes: Any
) -> dict[str, Any]:
    """A certificate that is valid and agrees with itself; `changes` replace top-level fields."""
    parallel = ParallelConfig(strategy="single", accelerator="cpu")
    config = replace(make_config(recipe, num_steps=STEPS), parallel=parallel)
    return copy.deepcopy(
        {
            "schema": 1,
            "kind": "parity",
            "recipe": recipe,
            "config_hash": config.hash(),
            "identity_hash": config.identity_hash(),
            "accelerator": "cpu",
            "device_counts": [2],
            "steps": STEPS,
            "seed": 0,
            "global_batch_size": 2,
            "bounds": describe_bounds(),
            "config": to_dict(config),
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "code": {"commit": "0123456789abcdef", "is_dirty": False},
            "hardware": [HOST],
            "data": {"description": "a small text", "sha256": "ab" * 32},
            "command": f"python -m scaling parity --recipe {recipe} --devices 2",
            "started_at": "2026-01-01T00:00:00+00:00",
            "elapsed_s": 9.0,
            "reference": {
                "command": f"python -m recipes.{recipe} --strategy single",
                "elapsed_s": 1.0,
                "loss": list(PLAIN.loss),
                "gradient_norm": list(PLAIN.gradient_norm),
            },
            "cases": list(results),
        }
        | changes
    )


ZERO1 = make_result(Case(strategy="zero1", devices=2), PLAIN)
# ddp and zero1 are equal to the reference, fsdp is different, fsdp1 was not tried.
CERTIFICATES = [read_certificate(make_certificate(results=[*RESULTS, ZERO1]), "runs/parity.json")]

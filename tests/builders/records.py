"""Builds run records and runs for tests."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from scaling.store.run import Run
from unitransformer.config import DataConfig, ModelConfig, Recipe, RunConfig, to_dict
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.machine.calibration import Ceiling, WorkSamples
from unitransformer.measure.compile_ledger import CompileLedger
from unitransformer.record.metrics import compute_metrics, compute_mfu, recorded_steady_state
from unitransformer.record.schema import SCHEMA, Record, config_of
from unitransformer.stats.steady_state import SteadyState

STEP_S = [0.5, 0.3] + [0.1] * 10  # two slow steps, then ten steady ones
HOST = {
    "hostname": "secret-node-7",
    "cpu": "Example 9000",
    "cpu_cores": 2,
    "memory_bytes": 4 * 2**30,
    "system": "Linux 6.1",
    "machine": "x86_64",
    "device": "cpu",
    "threads": 2,
    "float32_matmul_precision": "highest",
}
# 1 GFLOP in 10 ms, 1 GB in 0.1 s.
CEILING = Ceiling(
    device="cpu",
    dtype="float32",
    threads=2,
    matmul=(WorkSamples(name="x W^T 8x8x8", work=10**9, seconds=(0.02, 0.01)),),
    copy=WorkSamples(name="copy", work=10**9, seconds=(0.1,)),
    elapsed_s=0.2,
).as_dict()


def make_config(recipe: Recipe = "gpt", *, num_steps: int = len(STEP_S)) -> RunConfig:
    """The config of a tiny run; a step has 16 tokens or 2 images."""
    images = {"image_size": 8, "patch_size": 4, "num_positions": 5, "num_classes": 3}
    shape = images if recipe == "vit" else {"num_positions": 8, "num_classes": 50}
    model = ModelConfig(
        width=16, num_layers=2, num_heads=4, feedforward_width=32, causal=recipe == "gpt", **shape
    )
    return RunConfig(
        recipe=recipe,
        size="tiny",
        model=model,
        data=DataConfig(),
        batch_size=2,
        max_steps=num_steps,
    )


def make_record(
    recipe: Recipe = "gpt", *, step_s: list[float] | None = None, status: str = "ok", **changes: Any
) -> Record:
    """Builds a valid run record. This is the schema by example: every field has a plausible value.

    All derived fields follow from `recipe` and `step_s`, so the record agrees with itself.

    Args:
        recipe: `vit` counts images, the others count tokens.
        step_s: seconds of every step, by default `STEP_S`. The first two are warm-up if there are
            at least 8; fewer steps have no steady state, and so no rate.
        status: how the run ended; `make_crashed` adds the error that belongs to a failure.
        changes: top-level fields to replace or add, which may make the record inconsistent.
    """
    step_s = STEP_S if step_s is None else step_s
    steps = len(step_s)
    config = make_config(recipe, num_steps=max(1, steps))
    unit = "image" if recipe == "vit" else "token"
    steady_from = 2 if steps >= 8 else None
    steady = SteadyState(
        start=steady_from, reason=None if steady_from else f"{steps} steps, needs 8"
    )
    record = {
        # What ran.
        "schema": SCHEMA,
        "status": status,
        "recipe": recipe,
        "size": "tiny",
        "config": to_dict(config),
        "world_size": 1,
        "global_batch_size": config.global_batch_size,
        "num_parameters": count_parameters(config.model),
        "command": f"python -m recipes.{recipe} --max-steps {steps}",
        "code": {"commit": "0123456789abcdef", "is_dirty": True},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": [HOST],  # one entry per rank
        "data": {"description": "a small text", "sha256": "ab" * 32},
        # Raw samples, one per step.
        "segment_starts": [0],  # the step at which each launch began
        "loss": [3.0 - 0.1 * step for step in range(steps)],
        "learning_rate": [1e-3] * steps,
        "step_s": step_s,
        "samples": _make_samples(step_s),
        # What follows from the raw samples.
        "excluded_steps": [],
        "steady_from": steady_from,
        "steady_method": steady.method,
        "no_steady_state_reason": steady.reason,
        "flags": [],
        "host_load": [],
        # Readings of the instruments, one per rank.
        "gpu": [None],
        "ceiling": [CEILING],
        "compile": [CompileLedger("off").as_dict()],
        "trace": [None],
        "tensor_bytes": [{"bytes": 2**30}],
        "peak_bytes": [2**30],
        "peak_bytes_kind": "tensors",
        "peak_reserved_bytes": [None],
        "peak_resident_bytes": [3 * 2**29],
        f"flops_per_{unit}": count_flops(config),
        # What people read.
        "validation": _make_validation(recipe, step=max(1, steps)),
        "summary": f"0 | embedding of {recipe} | Embeddings | 800",
        "log": [f"step {step}/{steps} | loss 2.0" for step in range(1, steps + 1)],
        "error": None,
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    return with_metrics(record) | changes


def _make_samples(step_s: list[float]) -> dict[str, Any]:
    """10 % of each step loads data, 60 % is forward and backward, 30 % is the optimizer."""
    return {
        "cpu_s": [2 * s for s in step_s],
        "data_s": [0.1 * s for s in step_s],
        "forward_backward_s": [0.6 * s for s in step_s],
        "optimizer_s": [0.3 * s for s in step_s],
        "slowest_rank": [0] * len(step_s),
    }


def _make_validation(recipe: Recipe, *, step: int) -> dict[str, Any]:
    """A validation loss of 2 nats, better than the trivial baseline."""
    by_loss = {"name": "unigram entropy", "loss": 2.5, "accuracy": None}
    by_accuracy = {"name": "majority class 1", "loss": None, "accuracy": 0.25}
    return {
        "history": [{"step": step, "val_loss": 2.0, "val_accuracy": 0.5}],
        "loss": 2.0,
        "metric": {"gpt": "perplexity", "bert": "masked accuracy", "vit": "top-1"}[recipe],
        "value": 7.38905609893065 if recipe == "gpt" else 0.5,
        "baseline": by_loss if recipe == "gpt" else by_accuracy,
    }


def make_crashed(recipe: Recipe = "gpt", **changes: Any) -> Record:
    """A record of a run whose rank 0 raised an error."""
    error = {"type": "RuntimeError", "message": "it broke", "rank": 0, "last_lines": []}
    return make_record(recipe, status="crashed") | {"validation": {}, "error": error} | changes


def with_metrics(record: Record) -> Record:
    """The record with the metrics that follow from its samples, config and hardware."""
    config = config_of(record)
    metrics = compute_metrics(
        record["step_s"],
        record["samples"],
        recorded_steady_state(record),
        segment_starts=record["segment_starts"],
        units_per_step=config.global_batch_size * config.tokens_per_sample,
    )
    rate = None if metrics is None else metrics.units_per_s
    rows = compute_mfu(config, rate, record["hardware"], record["ceiling"])
    return record | {
        "metrics": {} if metrics is None else metrics.as_dict(),
        f"{'image' if config.recipe == 'vit' else 'token'}s_per_s": rate,
        "mfu": [asdict(row) for row in rows],
    }


def make_run(record: Record | None = None, name: str = "runs/a.json") -> Run:
    """A run of the file `name` whose metrics follow from its samples."""
    return as_recorded(with_metrics(make_record() if record is None else record), name)


def as_recorded(record: Record, name: str = "runs/a.json") -> Run:
    """A run with the metrics that its record holds, whatever its samples say."""
    return Run(name=name, record=record, config=config_of(record))


def broken_variants(record: Record) -> Iterator[Record]:
    """Copies of `record`, each with one value replaced by one that may or may not be valid."""
    for path in list(_paths(record)):
        for value in (None, "x|y", -1, 10**400, [], {}, [None]):
            broken = copy.deepcopy(record)
            place: Any = broken
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield broken


def _paths(values: Any) -> Iterator[tuple[Any, ...]]:
    keys = values if isinstance(values, dict) else range(min(1, len(values)))
    for key in keys:
        yield (key,)
        if isinstance(values[key], dict | list):
            yield from ((key, *rest) for rest in _paths(values[key]))

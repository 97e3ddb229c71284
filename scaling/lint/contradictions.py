"""Recomputes the numbers of a record from its raw samples and reports where they differ."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from scaling.store.run import Run
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.machine.calibration_store import read_ceiling
from unitransformer.measure.nvml import energy_between_samples
from unitransformer.record.fields import NUMBER, RELATIVE_ERROR, is_of_kind, look_up
from unitransformer.record.metrics import (
    compute_metrics,
    compute_mfu,
    find_last_steady_state,
    recorded_steady_state,
)
from unitransformer.record.schema import Record
from unitransformer.record.units import perplexity

MFU_FIELDS = ("flops_per_unit", "flops_per_s", "utilisation", "share_of_ceiling")


def find_contradictions(run: Run) -> list[str]:
    """Returns the derived fields of an `ok` run that its samples and config contradict."""
    rate, record = f"{run.unit}s_per_s", run.record
    steady = recorded_steady_state(record)
    metrics = compute_metrics(
        record["step_s"],
        record["samples"],
        steady,
        segment_starts=record["segment_starts"],
        units_per_step=run.units_per_step,
    )
    derived = {} if metrics is None else metrics.as_dict()
    validation = record["validation"]
    fields: dict[str, tuple[Any, Any]] = {}
    fields[rate] = (record.get(rate), derived.get("units_per_s"))
    for name in sorted(record["metrics"].keys() | derived.keys()):
        fields[f"metrics.{name}"] = (record["metrics"].get(name), derived.get(name))
    first = record["segment_starts"][-1]
    steps = {first + step for step in steady.steps(len(record["step_s"]) - first)}
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            for name, energy in energy_between_samples(gpu["samples"], steps).as_dict().items():
                fields[f"gpu.{rank}.{name}"] = (gpu.get(name), energy)
    fields["num_parameters"] = (record["num_parameters"], count_parameters(run.config.model))
    if validation["metric"] == "perplexity":  # an accuracy cannot be recomputed
        fields["validation.value"] = (validation["value"], perplexity(validation["loss"]))
    return [*_ceilings(record), *_differences(fields)]


def _ceilings(record: Record) -> Iterator[str]:
    for rank, ceiling in enumerate(record["ceiling"]):
        if ceiling is not None:
            try:
                read_ceiling(ceiling, f"ceiling.{rank}")
            except ValueError as error:
                yield str(error)


def find_recounts(run: Run) -> list[str]:
    """Returns where the current code counts FLOPs, MFU or the start of the steady state differently
    from the version that wrote the record."""
    flops, record = f"flops_per_{run.unit}", run.record
    steady = find_last_steady_state(
        record["step_s"], segment_starts=record["segment_starts"], excluded_steps=run.excluded_steps
    )
    start = None if steady.start is None else record["segment_starts"][-1] + steady.start
    today = compute_mfu(run.config, run.units_per_s, record["hardware"], record["ceiling"])
    stored = {row.convention: row for row in run.mfu}
    return _differences(
        {
            "steady_from": (record["steady_from"], start),
            **{
                f"{flops}.{name}": (look_up(record, f"{flops}.{name}"), count)
                for name, count in count_flops(run.config).items()
            },
            **{
                f"mfu.{row.convention}.{name}": (
                    getattr(stored.get(row.convention), name, None),
                    getattr(row, name),
                )
                for row in today
                for name in MFU_FIELDS
            },
        }
    )


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{field} is {_text(stored)} in the record, {_text(derived)} by its samples and config"
        for field, (stored, derived) in fields.items()
        if not _agree(stored, derived)
    ]


def _agree(stored: Any, derived: Any) -> bool:
    if derived is None or isinstance(derived, str):
        return bool(stored == derived)
    return is_of_kind(stored, NUMBER) and math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)


def _text(value: Any) -> str:
    return "nothing" if value is None else repr(value)

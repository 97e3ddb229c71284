"""Recomputes the numbers of a record from its raw samples and reports where they differ."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from scaling.store.run import Run
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.machine.calibration_store import read_ceiling
from unitransformer.measure.nvml import energy_between_samples
from unitransformer.record.fields import NUMBER, RELATIVE_ERROR, fits, look_up
from unitransformer.record.metrics import passport_of, read_out, recorded_steady, steady_of
from unitransformer.record.schema import Record
from unitransformer.record.units import perplexity

MFU_FIELDS = ("flops_per_unit", "flops_per_s", "utilisation", "share_of_ceiling")


def find_contradictions(run: Run) -> list[str]:
    """Returns the derived fields of an `ok` run that its samples and config contradict."""
    rate, record = f"{run.unit}s_per_s", run.record
    metrics = read_out(
        record["step_s"],
        record["samples"],
        recorded_steady(record),
        segment_starts=record["segment_starts"],
        units_per_step=run.units_per_step,
    )
    derived = {} if metrics is None else metrics.as_dict()
    return [
        *_ceilings(record),
        *_differences(
            {
                rate: (record.get(rate), derived.get("units_per_s")),
                **{
                    f"metrics.{name}": (record["metrics"].get(name), derived.get(name))
                    for name in sorted(record["metrics"].keys() | derived.keys())
                },
                **dict(_joules(run)),
                "num_parameters": (record["num_parameters"], count_parameters(run.config.model)),
                "validation.value": (record["validation"]["value"], _metric(run)),
            }
        ),
    ]


def _ceilings(record: Record) -> Iterator[str]:
    for rank, ceiling in enumerate(record["ceiling"]):
        if ceiling is not None:
            try:
                read_ceiling(ceiling, f"ceiling.{rank}")
            except ValueError as error:
                yield str(error)


def _metric(run: Run) -> float:
    """Perplexity from the validation loss; an accuracy cannot be recomputed."""
    validation = run.record["validation"]
    if validation["metric"] == "perplexity":
        return perplexity(validation["loss"])
    return float(validation["value"])


def _joules(run: Run) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The recorded energy of each GPU, and that by its samples."""
    record, first = run.record, run.record["segment_starts"][-1]
    steps = {first + s for s in recorded_steady(record).steps(len(record["step_s"][first:]))}
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            for name, derived in energy_between_samples(gpu["samples"], steps).as_dict().items():
                yield f"gpu.{rank}.{name}", (gpu.get(name), derived)


def find_recounts(run: Run) -> list[str]:
    """Returns where the current code counts FLOPs, MFU or the start of the steady state differently
    from the version that wrote the record."""
    flops, record = f"flops_per_{run.unit}", run.record
    steady = steady_of(
        record["step_s"], segment_starts=record["segment_starts"], excluded_steps=run.excluded_steps
    )
    start = None if steady.start is None else record["segment_starts"][-1] + steady.start
    today = passport_of(run.config, run.units_per_s, record["hardware"], record["ceiling"])
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
    return fits(stored, NUMBER) and math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)


def _text(value: Any) -> str:
    return "nothing" if value is None else repr(value)

"""What a report needs of a run that ended well, beyond what `records.validate` looks at."""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from unitransformer.record.fields import HOST, NUMBER, Kinds, check_fields, check_lists
from unitransformer.record.metrics import PARTS
from unitransformer.record.schema import Record

FACTS: dict[str, Kinds] = {
    "num_parameters": int,
    "code.commit": (str, NoneType),
    "code.is_dirty": (bool, NoneType),
    "data.description": str,
    "data.sha256": (str, NoneType),
    "steady_method": str,
    "no_steady_state_reason": (str, NoneType),
    "peak_bytes_kind": str,
    "validation.loss": NUMBER,
    "validation.metric": str,
    "validation.value": NUMBER,
    "validation.baseline": (dict, NoneType),
    "mfu": list,
}
FIGURES: dict[str, Kinds] = {
    "num_steady_steps": int,
    "median_step_s": NUMBER,
    "mad_step_s": NUMBER,
    "low_step_s": (*NUMBER, NoneType),
    "high_step_s": (*NUMBER, NoneType),
    "interval": str,
    "median_cpu_s": NUMBER,
    "units_per_s": NUMBER,
    "low_units_per_s": (*NUMBER, NoneType),
    "high_units_per_s": (*NUMBER, NoneType),
    "mean_units_per_s": NUMBER,
    **{f"{part.removesuffix('_s')}_share": NUMBER for part in PARTS},
}
# Absent where nothing was measured.
OPTIONAL_FIGURES: dict[str, Kinds] = dict.fromkeys(
    ("communication_share", "waiting_share", "between_steps_share"), (*NUMBER, NoneType)
)
LISTS: dict[str, Kinds] = {
    "hardware": dict,
    "segment_starts": int,
    "log": str,
    "flags": str,
    "excluded_steps": dict,
    "ceiling": (dict, NoneType),
    "compile": dict,
    "gpu": (dict, NoneType),
    "peak_bytes": (int, NoneType),
    "peak_reserved_bytes": (int, NoneType),
    "peak_resident_bytes": (int, NoneType),
    "validation.history": dict,
}
OF_EVERY_RANK = ("hardware", "ceiling", "compile", "peak_bytes")
CEILING: dict[str, Kinds] = {
    "dtype": str,
    "matmul_flops_per_s": NUMBER,
    "copy_bytes_per_s": NUMBER,
}
UNSTEADY: dict[str, Kinds] = {"step": int, "reason": str}
LEDGER: dict[str, Kinds] = {
    "mode": str,
    "start": (str, NoneType),
    "compile_s": (*NUMBER, NoneType),
    "graphs": (int, NoneType),
}
GPU: dict[str, Kinds] = {
    "joules": (*NUMBER, NoneType),
    "joules_num_steps": (int, NoneType),
    "missing": dict,
}
LOOK: dict[str, Kinds] = {
    "step": int,
    "energy_j": (*NUMBER, NoneType),
    "sm_clock_hz": (*NUMBER, NoneType),
    "memory_clock_hz": (*NUMBER, NoneType),
    "power_w": (*NUMBER, NoneType),
    "temperature_c": (*NUMBER, NoneType),
    "clock_reasons": (list, NoneType),
}
LEDGER_LISTS: dict[str, Kinds] = {"graph_breaks": dict, "recompiles": dict}
BREAK: dict[str, Kinds] = {"where": str, "reason": str}
RECOMPILE: dict[str, Kinds] = {
    "step": (int, NoneType),
    "function": str,
    "reason": (str, NoneType),
}
BASELINE: dict[str, Kinds] = {
    "name": str,
    "loss": (*NUMBER, NoneType),
    "accuracy": (*NUMBER, NoneType),
}
POINT: dict[str, Kinds] = {"step": int, "val_loss": NUMBER, "val_accuracy": NUMBER}


def check_facts(record: Record) -> None:
    """Raises ValueError for the first fact that a report needs and this record does not have."""
    check_fields(record, FACTS, "record")
    check_lists(record, LISTS, "record")
    for field in (*OF_EVERY_RANK, "segment_starts"):
        if not record[field]:
            raise ValueError(f"record: {field} is empty")
    for index, item in enumerate(record["excluded_steps"]):
        check_fields(item, UNSTEADY, f"record: excluded_steps.{index}")
    for rank, ceiling in enumerate(record["ceiling"]):
        if ceiling is not None:
            check_fields(ceiling, CEILING, f"record: ceiling.{rank}")
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            check_fields(gpu, GPU, f"record: gpu.{rank}")
            check_lists(gpu, {"samples": dict}, f"record: gpu.{rank}")
            _check_items(gpu, "samples", LOOK, f"record: gpu.{rank}")
    for rank, ledger in enumerate(record["compile"]):
        where = f"record: compile.{rank}"
        check_fields(ledger, LEDGER, where)
        check_lists(ledger, LEDGER_LISTS, where)
        _check_items(ledger, "graph_breaks", BREAK, where)
        _check_items(ledger, "recompiles", RECOMPILE, where)
    for rank, host in enumerate(record["hardware"]):
        check_fields(host, HOST, f"record: hardware.{rank}", missing=None)
    _check_items(record["validation"], "history", POINT, "record: validation")
    if record["validation"]["baseline"] is not None:
        check_fields(record["validation"]["baseline"], BASELINE, "record: validation.baseline")
    _check_times(record)
    _check_figures(record)


def _check_figures(record: Record) -> None:
    figures = record["metrics"]
    if bool(figures) != (record["steady_from"] is not None):
        raise ValueError(
            f"record: metrics holds {len(figures)} fields, and steady_from is "
            f"{record['steady_from']}: there are figures where there is a steady state"
        )
    if figures:
        check_fields(figures, FIGURES, "record: metrics")
        check_fields(figures, OPTIONAL_FIGURES, "record: metrics", missing=None)
        for name in ("median_step_s", "units_per_s", "mean_units_per_s"):
            if figures[name] <= 0:
                raise ValueError(f"record: metrics.{name} is {figures[name]}; it must be above 0")


def _check_items(
    values: Mapping[str, Any], field: str, kinds: Mapping[str, Kinds], where: str
) -> None:
    for index, item in enumerate(values[field]):
        check_fields(item, kinds, f"{where}.{field}.{index}")


def _check_times(record: Record) -> None:
    steps, start = len(record["step_s"]), record["steady_from"]
    if min(record["step_s"]) <= 0:
        raise ValueError("record: step_s holds a step that took no time")
    if start is not None and not record["segment_starts"][-1] <= start < steps:
        raise ValueError(f"record: steady_from is {start}, outside the last launch's steps")

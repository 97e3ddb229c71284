"""What a report needs of the record of an `ok` run, beyond what `record.schema` validates."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from unitransformer.record.fields import HOST_FIELDS, NUMBER, Kinds, check_fields, check_lists
from unitransformer.record.metrics import PARTS
from unitransformer.record.schema import Record

OPTIONAL_NUMBER: Kinds = (*NUMBER, NoneType)
OPTIONAL_INT: Kinds = (int, NoneType)
OPTIONAL_STR: Kinds = (str, NoneType)
OPTIONAL_DICT: Kinds = (dict, NoneType)

FIELDS: dict[str, Kinds] = {
    **dict.fromkeys(("data.description", "steady_method", "peak_bytes_kind"), str),
    **dict.fromkeys(("code.commit", "data.sha256", "no_steady_state_reason"), OPTIONAL_STR),
    "num_parameters": int,
    "code.is_dirty": (bool, NoneType),
    **dict.fromkeys(("validation.loss", "validation.value"), NUMBER),
    "validation.metric": str,
    "validation.baseline": OPTIONAL_DICT,
    "mfu": list,
}
METRICS: dict[str, Kinds] = {
    "num_steady_steps": int,
    "interval": str,
    **dict.fromkeys(("median_step_s", "mad_step_s", "median_cpu_s"), NUMBER),
    **dict.fromkeys(("units_per_s", "mean_units_per_s"), NUMBER),
    **dict.fromkeys(("low_step_s", "high_step_s"), OPTIONAL_NUMBER),
    **dict.fromkeys(("low_units_per_s", "high_units_per_s"), OPTIONAL_NUMBER),
    **dict.fromkeys((f"{part.removesuffix('_s')}_share" for part in PARTS), NUMBER),
}
# Older records and runs without these measurements lack them.
OPTIONAL_METRICS: dict[str, Kinds] = dict.fromkeys(
    ("communication_share", "waiting_share", "between_steps_share"), OPTIONAL_NUMBER
)
LISTS: dict[str, Kinds] = {
    **dict.fromkeys(("hardware", "excluded_steps", "compile", "validation.history"), dict),
    **dict.fromkeys(("ceiling", "gpu"), OPTIONAL_DICT),
    **dict.fromkeys(("peak_bytes", "peak_reserved_bytes", "peak_resident_bytes"), OPTIONAL_INT),
    **dict.fromkeys(("log", "flags"), str),
    "segment_starts": int,
}
CEILING: dict[str, Kinds] = {
    "dtype": str,
    "matmul_flops_per_s": NUMBER,
    "copy_bytes_per_s": NUMBER,
}
EXCLUDED_STEP: dict[str, Kinds] = {"step": int, "reason": str}
COMPILE: dict[str, Kinds] = {
    "mode": str,
    "start": OPTIONAL_STR,
    "compile_s": OPTIONAL_NUMBER,
    "graphs": OPTIONAL_INT,
}
GPU: dict[str, Kinds] = {
    "joules": OPTIONAL_NUMBER,
    "joules_num_steps": OPTIONAL_INT,
    "missing": dict,
}
GPU_SAMPLE: dict[str, Kinds] = {
    "step": int,
    **dict.fromkeys(
        ("energy_j", "sm_clock_hz", "memory_clock_hz", "power_w", "temperature_c"), OPTIONAL_NUMBER
    ),
    "clock_reasons": (list, NoneType),
}
GRAPH_BREAK: dict[str, Kinds] = {"where": str, "reason": str}
RECOMPILE: dict[str, Kinds] = {"step": OPTIONAL_INT, "function": str, "reason": OPTIONAL_STR}
BASELINE: dict[str, Kinds] = {"name": str, "loss": OPTIONAL_NUMBER, "accuracy": OPTIONAL_NUMBER}
VALIDATION: dict[str, Kinds] = {"step": int, "val_loss": NUMBER, "val_accuracy": NUMBER}


def check_required_fields(record: Record) -> None:
    """Raises ValueError for the first field that is missing, malformed or inconsistent."""
    check_fields(record, FIELDS, "record")
    check_lists(record, LISTS, "record")
    for field in ("hardware", "ceiling", "compile", "peak_bytes", "segment_starts"):
        if not record[field]:
            raise ValueError(f"record: {field} is empty")
    _check_items(record["excluded_steps"], EXCLUDED_STEP, "record: excluded_steps")
    _check_items(record["ceiling"], CEILING, "record: ceiling")
    _check_items(record["gpu"], GPU, "record: gpu")
    for rank, gpu in enumerate(record["gpu"]):
        if gpu is not None:
            check_lists(gpu, {"samples": dict}, f"record: gpu.{rank}")
            _check_items(gpu["samples"], GPU_SAMPLE, f"record: gpu.{rank}.samples")
    _check_items(record["compile"], COMPILE, "record: compile")
    for rank, compiled in enumerate(record["compile"]):
        where = f"record: compile.{rank}"
        check_lists(compiled, {"graph_breaks": dict, "recompiles": dict}, where)
        _check_items(compiled["graph_breaks"], GRAPH_BREAK, f"{where}.graph_breaks")
        _check_items(compiled["recompiles"], RECOMPILE, f"{where}.recompiles")
    for rank, host in enumerate(record["hardware"]):
        check_fields(host, HOST_FIELDS, f"record: hardware.{rank}", missing=None)
    validation = record["validation"]
    _check_items(validation["history"], VALIDATION, "record: validation.history")
    if validation["baseline"] is not None:
        check_fields(validation["baseline"], BASELINE, "record: validation.baseline")
    num_steps, start = len(record["step_s"]), record["steady_from"]
    if min(record["step_s"]) <= 0:
        raise ValueError("record: step_s holds a step that took no time")
    if start is not None and not record["segment_starts"][-1] <= start < num_steps:
        raise ValueError(f"record: steady_from is {start}, outside the last launch's steps")
    metrics = record["metrics"]
    if bool(metrics) != (record["steady_from"] is not None):
        raise ValueError(
            f"record: metrics holds {len(metrics)} fields, and steady_from is "
            f"{record['steady_from']}: there are metrics if and only if there is a steady state"
        )
    if metrics:
        check_fields(metrics, METRICS, "record: metrics")
        check_fields(metrics, OPTIONAL_METRICS, "record: metrics", missing=None)
        for name in ("median_step_s", "units_per_s", "mean_units_per_s"):
            if metrics[name] <= 0:
                raise ValueError(f"record: metrics.{name} is {metrics[name]}; it must be above 0")


def _check_items(
    items: Sequence[Mapping[str, Any] | None], kinds: Mapping[str, Kinds], where: str
) -> None:
    for index, item in enumerate(items):
        if item is not None:  # a rank without the measurement
            check_fields(item, kinds, f"{where}.{index}")

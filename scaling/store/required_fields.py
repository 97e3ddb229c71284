"""What a report needs of the record of an `ok` run, beyond what `record.schema` validates."""

from collections.abc import Callable, Mapping, Sequence
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


NOT_EMPTY = ("hardware", "ceiling", "compile", "peak_bytes", "segment_starts")


def _by_field(kinds: Mapping[str, Kinds]) -> dict[str, dict[str, Kinds]]:
    """Groups dotted names by the top-level field of the record that they are in."""
    grouped: dict[str, dict[str, Kinds]] = {}
    for name, kind in kinds.items():
        grouped.setdefault(name.partition(".")[0], {})[name] = kind
    return grouped


_FIELDS, _LISTS = _by_field(FIELDS), _by_field(LISTS)


def check_required_fields(record: Record, like: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError for the first field that is missing, malformed or inconsistent.

    Args:
        like: a record that passed this check. Objects that it shares are not checked again.
    """

    def is_new(name: str) -> bool:
        return like is None or name not in record or like[name] is not record[name]

    for name in filter(is_new, _FIELDS):
        check_fields(record, _FIELDS[name], "record")
    for name in filter(is_new, _LISTS):
        check_lists(record, _LISTS[name], "record")
    for name in NOT_EMPTY:
        if not record[name]:
            raise ValueError(f"record: {name} is empty")
    for name in filter(is_new, _CHECKS):
        _CHECKS[name](record[name], f"record: {name}")
    num_steps, start = len(record["step_s"]), record["steady_from"]
    starts = record["segment_starts"]
    if not (starts[0] >= 0 and starts == sorted(starts) and starts[-1] <= num_steps):
        raise ValueError(f"record: segment_starts is {starts}, not steps of {num_steps} in order")
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


def _check_ceiling(ranks: Sequence[Mapping[str, Any] | None], where: str) -> None:
    _check_items(ranks, CEILING, where)
    for rank, ceiling in enumerate(ranks):
        if ceiling is None:
            continue
        for name in ("matmul_flops_per_s", "copy_bytes_per_s"):
            if ceiling[name] <= 0:
                raise ValueError(f"{where}.{rank}: {name} is {ceiling[name]}; it must be above 0")
        check_lists(ceiling, {"matmul": dict, "copy.seconds": NUMBER}, f"{where}.{rank}")
        for index, work in enumerate(ceiling["matmul"]):
            check_lists(work, {"seconds": NUMBER}, f"{where}.{rank}.matmul.{index}")


def _check_gpu(ranks: Sequence[Mapping[str, Any] | None], where: str) -> None:
    _check_items(ranks, GPU, where)
    for rank, gpu in enumerate(ranks):
        if gpu is not None:
            check_lists(gpu, {"samples": dict}, f"{where}.{rank}")
            _check_items(gpu["samples"], GPU_SAMPLE, f"{where}.{rank}.samples")


def _check_compile(ranks: Sequence[Mapping[str, Any]], where: str) -> None:
    _check_items(ranks, COMPILE, where)
    for rank, compiled in enumerate(ranks):
        check_lists(compiled, {"graph_breaks": dict, "recompiles": dict}, f"{where}.{rank}")
        _check_items(compiled["graph_breaks"], GRAPH_BREAK, f"{where}.{rank}.graph_breaks")
        _check_items(compiled["recompiles"], RECOMPILE, f"{where}.{rank}.recompiles")


def _check_hardware(hosts: Sequence[Mapping[str, Any]], where: str) -> None:
    for rank, host in enumerate(hosts):
        check_fields(host, HOST_FIELDS, f"{where}.{rank}", missing=None)


def _check_validation(validation: Mapping[str, Any], where: str) -> None:
    _check_items(validation["history"], VALIDATION, f"{where}.history")
    if validation["baseline"] is not None:
        check_fields(validation["baseline"], BASELINE, f"{where}.baseline")


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "excluded_steps": lambda items, where: _check_items(items, EXCLUDED_STEP, where),
    "ceiling": _check_ceiling,
    "gpu": _check_gpu,
    "compile": _check_compile,
    "hardware": _check_hardware,
    "validation": _check_validation,
}

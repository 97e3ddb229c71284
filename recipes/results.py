"""Formats the lines that a run ends with: speed, work, memory, and warnings."""

from collections.abc import Mapping
from typing import Any

from unitransformer.costs.flops import MAIN_CONVENTION
from unitransformer.costs.memory import format_gib
from unitransformer.record.metrics import format_flops_rate, format_share, format_time_shares
from unitransformer.record.units import UNIT, format_rate, format_si


def measured_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns a line per quantity, with its interval or the reason why there is none."""
    lines = {"speed": _speed(record), "work": _work(record), "memory": _memory(record)}
    if record["world_size"] > 1 and "communication_share" in record["metrics"]:
        lines["time"] = format_time_shares(record["metrics"])
    trace = record["trace"][0]
    if trace is not None and trace["rows"] is None:
        lines["traced"] = f"not traced: {trace['reason']}"
    elif trace is not None:
        lines["traced"] = ", ".join(f"{row['part']} {row['share']:.1%}" for row in trace["rows"])
    if record["flags"]:
        lines["caution"] = "; ".join(record["flags"])
    return [f"{name:<11} {line}" for name, line in lines.items()]


def _speed(record: Mapping[str, Any]) -> str:
    figures = record["metrics"]
    if not figures:
        return f"unknown, no steady state: {record['no_steady_state_reason']}"
    unit = UNIT[record["recipe"]]
    rate = format_rate(figures["units_per_s"], unit)
    steps = (
        f"median of {figures['num_steady_steps']} steady steps; "
        f"{format_rate(figures['mean_units_per_s'], unit)} on average, with pauses between them"
    )
    if figures["low_units_per_s"] is None:
        return f"{rate} ({steps}; {figures['interval']})"
    ends = [format_rate(figures[f"{end}_units_per_s"], "") for end in ("low", "high")]
    low, high = (end.removesuffix(" /s") for end in ends)
    return f"{rate} ({low} to {high}, {steps})"


def _work(record: Mapping[str, Any]) -> str:
    row = next(row for row in record["mfu"] if row["convention"] == MAIN_CONVENTION)
    unit = UNIT[record["recipe"]].rstrip("s")
    text = f"{format_si(row['flops_per_unit'])}FLOP per {unit} (`{MAIN_CONVENTION}`)"
    if row["flops_per_s"] is None:
        return text
    figures = record["metrics"]
    text += f", {format_flops_rate(row['flops_per_s'], figures)} per device"
    if row["share_of_ceiling"] is not None:
        share = format_share(row["share_of_ceiling"], figures)
        text += f", {share} of the ceiling measured in this run"
    if row["utilisation"] is None:
        return (
            f"{text}; no MFU: {row['reason']}"
            f"{'' if record['config']['ceiling_s'] else ' (not measured: --ceiling-s is 0)'}"
        )
    return f"{text}, MFU {format_share(row['utilisation'], figures)}"


def _memory(record: Mapping[str, Any]) -> str:
    peaks = []
    for kind, name in (
        ("peak_bytes", f"of {record['peak_bytes_kind']}"),
        ("peak_reserved_bytes", "reserved"),
        ("peak_resident_bytes", "resident"),
    ):
        sizes = [size for size in record[kind] if size is not None]
        peaks += [f"{format_gib(max(sizes))} {name}"] if sizes else []
    return f"peak {', '.join(peaks)} (largest of all ranks)"

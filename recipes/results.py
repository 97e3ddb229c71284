"""A record in, the lines out that a run ends with: speed, work, memory, and what is doubtful."""

from collections.abc import Mapping
from typing import Any

from unitransformer.costs.flops import MAIN_CONVENTION
from unitransformer.costs.memory import format_gib
from unitransformer.record.metrics import flops_rate_in_words, parts_in_words, share_in_words
from unitransformer.record.units import UNIT, rate_in_words, si


def measured_lines(record: Mapping[str, Any]) -> list[str]:
    """What was measured, with its interval or why there is none."""
    lines = {"speed": _speed(record), "work": _work(record), "memory": _memory(record)}
    if record["world_size"] > 1 and "communication_share" in record["figures"]:
        lines["time"] = parts_in_words(record["figures"])
    if record["trace"][0] is not None:
        lines["traced"] = _traced(record["trace"][0])
    if record["flags"]:
        lines["doubtful"] = "; ".join(record["flags"])
    return [f"{name:<11} {line}" for name, line in lines.items()]


def _speed(record: Mapping[str, Any]) -> str:
    figures = record["figures"]
    if not figures:
        return f"not told, no steady state: {record['steady_reason']}"
    unit = UNIT[record["recipe"]]
    rate = rate_in_words(figures["units_per_s"], unit)
    steps = (
        f"median of {figures['num_steady_steps']} steady steps; "
        f"{rate_in_words(figures['mean_units_per_s'], unit)} over all of them and all between them"
    )
    if figures["low_units_per_s"] is None:
        return f"{rate} ({steps}; {figures['interval']})"
    ends = [rate_in_words(figures[f"{end}_units_per_s"], "") for end in ("low", "high")]
    low, high = (end.removesuffix(" /s") for end in ends)
    return f"{rate} ({low} to {high}, {steps})"


def _work(record: Mapping[str, Any]) -> str:
    row = next(row for row in record["passport"] if row["convention"] == MAIN_CONVENTION)
    unit = UNIT[record["recipe"]].rstrip("s")
    told = f"{si(row['flops_per_unit'])}FLOP per {unit} (`{MAIN_CONVENTION}`)"
    if row["flops_per_s"] is None:
        return told
    figures = record["figures"]
    told += f", {flops_rate_in_words(row['flops_per_s'], figures)} per device"
    if row["share_of_ceiling"] is not None:
        share = share_in_words(row["share_of_ceiling"], figures)
        told += f", {share} of what this machine reached in this job"
    if row["utilisation"] is None:
        return f"{told}; no MFU: {row['reason']}"
    return f"{told}, MFU {share_in_words(row['utilisation'], figures)}"


def _memory(record: Mapping[str, Any]) -> str:
    peaks = [peak for peak in record["peak_bytes"] if peak is not None]
    told = [f"{format_gib(max(peaks))} of {record['peak_bytes_kind']}"] if peaks else []
    for kind in ("reserved", "resident"):
        beside = [peak for peak in record[f"peak_{kind}_bytes"] if peak is not None]
        told += [f"{format_gib(max(beside))} {kind}"] if beside else []
    return f"peak {', '.join(told)} (largest of all ranks)"


def _traced(trace: Mapping[str, Any]) -> str:
    if trace["rows"] is None:
        return f"not traced: {trace['reason']}"
    return ", ".join(f"{row['part']} {row['share']:.1%}" for row in trace["rows"])

"""What the GPUs of a run said of themselves, in words: clocks, power, temperature and what held the
clocks down, at the first and the last look.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.markdown import count
from unitransformer.measuring.telemetry import HARMLESS
from unitransformer.records import Record

Look = Mapping[str, Any]  # a `GpuSample` as the record has it
SHOWN = (
    ("SM clock", "sm_clock_hz", 1e6, "MHz"),
    ("memory clock", "memory_clock_hz", 1e6, "MHz"),
    ("power", "power_w", 1, "W"),
    ("temperature", "temperature_c", 1, "°C"),
)


def gpu_state(record: Record) -> str:
    """Nothing for a run that no GPU tells of."""
    watched = [gpu["samples"] for gpu in record["gpu"] if gpu is not None and gpu["samples"]]
    if not watched:
        return ""
    first, last = ([looks[place] for looks in watched] for place in (0, -1))
    told = [
        f"{name} {_range(first, field, scale)} to {_range(last, field, scale)} {unit}"
        for name, field, scale, unit in SHOWN
    ]
    devices = "" if len(watched) == 1 else f", of {len(watched)} devices"
    return "; ".join([f"first and last look{devices}: {', '.join(told)}", _held_down(watched)])


def _range(looks: Sequence[Look], field: str, scale: float) -> str:
    """Over devices."""
    values = sorted({round(look[field] / scale) for look in looks if look[field] is not None})
    if not values:
        return "?"
    return str(values[0]) if len(values) == 1 else f"({values[0]} … {values[-1]})"


def _held_down(watched: Sequence[Sequence[Look]]) -> str:
    looks = [look for own in watched for look in own if look["clock_reasons"] is not None]
    if not looks:
        return "the driver does not tell what held the clocks down"
    reasons = Counter(reason for look in looks for reason in look["clock_reasons"])
    told = [
        f"{reason} at {number}"
        for reason, number in reasons.most_common()
        if reason not in HARMLESS
    ]
    return f"clocks held down by {', '.join(told) or 'nothing'} of {count(len(looks), 'look')}"

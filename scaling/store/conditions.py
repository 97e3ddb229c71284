"""Describes the conditions in which records differ, so that a table or curve can state them."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from unitransformer.machine.host import nominal_gib
from unitransformer.record.schema import Record

CLOCK_TOLERANCE = 0.02  # of the highest: clocks at one setting vary by less
HOST = (
    *("cpu", "cpu_cores", "system", "machine", "device", "device_memory_bytes", "threads"),
    "float32_matmul_precision",  # "high" lets a float32 product run in TF32
)
CLOCKS = ("sm_clock_hz", "memory_clock_hz")
MISSING = "not recorded"


def differences(records: Sequence[Record]) -> list[str]:
    """Returns one line for each condition in which the records differ; empty: they are comparable.

    It compares the hardware of each rank without its host name, recorded clocks, versions and the
    commit. Code with uncommitted changes differs from everything, also from itself: its content is
    unknown.
    """
    if len(records) < 2:
        return []
    versions = [record["versions"] for record in records]
    names: dict[str, None] = {}
    if any(other != versions[0] for other in versions):
        names = dict.fromkeys(name for installed in versions for name in installed)
    lines = [
        *machine_differences(records),
        *(
            _difference(f"versions of {name}", [_text(other.get(name)) for other in versions])
            for name in names
        ),
        _difference("commit", [_text(record["code"].get("commit")) for record in records]),
        _uncommitted_changes(records),
    ]
    return [line for line in lines if line is not None]


def machine_differences(records: Sequence[Record]) -> list[str]:
    """Returns a line for the processors and each clock in which the records differ."""
    lines = [
        _difference("processors and devices", [_hosts(record) for record in records]),
        *_clock_differences(records),
    ]
    return [line for line in lines if line is not None]


def processors_of(record: Record) -> str:
    """Returns the kinds of processors and devices of the ranks, without their threads."""
    return _hosts(without_threads(record))


def without_threads(record: Record) -> Record:
    """Ranks that share the cores of a machine have fewer threads each the more there are."""
    ranks = [{n: host[n] for n in host if n != "threads"} for host in record["hardware"]]
    return record | {"hardware": ranks}


def conditions_of(records: Sequence[Record]) -> list[str]:
    """Returns a short hash for each record, which it shares with those of comparable conditions.

    Clocks are compared as in `differences`, with the first record of each hash.
    """
    groups: dict[str, list[Record]] = {}  # the first of each hash, of records equal but for clocks
    hashes = []
    for record in records:
        compared = (
            processors_of(record),
            sorted(record["versions"].items()),
            record["code"].get("commit"),
            record["code"].get("is_dirty") is False or record.get("started_at"),
        )
        firsts = groups.setdefault(repr(compared), [])
        alike = (i for i, first in enumerate(firsts) if not _clock_differences([first, record]))
        if (number := next(alike, None)) is None:
            number = len(firsts)
            firsts.append(record)
        hashes.append(hashlib.sha256(repr((*compared, number)).encode()).hexdigest()[:8])
    return hashes


def _difference(field: str, values: Sequence[str]) -> str | None:
    return None if len(set(values)) == 1 else f"{field} differ: {_by_record(values)}"


def _by_record(values: Sequence[str]) -> str:
    """Each distinct value with the numbers of the records that have it."""
    parts = []
    for value in dict.fromkeys(values):
        numbers = [str(number) for number, other in enumerate(values, start=1) if other == value]
        noun = "record" if len(numbers) == 1 else "records"
        parts.append(f"{value} ({noun} {', '.join(numbers)})")
    return "; ".join(parts)


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)


def _hosts(record: Record) -> str:
    """The kinds of ranks, not their number, in which a curve over devices differs on purpose."""
    hosts = {tuple(host.items()) for host in record["hardware"]}
    return " and ".join(sorted({_host(host) for host in hosts})) or MISSING


@functools.lru_cache(maxsize=1024)  # thousands of records come from a few hosts
def _host(items: tuple[tuple[str, Any], ...]) -> str:
    host = dict(items)
    parts = [f"{name} {_text(host[name])}" for name in HOST if name in host]
    memory = host.get("memory_bytes")
    if memory is not None and memory > 0:  # equal nodes differ by what their kernels reserve
        parts.append(f"{nominal_gib(memory):g} GiB")
    return ", ".join(parts) or MISSING


def _clock_differences(records: Sequence[Record]) -> list[str]:
    lines = [_clock_difference(name, records) for name in CLOCKS]
    return [line for line in lines if line is not None]


def _clock_difference(name: str, records: Sequence[Record]) -> str | None:
    """A line if the clocks differ by more than the tolerance or only some ranks record one."""
    by_record = [[host.get(name) for host in record["hardware"]] for record in records]
    clocks = [clock for ranks in by_record for clock in ranks]
    recorded = [clock for clock in clocks if clock is not None]
    if not recorded:
        return None
    is_complete = len(recorded) == len(clocks)
    if is_complete and min(recorded) >= (1 - CLOCK_TOLERANCE) * max(recorded):
        return None
    ranges = [_clock_range(ranks) for ranks in by_record]
    if len(set(ranges)) == 1:
        return f"{name} differ among the ranks of every record: {ranges[0]}"
    return _difference(name, ranges)


def _clock_range(clocks: Sequence[float | None]) -> str:
    recorded = [clock for clock in clocks if clock is not None]
    if len(recorded) < len(clocks):
        return f"{MISSING} by some ranks" if recorded else MISSING
    low, high = min(recorded), max(recorded)
    return f"{low / 1e6:.0f} MHz" if low == high else f"{low / 1e6:.0f} to {high / 1e6:.0f} MHz"


def _uncommitted_changes(records: Sequence[Record]) -> str | None:
    states = {True: "uncommitted changes", False: "clean", None: "not recorded whether clean"}
    values = [states[record["code"].get("is_dirty")] for record in records]
    is_clean = set(values) == {"clean"}
    return None if is_clean else f"code may not be its commit: {_by_record(values)}"

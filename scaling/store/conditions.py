"""Records in; in which conditions they differ, in words. Rows that differ are one curve only with
that said beside them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unitransformer.machine.host import nominal_gib
from unitransformer.record.schema import Record

CLOCK_TOLERANCE = 0.02  # of the highest: clocks of one setting flicker by less
HOST = (
    *("cpu", "cpu_cores", "system", "machine", "device", "device_memory_bytes", "threads"),
    "float32_matmul_precision",  # "high" lets a float32 product run in TF32
)
CLOCKS = ("sm_clock_hz", "memory_clock_hz")
UNTOLD = "not told"


def differences(records: Sequence[Record]) -> list[str]:
    """Every condition in which the records differ, one line each; empty if they may be joined.

    Looked at: the hardware of each rank without the name of its host, clocks where told, versions,
    commit. A tree with uncommitted changes differs from everything, also from itself: nobody knows
    what ran.
    """
    if len(records) < 2:
        return []
    found = [_differing("processors and devices", [_kinds(record) for record in records])]
    found += [_clocks(name, records) for name in CLOCKS]
    found += _versions(records)
    found.append(_differing("commit", [_told(record["code"].get("commit")) for record in records]))
    found.append(_dirt(records))
    return [line for line in found if line is not None]


def processors_of(record: Record) -> str:
    """What a curve is of: the kinds of its ranks, threads aside, which more ranks have fewer of."""
    return _kinds(without_threads(record))


def without_threads(record: Record) -> Record:
    """Ranks that share the cores of a machine have fewer each the more there are."""
    ranks = [
        {n: value for n, value in host.items() if n != "threads"} for host in record["hardware"]
    ]
    return record | {"hardware": ranks}


def conditions_of(record: Record) -> str:
    """A short name that only records share which may stand on one curve without a word."""
    clocks = [[host.get(name) for host in record["hardware"]] for name in CLOCKS]
    told = (
        processors_of(record),
        sorted(record["versions"].items()),
        [_range(own) for own in clocks],
        record["code"].get("commit"),
        record["code"].get("is_dirty") is False or record.get("started_at"),
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def _differing(field: str, values: Sequence[str]) -> str | None:
    """A line if the values are not all equal: each value with the records that have it."""
    if len(set(values)) == 1:
        return None
    told = [f"{value} ({_which(values, value)})" for value in dict.fromkeys(values)]
    return f"{field} differ: {'; '.join(told)}"


def _which(values: Sequence[str], value: str) -> str:
    numbers = [str(number) for number, other in enumerate(values, start=1) if other == value]
    return f"record {numbers[0]}" if len(numbers) == 1 else f"records {', '.join(numbers)}"


def _told(value: Any) -> str:
    return UNTOLD if value is None else str(value)


def _kinds(record: Record) -> str:
    """The kinds of ranks, not their number: a curve over devices differs in that on purpose."""
    return " and ".join(sorted({_kind(host) for host in record["hardware"]})) or UNTOLD


def _kind(host: Mapping[str, Any]) -> str:
    told = [f"{name} {_told(host[name])}" for name in HOST if name in host]
    memory = host.get("memory_bytes")
    if memory is not None and memory > 0:  # equal nodes differ by what their kernels keep
        told.append(f"{nominal_gib(memory):g} GiB")
    return ", ".join(told) or UNTOLD


def _versions(records: Sequence[Record]) -> Iterator[str | None]:
    names = dict.fromkeys(name for record in records for name in record["versions"])
    for name in names:
        values = [_told(record["versions"].get(name)) for record in records]
        yield _differing(f"versions of {name}", values)


def _clocks(name: str, records: Sequence[Record]) -> str | None:
    """Clocks of the ranks' devices, if any rank of any record tells one."""
    of_records = [[host.get(name) for host in record["hardware"]] for record in records]
    told = [clock for clocks in of_records for clock in clocks if clock is not None]
    if not told:
        return None
    is_untold = any(clock is None for clocks in of_records for clock in clocks)
    if not is_untold and min(told) >= (1 - CLOCK_TOLERANCE) * max(told):
        return None
    shown = [_range(clocks) for clocks in of_records]
    if len(set(shown)) == 1:
        return f"{name} differ among the ranks of every record: {shown[0]}"
    return _differing(name, shown)


def _range(clocks: Sequence[float | None]) -> str:
    told = [clock for clock in clocks if clock is not None]
    if len(told) < len(clocks):
        return UNTOLD if not told else f"{UNTOLD} by some ranks"
    low, high = min(told), max(told)
    return f"{low / 1e6:.0f} MHz" if low == high else f"{low / 1e6:.0f} to {high / 1e6:.0f} MHz"


def _dirt(records: Sequence[Record]) -> str | None:
    states = {True: "uncommitted changes", False: "clean", None: f"{UNTOLD} whether clean"}
    values = [states[record["code"].get("is_dirty")] for record in records]
    if set(values) == {states[False]}:
        return None
    told = [f"{value} ({_which(values, value)})" for value in dict.fromkeys(values)]
    return f"code may not be its commit: {'; '.join(told)}"

"""What a step does, counted: two sets of counts in, what grew and where out. Plain arithmetic.

A counter is a number at each place: `{"operators": {"network.lm_head": 14, "optimizer": 25}}`.
Its total is their sum. Counts do not depend on the clock, so two sets are compared exactly; they do
depend on torch, whose releases dispatch different operators for the same step.
"""

import json
from collections.abc import Mapping
from pathlib import Path

Counters = Mapping[str, Mapping[str, int]]  # counter -> place -> count
PLACES_SHOWN = 4  # of those that changed, in a message
NAMES = (
    "parameters",
    "flops",
    "operators",  # by module
    "operator_names",  # the same ones by name
    "collective_calls",
    "collective_bytes",
    "graphs",
    "graph_breaks",
    "recompiles",
    "peak_bytes",  # at the instant of the peak, by the module that allocated them
)


def differences(before: Counters, now: Counters) -> list[str]:
    """A line for each counter that changed: how much, by how many percent, and where most."""
    return [
        _difference(name, before.get(name, {}), now.get(name, {}))
        for name in sorted({*before, *now})
        if before.get(name, {}) != now.get(name, {})
    ]


def _difference(name: str, before: Mapping[str, int], now: Mapping[str, int]) -> str:
    old, new = sum(before.values()), sum(now.values())
    changes = {place: now.get(place, 0) - before.get(place, 0) for place in {*before, *now}}
    changed = sorted(place for place in changes if changes[place])
    largest = sorted(changed, key=lambda place: -abs(changes[place]))
    where = ", ".join(f"{place} {changes[place]:+,}" for place in largest[:PLACES_SHOWN])
    more = len(largest) - PLACES_SHOWN
    rest = f" and {more} more places" if more > 0 else ""
    share = f", {(new - old) / old:+.2%}" if old else ""
    verdict = "grew" if new > old else "shrank" if new < old else "moved"
    return f"{name} {verdict}: {old:,} -> {new:,} ({new - old:+,}{share}) at {where}{rest}"


def write_counters(counters: Counters, path: Path) -> None:
    """Sorted, a number a line: a change of one count is a diff of one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counters, indent=1, sort_keys=True) + "\n")


def load_counters(path: Path) -> dict[str, dict[str, int]]:
    """What `write_counters` wrote.

    Raises:
        ValueError: a file that is no such thing, or has another counter than these.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or set(found) - set(NAMES):
        raise ValueError(f"{path} holds other counters than {', '.join(NAMES)}; write it anew")
    for name, places in found.items():
        for place, count in places.items():
            if type(count) is not int:
                raise ValueError(f"{path}: {name} at {place} is {count!r}, no whole number")
    return found

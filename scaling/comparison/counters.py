"""Counters of one training step: compares, stores and describes them, and counts those of a side.

A counter is parameters, FLOPs, operators, collectives, graphs or peak bytes, split by place in the
model. `unitransformer.step_counters` counts; nothing here needs torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.comparison.interleave import Side, SideFailed
from unitransformer.launch.subprocess_module import open_command

Counters = Mapping[str, Mapping[str, int]]  # counter -> location -> count

NAMES = (
    "parameters",
    "flops",
    "operators",  # by module
    "operator_names",  # the same operators by name
    "collective_calls",
    "collective_bytes",
    "graphs",
    "graph_breaks",
    "recompiles",
    "peak_bytes",  # at the peak, by the module that allocated them
)

SCRIPT = Path(__file__).parents[2] / "unitransformer/step_counters.py"
COUNT_LIMIT_S = 3600.0
MAX_LOCATIONS = 4  # of a difference, in a message


def differences(before: Counters, now: Counters) -> list[str]:
    """Returns a line for each changed counter: by how much, by how many percent, and where most."""
    return [
        _describe_difference(name, before.get(name, {}), now.get(name, {}))
        for name in sorted({*before, *now})
        if before.get(name, {}) != now.get(name, {})
    ]


def _describe_difference(counter: str, before: Mapping[str, int], now: Mapping[str, int]) -> str:
    old, new = sum(before.values()), sum(now.values())
    changes = {name: now.get(name, 0) - before.get(name, 0) for name in {*before, *now}}
    largest = sorted(filter(changes.get, changes), key=lambda name: (-abs(changes[name]), name))
    where = ", ".join(f"{name} {changes[name]:+,}" for name in largest[:MAX_LOCATIONS])
    more = len(largest) - MAX_LOCATIONS
    rest = f" and {more} more places" if more > 0 else ""
    share = f", {(new - old) / old:+.2%}" if old else ""
    verb = "grew" if new > old else "shrank" if new < old else "moved"
    return f"{counter} {verb}: {old:,} -> {new:,} ({new - old:+,}{share}) at {where}{rest}"


def write_counters(counters: Counters, path: Path) -> None:
    """Writes sorted JSON with one count per line, so that a changed count is a changed line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counters, indent=1, sort_keys=True) + "\n")


def load_counters(path: Path) -> dict[str, dict[str, int]]:
    """Returns what `write_counters` wrote.

    Raises:
        ValueError: the file is not JSON, holds something else, or other counters.
    """
    try:
        counters = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(counters, dict) or set(counters) - set(NAMES):
        raise ValueError(f"{path} has other counters than {', '.join(NAMES)}; write it again")
    for name, counts in counters.items():
        if not isinstance(counts, dict):
            raise ValueError(f"{path}: {name} is {counts!r}, not counts by location")
        for location, count in counts.items():
            if type(count) is not int:
                raise ValueError(f"{path}: {name} at {location} is {count!r}, not an integer")
    return counters


def count_side(side: Side) -> dict[str, dict[str, int]]:
    """Returns the counters of one step of a side, counted on a CPU by its own code.

    Raises:
        SideFailed: its code cannot be counted, for example because it is too old.
    """
    command = [str(side.python), "-P", str(SCRIPT)]
    question = {"recipe": side.recipe, "arguments": side.arguments}
    with open_command(
        f"counters of {side.label}",
        command,
        limit_s=COUNT_LIMIT_S,
        variables={"PYTHONPATH": str(side.code)},
    ) as ask:
        try:
            answer: dict[str, Any] = json.loads(ask(json.dumps(question)))
        except (RuntimeError, ValueError) as error:
            raise SideFailed(f"{side.label} cannot be counted: {error}") from error
    if "failure" in answer:
        raise SideFailed(f"{side.label} cannot be counted: {answer['failure']}")
    return answer


def sum_counters(counters: Counters) -> dict[str, object]:
    """Returns what distinguishes the work of two steps, whatever their modules are called.

    It is the sum of each counter over its places, and the calls of each operator.
    """
    sums: dict[str, object] = {name: sum(counts.values()) for name, counts in counters.items()}
    return sums | {"operator_names": dict(counters.get("operator_names", {}))}


def changed_work(before: Counters, now: Counters) -> list[str]:
    """Returns the lines of `differences` for counters whose sums differ."""
    old, new = sum_counters(before), sum_counters(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return differences(
        {name: before.get(name, {}) for name in names}, {name: now.get(name, {}) for name in names}
    )

"""Rehearses recipes as their command does, and measures what a rehearsal takes.

`python -m tests.benchmarks.rehearsals gpt 13b fsdp 8,64,512,4096` prints a row for each number of
ranks: processor time, wall time, peak resident memory, and whether the collectives are those that
`scaling predict` counts, to the byte.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.prediction.communication import AGREEMENT, Collective, collectives_of_step
from unitransformer.config import RunConfig, from_dict

NODE = 8  # ranks of a node, unless --devices says otherwise
LIMIT_S, LIMIT_BYTES = 60, 4 * 2**30  # of a rehearsal on two cores


@dataclass(frozen=True, kw_only=True)
class MeasuredRehearsal:
    """A rehearsal in a process of its own, and what that took."""

    config: RunConfig
    result: dict[str, Any]
    processor_s: float
    wall_s: float
    resident_bytes: int  # at the peak


def measure(recipe: str, size: str, strategy: str, ranks: int) -> MeasuredRehearsal:
    """Runs `python -m recipes.RECIPE --rehearse RANKS` with one sample per rank.

    Raises:
        RuntimeError: it does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"recipes.{recipe}", "--rehearse", str(ranks)]
        command += ["--size", size, "--strategy", strategy, "--batch-size", "1"]
        begin = time.perf_counter()
        child = subprocess.Popen([*command, "--json", str(file)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        result = json.loads(file.read_text())
    return MeasuredRehearsal(
        config=from_dict(RunConfig, result["config"]),
        result=result,
        processor_s=usage.ru_utime + usage.ru_stime,
        wall_s=wall_s,
        resident_bytes=usage.ru_maxrss * 1024,
    )


Sums = dict[str, Counter[tuple[str, int]]]  # calls, bytes and padding, by kind and ranks


def rehearsed_sums(result: dict[str, Any]) -> Sums:
    return _sums(
        (c["kind"], c["group"][0], c["calls"], c["num_bytes"], c["padding_bytes"])
        for c in result["collectives"]
    )


def predicted_sums(config: RunConfig) -> Sums:
    """Without the agreement to stop, which a rehearsal names apart."""
    predicted = collectives_of_step(config, node_size=NODE)
    return _sums(_row(c) for c in predicted if c.of != AGREEMENT)


def _row(collective: Collective) -> tuple[str, int, int, int, int]:
    # A rehearsal finds the padding of gathers and scatters, where all ranks need equal parts.
    padding = 0 if collective.kind == "all_reduce" else collective.padding_bytes
    kind = collective.kind.replace("_", "-")
    calls = collective.calls
    return kind, collective.ranks, calls, collective.total_bytes, padding * calls


def _sums(collectives: Any) -> Sums:
    found = {name: Counter[tuple[str, int]]() for name in ("calls", "bytes", "padding")}
    for kind, ranks, calls, size, padding in collectives:
        for name, number in (("calls", calls), ("bytes", size), ("padding", padding)):
            found[name][kind, ranks] += number
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints a row for each number of ranks; returns 1 if a limit or the bytes do not hold."""
    recipe, size, strategy, counts = arguments
    code = 0
    for ranks in map(int, counts.split(",")):
        found = measure(recipe, size, strategy, ranks)
        equal = predicted_sums(found.config) == rehearsed_sums(found.result)
        holds = found.wall_s < LIMIT_S and found.resident_bytes < LIMIT_BYTES
        code = code if equal and holds else 1
        took = f"{found.processor_s:5.1f} s of processor time, {found.wall_s:5.1f} s of wall time"
        peak = f"{found.resident_bytes / 2**20:5,.0f} MiB"
        bytes_are = "equal to" if equal else "DIFFERENT from"
        print(
            f"{recipe} {size} {strategy} {ranks:>5,} ranks: {took}, {peak}; collectives "
            f"{bytes_are} the predicted ones",
            flush=True,
        )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Counts the instructions of training steps on a CPU with valgrind's callgrind.

Instructions do not depend on load: repeated counts differ by 0.01 to 0.11 %. They depend on the
versions in `conditions`, and on the processor that valgrind emulates.
"""

import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unitransformer.config import Recipe

STEPS = 3
BATCH_SIZE = 2
# Under valgrind a step takes 2 to 5 seconds of one core, counted or not, and the imports 30.
SHAPES: Mapping[Recipe, Mapping[str, int]] = {
    "bert": {"num_positions": 32},
    "gpt": {"num_positions": 16},
    "vit": {},
}
# Of the instructions of a recipe. Equal code has differed by 0.11 % (ViT, in malloc and Python).
TOLERANCE = 0.002
LIMIT_S = 3600
MARKS = """
#include <valgrind/callgrind.h>
void start_counting(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop_counting(const char *name) {
    CALLGRIND_DUMP_STATS_AT(name);
    CALLGRIND_STOP_INSTRUMENTATION;
}
"""
Instructions = Mapping[str, Mapping[str, int]]  # recipe -> library -> instructions


def why_not_countable() -> str | None:
    """Returns what is missing to count instructions here; None if nothing is."""
    missing = [name for name in ("valgrind", "cc") if shutil.which(name) is None]
    return (
        f"{' and '.join(missing)} not installed: apt-get install valgrind gcc" if missing else None
    )


def conditions() -> dict[str, str]:
    """Versions on which the number of instructions depends."""
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True)
    return {
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "valgrind": valgrind.stdout.strip().removeprefix("valgrind-"),
    }


def count_instructions(repository: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Returns the instructions of `STEPS` steps of each recipe, by library.

    Takes about two minutes of one core.
    """
    (folder / "marks.c").write_text(MARKS)
    build = ["cc", "-O1", "-shared", "-fPIC", "marks.c", "-o", "marks.so"]
    subprocess.run(build, cwd=folder, check=True, timeout=60)
    valgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no")
    user = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [*valgrind, "--callgrind-out-file=counts", sys.executable, "-m", __name__, "marks.so"],
        cwd=folder,
        env=user | fixed,  # nothing else, as variables change the instructions a little
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = {}
    for number, recipe in enumerate(SHAPES, start=1):
        with (folder / f"counts.{number}").open() as lines:
            counted[recipe] = by_library(lines)
    return counted


def by_library(lines: Iterable[str]) -> dict[str, int]:
    """Returns the instructions of each library in a file of callgrind.

    The format: https://valgrind.org/docs/manual/cl-format.html. `ob=` begins a library, whose name
    is written once and then replaced by its number. The line after `calls=` counts the callee.
    """
    names, counts = dict[str, str](), Counter[str]()
    library, is_callee = "?", False
    for line in lines:
        if found := re.match(r"(c?)ob=\((\d+)\)(?: (.*))?$", line):
            if found[3]:
                names[found[2]] = Path(found[3]).name
            library = library if found[1] else names[found[2]]
        elif line.startswith("calls="):
            is_callee = True
        elif found := re.match(r"[+\-*\d]\S* (\d+)$", line):
            counts[library] += 0 if is_callee else int(found[1])
            is_callee = False
    return dict(counts)


def differences(before: Instructions, now: Instructions) -> list[str]:
    """Returns a line for each recipe whose instructions changed by more than `TOLERANCE`."""
    lines = []
    for recipe in sorted({*before, *now}):
        old, new = Counter(before.get(recipe, {})), Counter(now.get(recipe, {}))
        then, total = old.total(), new.total()
        if abs(total - then) <= TOLERANCE * then:
            continue
        change = Counter({name: new[name] - old[name] for name in {*old, *new}})
        most = sorted(change.items(), key=lambda item: -abs(item[1]))[:3]
        places = ", ".join(f"{name} {number:+,}" for name, number in most)
        share = f" ({total / then - 1:+.2%})" if then else ""
        lines.append(f"{recipe}: {then:,} -> {total:,} instructions{share} in {places}")
    return lines


def load_instructions(path: Path) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Returns conditions and instructions of a baseline.

    Raises:
        ValueError: the file is missing, is not JSON, or lacks a count.
    """
    try:
        stored: Any = json.loads(path.read_text())
        counted = {name: dict(stored["instructions"][name]) for name in SHAPES}
        if not all(type(n) is int and n > 0 for of in counted.values() for n in of.values()):
            raise ValueError("a count is not a positive integer")
        return dict(stored["conditions"]), counted
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def write_instructions(counted: Instructions, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"conditions": conditions(), "instructions": counted}
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def main(library: str) -> None:
    """Runs under callgrind: trains steps, of which only some are counted."""
    from tests.benchmarks.steps import PRESETS, build_step

    marks = ctypes.CDLL(os.path.abspath(library))
    gc.disable()
    for recipe, shape in SHAPES.items():
        step = build_step(PRESETS[recipe], BATCH_SIZE, **shape)
        for _ in range(2):  # the second allocates nothing that lasts
            step()
        gc.collect()
        marks.start_counting()
        for _ in range(STEPS):
            step()
        marks.stop_counting(recipe.encode())


if __name__ == "__main__":
    main(sys.argv[1])

"""What the benchmarks say on a machine that they have not seen, and of runs of another one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.benchmarks.clock import machine
from tests.benchmarks.conftest import folder_of_times

ELSEWHERE = "0123456789ab"  # fingerprint of another machine
COUNTED = "test_counters.py::test_a_step_does_what_it_did[bert-single-off]"
TIMED = "test_step_time.py::test_step_time[vit]"


def bench(
    repository: Path, folder: Path, tests: Sequence[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """On a processor that does nothing at once; `folder` is the working directory.

    A worker of pytest-xdist hands its name on, and pytest-benchmark measures nothing there.
    """
    inherited = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *options),
            *("-c", str(repository / "pyproject.toml"), "--rootdir", str(repository)),
            *(str(repository / "tests" / "benchmarks" / test) for test in tests),
        ],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(repository), "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def first(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Nothing is stored; what is measured is kept."""
    folder = tmp_path_factory.mktemp("first")
    options = ("--benchmark-autosave", "--benchmark-compare", "--benchmark-compare-fail=median:5%")
    return folder, bench(repository, folder, (TIMED, COUNTED), *options)


def test_without_runs_of_this_machine_there_is_nothing_to_compare_and_it_says_so(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = first
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{folder_of_times()}: no times of this machine to compare with" in done.stdout


def test_times_are_kept_in_a_folder_of_this_machine_with_what_it_is(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = first
    (kept,) = (folder / ".benchmarks").glob("*/*/*.json")
    place = kept.relative_to(folder / ".benchmarks").parts[0]
    assert place == folder_of_times().name
    assert place.startswith(machine().fingerprint)
    told = json.loads(kept.read_text())["machine_info"]["unitransformer"]
    assert told["cpu"] == machine().cpu
    assert told["versions"]["torch"] == torch.__version__


def test_another_processor_is_held_to_what_does_not_depend_on_it(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = first
    (said,) = re.findall(r"SKIPPED \[1\] .*", done.stdout)
    assert "parameters, flops, collective_calls, collective_bytes" in said
    assert (
        f"the rest has none in torch-{'.'.join(torch.__version__.split('.')[:2])}-default" in said
    )


def test_runs_of_another_machine_are_told_apart_and_fail_nothing(
    first: tuple[Path, subprocess.CompletedProcess[str]], repository: Path, tmp_path: Path
) -> None:
    """Its times are a millionth of ours: both in its own folder, and brought into this one's."""
    folder, _ = first
    (kept,) = (folder / ".benchmarks").glob("*/*/*.json")
    stored = json.loads(kept.read_text())
    stored["machine_info"]["unitransformer"]["fingerprint"] = ELSEWHERE
    (timed,) = stored["benchmarks"]
    timed["stats"] |= {
        name: value / 1e6 for name, value in timed["stats"].items() if isinstance(value, float)
    }
    text = json.dumps(stored)
    inside = kept.relative_to(folder / ".benchmarks").parts[1:]
    for place in (f"{ELSEWHERE}-1-threads", folder_of_times().name):
        path = tmp_path.joinpath(".benchmarks", place, *inside)
        path.parent.mkdir(parents=True)
        path.write_text(text)
    done = bench(
        repository, tmp_path, (TIMED,), "--benchmark-compare", "--benchmark-compare-fail=median:5%"
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert f"Times of another machine ({ELSEWHERE}): no test fails on them" in said

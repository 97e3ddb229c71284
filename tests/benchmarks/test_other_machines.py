"""The benchmarks recognize an unknown machine, and stored times of another machine."""

import importlib.metadata
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
from tests.distributed.forking import fork_command
from tests.processes import PATIENCE_S

ELSEWHERE = "0123456789ab"  # fingerprint of another machine
COUNTED = "test_counters.py::test_counters_of_a_step_equal_their_baseline[bert-single-off]"
TIMED = "test_step_time.py::test_step_time[vit]"


def arguments_of(repository: Path, tests: Sequence[str], *options: str) -> list[str]:
    """Arguments of pytest that run the benchmarks."""
    return [
        *("-p", "no:cacheprovider", "-rs", *options),
        *("-c", str(repository / "pyproject.toml"), "--rootdir", str(repository)),
        *(str(repository / "tests" / "benchmarks" / test) for test in tests),
    ]


def bench(
    repository: Path, folder: Path, tests: Sequence[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs the benchmarks in `folder` as on a processor without vector instructions.

    Drops the worker name of pytest-xdist, with which pytest-benchmark measures nothing.
    """
    inherited = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments_of(repository, tests, *options)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(repository), "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def bench_in_fork(
    repository: Path, folder: Path, tests: Sequence[str], *options: str
) -> tuple[int | None, str]:
    """Runs the benchmarks in `folder` on this processor; returns the exit code and the output."""

    def run() -> int:
        os.chdir(folder)
        for name in [name for name in os.environ if "XDIST" in name]:
            del os.environ[name]
        return pytest.main(arguments_of(repository, tests, *options))

    log = folder / "output.log"
    process = fork_command(run, log=log, variables={})
    process.join(PATIENCE_S)
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def first(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The first run on a machine, which stores its times."""
    folder = tmp_path_factory.mktemp("first")
    options = ("--benchmark-autosave", "--benchmark-compare")
    return folder, bench(repository, folder, (TIMED, COUNTED), *options)


def test_benchmark_reports_that_this_machine_has_no_earlier_runs(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = first
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{folder_of_times()}: no times of this machine to compare with" in done.stdout


def test_times_are_stored_per_machine_with_its_description(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = first
    (stored_path,) = (folder / ".benchmarks").glob("*/*/*.json")
    folder_name = stored_path.relative_to(folder / ".benchmarks").parts[0]
    assert folder_name == folder_of_times().name
    assert folder_name.startswith(machine().fingerprint)
    actual = json.loads(stored_path.read_text())["machine_info"]["unitransformer"]
    assert actual["cpu"] == machine().cpu
    assert actual["versions"]["torch"] == importlib.metadata.version("torch")


def test_another_processor_is_compared_on_portable_counters_only(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = first
    (printed,) = re.findall(r"SKIPPED \[1\] .*", done.stdout)
    assert "parameters, flops, collective_calls, collective_bytes" in printed
    assert (
        f"the rest has none in torch-{'.'.join(torch.__version__.split('.')[:2])}-default"
        in printed
    )


def test_a_gate_on_times_of_another_machine_is_no_pass(
    first: tuple[Path, subprocess.CompletedProcess[str]], repository: Path, tmp_path: Path
) -> None:
    """Stored times of another machine, a millionth of ours, in its folder and in this one's."""
    folder, _ = first
    (stored_path,) = (folder / ".benchmarks").glob("*/*/*.json")
    stored = json.loads(stored_path.read_text())
    stored["machine_info"]["unitransformer"]["fingerprint"] = ELSEWHERE
    (timed,) = stored["benchmarks"]
    timed["stats"] |= {
        name: value / 1e6 for name, value in timed["stats"].items() if isinstance(value, float)
    }
    text = json.dumps(stored)
    inside = stored_path.relative_to(folder / ".benchmarks").parts[1:]
    for folder_name in (f"{ELSEWHERE}-1-threads", folder_of_times().name):
        path = tmp_path.joinpath(".benchmarks", folder_name, *inside)
        path.parent.mkdir(parents=True)
        path.write_text(text)
    code, printed = bench_in_fork(
        repository, tmp_path, (TIMED,), "--benchmark-compare", "--benchmark-compare-fail=median:5%"
    )
    assert code == 6, printed[-3000:]
    assert f"stored times of another machine ({ELSEWHERE}): nothing is compared" in printed

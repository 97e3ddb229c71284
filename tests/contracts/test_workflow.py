"""The workflow for pull requests parses, and its commands exist, run here and keep exit codes.

`make` is real. A stub stands for Python: it writes down how it was called and ends with a given
exit code. The calls are then checked by the parsers of those commands.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from scaling.__main__ import SUBCOMMANDS, build_parser
from tests.distributed.forking import fork_command
from tests.processes import PATIENCE_S

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "regressions.yml"
CONTENT: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text())
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")  # as GitHub runs `shell: bash`
BASE = "0123abc"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How the steps of a job ended."""

    codes: Sequence[int]
    calls: Sequence[Sequence[str]]  # arguments of Python
    summary: str


def jobs() -> list[tuple[str, dict[str, str]]]:
    """Each job with the values of its matrix."""
    found = []
    for name, job in CONTENT["jobs"].items():
        matrix = job.get("strategy", {}).get("matrix", {})
        found += [(name, {key: value}) for key, values in matrix.items() for value in values]
        found += [] if matrix else [(name, {})]
    return found


def run_job(name: str, matrix: dict[str, str], code: int, folder: Path, repository: Path) -> Done:
    """Runs the steps of a job after `make setup`, with a Python that ends with an exit code."""
    (folder / "python").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {code}\n')
    (folder / "git").write_text(f"#!/bin/sh\necho {BASE}\n")
    make = shlex.join([shutil.which("make") or "make", "-C", str(repository), "-o", "setup"])
    (folder / "make").write_text(f'#!/bin/sh\nexec {make} BIN={folder} "$@"\n')
    for tool in ("python", "git", "make"):
        (folder / tool).chmod(0o755)
    variables = {"GITHUB_STEP_SUMMARY": str(folder / "summary"), "BASE": BASE}
    codes = []
    for step in steps_of(name):
        text = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: matrix[found[1]], step["run"])
        done = subprocess.run(
            [*BASH, text],
            cwd=folder,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables},
            capture_output=True,
            timeout=60,
        )
        codes.append(done.returncode)
    calls = [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]
    return Done(codes=codes, calls=calls, summary=(folder / "summary").read_text())


def steps_of(name: str) -> list[dict[str, Any]]:
    return [
        step
        for step in CONTENT["jobs"][name]["steps"]
        if "run" in step and step["run"] != "make setup"
    ]


def test_every_pull_request_is_checked_with_read_access_only() -> None:
    assert list(CONTENT[True]) == ["pull_request"]  # YAML 1.1 reads `on` as true
    assert CONTENT["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(("name", "matrix"), jobs())
@pytest.mark.parametrize("code", [0, 3, 4])
def test_a_job_passes_only_if_its_command_does_and_shows_the_verdict(
    name: str, matrix: dict[str, str], code: int, tmp_path: Path, repository: Path
) -> None:
    done = run_job(name, matrix, code, tmp_path, repository)
    assert [bool(ended) for ended in done.codes] == [code != 0, False]
    assert done.calls
    assert done.summary.startswith("### ")
    assert f"Error {code}" in done.summary or code == 0
    assert [step.get("if") for step in steps_of(name)] == [None, "always()"]


@pytest.mark.parametrize(("name", "matrix"), jobs())
def test_the_commands_of_a_job_are_accepted_here(
    name: str, matrix: dict[str, str], tmp_path: Path, repository: Path
) -> None:
    for _, module, *arguments in run_job(name, matrix, 0, tmp_path, repository).calls:
        if module == "pytest":
            assert collect(arguments, repository, tmp_path / "log") == 0
        else:
            assert module == "scaling"
            check_compare(arguments)


def collect(arguments: Sequence[str], repository: Path, log: Path) -> int | None:
    def run() -> int:
        os.chdir(repository)
        return pytest.main([*arguments, "--collect-only", "-q", "-p", "no:cacheprovider"])

    process = fork_command(run, log=log, variables={})
    process.join(PATIENCE_S)
    return process.exitcode


def check_compare(arguments: Sequence[str]) -> None:
    """Parses the self-test, or a comparison with the merge base and the options of its recipe."""
    if "--" not in arguments:
        assert build_parser("compare").parse_args(arguments)["compare"].self_test
        return
    end = arguments.index("--")
    command, recipe, *options = *arguments[:end][:1], *arguments[end + 1 :]
    assert command in SUBCOMMANDS
    given = build_parser(command).parse_args(arguments[:end])[command]
    assert (given.base, given.candidate) == (BASE, ".")
    preset = PRESETS[recipe]
    build_config(parse(preset, options), defaults=preset.cpu, devices=1)


def test_setup_is_a_target_of_make(repository: Path) -> None:
    subprocess.run(["make", "-n", "setup"], cwd=repository, check=True, capture_output=True)

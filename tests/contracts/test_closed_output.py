"""Every command ends as its work does when its output is closed, full or of another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.job_files import SUBMITTED
from tests.processes import PATIENCE_S

RECIPES = [f"recipes.{recipe} --help" for recipe in ("bert", "gpt", "vit")]
COMMANDS = [
    "recipes.gpt --print_config",
    "scaling --help",
    "scaling published",
    "slurm.submit recipes.gpt --dry-run",
    "slurm.status --help",
    "unitransformer.export --help",
]

FULL = b"error: standard output is lost: No space left on device; the rest follows here\n"


def run(
    line: str, repository: Path, stdout: int, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", *line.split()],
        cwd=repository,
        env={**os.environ, **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("line", [*RECIPES, *COMMANDS])
def test_a_command_whose_output_nobody_reads_succeeds(line: str, repository: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(line, repository, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("line", COMMANDS)
def test_output_for_which_a_disk_has_no_room_follows_a_line_in_standard_error(
    line: str, repository: Path
) -> None:
    shown = run(line, repository, subprocess.PIPE)
    with open("/dev/full", "wb") as full:
        done = run(line, repository, full.fileno())
    assert done.returncode == 1
    assert done.stderr.startswith(FULL)
    assert len(done.stderr.splitlines()) == 1 + len(shown.stdout.splitlines())


@pytest.mark.parametrize("is_full", [False, True])
def test_a_job_is_queued_although_nobody_reads_its_number(
    is_full: bool, repository: Path, tmp_path: Path
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    if is_full:
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    line = f"slurm.submit recipes.gpt --folder {tmp_path}/job"
    done = run(line, repository, writer, PATH=f"{tmp_path}:{os.environ['PATH']}")
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr.startswith(FULL + b"job     4711\n") if is_full else not done.stderr
    assert (tmp_path / "job" / SUBMITTED).exists()

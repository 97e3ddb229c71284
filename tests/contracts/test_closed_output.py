"""Every command ends as its work does when its output is closed, full or of another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.job_files import SUBMITTED

COMMANDS = [
    *(f"recipes.{recipe} --help" for recipe in ("bert", "gpt", "vit")),
    "recipes.gpt --print_config",
    "scaling --help",
    "scaling published",
    "slurm.submit recipes.gpt --dry-run",
    "slurm.status --help",
    "unitransformer.export --help",
]


def run(
    line: str, repository: Path, stdout: int, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", *line.split()],
        cwd=repository,
        env={**os.environ, **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
    )


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_whose_output_nobody_reads_succeeds(line: str, repository: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(line, repository, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_whose_output_a_full_disk_loses_fails_in_one_line(
    line: str, repository: Path
) -> None:
    with open("/dev/full", "wb") as full:
        done = run(line, repository, full.fileno())
    assert done.returncode == 1
    assert done.stderr == b"error: standard output is lost: No space left on device\n"


def test_a_job_is_queued_although_nobody_reads_its_number(repository: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    reader, writer = os.pipe()
    os.close(reader)
    line = f"slurm.submit recipes.gpt --folder {tmp_path}/job"
    done = run(line, repository, writer, PATH=f"{tmp_path}:{os.environ['PATH']}")
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "job" / SUBMITTED).exists()

"""A SLURM controller accepts the jobs for 64 imaginary nodes with 8 H200 each."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import sbatch, submit
from tests.slurm.cluster import controller_alone

SHAPE = ["--gpu-type", "h200", "--partition", "gpu"]
GIVEN = {"--gpu-type": "h200", "--partition": "gpu", "--time": "1-0"}


@pytest.fixture(scope="module")
def controller(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with controller_alone(tmp_path_factory.mktemp("controller")) as config:
        yield config


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--nodes", "64", "--devices", "8"), None),
        (("--nodes", "65", "--devices", "8"), "Node count specification invalid"),
        (("--nodes", "1", "--devices", "9"), "Requested node configuration is not available"),
        (
            ("--nodes", "64", "--devices", "8", "--gpu-type", "a100"),
            "Requested node configuration is not available",
        ),
        (("--nodes", "1", "--devices", "8", "--time", "3-0"), "[Tt]ime limit"),
    ],
)
def test_a_job_of_sixty_four_nodes_with_eight_gpus_is_accepted(
    options: tuple[str, ...],
    expected: str | None,
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", controller)
    given = GIVEN | dict(zip(options[::2], options[1::2], strict=True))
    words = [word for option in given.items() for word in option]
    argv = ["recipes.gpt", "--folder", str(tmp_path / "job"), *words, "--test-only"]
    code = submit.main([*argv, "--", "--size", "175b", "--strategy", "hsdp"])
    printed = capsys.readouterr()
    if expected is None:
        assert (code, printed.out) == (0, "SLURM accepts this job; nothing was submitted\n")
    else:
        assert code == 2
        assert re.search(f"^error: SLURM refuses this job: .*{expected}", printed.err), printed.err


def test_a_number_of_nodes_beyond_the_partition_is_named_and_nothing_is_queued(
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", controller)
    monkeypatch.chdir(tmp_path)
    argv = [
        "sweep",
        "--folder",
        str(tmp_path / "job"),
        *SHAPE,
        "--time",
        "1-0",
        "--devices",
        "8",
        "--",
    ]
    axes = ["--recipe", "gpt", "--strategy", "ddp", "--devices", "8", "--num-nodes"]
    assert submit.main([*argv, *axes, "1,64,65"]) == 2
    error = capsys.readouterr().err
    assert "so 1 cell on 65 nodes could never run: choose another partition" in error
    assert list(tmp_path.iterdir()) == []


def test_the_array_of_a_sweep_fits_the_limit_of_the_controller(
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The controller allows 100 tasks, and the sweep has more cells."""
    monkeypatch.setenv("SLURM_CONF", controller)
    options = ["--folder", str(tmp_path / "job"), *SHAPE, "--devices", "8", "--dry-run"]
    assert submit.main(["sweep", "quick", *options, "--time", "1:00:00"]) == 0
    assert not (tmp_path / "job").exists()
    first, second = capsys.readouterr().out.split("#!/bin/bash\n")[1:]
    script = f"#!/bin/bash\n{first}"
    assert "#SBATCH --array=0-99%8\n" in first
    assert re.search(r"^#SBATCH --array=0-\d\d%8$", second, re.MULTILINE)
    assert sbatch.run_sbatch(["--test-only"], script) == ""
    with pytest.raises(ValueError, match="Invalid job array specification"):
        sbatch.run_sbatch(["--test-only"], script.replace("0-99%8", "0-100%8"))


def test_ready_scripts_are_accepted(controller: str, repository: Path) -> None:
    for script in sorted(repository.glob("slurm/*.sbatch")):
        done = subprocess.run(
            ["sbatch", "--test-only", "--partition=gpu", script],
            env={**os.environ, "SLURM_CONF": controller},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script.name}: {done.stderr}"

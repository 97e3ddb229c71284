"""Large shapes, looked at by a controller without nodes: 64 of them with 8 H200 each."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import submit
from tests.slurm.cluster import controller_alone

SHAPE = ["--gpu-type", "h200", "--time", "1-0", "--partition", "gpu", "--test-only"]


@pytest.fixture(scope="module")
def controller(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with controller_alone(tmp_path_factory.mktemp("controller")) as config:
        yield config


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--nodes", "64", "--devices", "8"), 0),
        (("--nodes", "65", "--devices", "8"), 2),
        (("--nodes", "1", "--devices", "9"), 2),
        (("--nodes", "64", "--devices", "8", "--gpu-type", "a100"), 2),
        (("--nodes", "1", "--devices", "8", "--time", "3-0"), 2),
    ],
)
def test_sixty_four_nodes_of_eight_gpus(
    options: tuple[str, ...],
    code: int,
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CONF", controller)
    words = ["recipes.gpt", "--folder", str(tmp_path / "job"), *SHAPE, *options]
    assert submit.main([*words, "--", "--size", "175b", "--strategy", "hsdp"]) == code


def test_a_sweep_over_an_array_is_taken(
    controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", controller)
    words = ["sweep", "node-8", "--folder", str(tmp_path / "job"), *SHAPE, "--devices", "8"]
    assert submit.main(words) == 0
    assert not (tmp_path / "job").exists()


def test_ready_scripts_are_taken(controller: str, repository: Path) -> None:
    for script in sorted(repository.glob("slurm/*.sbatch")):
        done = subprocess.run(
            ["sbatch", "--test-only", "--partition=gpu", script],
            env={**os.environ, "SLURM_CONF": controller},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script.name}: {done.stderr}"

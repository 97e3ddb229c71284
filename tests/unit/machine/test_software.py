"""Tests the recorded commit and versions."""

import subprocess
from pathlib import Path

import pytest
import torch

from unitransformer.machine import software
from unitransformer.machine.software import describe_code, describe_versions


def git(checkout: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code lies in a new git repository."""
    module = tmp_path / "unitransformer" / "software.py"
    module.parent.mkdir()
    module.write_text("")
    (tmp_path / "RESULTS.md").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(software, "__file__", str(module))
    return tmp_path


@pytest.mark.parametrize(
    ("written", "is_dirty"),
    [
        ("scaling/results/records/0123-1.json", False),
        ("scaling/results/sweeps/quick/cells/0123-1/log.txt", False),
        ("RESULTS.md", False),
        ("unitransformer/machine/software.py", True),
        ("unitransformer/another.py", True),
        ("constraints.txt", True),
    ],
)
def test_changed_code_makes_the_tree_dirty_and_outputs_of_runs_do_not(
    written: str, is_dirty: bool, checkout: Path
) -> None:
    assert describe_code()["is_dirty"] is False
    (checkout / written).parent.mkdir(parents=True, exist_ok=True)
    (checkout / written).write_text("changed")
    assert describe_code()["is_dirty"] is is_dirty


def test_the_commit_is_missing_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "__file__", str(tmp_path / "software.py"))
    assert describe_code() == {"commit": None, "is_dirty": None}


def test_versions_of_cuda_libraries_are_recorded_for_gpu_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(software, "driver_versions", lambda: {"nvidia driver": "580.1"})
    on_cpu, on_gpu = describe_versions("cpu"), describe_versions("cuda")
    assert on_gpu == on_cpu | {"CUDA": "13.0", "NCCL": "2.28.3", "nvidia driver": "580.1"}
    assert on_cpu.keys() == {"python", *software.PACKAGES, "deepspeed"}


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "OPTIONAL_PACKAGES", ("no-such-package",))
    assert describe_versions("cpu").keys() == {"python", *software.PACKAGES}

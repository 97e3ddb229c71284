"""Tests which environment a side gets."""

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scaling.comparison import environments
from scaling.comparison.environments import (
    python_for_constraints,
    python_with_package,
    read_pins,
    runtime_packages,
)

Installed = list[tuple[Sequence[str], str]]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Collects what pip would install, and the constraints."""
    calls: Installed = []

    def install(python: Path, packages: Sequence[str], constraints: Path, label: str) -> None:
        calls.append((packages, constraints.read_text()))
        if "broken" in label:
            raise RuntimeError(f"{label} cannot be installed: no such version")

    monkeypatch.setattr(environments, "_install", install)
    monkeypatch.setattr(environments.venv, "create", make_folders)
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    return calls


def make_folders(folder: Path, **options: bool) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages").mkdir(parents=True)


@pytest.fixture
def constraints(tmp_path: Path) -> Path:
    path = tmp_path / "constraints.txt"
    path.write_text("# all\nPyYAML==6.0.0\ntorch==2.13.0  # the newest\ntorchvision==0.28.0\n")
    return path


def test_pins_are_read_without_comments(constraints: Path, tmp_path: Path) -> None:
    assert read_pins(constraints) == ["PyYAML==6.0.0", "torch==2.13.0", "torchvision==0.28.0"]
    assert read_pins(tmp_path / "nowhere.txt") == []


def test_another_version_gets_an_environment_that_is_kept(
    installed: Installed, constraints: Path
) -> None:
    python = python_with_package("pyyaml", "7.0", constraints)
    assert installed == [(["pyyaml==7.0"], "torch==2.13.0\ntorchvision==0.28.0\n")]
    assert python_with_package("PyYAML", "7.0", constraints) == python
    assert len(installed) == 1
    assert python_with_package("pyyaml", "8.0", constraints) != python


def test_packages_that_a_version_does_not_suit_follow_it(
    installed: Installed, constraints: Path
) -> None:
    python_with_package("torch", "1.0", constraints)
    ((packages, pins),) = installed
    assert packages[0] == "torch==1.0"
    assert "torchvision" in packages
    assert pins == "PyYAML==6.0.0\n"


def test_the_installed_version_needs_no_environment(
    installed: Installed, constraints: Path
) -> None:
    for version in {importlib.metadata.version("torch"), "2.13.0"}:
        if importlib.metadata.version("torch").startswith(version):
            assert python_with_package("torch", version, constraints) == Path(sys.executable)
    assert installed == []


def test_an_environment_that_failed_is_not_kept(installed: Installed, constraints: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="pyyaml broken cannot be installed"):
            python_with_package("pyyaml", "broken", constraints)
    assert len(installed) == 2


def test_a_package_that_is_not_installed_is_refused(constraints: Path) -> None:
    with pytest.raises(ValueError, match="package no-such-package is not installed here"):
        python_with_package("no-such-package", "1.0", constraints)


def test_only_packages_that_recipes_need_make_an_environment(
    installed: Installed, tmp_path: Path
) -> None:
    numpy = importlib.metadata.version("numpy")
    path = tmp_path / "constraints.txt"
    path.write_text(f"numpy=={numpy}\nruff==0.0.1\n")
    assert python_for_constraints(path, "old") == Path(sys.executable)
    path.write_text("numpy==1.0\nruff==0.0.1\n")
    assert python_for_constraints(path, "old") != Path(sys.executable)
    assert installed == [(["numpy==1.0"], "numpy==1.0\n")]


def test_runtime_packages_leave_test_tools_out() -> None:
    found = runtime_packages()
    assert {"torch", "lightning", "numpy"} <= found
    assert not {"ruff", "pytest", "deepspeed"} & found

"""Tests which environment a side gets."""

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaling.comparison import environments
from scaling.comparison.environments import (
    build_of,
    python_for_constraints,
    python_with_package,
    read_pins,
    runtime_packages,
)

Installed = list[tuple[Sequence[str], str]]


class FakePip:
    """Answers a dry run with `plan`."""

    def __init__(self) -> None:
        self.plan: list[dict[str, Any]] = []
        self.calls: list[list[str]] = []

    def run(self, python: Path, arguments: list[str], label: str) -> None:
        self.calls.append(arguments)
        if arguments[:2] == ["--dry-run", "--report"]:  # to a file: pip itself prints bars, too
            Path(arguments[2]).write_text(json.dumps({"install": self.plan}))


def installed_without_devices(name: str) -> SimpleNamespace:
    return SimpleNamespace(version="2.13.0+cpu", requires=["numpy"])


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


@pytest.mark.parametrize(
    ("version", "needs", "build"),
    [
        ("2.13.0+cpu", ["numpy"], "CPU"),
        ("2.13.0+cu130", [], "CUDA"),
        ("2.13.0+rocm6.4", [], "ROCm"),
        ("2.13.0", ["numpy", "nvidia-cudnn-cu13==9.1; python_version > '3'"], "CUDA"),
        ("2.13.0", ["numpy", "nvidia-cudnn-cu13==9.1; python_version < '3'"], "CPU"),
        ("2.13.0", ["cuda-bindings>=13; extra == 'cuda'"], "CPU"),
        ("1.0+custom.1", [], "CPU"),
    ],
)
def test_the_build_of_a_version_is_that_of_its_label_or_of_what_it_needs(
    version: str, needs: list[str], build: str
) -> None:
    assert build_of(version, needs) == build


def planned(
    name: str, version: str, needs: Sequence[str] = (), url: str = "https://a:b@files.example/x"
) -> dict[str, Any]:
    return {
        "download_info": {"url": url},
        "metadata": {"name": name, "version": version, "requires_dist": list(needs)},
    }


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(environments, "_pip", fake.run)
    return fake


def test_what_is_installed_and_from_where_is_printed_before(
    pip: FakePip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "own files" / "numpy.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(bytes(3 * 2**20))
    pip.plan = [planned("numpy", "9.0", url=wheel.as_uri()), planned("other", "1.0")]
    packages = ["--index-url=https://index.example", "numpy==9.0"]
    environments._install(Path("python"), packages, tmp_path / "pins", "numpy 9.0")
    assert capsys.readouterr().out == (
        f"numpy 9.0: installing numpy 9.0 (3.0 MiB), other 1.0 from {wheel.parent} and "
        "files.example\n"
    )
    dry, real = pip.calls
    assert dry == ["--dry-run", "--report", dry[2], *real]
    assert real[-2:] == packages


@pytest.mark.parametrize(
    ("version", "needs"), [("99.0+cu130", []), ("99.0", ["nvidia-cublas==13.1"])]
)
def test_a_build_for_other_devices_is_named_before_it_is_installed(
    pip: FakePip,
    version: str,
    needs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", installed_without_devices)
    pip.plan = [planned("torch", version, needs)]
    environments._install(Path("python"), ["torch==99.0"], tmp_path / "pins", "torch 99")
    assert capsys.readouterr().out.splitlines()[1] == (
        f"torch 99: torch {version} is a CUDA build, and 2.13.0+cpu here a CPU build; to compare "
        "two CPU builds, name an index or a folder that has them, --index-url or --find-links"
    )


def test_other_sources_make_another_environment(
    installed: Installed, constraints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = python_with_package("pyyaml", "7.0", constraints)
    options = ("--index-url=https://index.example",)
    assert python_with_package("pyyaml", "7.0", constraints, options) != first
    assert installed[-1][0] == [*options, "pyyaml==7.0"]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://index.example")
    assert python_with_package("pyyaml", "7.0", constraints) != first
    assert len(installed) == 3


def make_wheel(folder: Path, name: str, version: str, *needs: str, code: str = "") -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        about = f"{name}-{version}.dist-info"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        wheel.writestr(f"{name}/__init__.py", code)
        wheel.writestr(f"{about}/METADATA", "\n".join(lines))
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_an_error_of_pip_names_the_requirements_that_conflict(
    tmp_path: Path, constraints: Path
) -> None:
    constraints.write_text("bbb==2.0\n")
    make_wheel(tmp_path, "aaa", "1.0", "bbb<2")
    make_wheel(tmp_path, "bbb", "2.0")
    options = ["--no-index", f"--find-links={tmp_path}", "--constraint", str(constraints)]
    with pytest.raises(RuntimeError) as error:
        environments._pip(Path(sys.executable), ["--dry-run", *options, "aaa==1.0"], "aaa 1.0")
    assert str(error.value) == (
        "aaa 1.0 cannot be installed: Cannot install aaa==1.0 because these package versions have "
        "conflicting dependencies; aaa 1.0 depends on bbb<2; The user requested (constraint) "
        "bbb==2.0"
    )


@pytest.mark.proof  # a virtual environment takes seconds
def test_a_version_of_a_folder_of_files_is_installed_and_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(tmp_path, "iniconfig", "99.0", code="origin = 'the folder'\n")
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # of pip's variables, which count too
    pins, options = tmp_path / "no-pins.txt", (f"--find-links={tmp_path}",)
    python = python_with_package("iniconfig", "99.0", pins, options)
    show = [str(python), "-c", "import iniconfig, numpy; print(iniconfig.origin)"]
    done = subprocess.run(show, capture_output=True, text=True, check=True)
    assert done.stdout == "the folder\n"
    printed = capsys.readouterr().out
    assert printed.startswith("iniconfig 99.0: installing iniconfig 99.0 (")
    assert printed.endswith(f" from {tmp_path}\n")

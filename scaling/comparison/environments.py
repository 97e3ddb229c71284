"""Makes virtual environments for what is compared, and keeps them in the cache folder.

Each holds only what differs from the environment of this process, and finds the rest there.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from unitransformer.files import cache_folder

PROJECT = "unitransformer"
CONSTRAINTS = "constraints.txt"
INSTALL_LIMIT_S = 3600.0
DONE = ".complete"


def python_with_package(package: str, version: str, constraints: Path) -> Path:
    """Returns the interpreter of an environment with this version of a package.

    Packages that this version does not suit, or that it pins, follow it: torchvision follows torch.
    The versions of all others are those of the constraints.

    Raises:
        ValueError: the package is not installed here.
        RuntimeError: pip cannot install it.
    """
    name = _normal(package)
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"package {package} is not installed here; check its name") from None
    if version in _names_of(installed):
        return Path(sys.executable)
    followers = _unsuited(name, version)
    free = {name, *followers, *_pinned_by(name)}
    kept = [pin for pin in read_pins(constraints) if _normal(pin.partition("==")[0]) not in free]
    return _environment([f"{name}=={version}", *followers], kept, f"{package} {version}")


def python_for_constraints(constraints: Path, label: str) -> Path:
    """Returns an interpreter whose packages have the versions that a revision pins.

    Packages that the recipes do not need, such as test tools, do not count. Raises RuntimeError if
    pip cannot install them.
    """
    needed = runtime_packages()
    pins = [pin for pin in read_pins(constraints) if _normal(pin.partition("==")[0]) in needed]
    missing = [pin for pin in pins if not _is_installed(pin)]
    return Path(sys.executable) if not missing else _environment(missing, pins, label)


def read_pins(constraints: Path) -> list[str]:
    """Returns the lines `name==version` of a file of constraints; none if there is no file."""
    if not constraints.exists():
        return []
    lines = (line.partition("#")[0].strip() for line in constraints.read_text().splitlines())
    return sorted(filter(None, lines))


def runtime_packages(root: str = PROJECT) -> set[str]:
    """Returns the installed packages that the recipes need, directly or not."""
    found, left = set[str](), [root]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _requirements(name)
    return found


def _requirements(name: str) -> list[str]:
    """Returns the packages that an installed package needs without extras."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return [_normal(need.name) for need in _needs(importlib.metadata.distribution(name))]
    return []


def _needs(distribution: importlib.metadata.Distribution) -> Iterator[Requirement]:
    """Yields what an installed package needs on this machine without extras."""
    for line in distribution.requires or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield need


def _unsuited(name: str, version: str) -> list[str]:
    """Returns the installed packages that need another version of a package."""
    return sorted(
        {
            _normal(distribution.name)
            for distribution in importlib.metadata.distributions()
            for need in _needs(distribution)
            if _normal(need.name) == name and not need.specifier.contains(version, prereleases=True)
        }
    )


def _pinned_by(name: str) -> set[str]:
    """Returns the packages of which an installed package needs one exact version."""
    needs = _needs(importlib.metadata.distribution(name))
    return {_normal(need.name) for need in needs if "==" in str(need.specifier)}


def _is_installed(pin: str) -> bool:
    name, _, version = pin.partition("==")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return version in _names_of(importlib.metadata.version(name))
    return False


def _names_of(version: str) -> tuple[str, str]:
    """2.13.0+cpu is also called 2.13.0."""
    return version, version.partition("+")[0]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def _environment(packages: Sequence[str], pins: Iterable[str], label: str) -> Path:
    """Returns the interpreter of an environment with these packages, made if it is not cached."""
    pins = list(pins)
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    key = hashlib.sha256(json.dumps([sys.version, here, packages, pins]).encode()).hexdigest()[:16]
    folder = cache_folder() / "environments" / key
    python = folder / "bin/python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), _removed_unless_complete(folder):
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)  # one that was not completed
            venv.create(folder, with_pip=True, symlinks=True)
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            inherited = folder / "lib" / version / "site-packages/inherited.pth"
            inherited.write_text("\n".join(dict.fromkeys(here)) + "\n")
            constraints = folder / CONSTRAINTS
            constraints.write_text("\n".join(pins) + "\n")
            _install(python, packages, constraints, label)
            (folder / DONE).touch()
    return python


@contextlib.contextmanager
def _removed_unless_complete(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _install(python: Path, packages: Sequence[str], constraints: Path, label: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-warn-conflicts", "--constraint", str(constraints), *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{label}: pip has not ended after {INSTALL_LIMIT_S:.0f} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        lines = errors or done.stderr.strip().splitlines() or ["pip failed without a message"]
        raise RuntimeError(f"{label} cannot be installed: {lines[-1].removeprefix('ERROR: ')}")

"""Makes virtual environments for what is compared, and keeps them in the cache folder.

Each holds only what differs from the environment of this process, and finds the rest there. What is
installed, and from where, is printed before, and whether it is a build for other devices than the
one that is installed here, such as a torch for CUDA beside one for CPUs.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from packaging.requirements import Requirement

from unitransformer.files import cache_folder
from unitransformer.record.units import format_bytes

PROJECT = "unitransformer"
CONSTRAINTS = "constraints.txt"
INSTALL_LIMIT_S = 3600.0
DONE = ".complete"
# Lines of pip's log, after the time.
CONFLICT = r"^[\dT:,-]+\s+(The user requested .+|\S+ \S+ depends on .+)$"
BUILDS = {"cu": "CUDA", "rocm": "ROCm", "xpu": "XPU"}  # by the label of a version


def python_with_package(
    package: str, version: str, constraints: Path, pip_options: Sequence[str] = ()
) -> Path:
    """Returns the interpreter of an environment with this version of a package.

    Packages that this version does not suit, or that it pins, follow it: torchvision follows torch.
    The versions of all others are those of the constraints.

    Args:
        pip_options: say where pip finds packages; its variables, such as PIP_INDEX_URL, do too.

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
    packages = [f"{name}=={version}", *followers]
    return _environment(packages, kept, f"{package} {version}", pip_options)


def python_for_constraints(constraints: Path, label: str, pip_options: Sequence[str] = ()) -> Path:
    """Returns an interpreter whose packages have the versions that a revision pins.

    Packages that the recipes do not need, such as test tools, do not count. Raises as
    `python_with_package` does.
    """
    needed = runtime_packages()
    pins = [pin for pin in read_pins(constraints) if _normal(pin.partition("==")[0]) in needed]
    missing = [pin for pin in pins if not _is_installed(pin)]
    return Path(sys.executable) if not missing else _environment(missing, pins, label, pip_options)


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
    return _needs_in(distribution.requires or ())


def _needs_in(lines: Iterable[str]) -> Iterator[Requirement]:
    for line in lines:
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


def _environment(
    packages: Sequence[str], pins: Iterable[str], label: str, pip_options: Sequence[str]
) -> Path:
    """Returns the interpreter of an environment with these packages, made if it is not cached."""
    pins = list(pins)
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    parts = [sys.version, here, packages, pins, *pip_settings(pip_options)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "environments" / digest[:16]
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
            _install(python, [*pip_options, *packages], constraints, label)
            (folder / DONE).touch()
    return python


def pip_settings(pip_options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns what says where pip finds packages: its options, and its variables PIP_*."""
    variables = {name: text for name, text in os.environ.items() if name.startswith("PIP_")}
    return list(pip_options), variables


@contextlib.contextmanager
def _removed_unless_complete(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _install(python: Path, packages: Sequence[str], constraints: Path, label: str) -> None:
    """Prints what will be installed, unless it is refused, and installs it."""
    arguments = ["--no-warn-conflicts", "--constraint", str(constraints), *packages]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")  # standard output would also have progress bars
        _pip(python, ["--dry-run", "--report", str(report), *arguments], label)
        plan = json.loads(report.read_text(encoding="utf-8"))["install"]
    print(f"{label}: installing {describe_plan(plan)}", flush=True)
    for line in other_builds(plan):
        print(f"{label}: {line}", flush=True)
    _pip(python, arguments, label)


def other_builds(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names each package of a report of pip whose installed build is one for other devices."""
    lines = []
    for item in plan:
        new = item["metadata"]
        try:
            installed = importlib.metadata.distribution(new["name"])
        except importlib.metadata.PackageNotFoundError:
            continue
        build = build_of(new["version"], new.get("requires_dist", ()))
        here = build_of(installed.version, installed.requires or ())
        if build != here:
            lines.append(
                f"{new['name']} {new['version']} is a {build} build, and {installed.version} here "
                f"a {here} build; to compare two {here} builds, name an index or a folder that "
                "has them, --index-url or --find-links"
            )
    return lines


def build_of(version: str, needs: Iterable[str]) -> str:
    """Returns for which devices a version of a package was built: CPU, CUDA, ROCm or XPU.

    Its label says so, as in 2.13.0+cpu. One without a label is for CUDA if it needs packages of it.
    """
    if label := re.match("cu(?=[0-9])|rocm|xpu", version.partition("+")[2]):
        return BUILDS[label[0]]
    names = {_normal(need.name) for need in _needs_in(needs)}
    return "CUDA" if any(name.startswith(("nvidia-", "cuda-")) for name in names) else "CPU"


def describe_plan(plan: Sequence[Mapping[str, Any]]) -> str:
    """Returns the packages of a report of pip, with the size of files on disk, and their places."""
    names, places = [], []
    for item in plan:
        url = urlsplit(item["download_info"]["url"])
        path = Path(unquote(url.path))
        is_file = url.scheme == "file" and path.is_file()
        size = f" ({format_bytes(path.stat().st_size)})" if is_file else ""
        names.append(f"{item['metadata']['name']} {item['metadata']['version']}{size}")
        places.append(url.hostname or str(path.parent))  # without a password
    listed = ", ".join(names) or "nothing: all of it is here"
    return f"{listed} from {' and '.join(dict.fromkeys(places))}" if places else listed


def _pip(python: Path, arguments: Sequence[str], label: str) -> None:
    """Runs `pip install`; raises RuntimeError with its first error and the cause."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")  # alone says which packages conflict
        command += ["--log", str(log)]
        try:
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, timeout=INSTALL_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            message = f"{label}: pip has not ended after {INSTALL_LIMIT_S:.0f} s"
            raise RuntimeError(message) from None
        if done.returncode:
            logged = log.read_text(errors="replace") if log.exists() else ""
            raise RuntimeError(f"{label} cannot be installed: {_reason(done.stderr, logged)}")


def _reason(stderr: str, logged: str) -> str:
    """Returns pip's first error, and which requirements conflict."""
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")]
    lines = errors or stderr.strip().splitlines()[-1:] or ["pip failed without a message"]
    causes = dict.fromkeys(re.findall(CONFLICT, logged, re.MULTILINE))
    return "; ".join([lines[0].removeprefix("ERROR: ").rstrip("."), *causes])

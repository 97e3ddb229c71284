"""Finds out what is compared, and prepares it: revisions, files as they are, options, packages.

Revisions are copied out of the repository into a temporary folder, which is removed at the end and
leaves nothing in the repository even if the process is killed.
"""

import contextlib
import io
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from scaling.comparison.environments import (
    CONSTRAINTS,
    python_for_constraints,
    python_with_package,
    read_pins,
)
from scaling.comparison.interleave import SIDES, Side, SideName
from scaling.comparison.options import CompareOptions, check_recipe_options
from scaling.comparison.verdict import LOOKS
from unitransformer.config import Recipe

Kind = Literal["files", "options", "config", "records", "revision"]
HERE = "."  # the files as they are now
PACKAGES = ("unitransformer", "recipes")  # that a recipe needs
ON_ONE_DEVICE = ("--devices", "1")


def kind_of(text: str) -> Kind:
    """Returns what a side of the command line names, by the first rule that applies."""
    if text == HERE:
        return "files"
    if not text.strip() or text.startswith("-"):
        return "options"
    path = Path(text)
    if path.is_file():
        return "config"
    return "records" if path.is_dir() else "revision"


def check_kinds(options: CompareOptions) -> Kind:
    """Returns the kind of both sides; raises ValueError if they cannot be compared."""
    base, candidate = kind_of(options.base), kind_of(options.candidate)
    if base == "files":
        raise ValueError(
            "BASE is '.', the files as they are now; name a revision as BASE, and '.' as CANDIDATE"
        )
    alike: dict[Kind, Kind] = {"files": "revision", "config": "options"}  # compared with each other
    if alike.get(base, base) != alike.get(candidate, candidate):
        raise ValueError(
            f"BASE {options.base!r} is {_A[base]}, CANDIDATE {options.candidate!r} is "
            f"{_A[candidate]}; give two of a kind"
        )
    kind = alike.get(candidate, candidate)
    _check_used(options, kind)
    return base


def _check_used(options: CompareOptions, kind: Kind) -> None:
    """Raises ValueError for options that a comparison of this kind does not use."""
    if options.leaves_changes_out and (kind != "revision" or options.candidate == HERE):
        raise ValueError("dirty is only for two revisions; leave --dirty out")
    if options.pip_options and kind != "revision":
        raise ValueError(
            f"{options.pip_options[0]} is not used, as nothing is installed for {_A[kind]}; "
            "leave it out"
        )
    if kind == "records":
        if Path(options.base).resolve() == Path(options.candidate).resolve():
            raise ValueError(
                f"BASE {options.base!r} and CANDIDATE {options.candidate!r} are the same folder of "
                "records; name another"
            )
        for name, value, default in (
            ("pairs", options.looks, LOOKS),
            ("seed", options.seed, 0),
        ):
            if value != default:
                raise ValueError(
                    f"--{name} is not used: folders of records are not measured again; leave it out"
                )


_A: dict[Kind, str] = {
    "files": "the files as they are now",
    "options": "options of a recipe",
    "config": "a file of options",
    "records": "a folder of records",
    "revision": "neither a file, a folder nor options: a git revision",
}


@contextlib.contextmanager
def open_sides(options: CompareOptions) -> Iterator[Mapping[SideName, Side]]:
    """Yields both sides, ready to start; removes what it made when the block ends.

    Raises:
        ValueError: a revision that does not exist, options that are reserved, uncommitted changes.
        RuntimeError: an environment cannot be made.
    """
    named: dict[SideName, str] = {"base": options.base, "candidate": options.candidate}
    rest = (*ON_ONE_DEVICE, *options.recipe_options)
    how = (options.recipe, rest, options.pip_options)
    here = find_repository()
    if options.package is not None:
        versions = list(named.values())
        with open_versions(options.package, versions, *how) as sides:
            yield dict(zip(SIDES, sides, strict=True))
    elif kind_of(options.base) in ("options", "config"):
        arguments = {name: _read_arguments(text, name) for name, text in named.items()}
        with copied_files(here) as code:
            yield {
                name: Side(
                    label=text or "no options",
                    recipe=options.recipe,
                    arguments=(*rest, *arguments[name]),
                    code=code,
                    python=Path(sys.executable),
                    commit=find_commit("HEAD", here),
                    is_dirty=has_changes(here),
                )
                for name, text in named.items()
            }
    else:
        for text in named.values():
            find_commit("HEAD" if text == HERE else text, here)
        if HERE not in named.values() and has_changes(here) and not options.leaves_changes_out:
            raise ValueError(
                "uncommitted changes are part of no revision; commit them, give '.' as CANDIDATE "
                "to measure them, or --dirty to leave them out"
            )
        with open_revisions(list(named.values()), *how) as sides:
            yield dict(zip(SIDES, sides, strict=True))


@contextlib.contextmanager
def open_versions(
    package: str,
    versions: Sequence[str],
    recipe: Recipe,
    arguments: Sequence[str],
    pip_options: Sequence[str] = (),
) -> Iterator[list[Side]]:
    """Yields a side for each version of a package, all with the files as they are now.

    Raises:
        ValueError: the package is not installed here.
        RuntimeError: a version cannot be installed.
    """
    here = find_repository()
    with copied_files(here) as code:
        yield [
            Side(
                label=f"{package} {version}",
                recipe=recipe,
                arguments=tuple(arguments),
                code=code,
                python=python_with_package(package, version, here / CONSTRAINTS, pip_options),
                commit=find_commit("HEAD", here),
                is_dirty=has_changes(here),
            )
            for version in versions
        ]


@contextlib.contextmanager
def open_revisions(
    revisions: Sequence[str],
    recipe: Recipe,
    arguments: Sequence[str],
    pip_options: Sequence[str] = (),
) -> Iterator[list[Side]]:
    """Yields a side for each revision, or for the files as they are where it is '.'.

    A revision gets an environment of its own if its constraints differ from the others'.
    """
    here = find_repository()
    commits = [find_commit("HEAD" if text == HERE else text, here) for text in revisions]
    with contextlib.ExitStack() as stack:
        folders = [
            stack.enter_context(
                copied_files(here) if text == HERE else copied_revision(commit, here)
            )
            for text, commit in zip(revisions, commits, strict=True)
        ]
        pins = [tuple(read_pins(folder / CONSTRAINTS)) for folder in folders]
        yield [
            Side(
                label=text,
                recipe=recipe,
                arguments=tuple(arguments),
                code=folder,
                python=Path(sys.executable)
                if len(set(pins)) == 1
                else python_for_constraints(folder / CONSTRAINTS, text, pip_options),
                commit=commit,
                is_dirty=has_changes(here) if text == HERE else False,
            )
            for text, commit, folder in zip(revisions, commits, folders, strict=True)
        ]


def find_repository() -> Path:
    """Returns the root of the repository of the current folder; raises ValueError without one."""
    try:
        root = Path(git(Path.cwd(), "rev-parse", "--show-toplevel"))
    except ValueError:
        raise ValueError(
            "the current folder is in no git repository; change to that of the code"
        ) from None
    _check_packages(root, str(root))
    return root


def find_commit(revision: str, repository: Path) -> str:
    """Returns the full hash of a revision; raises ValueError if there is none of this name."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except ValueError:
        raise ValueError(
            f"{revision!r} is no revision of this repository, and no file or folder; git log lists "
            "revisions"
        ) from None


def has_changes(repository: Path) -> bool:
    """Whether files of the code differ from HEAD, or are new."""
    return bool(
        git(repository, "status", "--porcelain", "--", "*.py", "*.toml", "constraints*.txt")
    )


@contextlib.contextmanager
def copied_revision(commit: str, repository: Path) -> Iterator[Path]:
    """Yields a temporary copy of a revision; raises RuntimeError for files that it cannot copy."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        archive = _run(repository, "archive", "--format=tar", commit)
        try:
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
        except tarfile.TarError as error:  # such as a link to a file outside the repository
            raise RuntimeError(f"{commit[:10]} cannot be copied: {error}") from error
        _check_packages(Path(folder), commit[:10])
        yield Path(folder)


@contextlib.contextmanager
def copied_files(repository: Path) -> Iterator[Path]:
    """Yields a temporary copy of the files as they are now, which later edits do not change."""
    listed = _run(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        for name in filter(None, listed.decode(errors="surrogateescape").split("\0")):
            source, target = repository / name, Path(folder, name)
            if source.is_file():  # not one that was deleted
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(folder)


def _check_packages(folder: Path, label: str) -> None:
    for package in PACKAGES:
        if not (folder / package).is_dir():
            raise ValueError(f"{label} holds no package {package}; it cannot train a recipe")


def _read_arguments(text: str, name: SideName) -> tuple[str, ...]:
    try:
        is_config = kind_of(text) == "config"
        arguments = ("--config", text) if is_config else tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}: {error}") from error
    check_recipe_options(arguments, f"of {name.upper()}")
    return ("--config", str(Path(text).resolve())) if is_config else arguments


def git(repository: Path, *arguments: str) -> str:
    """Returns what a command of git that only reads prints; raises ValueError if it fails."""
    return _run(repository, *arguments).decode(errors="surrogateescape").strip()


def _run(repository: Path, *arguments: str) -> bytes:
    """Returns what git prints; raises ValueError with its message if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    except FileNotFoundError:
        raise ValueError("git is not installed; it is needed to compare code") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout

"""What was found in the samples of runs, kept under the digest of the bytes it was found in.

A report of many records finds each figure once. Kept is what this very code found in these very
bytes; to take the folder away costs time and nothing else.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unitransformer.files import cache_folder
from unitransformer.record.metrics import Readout
from unitransformer.record.seals import read_sealed, seal, to_text
from unitransformer.stats.comparisons import LaunchMedian
from unitransformer.stats.intervals import MedianInterval
from unitransformer.stats.steady_state import SteadyState

PACKAGES = ("unitransformer", "scaling")  # whose code finds
UNUSED_S = 30 * 86400.0  # after which what other code has found is taken away


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of a run that ended well: what its samples say, and where its other fields disagree."""

    readout: Readout | None
    launch: LaunchMedian | None  # None as `readout` is: there is no steady state
    steady_today: SteadyState
    contradictions: tuple[str, ...]
    recounts: tuple[str, ...]


class Kept:
    """A folder of `Found`, a file for each content; any number of processes may use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recall(self, content: bytes) -> Found | None:
        """What was found in a record of this content; None where nothing whole is kept."""
        try:
            values, seals_hold = read_sealed(self._place(content))
            return _from_dict(values) if seals_hold else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, content: bytes, found: Found) -> None:
        """Where there is room; what cannot be kept is found again."""
        place = self._place(content)
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to disk, which takes longer than finding it: its seals tell a half one.
            temporary.write_text(to_text(seal(_to_dict(found))))
            temporary.replace(place)

    def _place(self, content: bytes) -> Path:
        digest = hashlib.sha256(content).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.json"


def open_kept() -> Kept:
    """That of this version of the code, in the user's folder for caches."""
    root = cache_folder() / "found"
    own = root / _code_digest()
    with contextlib.suppress(OSError):
        _forget_others(root, own)
    return Kept(own)


@functools.cache
def _code_digest() -> str:
    """Of all that decides what is found."""
    found_by = hashlib.sha256(f"{platform.python_version()} {version('numpy')}".encode())
    repository = Path(__file__).parents[2]
    for package in PACKAGES:
        for path in sorted((repository / package).rglob("*.py")):
            found_by.update(path.relative_to(repository).as_posix().encode() + path.read_bytes())
    return found_by.hexdigest()[:16]


def _forget_others(root: Path, own: Path) -> None:
    """What another version has found and nobody has asked for lately."""
    own.mkdir(parents=True, exist_ok=True)
    os.utime(own)
    for folder in root.iterdir():
        if folder != own and time.time() - folder.stat().st_mtime > UNUSED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _to_dict(found: Found) -> dict[str, Any]:
    """Names in their order, as seals are of: so they are checked without writing it again."""
    ordered: dict[str, Any] = json.loads(json.dumps(asdict(found), sort_keys=True))
    return ordered


def _from_dict(values: Mapping[str, Any]) -> Found:
    readout, launch, steady = values["readout"], values["launch"], values["steady_today"]
    return Found(
        readout=readout
        and Readout(**_with_figures(readout, "step", cpu_s=tuple(readout["cpu_s"]))),
        launch=launch and LaunchMedian(**_with_figures(launch, "logs")),
        steady_today=SteadyState(**{**steady, "left_out": tuple(steady["left_out"])}),
        contradictions=tuple(values["contradictions"]),
        recounts=tuple(values["recounts"]),
    )


def _with_figures(values: Mapping[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {**values, name: MedianInterval(**values[name]), **more}

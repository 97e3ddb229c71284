"""Ranks that failed: what each has left behind, which came first, and the record that says so."""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unitransformer.files import write_atomically
from unitransformer.record.schema import Record, Status, load_record, write_record

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a rank says why it failed; torchrun reads it too
BAD_USAGE = 2  # exit code of every command here
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended: an exception, a signal, or an exit code without a word."""

    rank: int
    type: str
    message: str
    lines: list[str]  # of the traceback
    is_bad_usage: bool = False
    at_s: float = 0.0  # clock time
    errno: int | None = None  # of the system's error that it is or follows from


def report_failure(error: BaseException, *, is_bad_usage: bool = False) -> bool:
    """Tell whoever started this rank why it ends; False if nobody asked."""
    if ERROR_FILE not in os.environ:
        return False
    path = Path(os.environ[ERROR_FILE])
    lines = "".join(traceback.format_exception(error)).splitlines()
    told = {
        "message": {  # in torch's words
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": "\n".join(lines), "timestamp": str(_second(path))},
        },
        "failure": {
            "type": type(error).__name__,
            "message": str(error),
            "lines": lines,
            "is_bad_usage": is_bad_usage,
            "at_s": time.time(),
            "errno": errno_of(error),
        },
    }
    with contextlib.suppress(OSError):  # the failure itself matters more
        if not path.exists():
            path.write_text(json.dumps(told))
    return True


def _second(path: Path) -> int:
    """When a rank failed, for torchrun: it takes the earliest for the cause, knows whole seconds
    alone, and of equal ones takes the lower rank. Who comes after another of this node is later."""
    told = []
    beside = path.parent.parent.glob(f"*/{path.name}") if path.parent.name.isdigit() else ()
    for other in beside:  # a folder for each rank, as torchrun lays them out
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told.append(int(json.loads(other.read_text())["message"]["extraInfo"]["timestamp"]))
    return max([int(time.time()), *(second + 1 for second in told)])


def errno_of(error: BaseException | None) -> int | None:
    """What the system has answered, where that is why: a full disk has its number in any words."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def silent_failure(rank: int, code: int, *, node: str | None = None) -> Failure:
    """Of a rank that has left no word.

    It has no time: what others say of the lost connection comes after.

    Args:
        code: its exit code; negative: the signal that ended it.
    """
    who = f"rank {rank}" + (f" on {node}" if node else "")
    if code >= 0:
        told = f"{who} ended with exit code {code} and said nothing"
        return Failure(
            rank=rank, type="ExitCode", message=told, lines=[], is_bad_usage=code == BAD_USAGE
        )
    name = signal.Signals(-code).name
    why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return Failure(rank=rank, type=name, message=f"{who} was killed by {name}{why}", lines=[])


def write_failure(failure: Failure, path: Path) -> None:
    """Where `read_failure` finds it, whole."""
    told = {name: value for name, value in asdict(failure).items() if name != "rank"}
    write_atomically(path, json.dumps({"failure": told}).encode())


def read_failures(folder: Path) -> list[Failure]:
    """What ranks have left in the files `RANK.failure` of a folder."""
    files = [path for path in folder.glob("*.failure") if path.stem.isdigit()]
    return [told for path in files if (told := read_failure(path, int(path.stem))) is not None]


def read_failure(path: Path, rank: int) -> Failure | None:
    """What rank `rank` has left in a file; None if that is nothing, or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Failure(rank=rank, **json.loads(path.read_text())["failure"])
    return None


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The one that the others follow from.

    A rank that says nothing leaves no time; what others say of the lost connection comes after.
    An abort is what a library does when it waited in vain, and comes last.
    """
    return min(failures, key=lambda failure: (failure.type == "SIGABRT", failure.at_s))


def amend_record(path: Path, failure: Failure, *, since_s: float) -> bool:
    """Write into the first rank's record whose failure ended the run; False if there is none.

    The first rank records what it saw itself, if it still can: often only that a connection broke.

    Args:
        since_s: clock time at which the ranks were started; an older record is another's.
    """
    try:
        if path.stat().st_mtime < since_s:
            return False
        record = load_record(path)
    except (OSError, ValueError):
        return False
    if record["status"] != "ok":  # trained and recorded; what failed came after
        write_record(record | describe_failure(failure), path)
    return True


def describe_failure(failure: Failure) -> Record:
    """Status and error of a record."""
    error: dict[str, Any] = {
        "type": failure.type,
        "message": failure.message[:2000],
        "rank": failure.rank,
        "last_lines": failure.lines[-20:],
        "errno": failure.errno,
    }
    status: Status = "oom" if failure.type in OUT_OF_MEMORY else "crashed"
    return {"status": status, "error": error}

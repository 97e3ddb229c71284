"""Reports why a rank failed, finds the first failure, and writes it into the record."""

import contextlib
import errno
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unitransformer.files import write_atomically
from unitransformer.record.schema import Record, Status, load_record, write_record

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # names the file in which a rank reports its failure
RUN_ID = "unitransformer"  # value of `TORCHELASTIC_RUN_ID` in the ranks that `launch` starts
BAD_USAGE = 2  # exit code of every command here
STATUS_OF_ERROR: dict[str, Status] = {  # by name of the type; of all others it is "crashed"
    "OutOfMemoryError": "oom",
    "MemoryError": "oom",
    "Stopped": "preempted",
    "KeyboardInterrupt": "preempted",
    "SystemExit": "preempted",
    "FloatingPointError": "diverged",  # the loss is not finite
}
# Messages of errors that have no type of their own: PyTorch raises RuntimeError or a subclass.
_OUT_OF_MEMORY = re.compile(
    "out of memory"  # CUDA, its driver, HIP, Triton, and NCCL's Cuda failure 2
    "|[A-Z]_ALLOC_FAILED"  # cuBLAS, cuDNN, cuSOLVER, hipBLAS
    "|Failed to CUDA .*alloc"  # NCCL's last error, when that of CUDA came before
    "|DefaultCPUAllocator: can't allocate|Cannot allocate memory|std::bad_alloc"  # host
)


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """Why a rank ended: an exception, a signal, or an exit code without a report."""

    rank: int
    type: str
    message: str
    lines: list[str]  # of the traceback
    is_bad_usage: bool = False
    at_s: float = 0.0  # clock time
    errno: int | None = None  # of the OSError that it is or follows from


def is_launched_rank() -> bool:
    """Whether `launch` has started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def report_failure(error: BaseException, *, is_bad_usage: bool = False) -> bool:
    """Writes why this rank ends into the launcher's error file; False without a launcher."""
    if ERROR_FILE not in os.environ:
        return False
    path = Path(os.environ[ERROR_FILE])
    failure = failure_of(error, is_bad_usage=is_bad_usage)
    details = {"py_callstack": "\n".join(failure.lines)}
    details["timestamp"] = str(_torchrun_timestamp(path))
    message = {"message": f"{failure.type}: {error}", "extraInfo": details}  # torchrun's format
    content = {"message": message, "failure": asdict(failure)}
    with contextlib.suppress(OSError):  # the failure itself matters more
        if not path.exists():
            path.write_text(json.dumps(content))
    return True


def _torchrun_timestamp(path: Path) -> int:
    """Returns the second at which this rank failed, later than any rank of this node before it.

    torchrun takes the earliest failure for the cause. It knows whole seconds only, and prefers the
    lower rank of equal ones.
    """
    timestamp = int(time.time())
    # torchrun makes a folder for each rank.
    others = path.parent.parent.glob(f"*/{path.name}") if path.parent.name.isdigit() else ()
    for other in others:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(other.read_text())
            timestamp = max(timestamp, int(content["message"]["extraInfo"]["timestamp"]) + 1)
    return timestamp


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a device or of the host ran out, or an error follows from that."""
    return any(map(_says_out_of_memory, _causes(error)))


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
        return True
    return any(STATUS_OF_ERROR.get(kind.__name__) == "oom" for kind in type(error).__mro__)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those that it follows from."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        # PyTorch's compiler raises its errors `from None`, and keeps the cause in a field.
        cause = cause.__cause__ or getattr(cause, "inner_exception", None) or cause.__context__


def failure_of(error: BaseException, *, rank: int = 0, is_bad_usage: bool = False) -> RankFailure:
    """Describes the failure of a rank that an exception has just ended."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if is_out_of_memory(error):
        names.append("OutOfMemoryError")
    return RankFailure(
        rank=rank,
        type=next((name for name in names if name in STATUS_OF_ERROR), names[0]),
        message=str(error),
        lines="".join(traceback.format_exception(error)).splitlines(),
        is_bad_usage=is_bad_usage,
        at_s=time.time(),
        errno=next((cause.errno for cause in _causes(error) if isinstance(cause, OSError)), None),
    )


def unreported_failure(rank: int, code: int, *, node: str | None = None) -> RankFailure:
    """Describes a rank without a report, by its exit code; negative: the signal that ended it."""
    kind = "ExitCode" if code >= 0 else signal.Signals(-code).name
    message = f"rank {rank}" + (f" on {node}" if node else "")
    if code >= 0:
        message += f" ended with exit code {code} and no error message"
    else:
        message += f" was killed by {kind}"
    if code == -signal.SIGKILL:
        message += ", as the system does when memory runs out"
    return RankFailure(
        rank=rank, type=kind, message=message, lines=[], is_bad_usage=code == BAD_USAGE
    )


def write_failure(failure: RankFailure, path: Path) -> None:
    """Writes a failure atomically for `read_failure`."""
    write_atomically(path, json.dumps({"failure": asdict(failure)}).encode())


def read_failures(folder: Path) -> list[RankFailure]:
    """Returns the failures in the files `RANK.failure` of a folder."""
    files = [path for path in folder.glob("*.failure") if path.stem.isdigit()]
    failures = [read_failure(path, int(path.stem)) for path in files]
    return [failure for failure in failures if failure is not None]


def read_failure(path: Path, rank: int) -> RankFailure | None:
    """Returns the failure in the file of a rank; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return RankFailure(**json.loads(path.read_text())["failure"] | {"rank": rank})
    return None


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """Returns the failure that the others follow from.

    A rank that ended without a report has time 0 and comes first: others report the lost
    connection later. SIGABRT comes last: libraries abort after waiting in vain.
    """
    return min(failures, key=lambda failure: (failure.type == "SIGABRT", failure.at_s))


def amend_record(path: Path, failure: RankFailure, *, since_s: float) -> bool:
    """Writes the failure that ended the run into the record; False if there is no record.

    The first rank has recorded what it saw, which is often only that a connection broke. A record
    from before `since_s`, the clock time at which the ranks started, is of another run.
    """
    try:
        if path.stat().st_mtime < since_s:
            return False
        record = load_record(path)
    except (OSError, ValueError):
        return False
    if record["status"] != "ok":  # else the run was complete before the failure
        write_record(record | describe_failure(failure), path)
    return True


def describe_failure(failure: RankFailure) -> Record:
    """Returns the fields `status` and `error` of a record."""
    status = STATUS_OF_ERROR.get(failure.type, "crashed")
    error = {
        "type": failure.type,
        "message": failure.message[:2000],
        "rank": failure.rank,
        "last_lines": failure.lines[-20:],
        "errno": failure.errno,
    }
    return {"status": status, "error": error}

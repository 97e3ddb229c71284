"""What became of a run: how its process ended and what its record says in, its status out.

A sweep and a replay judge alike; neither searches what a run has said.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from scaling.recipe_process import ProcessResult, find_error
from unitransformer.costs.memory import format_gib
from unitransformer.launch.signals import STOPPED_EXIT_CODE
from unitransformer.record.schema import Record, Status

STOPPED_CODES = (
    STOPPED_EXIT_CODE,
    128 + 2,
    128 + 15,
    -2,
    -15,
)  # by SIGINT or SIGTERM, or saved and left
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def decide_status(
    ended: ProcessResult, record: Record | None, *, killed_by_kernel: bool = False
) -> Status:
    """The status of a cell by how its process ended and what its record says; never by its words.

    Args:
        killed_by_kernel: whether the system killed some process for want of memory meanwhile,
            which is this one's end only if it was killed.
    """
    if ended.ending != "ended":
        return ended.ending
    status: Status | None = None if record is None else record["status"]
    if ended.exit_code == 0 and status == "ok":
        return "ok"
    if status in ("oom", "preempted"):
        return status
    error = None if record is None else record["error"]
    was_killed = ended.exit_code == -signal.SIGKILL or (error and error["type"] == "SIGKILL")
    if killed_by_kernel and was_killed:
        return "oom"
    if ended.exit_code == 2:
        return "refused"
    return "preempted" if ended.exit_code in STOPPED_CODES else "crashed"


def is_stopped(ended: ProcessResult, record: Record | None) -> bool:
    """Whether a signal ended the cell, or one of its ranks."""
    code, error = ended.exit_code, None if record is None else record["error"]
    is_rank = error is not None and str(error["type"]).startswith("SIG")
    return code is not None and (code in STOPPED_CODES or code < 0 or is_rank)


def count_oom_kills(place: Path = Path("/proc/vmstat")) -> int:
    """Processes that the system has killed for want of memory since it started; 0 if it does not
    tell."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in place.read_text().splitlines())["oom_kill"])
    return 0


def explain_status(
    status: Status,
    ended: ProcessResult,
    record: Record | None,
    lines: Sequence[str],
    *,
    limit_s: float,
    memory_limit_bytes: int | None,
) -> str | None:
    if status == "ok":
        return None
    if ended.ending == "timeout":
        return f"did not end within {limit_s:g} s"
    if ended.ending == "oom":
        assert memory_limit_bytes is not None
        return f"passed its memory limit of {format_gib(memory_limit_bytes)}"
    error = None if record is None else record["error"]
    if error is not None:
        return f"rank {error['rank']}: {error['type']}: {error['message']}".splitlines()[0]
    if ended.exit_code == 0:
        return "it ended well and left no record that can be read"
    return find_error(lines, ended.exit_code)


def check_disk(place: Path, record: Record | None) -> None:
    """Raises OSError where a failure is the disk's: the run has met a full one, wherever that was,
    or nothing can be written beside it."""
    error = None if record is None else record["error"]
    if error is not None and error.get("errno") in DISK_FULL:
        raise OSError(error["errno"], os.strerror(error["errno"]), str(place))
    probe = place / ".probe"
    try:
        probe.write_bytes(bytes(2**20))
    finally:
        probe.unlink(missing_ok=True)

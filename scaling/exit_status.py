"""Decides the status of a run from how its process ended and what its record says.

The output of a run is never searched for its status. Sweeps and replays share these rules.
"""

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from scaling.recipe_process import ProcessResult, find_error
from unitransformer.costs.memory import format_gib
from unitransformer.launch.signals import STOPPED_EXIT_CODE
from unitransformer.record.schema import Record, Status

# Stopped by SIGINT or SIGTERM, with or without saving first.
STOPPED_CODES = (STOPPED_EXIT_CODE, 128 + 2, 128 + 15, -2, -15)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def decide_status(
    ended: ProcessResult, record: Record | None, *, killed_by_kernel: bool = False
) -> Status:
    """Returns the status of a cell.

    Args:
        killed_by_kernel: whether the kernel killed some process for lack of memory during the run;
            it was this one only if SIGKILL ended this one.
    """
    if ended.ending != "ended":
        return ended.ending
    status: Status | None = None if record is None else record["status"]
    if ended.exit_code == 0 and status == "ok":
        return "ok"
    if status in ("oom", "diverged", "preempted"):
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


def explain_status(
    status: Status,
    ended: ProcessResult,
    record: Record | None,
    lines: Sequence[str],
    *,
    limit_s: float,
    memory_limit_bytes: int | None,
) -> str | None:
    """Returns the reason of a status in one line, or None for "ok"."""
    if status == "ok":
        return None
    if ended.ending == "timeout":
        return f"did not end within {limit_s:g} s"
    if ended.ending == "oom":
        assert memory_limit_bytes is not None
        return f"exceeded its memory limit of {format_gib(memory_limit_bytes)}"
    error = None if record is None else record["error"]
    if error is not None:
        return f"rank {error['rank']}: {error['type']}: {error['message']}".splitlines()[0]
    if ended.exit_code == 0:
        return "exit code 0, but without a readable record"
    return find_error(lines, ended.exit_code)


def check_disk(folder: Path, record: Record | None) -> None:
    """Raises OSError if the run met a full disk anywhere, or if `folder` cannot be written."""
    error = None if record is None else record["error"]
    if error is not None and error.get("errno") in DISK_FULL:
        raise OSError(error["errno"], os.strerror(error["errno"]), str(folder))
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(2**20))
    finally:
        probe.unlink(missing_ok=True)

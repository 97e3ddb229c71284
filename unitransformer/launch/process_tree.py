"""Finds the processes that a process has started, measures their memory, and ends them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

POLL_S = 0.05  # between two checks of the memory
LONGEST_WAIT_S = 3600.0  # systems refuse to wait for a month at once
Ending = Literal["ended", "timeout", "oom"]


def descendants(process: int, root: Path = Path("/")) -> Iterator[int]:
    """Yields running children, their children and so on; nothing where `root` has no /proc."""
    for children in (root / f"proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child, root)


def tree_memory_bytes(process: int) -> int:
    """Returns the memory of a process and its descendants, without pages backed by files.

    A page that two of them share counts half for each.
    """
    return _tree_bytes(process, "smaps_rollup", ("Pss_Anon", "Pss_Shmem"))


def _exceeds(process: int, limit_bytes: int) -> bool:
    # Quick to read, and an upper bound: shared pages count once for each process.
    at_most = _tree_bytes(process, "status", ("RssAnon", "RssShmem"))
    return at_most > limit_bytes and tree_memory_bytes(process) > limit_bytes


def _tree_bytes(process: int, file: str, names: tuple[str, ...]) -> int:
    total = 0
    for member in (process, *descendants(process)):
        with contextlib.suppress(OSError, KeyError):  # it has ended
            lines = Path(f"/proc/{member}/{file}").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            total += sum(1024 * int(fields[name].split()[0]) for name in names)
    return total


def can_measure_memory() -> bool:
    return tree_memory_bytes(os.getpid()) > 0


def count_oom_kills(path: Path = Path("/proc/vmstat")) -> int:
    """Returns how many processes the kernel has killed for lack of memory since it booted.

    Returns 0 if the kernel does not count them.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])
    return 0


def wait_within(
    process: int,
    wait: Callable[[float], bool],
    *,
    limit_s: float,
    memory_limit_bytes: int | None = None,
    kill: Callable[[int], None] | None = None,
) -> Ending:
    """Waits for a process; kills it with its descendants when it passes a limit.

    Args:
        wait: waits for the process for at most that many seconds; returns whether it has ended.
        memory_limit_bytes: of the process and its descendants, checked 20 times a second.
        kill: kills the process; default: `kill_tree`.
    """
    kill = kill or kill_tree
    deadline = time.monotonic() + limit_s
    while True:
        left_s = deadline - time.monotonic()
        longest_s = LONGEST_WAIT_S if memory_limit_bytes is None else POLL_S
        if wait(max(0.0, min(left_s, longest_s))):
            return "ended"
        if time.monotonic() >= deadline:
            kill(process)
            return "timeout"
        if memory_limit_bytes is not None and _exceeds(process, memory_limit_bytes):
            kill(process)
            return "oom"


def die_with_parent(parent: int) -> None:
    """Moves this process into its own session and process group, and ends it with its parent."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)


def kill_tree(process: int) -> None:
    """Kills a process, its group and all descendants, also those with their own groups."""
    for member in [process, *descendants(process)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(member) == member:
                os.killpg(member, signal.SIGKILL)
            else:
                os.kill(member, signal.SIGKILL)


def end_process(process: "subprocess.Popen[Any]") -> None:
    """Kills a process and its descendants, waits for it, and closes its pipes."""
    kill_tree(process.pid)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # unwritten input
                pipe.close()

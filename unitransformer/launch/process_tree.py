"""A process and all it has started: which they are, what memory they hold, and their end."""

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

POLL_S = 0.05  # between two looks at the memory
LONGEST_WAIT_S = 3600.0  # systems do not wait for a month at once
Ending = Literal["ended", "timeout", "oom"]


def descendants(process: int, root: Path = Path("/")) -> Iterator[int]:
    """Children, their children and so on that still run; none where there is no /proc.

    Args:
        root: what stands before /proc; another one in tests.
    """
    for children in (root / f"proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child, root)


def tree_memory_bytes(process: int) -> int:
    """Memory that a process and its descendants hold, files that could be read again left out.

    What several of them share is counted once: a page that two hold is half each one's.
    """
    family = (process, *descendants(process))
    return sum(_kib(each, "smaps_rollup", ("Pss_Anon", "Pss_Shmem")) for each in family) * 1024


def _holds_more(process: int, limit_bytes: int) -> bool:
    """Whether `tree_memory_bytes` is above a limit; looked at closely only if it may be."""
    family = (process, *descendants(process))
    # Quick to read, and what is shared is counted for each: an upper bound.
    at_most = sum(_kib(each, "status", ("RssAnon", "RssShmem")) for each in family) * 1024
    return at_most > limit_bytes and tree_memory_bytes(process) > limit_bytes


def _kib(process: int, file: str, names: tuple[str, ...]) -> int:
    with contextlib.suppress(OSError, KeyError):
        text = Path(f"/proc/{process}/{file}").read_text()
        told = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return sum(int(told[name].split()[0]) for name in names)
    return 0


def can_measure_memory() -> bool:
    """Whether `tree_memory_bytes` knows anything here."""
    return tree_memory_bytes(os.getpid()) > 0


def wait_within(
    process: int,
    wait: Callable[[float], bool],
    *,
    limit_s: float,
    memory_limit_bytes: int | None = None,
) -> Ending:
    """Wait for a process until it ends or passes a limit; one that has passed is killed whole.

    Args:
        wait: waits some seconds for the process at most; whether it has ended.
        memory_limit_bytes: of the process and its descendants together, looked at 20 times a
            second; None: not looked at.
    """
    deadline = time.monotonic() + limit_s
    while True:
        left_s = deadline - time.monotonic()
        longest_s = LONGEST_WAIT_S if memory_limit_bytes is None else POLL_S
        if wait(max(0.0, min(left_s, longest_s))):
            return "ended"
        ending: Ending | None = None
        if time.monotonic() >= deadline:
            ending = "timeout"
        elif memory_limit_bytes is not None and _holds_more(process, memory_limit_bytes):
            ending = "oom"
        if ending is not None:
            kill_tree(process)
            return ending


def die_with_parent(parent: int) -> None:
    """A process group of its own, which ends with the process that started it."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was too late
            os._exit(1)


def kill_tree(process: int) -> None:
    """Kill a process, its group and all descendants, those with groups of their own too."""
    family = [process, *descendants(process)]
    for each in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(each) == each:
                os.killpg(each, signal.SIGKILL)
            else:
                os.kill(each, signal.SIGKILL)


def end_process(process: "subprocess.Popen[Any]") -> None:
    """Kill a process and all it has started."""
    kill_tree(process.pid)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # of what it has not read
                pipe.close()

"""What this machine is, in words that go into a record."""

import os
import platform
import socket
from pathlib import Path
from typing import Any


def describe_host() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system; nothing is guessed.

    A fact the system does not tell is None.
    """
    return {
        "hostname": socket.gethostname(),
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        "cpu_cores": available_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def available_cores() -> int:
    """Cores this process may run on, not those the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_value(path: Path, key: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def memory_bytes() -> int | None:
    """Memory of this machine, or less where a control group limits this process."""
    kib = _first_value(Path("/proc/meminfo"), "MemTotal")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    known = [int(kib.split()[0]) * 1024] if kib else []
    known += [int(allowed)] if allowed.isdigit() else []
    return min(known, default=None)

"""What this machine is, in words that go into a record."""

import hashlib
import json
import math
import os
import platform
import resource
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What two measurements must share to be comparable; no hostname, no patch level."""

    cpu: str | None
    cpu_cores: int  # this process may use
    cpu_quota: float | None  # cores' worth of time that a control group allows; None: all
    memory_gib: float | None  # rounded up, to four steps an octave
    system: str
    architecture: str
    gpus: Sequence[str] = ()  # that this process may use, as the driver names them
    software: Mapping[str, str] = field(default_factory=dict)  # told, but not what it is made of

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over everything but the software."""
        told = asdict(self) | {"gpus": list(self.gpus)}
        del told["software"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def describe_machine(
    gpus: Sequence[str] = (), software: Mapping[str, str] | None = None
) -> Machine:
    """This machine; what only torch can tell is given by the caller.

    Args:
        gpus: a name for each GPU.
        software: versions of drivers and libraries.
    """
    host = describe_host()
    return Machine(
        cpu=host["cpu"],
        cpu_cores=host["cpu_cores"],
        cpu_quota=cpu_quota(),
        memory_gib=None if host["memory_bytes"] is None else nominal_gib(host["memory_bytes"]),
        system=platform.system(),
        architecture=host["machine"],
        gpus=tuple(gpus),
        software={**(software or {}), **driver_versions()},
    )


def nominal_gib(memory_bytes: int) -> float:
    """Memory as it is sold: 15.6 GiB are 16.

    A kernel keeps some for itself, and another some more: rounded up to four steps an octave.
    """
    gib = memory_bytes / 2**30
    step = 2.0 ** (math.floor(math.log2(gib)) - 2)
    return math.ceil(gib / step) * step


def cpu_quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time a control group allows; None without a limit."""
    quota, *period = limit.read_text().split() if limit.exists() else ["max"]
    return None if quota == "max" else int(quota) / int(period[0])


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """All last-level caches of the cores this process may use; None where the system is silent."""
    caches: dict[tuple[int, str], int] = {}
    for size in root.glob("cpu[0-9]*/cache/index*/size"):
        text = size.read_text().strip()
        if text.endswith("K"):
            level = int((size.parent / "level").read_text())
            caches[level, (size.parent / "shared_cpu_list").read_text()] = int(text[:-1]) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None


def driver_versions(root: Path = Path("/sys/module")) -> dict[str, str]:
    """Of the drivers of GPUs that are loaded."""
    versions = {name: root / name / "version" for name in ("nvidia", "amdgpu")}
    return {
        f"{name} driver": path.read_text().strip()
        for name, path in versions.items()
        if path.exists()
    }


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


def peak_resident_bytes() -> int:
    """Most memory of this machine that the process held at once since its peak was last forgotten;
    since it began where the system cannot forget.

    The peak of `getrusage` holds that of whoever started the process, and nothing resets it.
    """
    if peak := _first_value(Path("/proc/self/status"), "VmHWM"):
        return int(peak.split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> int | None:
    """Memory of this machine, or less where a control group limits this process."""
    kib = _first_value(Path("/proc/meminfo"), "MemTotal")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    known = [int(kib.split()[0]) * 1024] if kib else []
    known += [int(allowed)] if allowed.isdigit() else []
    return min(known, default=None)

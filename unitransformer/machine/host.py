"""Describes this machine and its fingerprint: processor, cores, memory, system, GPUs."""

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

from unitransformer.files import read_if_there

# Of each row the first that the processor has, by its flag in /proc/cpuinfo. Matrix products run
# many times as fast with them, and a virtual machine may hide them behind the same model name.
INSTRUCTIONS = (
    {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"},
    {"avx512_bf16": "BF16", "bf16": "BF16"},
    {"amx_tile": "AMX", "sme": "SME"},
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What two measurements must share to be comparable, and the versions of software."""

    cpu: str | None
    cpu_cores: int  # that this process may use
    cpu_quota: float | None  # in cores, set by a control group; None: no limit
    memory_gib: float | None  # rounded up, see `nominal_gib`
    system: str
    architecture: str
    gpus: Sequence[str] = ()  # that this process may use, as the driver names them
    software: Mapping[str, str] = field(default_factory=dict)  # not in the fingerprint

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify everything except the software."""
        values = asdict(self) | {"gpus": list(self.gpus)}
        del values["software"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def describe_machine(
    gpus: Sequence[str] = (), software: Mapping[str, str] | None = None
) -> Machine:
    """Describes this machine, given the name of each GPU and the versions of libraries."""
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
    """Returns the nominal size, such as 16 for 15.6: rounded up to one of 4 steps per power of 2.

    The kernel reserves some memory, and how much differs between versions.
    """
    gib = memory_bytes / 2**30
    step = 2.0 ** (math.floor(math.log2(gib)) - 2)
    return math.ceil(gib / step) * step


def cpu_quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Returns the limit of a control group in cores; None without a limit."""
    quota, *period = limit.read_text().split() if limit.exists() else ["max"]
    return None if quota == "max" else int(quota) / int(period[0])


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Returns the sum of all last-level caches; None if the system does not list them."""
    caches: dict[tuple[int, str], int] = {}
    for size in root.glob("cpu[0-9]*/cache/index*/size"):
        text = size.read_text().strip()
        if text.endswith("K"):
            level = int((size.parent / "level").read_text())
            caches[level, (size.parent / "shared_cpu_list").read_text()] = int(text[:-1]) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None


def driver_versions(root: Path = Path("/sys/module")) -> dict[str, str]:
    """Returns the versions of the loaded GPU drivers."""
    versions = {n: read_if_there(root / n / "version").strip() for n in ("nvidia", "amdgpu")}
    return {f"{name} driver": version for name, version in versions.items() if version}


def describe_host() -> dict[str, Any]:
    """Returns processor, usable cores, memory and system; None for what the system hides."""
    return {
        "hostname": socket.gethostname(),
        "cpu": describe_cpu(),
        "cpu_cores": available_cores(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Returns model and instruction sets, such as "AMD EPYC 9654 with AVX-512, BF16"; None if both
    are hidden."""
    model = _first_value(cpuinfo, "model name") or platform.processor() or None
    flags = (_first_value(cpuinfo, "flags") or _first_value(cpuinfo, "Features") or "").split()
    names = [next((row[flag] for flag in row if flag in flags), None) for row in INSTRUCTIONS]
    if not (known := ", ".join(name for name in names if name)):
        return model
    return f"{model or platform.machine()} with {known}"


def available_cores() -> int:
    """Returns the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_value(path: Path, key: str) -> str | None:
    pairs = (line.partition(":") for line in read_if_there(path).splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def peak_resident_bytes() -> int:
    """Returns the peak since the last reset, or since the process began if it cannot be reset.

    `getrusage` is the fallback: its peak includes that of the parent process before the fork.
    """
    if peak := _first_value(Path("/proc/self/status"), "VmHWM"):
        return int(peak.split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> int | None:
    """Returns the memory of this machine, or the limit of this process's control group."""
    kib = _first_value(Path("/proc/meminfo"), "MemTotal")
    allowed = read_if_there(Path("/sys/fs/cgroup/memory.max")).strip()
    known = [int(kib.split()[0]) * 1024] if kib else []
    known += [int(allowed)] if allowed.isdigit() else []
    return min(known, default=None)

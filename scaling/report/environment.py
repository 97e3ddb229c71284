"""Describes machines, versions and commits, and removes host names and paths from texts."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unitransformer.record.units import format_bytes, format_count

DESCRIBED = (  # fields of a host
    "device", "cpu", "cpu_cores", "memory_bytes", "system", "machine", "device_memory_bytes",
    "threads",
)  # fmt: skip


def describe_hardware(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Returns the machines of all ranks, equal ones once."""
    hosts = len({host.get("hostname") for host in ranks})
    machines = dict.fromkeys(_describe_host(*map(host.get, DESCRIBED)) for host in ranks)
    number = format_count(hosts, "machine")
    return f"{format_count(len(ranks), 'rank')} on {number}: {'; '.join(machines)}"


@functools.lru_cache(maxsize=1024)  # thousands of records come from a few hosts
def _describe_host(
    device: str,
    cpu: str | None,
    cores: int | None,
    memory: int | None,
    system: str | None,
    machine: str | None,
    device_memory: int | None,
    threads: int | None,
) -> str:
    parts = [
        cpu or "processor unknown",
        f"{cores} cores" if cores else "number of cores unknown",
        f"{format_bytes(memory)} memory" if memory else "memory unknown",
        " ".join(filter(None, (system, machine))) or "system unknown",
    ]
    if device != "cpu":
        size = format_bytes(device_memory) if device_memory else "memory unknown"
        parts.insert(0, f"{device}, {size}")
    elif threads:
        parts.append(f"{format_count(threads, 'thread')} per rank")
    return ", ".join(parts)


def describe_commit(code: Mapping[str, Any]) -> str:
    """Returns the commit that ran, and whether it was changed."""
    commit, is_dirty = code["commit"], code["is_dirty"]
    if commit is None:
        return "unknown: the code ran outside a git checkout"
    state = {True: "with uncommitted changes", False: "clean", None: "whether changed is unknown"}
    return f"{commit[:12]}, {state[is_dirty]}"


def describe_versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def without_paths(text: str, ranks: Sequence[Any]) -> str:
    """Removes the host names of these ranks, and of absolute paths all but the last part."""
    hosts = {str(host.get("hostname") or "") for host in ranks if isinstance(host, Mapping)}
    for name in sorted(hosts):
        if name and name in text:
            text = re.sub(rf"\b{re.escape(name)}\b", "(host)", text)
    if "/" not in text:
        return text
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/:'\"]+/)+", "…/", text)

"""Describes machines, versions and commits, and removes host names and paths from texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unitransformer.record.units import format_bytes, format_count


def describe_hardware(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Returns the machines of all ranks, equal ones once."""
    hosts = len({host.get("hostname") for host in ranks})
    machines = "; ".join(dict.fromkeys(map(_describe_host, ranks)))
    return f"{format_count(len(ranks), 'rank')} on {format_count(hosts, 'machine')}: {machines}"


def _describe_host(host: Mapping[str, Any]) -> str:
    cores, memory = host.get("cpu_cores"), host.get("memory_bytes")
    parts = [
        host.get("cpu") or "processor unknown",
        f"{cores} cores" if cores else "number of cores unknown",
        f"{format_bytes(memory)} memory" if memory else "memory unknown",
        " ".join(filter(None, (host.get("system"), host.get("machine")))) or "system unknown",
    ]
    if host["device"] != "cpu":
        on_device = host.get("device_memory_bytes")
        parts.insert(
            0, f"{host['device']}, {format_bytes(on_device) if on_device else 'memory unknown'}"
        )
    elif host.get("threads"):
        parts.append(f"{format_count(host['threads'], 'thread')} per rank")
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
    for host in ranks:
        if isinstance(host, Mapping) and host.get("hostname"):
            text = re.sub(rf"\b{re.escape(str(host['hostname']))}\b", "(host)", text)
    if "/" not in text:
        return text
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/:'\"]+/)+", "…/", text)

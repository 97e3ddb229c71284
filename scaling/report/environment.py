"""Where something was measured, in words for people: machines, commits, and no private places."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.markdown import escaped
from scaling.store.conditions import differences
from unitransformer.record.schema import Record
from unitransformer.record.units import count, gib

LONGEST_DIFFERENCE = 400  # letters


def describe_hardware(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The machines of all ranks, equal ones once."""
    hosts = len({host.get("hostname") for host in ranks})
    described = dict.fromkeys(map(_host, ranks))
    return f"{count(len(ranks), 'rank')} on {count(hosts, 'machine')}: {'; '.join(described)}"


def _host(host: Mapping[str, Any]) -> str:
    cores, memory = host.get("cpu_cores"), host.get("memory_bytes")
    parts = [
        host.get("cpu") or "processor unknown",
        f"{cores} cores" if cores else "number of cores unknown",
        f"{gib(memory)} memory" if memory else "memory unknown",
        " ".join(filter(None, (host.get("system"), host.get("machine")))) or "system unknown",
    ]
    if host["device"] != "cpu":
        on_device = host.get("device_memory_bytes")
        parts.insert(0, f"{host['device']}, {gib(on_device) if on_device else 'memory unknown'}")
    elif host.get("threads"):
        parts.append(f"{count(host['threads'], 'thread')} per rank")
    return ", ".join(parts)


def describe_commit(code: Mapping[str, Any]) -> str:
    """Which commit ran, and whether it was changed."""
    commit, is_dirty = code["commit"], code["is_dirty"]
    if commit is None:
        return "unknown: the code ran outside a git checkout"
    state = {True: "with uncommitted changes", False: "clean", None: "whether changed is unknown"}
    return f"{commit[:12]}, {state[is_dirty]}"


def describe_versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def without_places(text: str, ranks: Sequence[Any]) -> str:
    """Hosts and absolute paths are nobody's business: only the last name of a path stays."""
    for host in ranks:
        if isinstance(host, Mapping) and host.get("hostname"):
            text = re.sub(rf"\b{re.escape(str(host['hostname']))}\b", "(host)", text)
    return re.sub(r"(?<![\w.:/~])/(?:[^\s/:'\"]+/)+", "…/", text)


def apart(records: Sequence[Record]) -> str:
    """In which conditions the rows of a table differ: they are no curve. Empty: in none."""
    found = [without_places(line, []) for line in differences(records)]
    lines = [
        f"> - {escaped(line[:LONGEST_DIFFERENCE])}{'…' * (len(line) > LONGEST_DIFFERENCE)}"
        for line in found
    ]
    if not lines:
        return ""
    return "\n".join(
        ["> [!NOTE]", "> These rows were measured under different conditions.", ">", *lines]
    )

"""Reads records of schema 2, which named fields differently, as records of today's schema."""

import functools
import re
from collections.abc import Mapping
from typing import Any

OLD_SCHEMA = 2

# Name in schema 2 -> name today, of top-level fields and of fields within `CHANGED`.
NAMES = {
    "launches": "segment_starts",
    "samples_untold": "samples_missing",
    "unsteady": "excluded_steps",
    "steady_reason": "no_steady_state_reason",
    "figures": "metrics",
    "passport": "mfu",
    "seals": "checksums",
    "least_communication_s": "min_communication_s",
    "between_s": "between_steps_s",
    "between_share": "between_steps_share",
    "counts": "definition",
    "own_cpu_s": "run_cpu_s",
    "others_cpu_s": "other_processes_cpu_s",
    "joules_of_steps": "joules_num_steps",
    "untold": "missing",
}
# Top-level fields, by today's names, with names or texts that changed.
CHANGED = (
    "samples",
    "samples_missing",
    "excluded_steps",
    "steady_method",
    "no_steady_state_reason",
    "metrics",
    "mfu",
    "host_load",
    "gpu",
    "compile",
    "trace",
    "flags",
    "data",
)
# Phrases of stored texts that reports print, as regular expressions, and what is written today.
PHRASES = {
    r"\d+ samples that hang together over (\d+) of them, an interval needs (\d+)": (
        r"autocorrelated over \1 steps; needs \2 samples"
    ),
    r"bytes of tensors were counted": "tensor bytes counted",
    r"right behind it": "right after it",
    r"\bpictures\b": "images",
    r"clock held down by (.+) at (\d+) looks": r"clock limited by \1 in \2 samples",
    r"fewer than two looks at the energy in the window": (
        "fewer than two energy samples in the steady state"
    ),
    r"this system does not tell": "not available on this system",
    r"group was held back": "group was throttled",
    r"does not tell": "does not record",
    r"was looked for in a cache": "was looked up in a cache",
    r"^training broke off": "training failed",
    r"was not reached": "not reached",
    r"on a GPU (\w+) waits on streams of its own; --trace tells communication apart": (
        r"\1 waits on its own GPU streams; use --trace instead"
    ),
}


def migrate(record: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """Returns a record of schema 2 with the names and phrases of `schema`.

    Its checksums stay those of the file, whose fields have the old names.
    """
    migrated = {NAMES.get(name, name): value for name, value in record.items()}
    for field in CHANGED:
        if field in migrated:
            value = migrated[field]
            is_list = isinstance(value, list)
            migrated[field] = [_migrate(item) for item in value] if is_list else _migrate(value)
    return migrated | {"schema": schema}


def _migrate(value: Any) -> Any:
    """Returns a field, or an item of a field, renamed at all depths but for lists within it."""
    if isinstance(value, dict):
        return {NAMES.get(name, name): _migrate(item) for name, item in value.items()}
    return _reword(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=4096)  # thousands of records hold the same texts
def _reword(text: str) -> str:
    for phrase, replacement in PHRASES.items():
        text = re.sub(phrase, replacement, text)
    return text

"""Reads records of schema 2, which named fields differently, as records of today's schema."""

import functools
import re
from typing import Any

OLD_SCHEMA = 2
OLD_CHECKSUMS = "seals"  # the same field in other files of that time

# Name in schema 2 -> name today, of top-level fields and of fields within `CHANGED`.
NAMES = {
    "launches": "segment_starts",
    "samples_untold": "samples_missing",
    "unsteady": "excluded_steps",
    "steady_reason": "no_steady_state_reason",
    "figures": "metrics",
    "passport": "mfu",
    OLD_CHECKSUMS: "checksums",
    "least_communication_s": "min_communication_s",
    "between_s": "between_steps_s",
    "between_share": "between_steps_share",
    "counts": "definition",
    "own_cpu_s": "run_cpu_s",
    "others_cpu_s": "other_processes_cpu_s",
    "joules_of_steps": "joules_num_steps",
    "untold": "missing",
}
RENAMED = {"samples", "mfu"}  # top-level fields in which names changed, but no text
CHANGED = RENAMED | {
    "samples_missing",
    "excluded_steps",
    "steady_method",
    "no_steady_state_reason",
    "metrics",
    "host_load",
    "gpu",
    "compile",
    "trace",
    "flags",
    "data",
}
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


def migrate(record: dict[str, Any], schema: int) -> dict[str, Any]:
    """Returns a record of schema 2 with the names and phrases of `schema`.

    Its checksums stay those of the file, whose fields have the old names.
    """
    migrated: dict[str, Any] = _rename(record) | {"schema": schema}
    for field in migrated.keys() & CHANGED:
        value, change = migrated[field], _rename if field in RENAMED else _reword
        is_list = isinstance(value, list)
        migrated[field] = [change(item) for item in value] if is_list else change(value)
    return migrated


def _rename(values: Any) -> Any:
    """Returns a dict with today's names, and other values as they are."""
    if not isinstance(values, dict):
        return values
    return {NAMES.get(name, name): value for name, value in values.items()}


def _reword(value: Any) -> Any:
    """Returns a text with today's phrases, or a dict with such texts and today's names."""
    if isinstance(value, str):
        return _reword_text(value)
    if not isinstance(value, dict):
        return value
    reworded = {}
    for name, item in value.items():
        if type(item) is str:
            item = _reword_text(item)
        elif type(item) is dict:
            item = _reword(item)
        reworded[NAMES.get(name, name)] = item
    return reworded


@functools.lru_cache(maxsize=4096)  # thousands of records hold the same texts
def _reword_text(text: str) -> str:
    for phrase, replacement in PHRASES.items():
        text = re.sub(phrase, replacement, text)
    return text

"""The record of a comparison: all pairs, from which its verdict is computed again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from scaling.comparison.interleave import (
    SIDES,
    Side,
    Start,
    from_json,
    judge_starts,
    to_json,
)
from scaling.comparison.paired_calls import Clock
from scaling.comparison.verdict import Judgement
from unitransformer.files import write_atomically
from unitransformer.machine.host import describe_machine
from unitransformer.record.fields import NUMBER, agree, check_fields

SCHEMA, KIND = 1, "paired-steps"
RULE = 2  # by which the interval follows from the pairs; 2 allows for how much starts differ
EVIDENCE = ("verdict", "low", "high")  # of a judgement, which its pairs imply by that rule
EVIDENCE_OF_ANY_RULE = ("ratio", "pairs")


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """A record whose judgement follows from its pairs."""

    content: Mapping[str, Any]
    starts: tuple[Start, ...]
    judgement: Judgement


def describe(
    sides: Mapping[Any, Side],
    starts: Sequence[Start],
    judgement: Judgement,
    *,
    clock: Clock,
    threshold: float,
    stop_faster: float,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of a record; `about` holds its command, start and seconds."""
    device = starts[0].about["base"]["device"]
    machine = describe_machine([] if device == "cpu" else [device])
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "rule": RULE,
        **about,
        "machine": {"fingerprint": machine.fingerprint, **asdict(machine)},
        "threshold": threshold,
        "stop_faster": stop_faster,
        "clock": clock,
        "sides": {
            name: {
                "label": side.label,
                "recipe": side.recipe,
                "arguments": list(side.arguments),
                "commit": side.commit,
                "is_dirty": side.is_dirty,
            }
            for name, side in sides.items()
        },
        "starts": [to_json(start) for start in starts],
        "judgement": judgement_to_json(judgement),
    }


def judgement_to_json(judgement: Judgement) -> dict[str, Any]:
    return asdict(judgement) | {"verdict": judgement.verdict.value}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a record; raises OSError."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> ComparisonRecord:
    """Reads a record and judges its pairs again, also those of an earlier rule.

    Raises ValueError if it is no such record, is damaged, or its pairs imply another judgement.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path} is no record of a comparison; compare --out writes one")
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: schema is {content.get('schema')!r}; this version reads {SCHEMA}"
        )
    try:
        check_fields(
            content,
            {
                "machine.fingerprint": str,
                "threshold": NUMBER,
                "stop_faster": NUMBER,
                "clock": str,
                "starts": list,
                "judgement.verdict": str,
                **{f"sides.{name}.label": str for name in SIDES},
                **{f"sides.{name}.commit": (str, NoneType) for name in SIDES},
                **{f"sides.{name}.is_dirty": (bool, NoneType) for name in SIDES},
            },
            "comparison",
        )
        starts = tuple(from_json(start) for start in content["starts"])
        for start in starts:
            for side in SIDES:
                fields = {"device": str, "clock": str, "versions": dict}
                check_fields(start.about[side], fields, f"about {side}")
        judgement = judge_starts(
            starts,
            content["clock"],
            threshold=content["threshold"],
            stop_faster=content["stop_faster"],
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    stored = content["judgement"]
    derived = judgement_to_json(judgement)
    is_of_this_rule = content.get("rule") == RULE
    for name in EVIDENCE_OF_ANY_RULE + (EVIDENCE if is_of_this_rule else ()):
        if not agree(stored.get(name), derived[name]):
            raise ValueError(f"{path}: {name} is {stored.get(name)}, its pairs say {derived[name]}")
    return ComparisonRecord(content=content, starts=starts, judgement=judgement)

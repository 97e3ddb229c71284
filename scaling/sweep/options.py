"""`python -m scaling sweep`: a command line in, what is swept and how out.

The sweep's own options are parsed here; every other `--name a,b,c` is an axis, whatever a recipe
takes by that name.
"""

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse

from scaling.sweep.max_batch import check_start
from scaling.sweep.run_cell import Limits
from scaling.sweep.study import OURS, RECIPES, Study, Values, list_studies, load_study, read_study
from unitransformer.cli import nearest
from unitransformer.launch.variables import CELL_LIMIT_S
from unitransformer.record.schema import STATUSES

DEFAULT_OUT = Path("sweeps")
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What was asked for, checked."""

    study: Study
    out: Path
    limits: Limits
    retry: frozenset[str]
    retry_before: str | None  # as outcomes tell when they ended
    find_max_batch: int | None
    is_dry: bool
    is_list: bool
    is_watch: bool
    max_cells: int | None
    price_per_hour: float | None


def build_sweep_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        usage="python -m scaling sweep [STUDY] [options] [--any-option-of-a-recipe VALUE,VALUE]",
        description="Run every combination of the values of some options of the recipes, each in "
        "a process of its own; run the same command again to go on where it was stopped. Studies "
        f"that come with the suite: {', '.join(list_studies())}. Every other option is an axis: "
        "--precision 32-true,bf16-mixed --batch-size 8,16.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", nargs="?", type=str | None, default=None, help="name of a study, or a YAML file")
    add("--recipe", type=str | None, default=None, help="some of bert,gpt,vit, or all")
    add("--out", type=Path | None, default=None, help="folder of the sweep; by its study's name")
    add(
        "--zip",
        type=str | None,
        default=None,
        help="axes that move together, as devices,batch-size",
    )
    add("--repeats", type=int | None, default=None, help="times that every cell is run")
    add("--retry", type=str, default="", help="statuses to try again, as oom,crashed")
    add(
        "--retry-before",
        type=str | None,
        default=None,
        help="of those, what ended before this: the same time for all that share the work, as "
        "2026-01-31T12:00:00+00:00; by default when each of them begins",
    )
    add("--time-limit", type=float, default=CELL_LIMIT_S, help="seconds of a cell")
    add("--memory-limit", type=str | None, default=None, help="of a cell, as 4GiB (Linux)")
    add(
        "--recheck",
        type=float,
        default=0.1,
        help="share of inferred lacks of memory that is run, at least one a cause",
    )
    add("--find-max-batch", type=int | None, default=None, help="search the largest, up to this")
    add("--max-cells", type=int | None, default=None, help="run so many and leave the rest")
    add("--watch", action="store_true", help="show what other processes do with it; run nothing")
    add("--list", action="store_true", help="print the command of every cell and stop")
    add("--dry-run", action="store_true", help="list cells, time, memory and stop")
    add("--price-per-hour", type=float | None, default=None, help="of a device, for --dry-run")
    return parser


def split_axes(
    words: Sequence[str], parser: jsonargparse.ArgumentParser
) -> tuple[list[str], dict[str, Values]]:
    """The sweep's own words, and the axes.

    Raises:
        ValueError: an option without a value, or given twice.
    """
    own_flags = {flag for action in parser._actions for flag in action.option_strings}
    switches = {"--dry-run", "--list", "--watch", "--help", "-h"}
    own: list[str] = []
    axes: dict[str, Values] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        if not flag.startswith("--") or flag in own_flags:
            own.append(word)
            if flag in own_flags - switches and not has_value and rest:
                own.append(rest.pop(0))
            continue
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{flag} has no value; give some, as {flag} a,b")
            value = rest.pop(0)
        name = flag.removeprefix("--").replace("_", "-")
        if name in axes:
            raise ValueError(f"{flag} is given twice; give all its values in one list")
        axes[name] = tuple(part.strip() for part in value.split(",") if part.strip())
    return own, axes


def read_sweep_options(given: Any, axes: dict[str, Values]) -> SweepOptions:
    """What was asked for; raises ValueError naming option, value and fix."""
    limits = Limits(
        limit_s=_above_zero("time-limit", given.time_limit),
        memory_limit_bytes=_bytes(given.memory_limit),
        recheck=given.recheck,
    )
    if not 0 <= given.recheck <= 1:
        raise ValueError(f"recheck is {given.recheck}; it must be between 0 and 1")
    if given.price_per_hour is not None:
        _above_zero("price-per-hour", given.price_per_hour)
    retry = frozenset(status.strip() for status in given.retry.split(",") if status.strip())
    for status in retry:
        if status not in STATUSES:
            raise ValueError(f"retry holds {status}; {nearest(status, STATUSES)}")
    if given.retry_before is not None and not retry:
        raise ValueError(
            f"retry-before is {given.retry_before} and nothing is tried again; give --retry, as "
            "--retry oom, or leave it out"
        )
    study = _study(given, axes)
    if given.find_max_batch is not None:
        if given.find_max_batch < 1:
            raise ValueError(f"find-max-batch is {given.find_max_batch}; it must be at least 1")
        check_start(study)
    if given.max_cells is not None and given.max_cells < 1:
        raise ValueError(f"max-cells is {given.max_cells}; it must be at least 1")
    name = Path(given.study).stem if given.study else "sweep"
    return SweepOptions(
        study=study,
        out=given.out or DEFAULT_OUT / name,
        limits=limits,
        retry=retry,
        retry_before=_instant("retry-before", given.retry_before),
        find_max_batch=given.find_max_batch,
        is_dry=given.dry_run,
        is_list=given.list,
        is_watch=given.watch,
        max_cells=given.max_cells,
        price_per_hour=given.price_per_hour,
    )


def _study(given: Any, axes: dict[str, Values]) -> Study:
    """The one that is named, with what the command line changes; or one of the command line."""
    for name in axes:
        if name in OURS:
            raise ValueError(f"--{name} is decided by the sweep for each cell; leave it out")
    if given.study is None:
        if not given.recipe:
            raise ValueError(
                f"nothing to sweep: name a study ({', '.join(list_studies())}) or give --recipe"
            )
        study = read_study({"recipe": _recipes(given.recipe), "axes": axes})
    else:
        study = load_study(given.study)
        own = {
            recipe: {name: values for name, values in options.items() if name not in axes}
            for recipe, options in study.recipes.items()
        }
        study = replace(study, recipes=own, axes={**study.axes, **axes})
        if given.recipe:
            chosen = _recipes(given.recipe)
            missing = [name for name in chosen if name not in own]
            if missing:
                raise ValueError(
                    f"recipe {missing[0]} is not in study {given.study}, which has {', '.join(own)}"
                )
            study = replace(study, recipes={name: own[name] for name in own if name in chosen})
    if given.zip:
        study = replace(study, zipped=(*study.zipped, tuple(given.zip.split(","))))
    if given.repeats is not None:
        study = replace(study, repeats=given.repeats)
    return study


def _recipes(text: str) -> list[str]:
    return list(RECIPES) if text == "all" else [name.strip() for name in text.split(",")]


def _above_zero(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be above 0")
    return value


def _instant(name: str, text: str | None) -> str | None:
    """As outcomes have it: two of them compare as their texts do."""
    if text is None:
        return None
    try:
        instant = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{name} is {text}; give a date and time, as 2026-01-31T12:00:00+00:00"
        ) from None
    return instant.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def _bytes(text: str | None) -> int | None:
    """4GiB, 500MB or a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip())
    if match is None or (size := int(float(match[1]) * UNITS[match[2] or ""])) < 1:
        raise ValueError(f"memory-limit is {text}; give a size above 0, as 4GiB")
    return size

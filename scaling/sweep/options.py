"""Options of `python -m scaling sweep`.

The sweep reads its own options. Every other `--name a,b,c` is an axis: an option of the recipes.
"""

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling.recipe_process import RESERVED_OPTIONS
from scaling.sweep.max_batch import check_start
from scaling.sweep.run_cell import Limits
from scaling.sweep.study import (
    RECIPES,
    AxisValues,
    Study,
    axis_name,
    list_studies,
    load_study,
    read_study,
)
from unitransformer.cli import Parser, suggest
from unitransformer.launch.variables import CELL_LIMIT_S
from unitransformer.record.schema import STATUSES

DEFAULT_OUT = Path("sweeps")
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The checked options of a sweep."""

    study: Study
    out: Path
    limits: Limits
    retry: frozenset[str]
    retry_before: str | None  # formatted as `Outcome.finished_at`
    find_max_batch: int | None
    is_dry: bool
    is_list: bool
    is_watch: bool
    max_cells: int | None
    stop_after_s: float | None  # no cell begins that would end later, judged by the longest so far
    only_nodes: int | None  # run the cells on this many nodes alone; None: those on one
    run_cell: str | None  # name of the one cell that this rank of torchrun runs
    lists_left: bool  # `is_list`, without finished cells
    is_prepared: bool  # only create the folder
    price_per_hour: float | None
    hardware: str | None  # name or file of nodes that a dry run plans for; None: this machine


def build_sweep_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling sweep [STUDY] [options] [--any-option-of-a-recipe VALUE,VALUE]",
        description="Run every combination of the values of some recipe options, each in a process "
        "of its own. Run the same command again to continue after a stop. Built-in studies: "
        f"{', '.join(list_studies())}. Every option that is not listed below is an axis: "
        "--precision 32-true,bf16-mixed --batch-size 8,16.",
    )

    def add(flag: str, kind: Any, help_text: str, default: Any = None) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument(
        "study", nargs="?", type=str, default=None, help="name of a study, or a YAML file"
    )
    add("--recipe", str, "comma-separated list of bert, gpt, vit; or all")
    add("--out", Path | None, "folder of the sweep; by default sweeps/STUDY")
    add("--zip", str, "axes that change together, for example devices,batch-size")
    add("--repeats", int | None, "number of times that every cell is run")
    add("--retry", str, "statuses of finished cells to run again, for example oom,crashed", "")
    add(
        "--retry-before",
        str,
        "with --retry, run only cells again that finished before this time, for example "
        "2026-01-31T12:00:00+00:00; give the same time to all processes that share a sweep; by "
        "default the start of each process",
    )
    add("--time-limit", float, "time limit of a cell in seconds", CELL_LIMIT_S)
    add("--memory-limit", str, "memory limit of a cell, for example 4GiB (Linux)")
    add(
        "--recheck",
        float,
        "share of the cells inferred to be out of memory that is run all the same, at least one "
        "per cause; 0: none",
        0.1,
    )
    add("--find-max-batch", int | None, "search the largest batch size that fits, up to this one")
    add("--max-cells", int | None, "stop after running this many cells")
    add(
        "--stop-after",
        float | None,
        "begin no cell that would end later than this many seconds from now, if it takes as long "
        "as the longest so far",
    )
    add("--only-nodes", int | None, "in a SLURM job of several nodes, run the cells on so many")
    add(
        "--run-cell",
        str | None,
        "in ranks of torchrun on all nodes, run this one cell; a sweep prints the whole command",
    )
    add("--price-per-hour", float | None, "price of a device-hour, for --dry-run")
    add(
        "--hardware",
        str | None,
        "with --dry-run, plan for nodes that are not here, such as h200-sxm-8; predict --help "
        "lists them",
    )
    for flag, help_text in (
        ("--watch", "show the progress of other processes, run nothing"),
        ("--list", "print the command of every cell and exit; with --dry-run, also its estimate"),
        ("--left", "with --list, only the cells that are not finished"),
        ("--prepare", "create the folder of the sweep and exit"),
        ("--dry-run", "print the estimated time, memory and cost, and exit"),
    ):
        parser.add_argument(flag, action="store_true", help=help_text)
    return parser


def split_axes(arguments: Sequence[str], parser: Parser) -> tuple[list[str], dict[str, AxisValues]]:
    """Returns what `parser` knows, and the axes; raises ValueError for one without a value."""
    known_flags = {flag for action in parser._actions for flag in action.option_strings}
    switches = [action for action in parser._actions if action.nargs == 0]
    with_value = known_flags - {flag for action in switches for flag in action.option_strings}
    known: list[str] = []
    axes: dict[str, AxisValues] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, has_value, value = argument.partition("=")
        if not flag.startswith("--") or flag in known_flags:
            known.append(argument)
            if flag in with_value and not has_value and rest:
                known.append(rest.pop(0))
            continue
        name = axis_name(flag.removeprefix("--"))
        if not has_value:
            if not rest or rest[0].startswith("--"):
                if name in RESERVED_OPTIONS:  # refused by all who read axes, as with a value
                    axes[name] = ()
                    continue
                raise ValueError(f"{flag} has no value; give one or more: {flag} a,b")
            value = rest.pop(0)
        if name in axes:
            raise ValueError(f"{flag} is given twice; give all its values in one list")
        axes[name] = _split(value)
    return known, axes


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_sweep_options(given: Any, axes: dict[str, AxisValues]) -> SweepOptions:
    """Checks the parsed options; raises ValueError naming option, value and fix."""
    limits = Limits(
        limit_s=given.time_limit,
        memory_limit_bytes=_bytes(given.memory_limit),
        recheck=given.recheck,
    )
    for name in ("time_limit", "price_per_hour", "stop_after"):
        if given[name] is not None and not 0 < given[name] < math.inf:
            raise ValueError(f"{name.replace('_', '-')} is {given[name]}; it must be above 0")
    if not 0 <= given.recheck <= 1:
        raise ValueError(f"recheck is {given.recheck}; it must be between 0 and 1")
    retry = frozenset(_split(given.retry))
    for status in retry:
        if status not in STATUSES:
            raise ValueError(f"retry holds {status}; {suggest(status, STATUSES)}")
    if given.retry_before is not None and not retry:
        raise ValueError(
            f"retry-before is {given.retry_before} but no status is retried; add --retry, for "
            "example --retry oom, or leave retry-before out"
        )
    study = _read_study(given, axes)
    for name in ("find_max_batch", "max_cells", "only_nodes"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"{name.replace('_', '-')} is {given[name]}; it must be at least 1")
    modes = [
        name for name in ("watch", "list", "dry-run", "prepare") if given[name.replace("-", "_")]
    ]
    modes += ["run-cell"] if given.run_cell is not None else []
    if len(modes) > 1 and modes != ["list", "dry-run"]:
        raise ValueError(f"{modes[0]} and {modes[1]} do different things; leave one out")
    for name in ("max_cells", "stop_after", "only_nodes"):
        if given.watch and given[name] is not None:
            option = name.replace("_", "-")
            raise ValueError(f"{option} is {given[name]}, but --watch runs no cell; leave it out")
    if given.left and not given.list:
        raise ValueError("left only shortens a list; add --list, or leave it out")
    if given.left and given.dry_run:
        raise ValueError("left is for lists, and dry-run plans every cell; leave one out")
    # A job of slurm.submit lists its cells with the options of its plan.
    if given.price_per_hour is not None and not (given.dry_run or given.list):
        raise ValueError(
            f"price-per-hour is {given.price_per_hour:g}, and only a plan has costs; add --dry-run"
        )
    if given.only_nodes not in (None, 1) and limits.memory_limit_bytes is not None:
        raise ValueError(
            f"memory-limit is {given.memory_limit}, which is for cells on one node, and only-nodes "
            f"is {given.only_nodes}; leave memory-limit out"
        )
    if given.run_cell is not None and given.find_max_batch is not None:
        raise ValueError("run-cell runs one cell and find-max-batch searches; leave one out")
    if given.find_max_batch is not None:
        check_start(study)
    if given.hardware is not None and not given.dry_run:
        raise ValueError(
            f"hardware is {given.hardware}, but a sweep runs on this machine; add --dry-run"
        )
    return SweepOptions(
        study=study,
        out=given.out or DEFAULT_OUT / (Path(given.study).stem if given.study else "sweep"),
        limits=limits,
        retry=retry,
        retry_before=_utc(given.retry_before),
        find_max_batch=given.find_max_batch,
        is_dry=given.dry_run,
        is_list=given.list,
        is_watch=given.watch,
        max_cells=given.max_cells,
        stop_after_s=given.stop_after,
        only_nodes=given.only_nodes,
        run_cell=given.run_cell,
        lists_left=given.left,
        is_prepared=given.prepare,
        price_per_hour=given.price_per_hour,
        hardware=given.hardware,
    )


def _read_study(given: Any, axes: dict[str, AxisValues]) -> Study:
    """Returns the named study with the changes of the command line, or one of `axes` alone."""
    for name in axes:
        if name in RESERVED_OPTIONS:
            raise ValueError(f"--{name} is decided by the sweep for each cell; leave it out")
    recipe = given.recipe or ""
    chosen = RECIPES if recipe == "all" else [name.strip() for name in recipe.split(",")]
    if given.study is not None:
        study = load_study(given.study)
        for name in chosen if recipe else ():
            if name not in study.recipes:
                known = ", ".join(study.recipes)
                raise ValueError(f"recipe {name} is not in study {given.study}, which has {known}")
        recipes = {
            recipe: {name: values for name, values in options.items() if name not in axes}
            for recipe, options in study.recipes.items()
            if recipe in chosen or not given.recipe
        }
        study = replace(study, recipes=recipes, axes={**study.axes, **axes})
    elif recipe:
        study = read_study({"recipe": chosen, "axes": axes})
    else:
        raise ValueError(
            f"nothing to sweep: name a study ({', '.join(list_studies())}) or give --recipe"
        )
    if given.zip:
        group = tuple(map(axis_name, given.zip.split(",")))
        study = replace(study, zipped=(*study.zipped, group))
    if given.repeats is not None:
        study = replace(study, repeats=given.repeats)
    return study


def _utc(text: str | None) -> str | None:
    """Returns the time in UTC with a fixed number of digits, so that texts compare as times do."""
    if text is None:
        return None
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"retry-before is {text}; give a date and time, for example 2026-01-31T12:00:00+00:00"
        ) from None
    return time.astimezone(datetime.UTC).isoformat(timespec="microseconds")


def _bytes(text: str | None) -> int | None:
    """Reads a size such as 4GiB, 500MB or a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip())
    if match is None or (size := int(float(match[1]) * UNITS[match[2] or ""])) < 1:
        raise ValueError(f"memory-limit is {text}; give a size above 0, for example 4GiB")
    return size

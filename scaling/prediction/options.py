"""Options of `python -m scaling predict`, and the configurations that they describe.

The command reads its own options. Every other `--name a,b,c` is an option of the recipe.
"""

import contextlib
import functools
import importlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from scaling.changed_options import changed_options
from scaling.paths import why_missing
from scaling.prediction.hardware import (
    THIS_MACHINE,
    Hardware,
    from_calibration,
    list_hardware,
    load_hardware,
)
from scaling.recipe_process import RESERVED_OPTIONS
from unitransformer.cli import Parser, read_integer, suggest
from unitransformer.config import Accelerator, ParallelConfig, Recipe, RunConfig
from unitransformer.costs.memory import choose_strategy
from unitransformer.files import check_writable
from unitransformer.machine.calibration_store import read_calibration
from unitransformer.machine.host import memory_bytes

if TYPE_CHECKING:
    from recipes.options import ParsedCommand

MAX_DEVICES = 16_384
MAX_BATCH = 2**24  # of a device
# Fields of `RunConfig` beyond which a number is a typing error.
MOST = {"batch_size": MAX_BATCH, "accumulate": 2**20, "sequence_length": 2**24}
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
DEFAULT_DEVICES = "8,64,512,4096"
# What `--best` tries of the options that are not given. It doubles the batch size from there.
SEARCHED = {
    "strategy": "ddp,fsdp,hsdp,zero1,zero2,zero3",
    "batch-size": "1",
    "activation-checkpointing": "off,selective,full",
}
# Options of which every value is one of `ParallelConfig` or `RunConfig`, replaced without parsing.
PARALLEL_AXES = ("strategy", "precision", "activation-checkpointing", "compile", "cpu-offload")
RUN_AXES = ("batch-size", "accumulate")
REFUSED = {
    "num-nodes": "the hardware says how many devices a node has; give all devices with --devices",
    "accelerator": "the hardware says what computes",
    **dict.fromkeys(RESERVED_OPTIONS, "it runs nothing"),
}


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The checked options, and what they ask for."""

    hardware: Hardware
    configs: tuple[RunConfig, ...]
    left_out: tuple[str, ...]  # why a combination is no configuration
    records: Path | None  # folder of runs that the time is fitted to as well
    is_best: bool
    tokens: float | None
    price_per_hour: float | None
    searched: tuple[str, ...] = ()  # options that `--best` varies, as they are not given
    plot: Path | None = None
    html: Path | None = None
    command: str = ""  # as typed, for the page


def build_predict_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling predict --recipe RECIPE --hardware NAME [options] "
        "[--any-option-of-a-recipe VALUE,VALUE]",
        description="Predict memory, step time, speed and cost of configurations before anything "
        "runs, each with a 90 % interval. Every option that is not listed below is one of the "
        "recipe, with one value or several: --size 6.7b --strategy ddp,fsdp --batch-size 1,2,4 "
        "--model.width 4096. Hardware: " + ", ".join(list_hardware()) + ".",
    )

    def add(flag: str, kind: Any, help_text: str, default: Any = None) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add("--recipe", str | None, "bert, gpt or vit")
    add("--hardware", str | None, "name of a kind of node, or a .toml file that describes one")
    add("--devices", str, "numbers of devices, of all nodes together", DEFAULT_DEVICES)
    add(
        "--calibration",
        Path | None,
        "folder of run records on this hardware, to fit the time to them too; or with --hardware "
        "this-machine, a file that `calibrate` has written, by default the newest",
    )
    add("--tokens", str | None, "tokens to train, such as 300e9 (images for vit)")
    add("--price-per-hour", float | None, "USD for a device and hour; by default of the hardware")
    add("--plot", Path | None, "draw speed, efficiency, memory and cost in this .svg or .png file")
    add(
        "--html",
        Path | None,
        "write a page with all tables, and with the plot of several --devices",
    )
    add("--rows", Path | None, "with --validate, other published runs, as in published/runs.csv")
    for flag, help_text in (
        ("--best", "search the fastest configuration that fits, and the cheapest for --tokens"),
        ("--validate", "print how far predictions are off for runs that the fit has not seen"),
    ):
        parser.add_argument(flag, action="store_true", help=help_text)
    return parser


def read_predict_options(
    given: Any, axes: Mapping[str, Sequence[str]], command: str = ""
) -> PredictOptions:
    """Checks the parsed options; raises ValueError naming option, value and fix."""
    if given.recipe not in RECIPES:
        given_recipe = "missing" if given.recipe is None else given.recipe
        hint = suggest(given_recipe, RECIPES)
        raise ValueError(f"recipe is {given_recipe}; {hint}")
    if given.hardware is None:
        raise ValueError(f"hardware is missing; give one of {', '.join(list_hardware())}")
    hardware = _hardware(given.hardware, given.calibration)
    if given.price_per_hour is not None and not 0 < given.price_per_hour < math.inf:
        raise ValueError(f"price-per-hour is {given.price_per_hour}; it must be above 0")
    if given.price_per_hour is not None and given.tokens is None:
        raise ValueError(
            f"price-per-hour is {given.price_per_hour}, but nothing is priced; add --tokens"
        )
    if given.rows is not None:
        raise ValueError(f"rows is {given.rows}; it needs --validate")
    tokens = None if given.tokens is None else _amount("tokens", given.tokens)
    price = given.price_per_hour
    if price is None:
        price = hardware.price_per_device_hour
    searched: tuple[str, ...] = ()
    if given.best:
        # What `auto` would choose, the search finds.
        kept = {n: values for n, values in axes.items() if n != "strategy" or "auto" not in values}
        searched = tuple(name for name in SEARCHED if name not in kept)
        axes = {**{name: SEARCHED[name].split(",") for name in searched}, **kept}
    devices = read_devices(given.devices, hardware)
    _check_plots(given, devices)
    configs, left_out = build_configs(given.recipe, devices, axes, hardware)
    return PredictOptions(
        hardware=hardware,
        configs=configs,
        left_out=left_out,
        records=given.calibration if given.calibration and given.calibration.is_dir() else None,
        is_best=given.best,
        tokens=tokens,
        price_per_hour=price,
        searched=searched,
        plot=given.plot,
        html=given.html,
        command=command,
    )


def check_validate(given: Any, axes: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for options that `--validate` does not use."""
    changed = changed_options(given, build_predict_parser())
    others = [name for name in changed if name not in ("validate", "rows", "config")] + list(axes)
    if others:
        raise ValueError(
            f"validate judges published runs and does not use --{', --'.join(others)}; leave "
            f"{'it' if len(others) == 1 else 'them'} or --validate out"
        )


def _check_plots(given: Any, devices: Sequence[int]) -> None:
    """Raises ValueError for files that cannot be written, and for too few devices to draw."""
    if given.plot is not None and given.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"plot is {given.plot}; give a file that ends in .svg or .png")
    if given.plot is not None and given.plot == given.html:
        raise ValueError(f"html is {given.html}, and so is plot; give them different files")
    for name, path in (("plot", given.plot), ("html", given.html)):
        if path is None:
            continue
        check_writable(name, path, is_folder=False)
        if name == "plot" and len(devices) < 2:
            raise ValueError(
                f"devices is {devices[0]}, and --plot draws over several; give --devices 8,64,512"
            )


def _hardware(name: str, calibration: Path | None) -> Hardware:
    if calibration is None or calibration.is_dir():
        return load_hardware(name)
    if not calibration.exists():
        raise ValueError(f"calibration {calibration} {why_missing(calibration)}; check the path")
    if name != THIS_MACHINE:
        raise ValueError(
            f"calibration is {calibration}, a file, but hardware is {name}; use it with --hardware "
            f"{THIS_MACHINE}"
        )
    try:
        return from_calibration(read_calibration(calibration), memory_bytes())
    except OSError as error:
        raise ValueError(f"calibration {calibration} cannot be read: {error}") from error


def _amount(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {text}; it must be a number above 0, such as 300e9")
    return value


def read_devices(text: str, hardware: Hardware) -> tuple[int, ...]:
    """Returns numbers of devices such as "8,64"; raises ValueError for one that no job has."""
    counts = []
    for part in text.split(","):
        try:
            count = read_integer(part.strip())
        except ValueError:
            found = f"{text!r}, with {part.strip()!r} in it" if "," in text else repr(text)
            raise ValueError(
                f"devices is {found}; give integers and commas, such as 8,64"
            ) from None
        counts.append(count)
        check_devices(count, hardware)
    return tuple(dict.fromkeys(counts))


def check_devices(count: int, hardware: Hardware) -> None:
    """Raises ValueError for a number of devices that does not make whole nodes."""
    node = hardware.devices_per_node
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"devices is {count}; it must be between 1 and {MAX_DEVICES:,}")
    if count < node and node % count:
        parts = ", ".join(str(n) for n in range(1, node) if node % n == 0)
        raise ValueError(
            f"devices is {count}, which does not divide a node of {hardware.name} with {node}; "
            f"choose {parts}, or a multiple of {node}"
        )
    if count > node and count % node:
        low, high = count // node * node, -(-count // node) * node
        raise ValueError(
            f"devices is {count}, which does not divide into nodes of {hardware.name} with {node}; "
            f"choose {low} or {high}"
        )


def build_configs(
    recipe: Recipe,
    devices: Sequence[int],
    axes: Mapping[str, Sequence[str]],
    hardware: Hardware,
) -> tuple[tuple[RunConfig, ...], tuple[str, ...]]:
    """Returns every combination as a config with a chosen strategy, and why others are none.

    Raises:
        ValueError: an option or value is not one of the recipe, or no combination is a config.
    """
    for name in axes:
        if name in REFUSED:
            raise ValueError(f"--{name} does not suit a prediction: {REFUSED[name]}")
        if not axes[name]:
            raise ValueError(f"--{name} is empty; give at least one value")
    fast = {name: axes[name] for name in axes if name in (*PARALLEL_AXES, *RUN_AXES)}
    slow = {name: values for name, values in axes.items() if name not in fast}
    configs: dict[RunConfig, None] = {}
    left_out: dict[str, None] = {}
    for values in itertools.product(*slow.values()):
        arguments = [f"--{name}={value}" for name, value in zip(slow, values, strict=True)]
        base = _base_config(recipe, tuple(arguments), hardware.is_cpu)
        changes = [_changes(recipe, name, fast[name], arguments, hardware) for name in fast]
        for count in devices:
            for chosen in itertools.product(*changes):
                try:
                    configs[_combine(base, count, chosen, hardware)] = None
                except ValueError as error:
                    left_out[str(error)] = None
    if not configs:
        raise ValueError(next(iter(left_out)))
    return tuple(configs), tuple(left_out)


def _combine(
    base: RunConfig, count: int, chosen: Sequence[tuple[str, Any]], hardware: Hardware
) -> RunConfig:
    node = hardware.devices_per_node
    changes = dict(chosen)
    run = {name: changes.pop(name) for name in ("batch_size", "accumulate") if name in changes}
    shape = {"devices": min(count, node), "num_nodes": max(1, count // node)}
    strategy = changes.get("strategy", base.parallel.strategy)
    if count == 1 and strategy == "ddp":
        changes["strategy"] = "single"
    parallel: ParallelConfig = replace(base.parallel, **(changes | shape))
    config: RunConfig = replace(base, parallel=parallel, **run)
    return choose_strategy(config, hardware.shared_by(parallel.devices).memory_bytes)[0]


def _changes(
    recipe: Recipe,
    name: str,
    values: Sequence[str],
    arguments: Sequence[str],
    hardware: Hardware,
) -> list[tuple[str, Any]]:
    """Returns the parsed values of an option, as pairs of a field and a value."""
    field = name.replace("-", "_")
    parsed = []
    for value in values:
        given = (*arguments, f"--{name}={value}")
        if name == "strategy" and value == "single":
            parsed.append((field, "single"))
            continue
        config = _base_config(recipe, given, hardware.is_cpu)
        owner: Any = config if name in RUN_AXES else config.parallel
        parsed.append((field, getattr(owner, field)))
    return parsed


@functools.lru_cache(maxsize=256)
def _base_config(recipe: Recipe, arguments: tuple[str, ...], is_cpu: bool) -> RunConfig:
    """Returns the config of a recipe's command line on one device."""
    return _build(parse_command(recipe, arguments), is_cpu, devices=1)


def parse_command(recipe: Recipe, arguments: Sequence[str]) -> "ParsedCommand":
    """Parses a command line of a recipe; raises ValueError for an unknown option or value."""
    from recipes.options import parse

    with _options_as_typed():
        return parse(importlib.import_module(f"recipes.{recipe}").PRESET, arguments)


def _build(
    command: "ParsedCommand", is_cpu: bool, *, devices: int, num_nodes: int = 1
) -> RunConfig:
    from recipes.options import build_config

    defaults = command.preset.cpu if is_cpu else command.preset.cuda
    with _options_as_typed():
        config = build_config(command, defaults=defaults, devices=devices, num_nodes=num_nodes)
    for name, most in MOST.items():
        if (value := getattr(config, name)) > most:
            flag = name.replace("_", "-")
            raise ValueError(f"{flag} is {value}; predictions reach {most:,}")
    accelerator: Accelerator = "cpu" if is_cpu else "cuda"
    return replace(config, parallel=replace(config.parallel, accelerator=accelerator))


@contextlib.contextmanager
def _options_as_typed() -> Iterator[None]:
    """Names options in errors, such as batch-size, where a config names its field."""
    from recipes.options import RecipeOptions

    def option(field: re.Match[str]) -> str:
        names = (f"{field[1]}_{field[2]}", field[2])
        known = (name for name in names if name in RecipeOptions.__dataclass_fields__)
        return next(known, field[0]).replace("_", "-")

    try:
        yield
    except ValueError as error:
        text = re.sub(r"\b(run|data|parallel)\.(\w+)", option, str(error))
        raise ValueError(re.sub(r"^()(\w+)(?= is )", option, text)) from None


def resolve_on(
    command: "ParsedCommand", hardware: Hardware, *, devices: int | None = None, num_nodes: int = 1
) -> tuple[RunConfig, Hardware, str]:
    """Returns what a command line runs, the nodes with the devices it uses, and why its strategy.

    Args:
        devices: per node, if the command does not say; by default all GPUs, or one CPU process.
        num_nodes: if the command does not say.

    Raises:
        ValueError: the command cannot run there, naming field, value and fix.
    """
    options, node = command.options, hardware.devices_per_node
    other = "cuda" if hardware.is_cpu else "cpu"
    if options.accelerator == other:
        raise ValueError(f"accelerator is {other}, which {hardware.name} is not; leave it out")
    if devices is None:
        devices = 1 if hardware.is_cpu or options.strategy == "single" else node
    config = _build(command, hardware.is_cpu, devices=devices, num_nodes=num_nodes)
    parallel = config.parallel
    if parallel.devices > node:
        raise ValueError(
            f"devices is {parallel.devices}, and a node of {hardware.name} has {node}; give at "
            f"most {node}, and more nodes with --num-nodes"
        )
    if parallel.world_size > MAX_DEVICES:
        raise ValueError(
            f"num-nodes is {parallel.num_nodes}, with {parallel.world_size:,} devices; predictions "
            f"reach {MAX_DEVICES:,}"
        )
    if parallel.cpu_offload and hardware.is_cpu:
        raise ValueError("cpu-offload is for GPUs: on a CPU everything is in host memory already")
    hardware = hardware.shared_by(parallel.devices)
    hardware = replace(hardware, devices_per_node=parallel.devices)  # the others are not used
    config, reason = choose_strategy(config, hardware.memory_bytes)
    return config, hardware, reason

"""Options of the recipes, and the `RunConfig` that they describe. Does not import torch."""

import functools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from recipes.presets import Defaults, Preset
from unitransformer.checkpoint.names import NUM_KEPT, is_checkpoint_name
from unitransformer.cli import Parser, explain_parse_error, name_config_files
from unitransformer.config import (
    Accelerator,
    ActivationCheckpointing,
    Compile,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    Strategy,
    describe_type,
    from_dict,
)
from unitransformer.costs.memory import check_loss_blocks
from unitransformer.files import check_is_utf8, expand_home, why_not_writable


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options of every recipe; for None the recipe or the machine decides."""

    size: str = _option("reference", "named model size")
    data: str = _option("builtin", "builtin, synthetic, or a path of text files or image folders")
    data_encoding: str = _option(
        "utf-8", "encoding of the text files, such as utf-16, cp1252 or shift_jis"
    )
    data_field: str | None = _option(None, "field to read of each line of JSON Lines files")
    accelerator: Accelerator = _option("auto", "auto: GPUs if there are any, otherwise the CPU")
    devices: int | None = _option(None, "ranks per node; by default all GPUs, or one CPU process")
    num_nodes: int | None = _option(None, "number of nodes, started by torchrun or srun")
    strategy: Strategy = _option(
        "auto", "auto: single on one device; ddp if the model fits on each device, else sharded"
    )
    precision: Precision | None = _option(None, "by default 32-true on CPUs, bf16-mixed on GPUs")
    compile: Compile = _option("off", "mode of torch.compile")
    activation_checkpointing: ActivationCheckpointing = _option(
        "off", "recompute in the backward pass: full: whole layers, selective: the cheap parts"
    )
    cpu_offload: bool = _option(False, "keep weights and optimizer states in host memory (GPUs)")
    batch_size: int | None = _option(None, "samples per device and micro-batch")
    accumulate: int = _option(1, "micro-batches per optimizer step")
    max_steps: int | None = _option(None, "number of optimizer steps")
    until_interval: str | float | None = _option(
        None, "stop once the 95 % interval of the median step is this narrow, for example 1%"
    )
    ceiling_s: float = _option(1.0, "seconds to measure this machine's ceilings; 0: do not")
    repeats: int = _option(1, "launches of the whole run, each with its own record")
    seed: int = _option(0, "seed of weights, data order, masks and dropout")
    init_from: Path | None = _option(None, "file of initial weights: .safetensors or .pt")
    dropout: float | None = _option(None, "short for --model.dropout")
    sequence_length: int | None = _option(None, "tokens per sample; by default all positions")
    num_workers: int | None = _option(None, "data loader processes per rank")
    loss_chunk: int = _option(0, "rows of logits to compute at once; 0: all")
    loss_block: int | None = _option(
        None, "logits of a row to compute at once; 0: all; by default measured on a CPU"
    )
    pad_vocabulary: int | None = _option(
        None,
        "pad the logits to a multiple of this, with columns of probability 0; 0: do not; by "
        "default 128 on GPUs, but not for size reference",
    )
    validate_every: int | None = _option(
        None, "optimizer steps between validations; by default a quarter of all"
    )
    validation_batches: int = _option(12, "largest number of validation micro-batches per rank")
    log_every: int | None = _option(
        None, "optimizer steps between log lines; by default a twentieth of all"
    )
    out: Path = _option(Path("runs"), "folder in which each run gets a folder")
    checkpoint_dir: Path | None = _option(None, "by default a folder inside the run's folder")
    checkpoint_every: int = _option(0, "optimizer steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = _option(NUM_KEPT, "how many of the newest checkpoints to keep")
    no_checkpoint: bool = _option(False, "save no checkpoint, for runs that only measure")
    record: Path | None = _option(None, "file of the record; by default inside the run's folder")
    trace: Path | None = _option(None, "folder for a profiler trace of a few steps (Perfetto)")
    resume: bool | Literal["auto"] | Path = _option(
        False,
        "continue from the newest checkpoint, or from the one at a path; auto: from the newest if "
        "there is one and the run is not done",
    )
    summary: bool = _option(False, "print the parameter summary and exit")
    dry_run: bool = _option(False, "print what would run and exit")
    hardware: str | None = _option(
        None, "with --dry-run, nodes to plan for that are not here, such as h200-sxm-8"
    )
    rehearse: int | None = _option(
        None,
        "build and train a few steps as one of this many ranks, on tensors without numbers; print "
        "memory, collectives and shards, and exit",
    )
    json: Path | None = _option(None, "file for the result of --rehearse")


@dataclass(frozen=True, kw_only=True)
class ParsedCommand:
    """A parsed command line of a recipe."""

    preset: Preset
    options: RecipeOptions
    model: Mapping[str, Any]  # changed fields of the model
    optimizer: Mapping[str, Any]  # changed fields of the optimizer


@functools.cache
def build_parser(preset: Preset) -> Parser:
    """Returns a parser of `RecipeOptions` and of all fields of the model and the optimizer."""
    parser = Parser(
        prog=f"python -m recipes.{preset.recipe}",
        description=f"Train {preset.recipe.upper()}. Sizes: {', '.join(preset.sizes)}.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_fields(parser, RecipeOptions, "")
    _add_fields(parser, ModelConfig, "model.", optional=True)
    _add_fields(parser, OptimizerConfig, "optimizer.", optional=True)
    return parser


def _add_fields(parser: Parser, kind: type, prefix: str, *, optional: bool = False) -> None:
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        is_switch = item.default is False and not optional
        switch: dict[str, Any] = {"nargs": "?", "const": True} if is_switch else {}
        parser.add_argument(
            f"--{prefix}{item.name.replace('_', '-')}",
            type=hints[item.name] | None if optional else hints[item.name],
            default=None if optional else item.default,
            help=item.metadata.get("help", "by default that of the size or recipe"),
            **switch,
        )


def parse(preset: Preset, arguments: Sequence[str]) -> ParsedCommand:
    """Parses a command line; raises ValueError, in one line, for an unknown option or value."""
    parser = build_parser(preset)
    for name in (argument.partition("=")[0] for argument in arguments):
        # The parser would take `--data.x` for a part of the value of --data.
        if re.fullmatch(r"--[\w-]+\.\S+", name) and name not in parser._option_string_actions:
            raise ValueError(_explain(parser, f"Unrecognized arguments: {name}"))
    try:
        given = parser.parse_args(list(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        explained = name_config_files(_explain(parser, str(error)), arguments)
        raise ValueError(explained) from error
    model, optimizer = (_group(name, given.pop(name, None)) for name in ("model", "optimizer"))
    given.pop("config", None)
    if isinstance(given["data"], str):
        try:
            given["data"] = expand_home(given["data"])
        except ValueError as error:
            raise ValueError(f"data {error}") from None
    if isinstance(resume := given["resume"], str | Path) and resume != "auto":
        given["resume"] = Path(resume).resolve()
        if not is_checkpoint_name(given["resume"].name):
            raise ValueError(
                f"resume is {str(resume)!r}; it must be true or false, auto, or the path of a "
                "checkpoint, which is a folder such as step-00000100"
            )
    # The parser accepts null, and text for a switch, in a file; `from_dict` does not.
    options = from_dict(RecipeOptions, given)
    for name in ("repeats", "keep_checkpoints"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(options, name)}; it must be at least 1")
    default = RecipeOptions()
    for name in ("resume", "checkpoint_every", "checkpoint_dir", "keep_checkpoints"):
        if options.no_checkpoint and getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"no-checkpoint saves nothing but {flag} needs checkpoints; leave one out"
            )
    for name in ("resume", "repeats", "record", "trace", "summary", "dry_run"):
        if options.rehearse is not None and getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"rehearse is no run, and {flag} is for one; leave one out")
    if options.json is not None and options.rehearse is None:
        raise ValueError(f"json {options.json} is for the result of --rehearse; leave it out")
    if options.hardware is not None and options.rehearse is not None:
        raise ValueError(
            f"hardware is {options.hardware}, which a rehearsal does not use; leave --hardware or "
            "--rehearse out"
        )
    if options.hardware is not None and not options.dry_run:
        raise ValueError(
            f"hardware is {options.hardware}, but a run uses this machine; add --dry-run"
        )
    if options.dropout is not None:
        if model.get("dropout", options.dropout) != options.dropout:
            raise ValueError(
                f"dropout is {options.dropout} and model.dropout is {model['dropout']}; both mean "
                "the same: leave one out"
            )
        model["dropout"] = options.dropout
    return ParsedCommand(preset=preset, options=options, model=model, optimizer=optimizer)


def _group(name: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"config.{name} is {values!r}; it must be a group of fields")
    return {key: value for key, value in values.items() if value is not None}


def _explain(parser: Parser, message: str) -> str:
    if message.startswith("Unexpected config"):
        return "config holds no lines of the form `option: value`; --print_config prints an example"
    return explain_parse_error(message, parser, expected=_expected)


def _expected(key: str) -> str:
    group, _, name = key.rpartition(".")
    kind = {"": RecipeOptions, "model": ModelConfig, "optimizer": OptimizerConfig}[group]
    return f"it must be {describe_type(typing.get_type_hints(kind)[name])}"


def build_config(
    command: ParsedCommand, *, defaults: Defaults, devices: int, num_nodes: int = 1
) -> RunConfig:
    """Returns the config of a run.

    Args:
        defaults: those of the kind of device that the run uses.
        devices: ranks per node if the options do not give them.
        num_nodes: nodes if the options do not give them.

    Raises:
        ValueError: an invalid config, naming field, value and fix.
    """
    preset, options = command.preset, command.options
    max_steps = defaults.max_steps if options.max_steps is None else options.max_steps
    optimizer = {
        "learning_rate": defaults.learning_rate,
        "warmup_steps": defaults.warmup_steps,
        # A shorter run follows the beginning of the recipe's schedule, a longer one its own.
        "schedule_steps": max(defaults.max_steps, max_steps),
        **command.optimizer,
    }
    parallel = {"devices": devices, "num_nodes": num_nodes, "precision": defaults.precision}
    run: dict[str, Any] = {
        "batch_size": defaults.batch_size,
        "max_steps": max_steps,
        "validate_every": max(1, max_steps // 4),
        "log_every": max(1, max_steps // 20),
        "pad_vocabulary": 0 if options.size == "reference" else defaults.pad_vocabulary,
        **_given(options, RunConfig),
        "recipe": preset.recipe,
        "model": preset.model_config(options.size, **command.model),
        "data": DataConfig(
            source=options.data,
            encoding=options.data_encoding,
            field=options.data_field,
            **_given(options, DataConfig),
        ),
        "optimizer": OptimizerConfig(**optimizer),
        "parallel": ParallelConfig(**parallel | _given(options, ParallelConfig)),
        "until_interval": _fraction("until_interval", options.until_interval),
        "init_from": None if options.init_from is None else str(options.init_from),
    }
    config = RunConfig(**run)
    check_loss_blocks(config)
    return config


def _given(options: RecipeOptions, kind: type) -> dict[str, Any]:
    """Returns the options that have a value and the name of a field of `kind`."""
    values = {item.name: getattr(options, item.name, None) for item in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _fraction(name: str, value: str | float | None) -> float | None:
    """Reads a fraction such as 0.01 or 1%."""
    if not isinstance(value, str):
        return value
    number, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError:
        raise ValueError(
            f"{name.replace('_', '-')} is {value!r}; it must be a fraction, for example 1% or 0.01"
        ) from None


def check_paths(options: RecipeOptions) -> None:
    """Raises ValueError for data that does not exist, and for paths that cannot be written."""
    is_folder = options.data not in ("builtin", "synthetic")
    if is_folder and not Path(options.data).exists():
        raise ValueError(f"data {options.data} does not exist; give builtin, synthetic or a path")
    if options.init_from is not None and options.resume in (False, "auto"):
        if options.init_from.is_dir():
            raise ValueError(
                f"init-from {options.init_from} is a folder; name a file, for example one that "
                "`python -m unitransformer.export` has written"
            )
        if not options.init_from.exists():
            raise ValueError(f"init-from {options.init_from} does not exist; check the path")
    check_is_utf8("out", options.out)
    for name in ("out", "checkpoint_dir", "record", "trace", "json"):
        path = getattr(options, name)
        if path is None:
            continue
        flag = name.replace("_", "-")
        is_file = name in ("record", "json")
        if is_file and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; name a file in it with --{flag}")
        if problem := why_not_writable(path.parent if is_file else path):
            folder, why = problem
            raise ValueError(
                f"{flag} {path}: {folder} cannot be written ({why}); choose another with --{flag}"
            )

"""What a person may say to a recipe: typed options in, one `RunConfig` out. Nothing heavy."""

import functools
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from recipes.presets import Defaults, Preset
from unitransformer.cli import explain_parse_error
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
from unitransformer.files import why_not_writable


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What a person may say; None is decided by the recipe and the machine."""

    size: str = _option("reference", "named shape of the model")
    data: str = _option("builtin", "builtin, synthetic, or the path of a text or picture folder")
    accelerator: Accelerator = _option("auto", "auto takes GPUs where there are some")
    devices: int | None = _option(None, "ranks on each node; by default every GPU, or one CPU rank")
    num_nodes: int | None = _option(None, "machines, if torchrun or srun starts this on them")
    strategy: Strategy = _option(
        "auto", "auto: ddp where the model fits on each device, else sharded; single on one"
    )
    precision: Precision | None = _option(None, "by default 32-true on CPU, bf16-mixed on GPUs")
    compile: Compile = _option("off", "mode of torch.compile")
    activation_checkpointing: ActivationCheckpointing = _option(
        "off", "compute again in the backward pass: full all of a layer, selective the cheap part"
    )
    cpu_offload: bool = _option(False, "weights and optimizer states wait in host memory (GPUs)")
    batch_size: int | None = _option(None, "samples a device takes at once")
    accumulate: int = _option(1, "micro-batches added up before an optimizer step")
    max_steps: int | None = _option(None, "optimizer steps")
    until_interval: str | float | None = _option(
        None, "stop once the 95 % interval of the median step is so narrow, as 1%"
    )
    ceiling_s: float = _option(1.0, "seconds spent on this machine's own ceilings; 0: none")
    repeats: int = _option(1, "launches of the whole run, each with its own record")
    seed: int = _option(0, "decides weights, data order, masks and dropout")
    init_from: Path | None = _option(None, "state dict of the first weights: .safetensors or .pt")
    dropout: float | None = _option(None, "short for --model.dropout")
    sequence_length: int | None = _option(None, "tokens of a sample; by default all positions")
    num_workers: int | None = _option(None, "loader processes of a rank")
    loss_chunk: int = _option(0, "rows whose logits exist at once; 0: all")
    validate_every: int | None = _option(None, "optimizer steps; by default a quarter of them")
    validation_batches: int = _option(12, "micro-batches a rank validates on, at most")
    log_every: int | None = _option(None, "optimizer steps; by default a twentieth of them")
    out: Path = _option(Path("runs"), "folder that gets a folder for each run")
    checkpoint_dir: Path | None = _option(None, "by default a folder inside the run's")
    checkpoint_every: int = _option(0, "optimizer steps; 0: only the last")
    no_checkpoint: bool = _option(False, "save nothing, for a run that only measures")
    record: Path | None = _option(None, "file of the record; by default inside the run's folder")
    trace: Path | None = _option(None, "folder for a profiler's trace of a few steps (Perfetto)")
    resume: bool | Literal["auto"] = _option(
        False, "go on from the newest checkpoint; auto: if there is one and the run is not done"
    )
    summary: bool = _option(False, "print the parameter summary and stop")
    dry_run: bool = _option(False, "print what would run and stop")


@dataclass(frozen=True, kw_only=True)
class ParsedCommand:
    """A command line, read: of which recipe, what was said, what it changes."""

    preset: Preset
    options: RecipeOptions
    shape: Mapping[str, Any]  # changed fields of the model
    tuning: Mapping[str, Any]  # changed fields of the optimizer


@functools.cache
def build_parser(preset: Preset) -> jsonargparse.ArgumentParser:
    """Every option of `RecipeOptions`, every field of the model and of the optimizer."""
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m recipes.{preset.recipe}",
        description=f"Train {preset.recipe.upper()}. Sizes: {', '.join(preset.sizes)}.",
        exit_on_error=False,
        allow_abbrev=False,  # what is short for one option today is short for two tomorrow
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_fields(parser, RecipeOptions, "")
    _add_fields(parser, ModelConfig, "model.", optional=True)
    _add_fields(parser, OptimizerConfig, "optimizer.", optional=True)
    return parser


def _add_fields(
    parser: jsonargparse.ArgumentParser, kind: type, prefix: str, *, optional: bool = False
) -> None:
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        flag = f"--{prefix}{item.name.replace('_', '-')}"
        if item.default is False and not optional:
            switch: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
            parser.add_argument(flag, type=hints[item.name], help=item.metadata["help"], **switch)
            continue
        parser.add_argument(
            flag,
            type=hints[item.name] | None if optional else hints[item.name],
            default=None if optional else item.default,
            help=item.metadata.get("help", "by default that of the size or recipe"),
        )


def parse(preset: Preset, arguments: Sequence[str]) -> ParsedCommand:
    """Read a command line.

    Raises:
        ValueError: an unknown option, or a value of another type, in one line.
    """
    parser = build_parser(preset)
    try:
        given = parser.parse_args(list(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise ValueError(_explain(parser, str(error))) from error
    shape, tuning = (_group(name, given.pop(name, None)) for name in ("model", "optimizer"))
    given.pop("config", None)
    for name in ("out", "checkpoint_dir", "record", "trace", "init_from"):
        given[name] = None if given[name] is None else Path(os.path.expanduser(given[name]))
    # A file may say null, or give a switch a word: the parser lets both pass.
    options = from_dict(RecipeOptions, given)
    if options.repeats < 1:
        raise ValueError(f"repeats is {options.repeats}; it must be at least 1")
    for name in ("resume", "checkpoint_every", "checkpoint_dir"):
        if options.no_checkpoint and getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"no-checkpoint saves nothing and {flag} needs checkpoints; leave one out"
            )
    if options.dropout is not None:
        shape["dropout"] = options.dropout
    return ParsedCommand(preset=preset, options=options, shape=shape, tuning=tuning)


def _group(name: str, values: Any) -> dict[str, Any]:
    """The fields that were given of the group called `name`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config.{name} is {values!r}; it must be a group of fields")
    return {key: value for key, value in values.items() if value is not None}


def _explain(parser: jsonargparse.ArgumentParser, message: str) -> str:
    if message.startswith("Unexpected config"):
        return "config holds no lines of the form `option: value`; --print_config shows some"
    return explain_parse_error(
        message, parser, expected=lambda key: f"it must be {describe_type(_hint_of(key))}"
    )


def _hint_of(key: str) -> Any:
    group, _, name = key.rpartition(".")
    kind = {"": RecipeOptions, "model": ModelConfig, "optimizer": OptimizerConfig}[group]
    return typing.get_type_hints(kind)[name]


def build_config(
    request: ParsedCommand, *, defaults: Defaults, devices: int, num_nodes: int = 1
) -> RunConfig:
    """The run that is asked for.

    Args:
        defaults: those of the kind of device it will use.
        devices: ranks on each node where the options leave it open.
        num_nodes: nodes where the options leave it open.

    Raises:
        ValueError: by the config, naming field, value and fix.
    """
    preset, options = request.preset, request.options
    max_steps = defaults.max_steps if options.max_steps is None else options.max_steps
    optimizer = {
        "learning_rate": defaults.learning_rate,
        "warmup_steps": defaults.warmup_steps,
        # A run cut short follows the beginning of the recipe's schedule, a longer one its own.
        "schedule_steps": max(defaults.max_steps, max_steps),
        **request.tuning,
    }
    return RunConfig(
        recipe=preset.recipe,
        size=options.size,
        model=preset.model_config(options.size, **request.shape),
        data=DataConfig(
            source=options.data,
            sequence_length=options.sequence_length,
            num_workers=options.num_workers,
        ),
        optimizer=OptimizerConfig(**optimizer),
        parallel=ParallelConfig(
            accelerator=options.accelerator,
            devices=devices if options.devices is None else options.devices,
            num_nodes=num_nodes if options.num_nodes is None else options.num_nodes,
            strategy=options.strategy,
            precision=options.precision or defaults.precision,
            compile=options.compile,
            activation_checkpointing=options.activation_checkpointing,
            cpu_offload=options.cpu_offload,
        ),
        batch_size=defaults.batch_size if options.batch_size is None else options.batch_size,
        accumulate=options.accumulate,
        max_steps=max_steps,
        until_interval=_share("until_interval", options.until_interval),
        ceiling_s=options.ceiling_s,
        validate_every=(
            max(1, max_steps // 4) if options.validate_every is None else options.validate_every
        ),
        validation_batches=options.validation_batches,
        checkpoint_every=options.checkpoint_every,
        log_every=max(1, max_steps // 20) if options.log_every is None else options.log_every,
        loss_chunk=options.loss_chunk,
        seed=options.seed,
        init_from=None if options.init_from is None else str(options.init_from),
    )


def _share(name: str, value: str | float | None) -> float | None:
    """A share of one, written as 0.01 or 1%."""
    if not isinstance(value, str):
        return value
    number, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; it must be a share, as 1% or 0.01") from None


def check_outside_world(options: RecipeOptions) -> None:
    """Raises ValueError for data that is not there and folders that cannot be written."""
    if (
        options.data not in ("builtin", "synthetic")
        and not Path(options.data).expanduser().exists()
    ):
        raise ValueError(f"data {options.data} does not exist; give builtin, synthetic or a path")
    if options.init_from is not None and options.resume is not True:
        if options.init_from.is_dir():
            raise ValueError(
                f"init-from {options.init_from} is a folder; name a file, as "
                "`python -m unitransformer.export` writes"
            )
        if not options.init_from.exists():
            raise ValueError(f"init-from {options.init_from} does not exist; check the path")
    for name in ("out", "checkpoint_dir", "record", "trace"):
        path = getattr(options, name)
        if path is None:
            continue
        flag = name.replace("_", "-")
        if name == "record" and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; name a file in it with --{flag}")
        folder = path.parent if name == "record" else path
        if closed := why_not_writable(folder):
            there, why = closed
            raise ValueError(
                f"{flag} {path}: {there} cannot be written ({why}); choose another with --{flag}"
            )

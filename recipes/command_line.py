"""The command line the three recipes share: options in, exit code out.

0 done | 1 the run failed | 2 bad usage. Nothing heavy is imported until the options are sound.
"""

import os
import re
import shlex
import sys
import tempfile
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jsonargparse

from recipes.presets import Defaults, Preset, nearest
from unitransformer.config import (
    Accelerator,
    Compile,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    Strategy,
    from_dict,
    spelled,
)

if TYPE_CHECKING:
    from unitransformer.run import Outcome, Places

SEE_HELP = "--help lists them all"
RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # tells the ranks a launcher starts which folder to use


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say; None is decided by the recipe and the machine."""

    size: str = _option("reference", "named shape of the model")
    data: str = _option("builtin", "builtin, synthetic, or the path of a text or picture folder")
    accelerator: Accelerator = _option("auto", "auto takes GPUs where there are some")
    devices: int | None = _option(None, "ranks on each node; by default every GPU, or one CPU rank")
    num_nodes: int = _option(1, "machines that run this command together")
    strategy: Strategy = _option("auto", "auto: single on one device, ddp on more")
    precision: Precision | None = _option(None, "by default 32-true on CPU, bf16-mixed on GPUs")
    compile: Compile = _option("off", "mode of torch.compile")
    batch_size: int | None = _option(None, "samples a device takes at once")
    accumulate: int = _option(1, "micro-batches added up before an optimizer step")
    max_steps: int | None = _option(None, "optimizer steps")
    seed: int = _option(0, "decides weights, data order, masks and dropout")
    dropout: float | None = _option(None, "short for --model.dropout")
    sequence_length: int | None = _option(None, "tokens of a sample; by default all positions")
    num_workers: int | None = _option(None, "loader processes of a rank")
    loss_chunk: int = _option(0, "rows whose logits exist at once; 0: all")
    validate_every: int | None = _option(None, "optimizer steps; by default a quarter of them")
    validation_batches: int = _option(20, "micro-batches a rank validates on, at most")
    log_every: int = _option(10, "optimizer steps between log lines")
    out: Path = _option(Path("runs"), "folder that gets a folder for each run")
    checkpoint_dir: Path | None = _option(None, "by default a folder inside the run's")
    checkpoint_every: int = _option(0, "optimizer steps; 0: only the last")
    record: Path | None = _option(None, "file of the record; by default inside the run's folder")
    resume: bool = _option(False, "go on from the newest checkpoint")
    summary: bool = _option(False, "print the parameter summary and stop")
    dry_run: bool = _option(False, "print what would run and stop")


class Show(Protocol):
    """What a recipe does with a trained network: figures into a folder, lines for people."""

    def __call__(self, outcome: "Outcome", folder: Path) -> list[str]: ...


def run_recipe(preset: Preset, show: Show, argv: Sequence[str] | None = None) -> int:
    """Parse, check, train, show; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, shape, tuning = parse(preset, arguments)
        # Everything plain is refused here, before torch is imported.
        build_config(preset, options, shape, tuning, defaults=preset.cpu, devices=1)
        if options.summary:
            print(_summary(preset.model_config(options.size, **shape)))
            return 0
        _check_outside_world(options)
        return _train(preset, show, options, shape, tuning, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------------------------- options


def build_parser(preset: Preset) -> jsonargparse.ArgumentParser:
    """Every option of `Options`, every field of the model and of the optimizer."""
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m recipes.{preset.recipe}",
        description=f"Train {preset.recipe.upper()}. Sizes: {', '.join(preset.sizes)}.",
        exit_on_error=False,
        allow_abbrev=False,  # what is short for one option today is short for two tomorrow
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_fields(parser, Options, "")
    _add_fields(parser, ModelConfig, "model.", optional=True)
    _add_fields(parser, OptimizerConfig, "optimizer.", optional=True)
    return parser


def _add_fields(
    parser: jsonargparse.ArgumentParser, kind: type, prefix: str, *, optional: bool = False
) -> None:
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        flag = f"--{prefix}{item.name.replace('_', '-')}"
        if hints[item.name] is bool and not optional:
            parser.add_argument(flag, action="store_true", help=item.metadata["help"])
            continue
        parser.add_argument(
            flag,
            type=hints[item.name] | None if optional else hints[item.name],
            default=None if optional else item.default,
            help=item.metadata.get("help", "by default that of the size or recipe"),
        )


def parse(
    preset: Preset, arguments: Sequence[str]
) -> tuple[Options, dict[str, Any], dict[str, Any]]:
    """Options, changed fields of the model, changed fields of the optimizer.

    Raises:
        ValueError: an unknown option, or a value of another type, in one line.
    """
    parser = build_parser(preset)
    try:
        given = parser.parse_args(list(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise ValueError(_in_one_line(parser, str(error))) from error
    shape, tuning = (_group(name, given.pop(name, None)) for name in ("model", "optimizer"))
    given.pop("config", None)
    for name in ("out", "checkpoint_dir", "record"):
        given[name] = None if given[name] is None else Path(given[name])
    # A file may say null, or give a switch a word: the parser lets both pass.
    options = from_dict(Options, given)
    if options.dropout is not None:
        shape["dropout"] = options.dropout
    return options, shape, tuning


def _group(name: str, values: Any) -> dict[str, Any]:
    """The fields that were given of the group called `name`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config.{name} is {values!r}; it must be a group of fields")
    return {field: value for field, value in values.items() if value is not None}


def _in_one_line(parser: jsonargparse.ArgumentParser, message: str) -> str:
    if unknown := re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", message):
        flags = [flag for action in parser._actions for flag in action.option_strings]
        return f"{unknown[1]} is not an option; {nearest(unknown[1], flags, otherwise=SEE_HELP)}"
    if unknown := re.search(r"Option '(\S+)' is not accepted", message):
        names = [action.dest for action in parser._actions]
        return f"config.{unknown[1]} is not an option; {nearest(unknown[1], names, otherwise=SEE_HELP)}"
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if key and value:
        return f"{key[1]} is {value[1].strip()!r}; it must be {spelled(_hint_of(key[1]))}"
    return " ".join(message.split())


def _hint_of(key: str) -> Any:
    group, _, name = key.rpartition(".")
    kind = {"": Options, "model": ModelConfig, "optimizer": OptimizerConfig}[group]
    return typing.get_type_hints(kind)[name]


# ---------------------------------------------------------------------------------- config


def build_config(
    preset: Preset,
    options: Options,
    shape: Mapping[str, Any],
    tuning: Mapping[str, Any],
    *,
    defaults: Defaults,
    devices: int,
) -> RunConfig:
    """The run that `options` ask for.

    Args:
        defaults: those of the kind of device it will use.
        devices: ranks on each node where the options leave it open.

    Raises:
        ValueError: by the config, naming field, value and fix.
    """
    max_steps = defaults.max_steps if options.max_steps is None else options.max_steps
    optimizer = {
        "learning_rate": defaults.learning_rate,
        "warmup_steps": defaults.warmup_steps,
        # A run cut short follows the beginning of the recipe's schedule, a longer one its own.
        "schedule_steps": max(defaults.max_steps, max_steps),
        **tuning,
    }
    return RunConfig(
        recipe=preset.recipe,
        size=options.size,
        model=preset.model_config(options.size, **shape),
        data=DataConfig(
            source=options.data,
            sequence_length=options.sequence_length,
            num_workers=options.num_workers,
        ),
        optimizer=OptimizerConfig(**optimizer),
        parallel=ParallelConfig(
            accelerator=options.accelerator,
            devices=devices if options.devices is None else options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision=options.precision or defaults.precision,
            compile=options.compile,
        ),
        batch_size=defaults.batch_size if options.batch_size is None else options.batch_size,
        accumulate=options.accumulate,
        max_steps=max_steps,
        validate_every=(
            max(1, max_steps // 4) if options.validate_every is None else options.validate_every
        ),
        validation_batches=options.validation_batches,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        loss_chunk=options.loss_chunk,
        seed=options.seed,
    )


def _check_outside_world(options: Options) -> None:
    """Raises ValueError for data that is not there and folders that cannot be written."""
    if options.data not in ("builtin", "synthetic") and not Path(options.data).exists():
        raise ValueError(f"data {options.data} does not exist; give builtin, synthetic or a path")
    for name in ("out", "checkpoint_dir", "record"):
        path = getattr(options, name)
        if path is None:
            continue
        flag = name.replace("_", "-")
        if name == "record" and path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; name a file in it with --{flag}")
        folder = path.parent if name == "record" else path
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        try:
            # Asking for permission is not enough: root may write everywhere, but not on /proc.
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise ValueError(
                f"{flag} {path}: {there} cannot be written ({error.strerror}); "
                f"choose another with --{flag}"
            ) from error


# ---------------------------------------------------------------------------------- running


def _train(
    preset: Preset,
    show: Show,
    options: Options,
    shape: Mapping[str, Any],
    tuning: Mapping[str, Any],
    arguments: Sequence[str],
) -> int:
    from unitransformer.run import RunFailed, count_gpus, find_device, process_rank, run

    num_gpus = count_gpus()
    on_gpu = options.accelerator != "cpu" and num_gpus > 0
    config = build_config(
        preset,
        options,
        shape,
        tuning,
        defaults=preset.cuda if on_gpu else preset.cpu,
        devices=num_gpus if on_gpu else 1,
    )
    device = find_device(config.parallel)
    places = _places(config, options)
    if process_rank() == 0:
        if options.accelerator == "auto" and device == "cpu":
            ranks = config.parallel.devices
            print(f"no GPU found: {ranks} CPU worker{'s over gloo' if ranks > 1 else ''}")
    if options.dry_run:
        print(_plan(config, device, places))
        return 0
    os.environ[RUN_FOLDER] = str(places.folder)
    try:
        outcome = run(
            config,
            places,
            command=f"python -m recipes.{preset.recipe} {shlex.join(arguments)}".strip(),
            resume=options.resume,
            show_bar=sys.stdout.isatty(),
        )
    except RunFailed as failure:
        cause = failure.__cause__
        if not isinstance(cause, OSError):
            traceback.print_exception(cause)
        print(f"error: {failure} (record: {places.record})", file=sys.stderr)
        return 1
    if outcome.record is not None:
        print("\n".join(_results(outcome, places, show)))
    return 0


def _places(config: RunConfig, options: Options) -> "Places":
    from unitransformer.run import Places

    folder = _run_folder(config, options)
    repeat = folder.name.rpartition("-")[2]
    return Places(
        folder=folder,
        checkpoints=options.checkpoint_dir or folder / "checkpoints",
        record=options.record or folder / f"{config.hash()}-{repeat}.json",
    )


def _run_folder(config: RunConfig, options: Options) -> Path:
    """A new folder, or for a resumed run the newest that has a checkpoint."""
    if RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    stem = f"{config.recipe}-{config.size}-{config.identity_hash()}"
    existing = sorted(
        (path for path in options.out.glob(f"{stem}-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    if options.resume and options.checkpoint_dir is None:
        with_checkpoint = [p for p in existing if any((p / "checkpoints").glob("step-*"))]
        if not with_checkpoint:
            raise ValueError(
                f"resume: {options.out} holds no checkpoint of these options; run without --resume "
                "first, or name its --checkpoint-dir"
            )
        return with_checkpoint[-1]
    repeat = int(existing[-1].name.rpartition("-")[2]) + 1 if existing else 1
    return options.out / f"{stem}-{repeat}"


def _summary(model: ModelConfig) -> str:
    import torch

    from unitransformer.summary import render_summary, summarise
    from unitransformer.transformer import Transformer

    with torch.device("meta"):
        return render_summary(summarise(Transformer(model)))


def _plan(config: RunConfig, device: str, places: "Places") -> str:
    from unitransformer.flops import count_flops, count_parameters
    from unitransformer.progress import UNIT

    parallel = config.parallel
    unit = UNIT[config.recipe].rstrip("s")
    flops = ", ".join(f"{name} {count:,.0f}" for name, count in count_flops(config).items())
    lines = {
        "model": f"{config.recipe} {config.size}, {count_parameters(config.model):,} parameters",
        "data": config.data.source,
        "devices": f"{parallel.num_nodes} x {parallel.devices} {device}, {parallel.strategy}, "
        f"{parallel.precision}, compile {parallel.compile}",
        "batch": f"{config.global_batch_size} = {config.batch_size} a device x "
        f"{config.accumulate} micro-batches x {parallel.world_size} devices",
        "steps": str(config.max_steps),
        f"FLOPs a {unit}": flops,
        "folder": str(places.folder),
        "checkpoint": str(places.checkpoints),
        "record": str(places.record),
    }
    return "\n".join(f"{name:<15} {value}" for name, value in lines.items())


def _results(outcome: "Outcome", places: "Places", show: Show) -> list[str]:
    """The block a run ends with."""
    from unitransformer.plots import loss_figure, write_figure
    from unitransformer.progress import UNIT

    record = outcome.record
    assert record is not None
    validation = record["validation"]
    baseline = validation["baseline"]
    to_beat = (baseline["name"], baseline["loss"]) if baseline and baseline["loss"] else None
    title = f"{record['recipe']} {record['size']}"
    loss_png = write_figure(
        loss_figure(record["loss"], validation["history"], title=title, baseline=to_beat),
        places.folder / "figures" / "loss.png",
    )
    shown = show(outcome, places.folder / "figures")
    unit = UNIT[record["recipe"]]
    rate = record[f"{unit}_per_s"]
    speed = (
        f"{rate:,.0f} {unit}/s (median of {len(record['step_s']) - record['steady_from']} "
        "steady steps)"
        if rate is not None
        else f"not told: {len(record['step_s'])} steps are too few to find a steady state"
    )
    return [
        *(["", "last lines:", *record["log"][-5:]] if sys.stdout.isatty() else []),
        "",
        f"validation  loss {validation['loss']:.4f}, {validation['metric']} "
        f"{_figure(validation['metric'], validation['value'])}{_against(baseline, validation)}",
        f"speed       {speed}",
        f"memory      peak {max(record['peak_bytes']) / 2**30:.2f} GiB a rank "
        f"({record['peak_bytes_kind']})",
        *shown,
        f"checkpoint  {places.checkpoints}",
        f"record      {places.record}",
        f"logs        {places.folder / 'csv'}, {places.folder / 'tensorboard'}",
        f"figures     {loss_png.parent}",
    ]


def _figure(metric: str, value: float) -> str:
    return f"{value:,.1f}" if metric == "perplexity" else f"{value:.2%}"


def _against(baseline: Mapping[str, Any] | None, validation: Mapping[str, Any]) -> str:
    if baseline is None:
        return ""
    if baseline["loss"] is not None:
        return f" (to beat: {baseline['name']}, loss {baseline['loss']:.4f})"
    return f" (to beat: {baseline['name']}, {baseline['accuracy']:.2%})"

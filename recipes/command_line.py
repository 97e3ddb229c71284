"""The command line the three recipes share: options in, exit code out.

0 done | 1 the run failed | 2 bad usage. Nothing heavy is imported until the options are sound.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recipes.options import Options, Request, build_config, check_outside_world, parse
from recipes.presets import Preset
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.tasks import UNIT, metric_in_words, rate_in_words

if TYPE_CHECKING:
    from unitransformer.run import Outcome, Places

RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # tells the ranks a launcher starts which folder to use


class Show(Protocol):
    """What a recipe does with a trained network: figures into a folder, lines for people."""

    def __call__(self, outcome: "Outcome", folder: Path) -> list[str]: ...


def run_recipe(preset: Preset, show: Show, argv: Sequence[str] | None = None) -> int:
    """Parse, check, train, show; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        request = _read(preset, arguments)
        if request.options.summary:
            print(_summary(preset.model_config(request.options.size, **request.shape)))
            return 0
        check_outside_world(request.options)
        config, places = _resolve(request)
        _say_device(request.options, config)
        if request.options.dry_run:
            print(_plan(config, places))
            return 0
        command = f"python -m recipes.{preset.recipe} {shlex.join(arguments)}".strip()
        return _train(config, places, show, command=command, resume=request.options.resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def configure(preset: Preset, arguments: Sequence[str]) -> tuple[RunConfig, "Places"]:
    """The run that a command line asks for on this machine, and where its results go.

    Raises:
        ValueError: naming field, value and fix.
    """
    request = _read(preset, arguments)
    check_outside_world(request.options)
    return _resolve(request)


def _read(preset: Preset, arguments: Sequence[str]) -> Request:
    """Parse, and refuse everything plain before torch is imported."""
    request = parse(preset, arguments)
    build_config(request, defaults=preset.cpu, devices=1)
    return request


def _resolve(request: Request) -> tuple[RunConfig, "Places"]:
    from unitransformer.process import count_gpus, find_device, has_bf16

    num_gpus = count_gpus()
    on_gpu = request.options.accelerator != "cpu" and num_gpus > 0
    defaults = request.preset.cuda if on_gpu else request.preset.cpu
    if on_gpu and not has_bf16():
        defaults = replace(defaults, precision="16-mixed")
    is_single = request.options.strategy == "single"
    config = build_config(
        request, defaults=defaults, devices=num_gpus if on_gpu and not is_single else 1
    )
    device = find_device(config.parallel)
    config = replace(config, parallel=config.parallel.resolved(device))
    return config, _places(config, request.options)


def _say_device(options: Options, config: RunConfig) -> None:
    from unitransformer.process import process_rank

    parallel = config.parallel
    is_first = process_rank(parallel) == 0
    if is_first and options.accelerator == "auto" and parallel.accelerator == "cpu":
        workers = f"{parallel.devices} CPU worker{'s over gloo' if parallel.devices > 1 else ''}"
        print(f"no GPU found: {workers}", flush=True)


def _train(config: RunConfig, places: "Places", show: Show, *, command: str, resume: bool) -> int:
    from unitransformer.run import RunFailed, run

    os.environ[RUN_FOLDER] = str(places.folder)
    try:
        outcome = run(config, places, command=command, resume=resume, show_bar=sys.stdout.isatty())
    except RunFailed as failure:
        cause = failure.__cause__
        if not isinstance(cause, OSError):
            traceback.print_exception(cause)
        print(f"error: {failure} (record: {places.record})", file=sys.stderr)
        return 1
    finally:
        del os.environ[RUN_FOLDER]
    if outcome.record is None:
        return 0
    try:
        print("\n".join(_results(outcome, places, show)))
    except OSError as error:  # the training itself is done and recorded
        print(f"error: figures: {error} (record: {places.record})", file=sys.stderr)
        return 1
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


def _plan(config: RunConfig, places: "Places") -> str:
    from unitransformer.flops import count_flops, count_parameters

    parallel = config.parallel
    unit = UNIT[config.recipe].rstrip("s")
    flops = ", ".join(f"{name} {count:,.0f}" for name, count in count_flops(config).items())
    lines = {
        "model": f"{config.recipe} {config.size}, {count_parameters(config.model):,} parameters",
        "data": config.data.source,
        "devices": f"{parallel.num_nodes} x {parallel.devices} {parallel.accelerator}, "
        f"{parallel.strategy}, {parallel.precision}, compile {parallel.compile}",
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

    record = outcome.record
    assert record is not None
    validation = record["validation"]
    metric, baseline = validation["metric"], validation["baseline"]
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
        f"{rate_in_words(rate, unit)} (median of {len(record['step_s']) - record['steady_from']} "
        "steady steps)"
        if rate is not None
        else f"not told: {len(record['step_s'])} steps are too few to find a steady state"
    )
    return [
        *(["", "last lines:", *record["log"][-5:]] if sys.stdout.isatty() else []),
        "",
        f"validation  loss {validation['loss']:.4f}, {metric} "
        f"{metric_in_words(metric, validation['value'])}{_against(baseline)}",
        f"speed       {speed}",
        f"memory      peak {max(record['peak_bytes']) / 2**30:.2f} GiB a rank "
        f"({record['peak_bytes_kind']})",
        *shown,
        f"checkpoint  {places.checkpoints}",
        f"record      {places.record}",
        f"logs        {places.folder / 'csv'}, {places.folder / 'tensorboard'}",
        f"figures     {loss_png.parent}",
    ]


def _against(baseline: Mapping[str, Any] | None) -> str:
    if baseline is None:
        return ""
    if baseline["loss"] is not None:
        return f" (to beat: {baseline['name']}, loss {baseline['loss']:.4f})"
    return f" (to beat: {baseline['name']}, {baseline['accuracy']:.2%})"

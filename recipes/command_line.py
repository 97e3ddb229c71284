"""The command line the three recipes share: options in, exit code out.

0 done | 1 the run failed | 2 bad usage | 75 stopped by a signal, saved. Nothing heavy is imported
until the options are sound.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.options import ParsedCommand, RecipeOptions, build_config, check_outside_world, parse
from recipes.presets import Preset
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.memory import format_gib, rank_bytes
from unitransformer.launch.failures import report_failure
from unitransformer.launch.gc_pause import heavy_import
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.schema import config_of, load_record
from unitransformer.record.units import UNIT

if TYPE_CHECKING:
    from recipes.train import Show
    from unitransformer.launch.devices import ResolvedConfig
    from unitransformer.run import RunPaths


def run_recipe(preset: Preset, show: "Show", argv: Sequence[str] | None = None) -> int:
    """Parse, check, train, show; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        request = _read(preset, arguments)
        options = request.options
        if options.summary:
            print(_summary(preset.model_config(options.size, **request.shape)))
            return 0
        with heavy_import("recipes.train"):
            check_outside_world(options)
            resolved = resolve(request)
            config = resolved.config
            _say_device(options, resolved)
            if options.dry_run:
                print(_plan(resolved, _places(config, options)))
                return 0
            if options.resume == "auto" and _is_done(config, _places(config, options).record):
                from unitransformer.launch.environment import process_rank

                if process_rank() == 0:
                    print(f"done already: {_places(config, options).record}")
                return 0
            from recipes.repeats import run_repeats
            from recipes.train import RunRequest, train

        asked = RunRequest(
            recipe=preset.recipe,
            arguments=arguments,
            show=show,
            resolved=resolved,
            choose_places=lambda: _places(config, options),
            resume=options.resume,
        )
        return run_repeats(asked, options) if options.repeats > 1 else train(asked)
    except (ValueError, OSError) as error:
        _refuse(error)
        return 2


def _refuse(error: Exception) -> None:
    """One line, to whoever started this rank or to a person."""
    report_failure(error, is_bad_usage=True)
    if "LOCAL_RANK" in os.environ:
        from unitransformer.launch.launcher import is_launched_rank

        if is_launched_rank():
            return
    print(f"error: {error}", file=sys.stderr)


def configure(preset: Preset, arguments: Sequence[str]) -> tuple[RunConfig, "RunPaths"]:
    """The run that a command line asks for on this machine, and where its results go.

    Raises:
        ValueError: naming field, value and fix.
    """
    request = _read(preset, arguments)
    config = resolve(request).config
    return config, _places(config, request.options)


def _read(preset: Preset, arguments: Sequence[str]) -> ParsedCommand:
    """Parse, and refuse everything plain before torch is imported."""
    request = parse(preset, arguments)
    build_config(request, defaults=preset.cpu, devices=1)
    return request


def resolve(request: ParsedCommand) -> "ResolvedConfig":
    """The run that a command line asks for on this machine.

    Raises:
        ValueError: naming field, value and fix.
    """
    from unitransformer.launch import devices as process
    from unitransformer.launch import environment

    check_outside_world(request.options)
    environment.adopt_launcher()
    num_gpus = process.count_gpus()
    on_gpu = request.options.accelerator != "cpu" and num_gpus > 0
    defaults = request.preset.cuda if on_gpu else request.preset.cpu
    if on_gpu and not process.has_bf16():
        defaults = replace(defaults, precision="16-mixed")
    is_single = request.options.strategy == "single"
    devices, num_nodes = environment.launched_shape() or (
        num_gpus if on_gpu and not is_single else 1,
        1,
    )
    config = build_config(request, defaults=defaults, devices=devices, num_nodes=num_nodes)
    resolved = process.resolve(config)
    if config.init_from is not None and request.options.resume is not True:
        from unitransformer.weights import read_weights

        read_weights(Path(config.init_from), config.model)  # refused here, once, or not at all
    return resolved


def _say_device(options: RecipeOptions, resolved: "ResolvedConfig") -> None:
    from unitransformer.launch.environment import process_rank
    from unitransformer.launch.launcher import is_launched_rank

    parallel = resolved.config.parallel
    if is_launched_rank() or process_rank() != 0:
        return
    if options.accelerator == "auto" and parallel.accelerator == "cpu":
        workers = f"{parallel.devices} CPU worker{'s over gloo' if parallel.devices > 1 else ''}"
        print(f"no GPU found: {workers}", flush=True)
    if options.strategy == "auto" and parallel.strategy != "single":
        print(f"strategy {parallel.strategy}: {resolved.strategy_reason}", flush=True)


def _places(config: RunConfig, options: RecipeOptions) -> "RunPaths":
    from unitransformer.run import RunPaths

    folder = _run_folder(config, options)
    repeat = folder.name.rpartition("-")[2]
    return RunPaths(
        folder=folder,
        checkpoints=(
            None if options.no_checkpoint else options.checkpoint_dir or folder / "checkpoints"
        ),
        record=options.record or folder / f"{config.hash()}-{repeat}.json",
        trace=options.trace,
    )


def _run_folder(config: RunConfig, options: RecipeOptions) -> Path:
    """A new folder; for a resumed run the newest that has a checkpoint, if it must have one."""
    if RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    stem = f"{config.recipe}-{config.size}-{config.identity_hash()}"
    existing = sorted(
        (path for path in options.out.glob(f"{stem}-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    if options.resume == "auto" and existing:
        return existing[-1]
    if options.resume is True and options.checkpoint_dir is None:
        with_checkpoint = [p for p in existing if any((p / "checkpoints").glob("step-*"))]
        if not with_checkpoint:
            raise ValueError(
                f"resume: {options.out} holds no checkpoint of these options; run without --resume "
                "first, or name its --checkpoint-dir"
            )
        return with_checkpoint[-1]
    repeat = int(existing[-1].name.rpartition("-")[2]) + 1 if existing else 1
    return options.out / f"{stem}-{repeat}"


def _is_done(config: RunConfig, path: Path) -> bool:
    """Whether this very run has ended well: its record says so, no exit code does."""
    try:
        record = load_record(path)
    except (OSError, ValueError):
        return False
    return record["status"] == "ok" and config_of(record).hash() == config.hash()


def _summary(model: ModelConfig) -> str:
    import torch

    from unitransformer.record.parameter_summary import render_summary, summarise
    from unitransformer.transformer import Transformer

    with torch.device("meta"):
        return render_summary(summarise(Transformer(model)))


def _plan(resolved: "ResolvedConfig", places: "RunPaths") -> str:
    from unitransformer.costs.flops import count_flops, count_parameters

    config = resolved.config
    parallel = config.parallel
    unit = UNIT[config.recipe].rstrip("s")
    mode = parallel.activation_checkpointing
    more = "" if mode == "off" else f", activation checkpointing {mode}"
    more += ", offloaded to host memory" if parallel.cpu_offload else ""
    flops = ", ".join(f"{name} {count:,.0f}" for name, count in count_flops(config).items())
    lines = {
        "model": f"{config.recipe} {config.size}, {count_parameters(config.model):,} parameters",
        "data": config.data.source,
        "devices": f"{parallel.num_nodes} x {parallel.devices} {parallel.accelerator}, "
        f"{parallel.strategy}, {parallel.precision}, compile {parallel.compile}{more}",
        "strategy": f"{parallel.strategy}: {resolved.strategy_reason}",
        "memory": f"a rank about {format_gib(rank_bytes(config))}: state and activations",
        "batch": f"{config.global_batch_size} = {config.batch_size} a device x "
        f"{config.accumulate} micro-batches x {parallel.world_size} devices",
        "steps": str(config.max_steps),
        f"FLOPs a {unit}": flops,
        "folder": str(places.folder),
        "checkpoint": str(places.checkpoints or "none"),
        "record": str(places.record),
    }
    return "\n".join(f"{name:<15} {value}" for name, value in lines.items())

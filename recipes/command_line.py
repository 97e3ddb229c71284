"""The command line that the three recipes share.

Exit codes: 0 done | 1 the run failed | 2 bad usage | 75 stopped by a signal after saving. Torch is
imported only once the options are valid.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.options import ParsedCommand, RecipeOptions, build_config, check_paths, parse
from recipes.presets import Preset
from unitransformer.cli import only_reports
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.memory import format_gib, rank_bytes
from unitransformer.launch.failures import is_launched_rank, report_failure
from unitransformer.launch.gc_pause import heavy_import
from unitransformer.launch.light_imports import import_lightly
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.schema import config_of, load_record
from unitransformer.record.units import UNIT, format_count

if TYPE_CHECKING:
    from recipes.train import Show
    from unitransformer.launch.devices import ResolvedConfig
    from unitransformer.run import RunPaths

PLAN_LIMIT_S = 120.0


def run_recipe(preset: Preset, show: "Show", argv: Sequence[str] | None = None) -> int:
    """Parses and checks a command line, trains, and prints the results; returns the exit code.

    Args:
        argv: None: the command line of this process, which is a run and nothing else.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parse_and_check(preset, arguments)
        options = command.options
        if options.summary:
            print(_summary(preset.model_config(options.size, **command.model)))
            return 0
        if options.rehearse is not None:
            check_paths(options)
            from recipes.rehearsal import run_rehearsal

            return run_rehearsal(command)
        if options.hardware is not None:
            # A process of its own: predictions rest on recipes, which therefore do not import them.
            plan = [options.hardware, preset.recipe, "--", *arguments]
            print(run_module("scaling.prediction.plan", plan, limit_s=PLAN_LIMIT_S), end="")
            return 0
        with heavy_import("recipes.train"):
            check_paths(options)
            is_plain = options.compile == "off" and options.strategy in ("auto", "single", "ddp")
            if argv is None and is_plain:
                import_lightly()
            resolved = resolve(command)
            config = resolved.config
            _print_choices(options, resolved)
            if options.dry_run:
                print(_plan(resolved, _choose_paths(config, options)))
                return 0
            if options.resume == "auto":
                record = _choose_paths(config, options).record
                if _is_done(config, record):
                    from unitransformer.launch.environment import process_rank

                    if process_rank() == 0:
                        print(f"done already (record: {record})")
                    return 0
            only_reports()  # the record is the result
            from recipes.repeats import run_repeats
            from recipes.train import RunRequest, train

        request = RunRequest(
            recipe=preset.recipe,
            arguments=arguments,
            show=show,
            resolved=resolved,
            choose_paths=lambda: _choose_paths(config, options),
            resume=options.resume,
        )
        return run_repeats(request, options) if options.repeats > 1 else train(request)
    except (ValueError, OSError) as error:
        report_failure(error, is_bad_usage=True)
        if not is_launched_rank():  # the launcher prints the error once for all ranks
            print(f"error: {error}", file=sys.stderr)
        return 2


def configure(preset: Preset, arguments: Sequence[str]) -> tuple[RunConfig, "RunPaths"]:
    """Returns the config of a command line, and the paths of its results; raises as `resolve`."""
    command = _parse_and_check(preset, arguments)
    config = resolve(command).config
    return config, _choose_paths(config, command.options)


def _parse_and_check(preset: Preset, arguments: Sequence[str]) -> ParsedCommand:
    """Parses a command line, and refuses what can be refused without torch."""
    command = parse(preset, arguments)
    build_config(command, defaults=preset.cpu, devices=1)
    return command


def resolve(command: ParsedCommand) -> "ResolvedConfig":
    """Returns the config on this machine; raises ValueError naming field, value and fix."""
    from unitransformer.launch import devices as hardware
    from unitransformer.launch import environment

    options = command.options
    check_paths(options)
    environment.adopt_launcher()
    num_gpus = 0 if options.accelerator == "cpu" else hardware.count_gpus()
    on_gpu = num_gpus > 0
    defaults = command.preset.cuda if on_gpu else command.preset.cpu
    if on_gpu and not hardware.has_bf16():
        defaults = replace(defaults, precision="16-mixed")
    all_gpus = num_gpus if on_gpu and options.strategy != "single" else 1
    devices, num_nodes = environment.launched_shape() or (all_gpus, 1)
    config = build_config(command, defaults=defaults, devices=devices, num_nodes=num_nodes)
    resolved = hardware.resolve(config)
    if config.init_from is not None and options.resume in (False, "auto"):
        from unitransformer.weights import read_weights

        read_weights(Path(config.init_from), config.model)  # refuses a bad file before launching
    return resolved


def _print_choices(options: RecipeOptions, resolved: "ResolvedConfig") -> None:
    """Prints what `auto` has chosen."""
    from unitransformer.launch.environment import process_rank

    parallel = resolved.config.parallel
    if is_launched_rank() or process_rank() != 0:
        return
    if options.accelerator == "auto" and parallel.accelerator == "cpu":
        gloo = ", which communicate over gloo" if parallel.devices > 1 else ""
        processes = format_count(parallel.devices, "CPU process", "CPU processes")
        print(f"no GPU found: using {processes}{gloo}", flush=True)
    if options.strategy == "auto" and parallel.strategy != "single":
        print(f"strategy {parallel.strategy}: {resolved.strategy_reason}", flush=True)


def _choose_paths(config: RunConfig, options: RecipeOptions) -> "RunPaths":
    from unitransformer.run import RunPaths

    folder = _run_folder(config, options)
    checkpoints = options.checkpoint_dir or folder / "checkpoints"
    if options.checkpoint_dir is None and isinstance(options.resume, Path):
        checkpoints = options.resume.parent
    return RunPaths(
        folder=folder,
        checkpoints=None if options.no_checkpoint else checkpoints,
        keep_checkpoints=options.keep_checkpoints,
        record=options.record or folder / f"{config.hash()}-{_repeat_of(folder)}.json",
        trace=options.trace,
    )


def _repeat_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _run_folder(config: RunConfig, options: RecipeOptions) -> Path:
    """Returns a new folder, or for a resumed run the newest one that it can resume."""
    if RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    stem = f"{config.recipe}-{config.size}-{config.identity_hash()}"
    existing = sorted(
        (path for path in options.out.glob(f"{stem}-*") if _repeat_of(path).isdigit()),
        key=lambda path: int(_repeat_of(path)),
    )
    if options.resume == "auto" and existing:
        return existing[-1]
    if isinstance(options.resume, Path) and options.checkpoint_dir is None:
        for path in existing:
            if path.resolve() / "checkpoints" == options.resume.parent:
                return path
    if options.resume is True and options.checkpoint_dir is None:
        with_checkpoint = [p for p in existing if any((p / "checkpoints").glob("step-*"))]
        if not with_checkpoint:
            raise ValueError(
                f"resume: {options.out} holds no checkpoint of these options; run without --resume "
                "first, or name its --checkpoint-dir"
            )
        return with_checkpoint[-1]
    repeat = int(_repeat_of(existing[-1])) + 1 if existing else 1
    return options.out / f"{stem}-{repeat}"


def _is_done(config: RunConfig, path: Path) -> bool:
    """Whether the record says that this run has ended well; an exit code may be lost."""
    try:
        record = load_record(path)
    except (OSError, ValueError):
        return False
    return record["status"] == "ok" and config_of(record).hash() == config.hash()


def _summary(model: ModelConfig) -> str:
    import torch

    from unitransformer.record.parameter_summary import render_summary, summarize
    from unitransformer.transformer import Transformer

    with torch.device("meta"):
        return render_summary(summarize(Transformer(model)))


def _plan(resolved: "ResolvedConfig", paths: "RunPaths") -> str:
    from unitransformer.costs.flops import count_flops, count_parameters, describe_padding

    config = resolved.config
    parallel = config.parallel
    device_options = [f"{parallel.num_nodes} x {parallel.devices} {parallel.accelerator}"]
    device_options += [parallel.strategy, parallel.precision, f"compile {parallel.compile}"]
    if parallel.activation_checkpointing != "off":
        device_options.append(f"activation checkpointing {parallel.activation_checkpointing}")
    if parallel.cpu_offload:
        device_options.append("offloaded to host memory")
    flops = ", ".join(f"{name} {number:,.0f}" for name, number in count_flops(config).items())
    lines = {
        "model": f"{config.recipe} {config.size}, {count_parameters(config.model):,} parameters"
        f"{describe_padding(config)}",
        "data": config.data.source,
        "devices": ", ".join(device_options),
        "strategy": f"{parallel.strategy}: {resolved.strategy_reason}",
        "memory": f"about {format_gib(rank_bytes(config))} per rank for weights, gradients, "
        "optimizer state and activations",
        "batch": f"{config.global_batch_size} = {config.batch_size} per device x "
        f"{format_count(config.accumulate, 'micro-batch', 'micro-batches')} x "
        f"{format_count(parallel.world_size, 'device')}",
        "steps": str(config.max_steps),
        f"FLOPs per {UNIT[config.recipe].rstrip('s')}": flops,
        "folder": str(paths.folder),
        "checkpoint": str(paths.checkpoints or "none"),
        "record": str(paths.record),
    }
    return "\n".join(f"{name:<15} {value}" for name, value in lines.items())

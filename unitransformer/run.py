"""run(config) -> outcome: the one place where data, network, trainer, clock and record meet."""

import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch

from unitransformer import measure
from unitransformer.checkpoints import (
    KEY,
    SaveCheckpoints,
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from unitransformer.config import ParallelConfig, RunConfig, to_dict
from unitransformer.data import DataModule, load_source
from unitransformer.flops import count_flops, count_parameters
from unitransformer.hardware import available_cores, describe_host
from unitransformer.progress import METRIC, UNIT, Bar, LogLines, task_metric
from unitransformer.records import SCHEMA, Record, Status, write_record
from unitransformer.steady import rate_per_s, slowest, steady_start
from unitransformer.summary import render_summary, summarise
from unitransformer.training import TrainingModule, build_trainer

PACKAGES = ("torch", "lightning", "torchvision", "tokenizers", "numpy")
T = TypeVar("T")
KEPT_LINES = 40  # log lines in a record


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run puts what it makes."""

    folder: Path  # logs and figures
    checkpoints: Path
    record: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves in memory; every rank has the network, rank 0 the record."""

    record: Record | None
    module: TrainingModule
    data: DataModule


@dataclass(kw_only=True)
class History:
    """What the launches before this one did; travels inside the checkpoint."""

    loss: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)  # first step of each
    validation: list[dict[str, float]] = field(default_factory=list)


class RunFailed(Exception):
    """Training began and did not end well; its cause is chained, its record written."""


def run(
    config: RunConfig,
    places: Places,
    *,
    command: str,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    show_bar: bool = False,
) -> Outcome:
    """Train `config` and write its record, whether it ends well or not.

    Args:
        command: what a person types to run this again; goes into the record.
        resume: continue from the newest checkpoint of `places`.
        say: takes each line for people, by default standard output; only rank 0 speaks.
        show_bar: a moving bar in place of the lines during training.

    Raises:
        ValueError: hardware, data or checkpoint that do not fit; nothing has been written.
        RunFailed: from whatever stopped the training, after its record is written.
    """
    started = {
        "command": command,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": _describe_code(),  # before anybody edits it under a long run
    }
    device = find_device(config.parallel)
    config = replace(config, parallel=replace(config.parallel, accelerator=device))
    set_up_process(config.parallel, device)
    is_first = process_rank() == 0
    say = (say or _say_at_once) if is_first else _say_nothing

    checkpoint, history = _find_history(config, places.checkpoints, resume=resume)
    source = load_source(config, show_progress=is_first)
    module, data = TrainingModule(config), DataModule(config, source)
    module.first_step = data.start_step = len(history.loss)
    module.validation = list(history.validation)
    clock = measure.StepClock()
    lines = LogLines(config, clock, _say_nothing if show_bar else say)
    saver = SaveCheckpoints(
        places.checkpoints,
        every=config.checkpoint_every,
        extra=lambda: {
            "config": to_dict(config),
            **asdict(_history_now(history, module, clock, is_whole=True)),
        },
    )
    bar = [Bar(config, lines)] if show_bar and is_first else []
    trainer = build_trainer(
        config,
        device=device,
        run_dir=places.folder,
        callbacks=[measure.ClockStops(clock), lines, saver, *bar, measure.ClockStarts(clock)],
        launch=len(history.launches),
    )
    say(f"data    {source.description}")
    say(f"model   {config.recipe} {config.size}, {count_parameters(config.model):,} parameters")
    if checkpoint is not None:
        say(f"resume  {checkpoint}, after step {len(history.loss)}")

    error: BaseException | None = None
    try:
        _fit(trainer, module, data, checkpoint)
    except BaseException as caught:
        error = caught
    if is_first or error is None:
        now = _history_now(history, module, clock, is_whole=error is None)
        error = error or _find_divergence(now)
        record = _build_record(config, module, data, now, lines.lines, error)
        record |= started
    if is_first:
        try:
            write_record(record, places.record)
        except OSError as full:
            told = f"{error}; " if error else ""
            raise RunFailed(f"{told}the record could not be written: {full}") from (error or full)
    if isinstance(error, Exception):
        raise RunFailed(str(error)) from error
    if error is not None:
        raise error
    return Outcome(record=record if is_first else None, module=module, data=data)


def count_gpus() -> int:
    """GPUs this process can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def find_device(parallel: ParallelConfig) -> Literal["cpu", "cuda"]:
    """ "cuda" or "cpu" for `parallel`, checked against this machine.

    Raises:
        ValueError: more GPUs than there are, or a precision the device does not have.
    """
    found = count_gpus()
    is_cuda = parallel.accelerator == "cuda" or (parallel.accelerator == "auto" and found > 0)
    device: Literal["cpu", "cuda"] = "cuda" if is_cuda else "cpu"
    if is_cuda and parallel.devices > found:
        cure = f"use --devices {found}" if found else "use --accelerator cpu"
        raise ValueError(f"devices is {parallel.devices} and this machine has {found} GPUs; {cure}")
    check_precision(parallel, device)
    return device


def check_precision(parallel: ParallelConfig, device: str) -> None:
    """Raises ValueError for a precision that `device` would replace or emulate."""
    if device == "cpu" and parallel.precision == "16-mixed":
        raise ValueError("precision 16-mixed is not for a CPU; use bf16-mixed or 32-true")
    is_bf16 = parallel.precision.startswith("bf16")
    if device == "cuda" and is_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise ValueError(f"precision {parallel.precision}: {name} has none; use 16-mixed")


def set_up_process(parallel: ParallelConfig, device: str) -> None:
    """What each rank needs before its first tensor."""
    # Saturated softmaxes fill gradients with denormal floats, which a CPU multiplies slowly.
    torch.set_flush_denormal(True)
    if device == "cpu":
        share = max(1, available_cores() // parallel.devices)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    else:
        torch.set_float32_matmul_precision("highest")  # 32-true means float32, not TF32


def process_rank() -> int:
    """Rank of this process in its launcher's words; 0 when it was started by hand."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _say_at_once(line: str) -> None:
    """Print without waiting for a full buffer: a pipe or a batch log shows a run as it goes."""
    print(line, flush=True)


def _say_nothing(_: str) -> None:
    """What ranks beside the first say."""


def _find_history(config: RunConfig, folder: Path, *, resume: bool) -> tuple[Path | None, History]:
    if not resume:
        if list_checkpoints(folder) and process_rank() == 0:
            raise ValueError(
                f"checkpoint-dir {folder} holds {newest_checkpoint(folder)}; "
                "add --resume to go on from it, or choose another folder"
            )
        return None, History()
    path = newest_checkpoint(folder)
    if path is None:
        raise ValueError(
            f"checkpoint-dir {folder} holds no checkpoint to resume; run without --resume first"
        )
    saved = dict(load_checkpoint(path)[KEY])
    check_same_run(saved, config, path)
    saved.pop("config")
    return path, History(**saved)


def _fit(
    trainer: pl.Trainer, module: TrainingModule, data: DataModule, checkpoint: Path | None
) -> None:
    trainer.fit(
        module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True
    )
    last = module.validation[-1]["step"] if module.validation else 0
    if last != module.config.max_steps:
        trainer.validate(module, datamodule=data, verbose=False)


def _history_now(
    before: History, module: TrainingModule, clock: measure.StepClock, *, is_whole: bool
) -> History:
    """Earlier launches and this one. A `is_whole` one is the same on every rank: the mean of
    their losses, the slowest of their steps; without it this rank speaks for itself."""
    own = (module.losses().tolist(), clock.step_s())
    ranks = _gather(own, module) if is_whole else [own]
    losses = [statistics.fmean(step) for step in zip(*(loss for loss, _ in ranks), strict=True)]
    step_s = slowest([seconds for _, seconds in ranks])
    return History(
        loss=before.loss + losses,
        step_s=before.step_s + step_s[: len(losses)],
        launches=[*before.launches, len(before.loss)],
        validation=module.validation,
    )


def _find_divergence(history: History) -> FloatingPointError | None:
    """The step whose loss is no number; `history` is cut before it."""
    for step, loss in enumerate(history.loss):
        if not math.isfinite(loss):
            del history.loss[step:], history.step_s[step:]
            return FloatingPointError(
                f"loss is {loss} at step {step + 1}; lower optimizer.learning_rate"
            )
    return None


def _gather(value: T, module: TrainingModule) -> list[T]:
    """`value` of every rank, on every rank; all of them have to call this."""
    if module.trainer.world_size == 1:
        return [value]
    everyone: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def _build_record(
    config: RunConfig,
    module: TrainingModule,
    data: DataModule,
    history: History,
    lines: list[str],
    error: BaseException | None,
) -> Record:
    """The record; on a whole run every rank has to call this."""
    own = (measure.peak_bytes(module.device), describe_host() | _describe_device(module.device))
    ranks = _gather(own, module) if error is None else [own]
    this_launch = history.step_s[history.launches[-1] :]
    steady = steady_start(this_launch)
    per_step = config.global_batch_size * config.tokens_per_sample
    unit = UNIT[config.recipe]
    per_unit = "flops_per_image" if config.recipe == "vit" else "flops_per_token"
    return {
        "schema": SCHEMA,
        "status": _status(error),
        "recipe": config.recipe,
        "size": config.size,
        "config": to_dict(config),
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
        "num_parameters": count_parameters(config.model),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": [host for _, host in ranks],
        "data": {"description": data.source.description, "sha256": data.source.sha256},
        "launches": history.launches,
        "loss": history.loss,
        "learning_rate": [
            config.optimizer.learning_rate_at(step) for step in range(len(history.loss))
        ],
        "step_s": history.step_s,
        "steady_method": "MSER over the last launch's steps",
        "steady_from": None if steady is None else history.launches[-1] + steady,
        f"{unit}_per_s": rate_per_s(this_launch, steady, per_step),
        "peak_bytes": [peak for peak, _ in ranks],
        "peak_bytes_kind": "allocated" if module.device.type == "cuda" else "resident set",
        per_unit: count_flops(config),
        "validation": _validation(config, data, history) if error is None else {},
        "summary": render_summary(summarise(module.network)),
        "log": lines[-KEPT_LINES:],
        "error": None if error is None else _describe_error(error),
    }


def _validation(config: RunConfig, data: DataModule, history: History) -> dict[str, Any]:
    last = history.validation[-1]
    baseline = data.baseline()
    return {
        "history": history.validation,
        "loss": last["val_loss"],
        "metric": METRIC[config.recipe],
        "value": task_metric(config, last),
        "baseline": None if baseline is None else asdict(baseline),
    }


def _status(error: BaseException | None) -> Status:
    match error:
        case None:
            return "ok"
        case torch.OutOfMemoryError() | MemoryError():
            return "oom"
        case KeyboardInterrupt() | SystemExit():
            return "preempted"
        case _:
            return "crashed"


def _describe_error(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "rank": process_rank(),
        "last_lines": "".join(traceback.format_exception(error)).splitlines()[-20:],
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_memory_bytes": properties.total_memory}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _describe_code() -> dict[str, Any]:
    """Commit of the code that ran, and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_dirty": None if status is None else bool(status),
    }

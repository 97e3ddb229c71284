"""A run that ended, well or not, in; its record out."""

import importlib.metadata
import math
import platform
import statistics
import subprocess
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from unitransformer import measure
from unitransformer.config import ParallelConfig, RunConfig, to_dict
from unitransformer.data import DataModule
from unitransformer.flops import count_flops, count_parameters
from unitransformer.hardware import describe_host
from unitransformer.launch import Failure
from unitransformer.process import process_rank
from unitransformer.records import SCHEMA, Record, Status, load_record, write_record
from unitransformer.steady import rate_per_s, slowest, steady_start
from unitransformer.summary import render_summary, summarise
from unitransformer.tasks import METRIC, UNIT, metric_value
from unitransformer.training import TrainingModule
from unitransformer.transformer import Transformer

PACKAGES = ("torch", "lightning", "torchvision", "tokenizers", "numpy")
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
KEPT_LINES = 40  # log lines in a record
T = TypeVar("T")


@dataclass(kw_only=True)
class History:
    """What the launches before this one did; travels inside the checkpoint."""

    loss: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)  # before clipping; empty without
    launches: list[int] = field(default_factory=list)  # first step of each
    validation: list[dict[str, float]] = field(default_factory=list)
    sha256: str | None = None  # of the data


def history_now(
    before: History, module: TrainingModule, clock: measure.StepClock, *, is_whole: bool
) -> History:
    """Earlier launches and this one. A `is_whole` one is the same on every rank: the mean of
    their losses, the slowest of their steps; without it this rank speaks for itself."""
    own: tuple[list[float], list[float], list[float]]
    try:
        own = (module.losses().tolist(), clock.step_s(), module.gradient_norms().tolist())
    except RuntimeError:
        if is_whole:
            raise
        own = ([], [], [])  # the device that failed answers no more
    ranks = _gather(own, module) if is_whole else [own]
    losses = [statistics.fmean(step) for step in zip(*(loss for loss, *_ in ranks), strict=True)]
    step_s = slowest([seconds for _, seconds, _ in ranks])
    num_steps = min(len(losses), len(step_s))  # a step that broke after its loss has no time
    return History(
        loss=before.loss + losses[:num_steps],
        step_s=before.step_s + step_s[:num_steps],
        gradient_norm=before.gradient_norm + own[2][:num_steps],
        launches=[*before.launches, len(before.loss)],
        validation=module.validation,
        sha256=before.sha256,
    )


def find_divergence(history: History) -> FloatingPointError | None:
    """The step whose loss is no number; `history` is cut before it."""
    for step, loss in enumerate(history.loss):
        if not math.isfinite(loss):
            del history.loss[step:], history.step_s[step:], history.gradient_norm[step:]
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


def build_record(
    config: RunConfig,
    module: TrainingModule,
    data: DataModule,
    history: History,
    lines: list[str],
    error: BaseException | None,
) -> Record:
    """The record; on a whole run every rank has to call this."""
    device = module.trainer.strategy.root_device  # the module itself is back on the CPU by now
    own = (measure.peak_bytes(device), describe_host() | _describe_device(device))
    ranks = _gather(own, module) if error is None else [own]
    this_launch = history.step_s[history.launches[-1] :]
    steady = steady_start(this_launch)
    per_step = config.global_batch_size * config.tokens_per_sample
    unit = UNIT[config.recipe]
    return {
        **_describe(config),
        "status": _status(error),
        "hardware": [host for _, host in ranks],
        "data": {"description": data.source.description, "sha256": data.source.sha256},
        "launches": history.launches,
        "loss": history.loss,
        "learning_rate": [
            config.optimizer.learning_rate_at(step) for step in range(len(history.loss))
        ],
        # None: it overflowed in float16, and the step was skipped.
        "gradient_norm": [n if math.isfinite(n) else None for n in history.gradient_norm],
        "step_s": history.step_s,
        "steady_method": "MSER over the last launch's steps",
        "steady_from": None if steady is None else history.launches[-1] + steady,
        f"{unit}_per_s": rate_per_s(this_launch, steady, per_step),
        "peak_bytes": [peak for peak, _ in ranks],
        "peak_bytes_kind": "allocated" if device.type == "cuda" else "resident set",
        "validation": _validation(config, data, history) if error is None else {},
        "log": lines[-KEPT_LINES:],
        "error": None if error is None else _describe_error(error, config.parallel),
    }


def _describe(config: RunConfig) -> Record:
    """What is known of a run before it begins."""
    per_unit = "flops_per_image" if config.recipe == "vit" else "flops_per_token"
    return {
        "schema": SCHEMA,
        "recipe": config.recipe,
        "size": config.size,
        "config": to_dict(config),
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
        "num_parameters": count_parameters(config.model),
        "versions": {"python": platform.python_version(), **_versions()},
        per_unit: count_flops(config),
        "summary": render_summary(summarise(_on_meta(config))),
    }


def record_failure(
    config: RunConfig, failure: Failure, path: Path, *, command: str, since_s: float
) -> None:
    """Write whose failure ended a run: into the first rank's record, or one of its own.

    The first rank records what it saw itself, if it still can: often only that a connection broke.

    Args:
        since_s: clock time at which the ranks were started; an older record is another's.
    """
    error = {
        "type": failure.type,
        "message": failure.message[:2000],
        "rank": failure.rank,
        "last_lines": failure.lines[-20:],
    }
    try:
        is_ours = path.stat().st_mtime >= since_s
        record = load_record(path) if is_ours else _empty_record(config, command)
    except (OSError, ValueError):
        record = _empty_record(config, command)
    if record["status"] == "ok":
        return  # trained and recorded; what failed came after
    status = "oom" if failure.type in OUT_OF_MEMORY else "crashed"
    write_record(record | {"status": status, "error": error}, path)


def _empty_record(config: RunConfig, command: str) -> Record:
    """Of a run that could tell nothing itself."""
    nothing: Record = {key: [] for key in ("launches", "loss", "learning_rate", "gradient_norm")}
    return {
        **nothing,
        **_describe(config),
        "status": "crashed",
        "command": command,
        "started_at": None,
        "code": describe_code(),
        "hardware": [describe_host()],
        "data": {},
        "step_s": [],
        "steady_method": None,
        "steady_from": None,
        "peak_bytes": [],
        "validation": {},
        "log": [],
        "error": None,
    }


def _on_meta(config: RunConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config.model)


def _validation(config: RunConfig, data: DataModule, history: History) -> dict[str, Any]:
    last = history.validation[-1]
    baseline = data.baseline()
    return {
        "history": history.validation,
        "loss": last["val_loss"],
        "metric": METRIC[config.recipe],
        "value": metric_value(config.recipe, loss=last["val_loss"], accuracy=last["val_accuracy"]),
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


def _describe_error(error: BaseException, parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "rank": process_rank(parallel),
        "last_lines": "".join(traceback.format_exception(error)).splitlines()[-20:],
    }


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_memory_bytes": properties.total_memory}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_code() -> dict[str, Any]:
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

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed inside another project
        return {"commit": None, "is_dirty": None}
    status = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_dirty": None if status is None else bool(status),
    }

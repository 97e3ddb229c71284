"""What a command line comes to: trained here, or in ranks that are started and watched.

Returns exit codes; what people read goes to standard output, errors to the other.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.utils.tensorboard

import recipes.showcase  # noqa: F401
from recipes.results import measured_lines
from unitransformer.checkpoint.callbacks import ResumeMode
from unitransformer.config import RunConfig
from unitransformer.launch.devices import ResolvedConfig
from unitransformer.launch.environment import (
    agree_on_folder,
    check_nodes,
    launched_shape,
    process_rank,
)
from unitransformer.launch.failures import RankFailure, report_failure
from unitransformer.launch.launcher import is_launched_rank, launch
from unitransformer.launch.signals import STOPPED_EXIT_CODE, Stopped
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.parallel.deepspeed import prepare_deepspeed
from unitransformer.plots import loss_figure, write_figure
from unitransformer.record.units import metric_in_words
from unitransformer.recording import record_failure
from unitransformer.run import RunFailed, RunOutcome, RunPaths, run


class Show(Protocol):
    """What a recipe does with a trained network: figures into a folder, lines for people."""

    def __call__(self, outcome: RunOutcome, folder: Path) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a command line comes to on this machine."""

    recipe: str
    arguments: Sequence[str]
    show: Show
    resolved: ResolvedConfig
    choose_places: Callable[[], RunPaths]  # the next that are free
    resume: ResumeMode

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def command(self) -> str:
        """What a person types to do it again."""
        return f"python -m recipes.{self.recipe} {shlex.join(self.arguments)}".strip()


def train(asked: RunRequest) -> int:
    """Train alone, as the rank this is, or in ranks to be started; returns the exit code.

    Raises:
        ValueError: hardware, data or checkpoint that do not fit, or several nodes without a
            launcher; nothing has been written.
    """
    parallel = asked.config.parallel
    if launched_shape() is not None:
        if RUN_FOLDER not in os.environ and parallel.world_size > 1:
            folder = agree_on_folder(lambda: str(claim_folder(asked)[0].folder))
            os.environ[RUN_FOLDER] = folder
        return _train_here(asked, asked.choose_places())
    check_nodes(parallel, f"recipes.{asked.recipe}", asked.arguments)
    places, made = claim_folder(asked)
    try:
        if parallel.world_size == 1:
            return _train_here(asked, places)
        return _train_in_ranks(asked, places)
    except (ValueError, OSError):
        _unmake(made)
        raise


def claim_folder(asked: RunRequest) -> tuple[RunPaths, list[Path]]:
    """Places of this run alone, however many start at once; and the folders made for it."""
    if RUN_FOLDER in os.environ:  # claimed by whoever repeats this run
        return asked.choose_places(), []
    while True:
        places = asked.choose_places()
        folder = places.folder.absolute()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if asked.resume:
                return places, []
        else:
            return places, missing


def _unmake(folders: list[Path]) -> None:
    """Remove folders again, inner ones first; a run that was refused leaves nothing."""
    with contextlib.suppress(OSError):  # another run has begun to use one
        for folder in folders:
            folder.rmdir()


def _train_here(asked: RunRequest, places: RunPaths) -> int:
    try:
        outcome = run(
            asked.resolved,
            places,
            command=asked.command,
            resume=asked.resume,
            show_bar=sys.stdout.isatty(),
        )
    except (MemoryError, torch.OutOfMemoryError) as error:  # no room for the weights
        if not report_failure(error):
            lines = traceback.format_exception(error)
            failure = RankFailure(
                rank=0, type=type(error).__name__, message=str(error), lines=lines
            )
            record_failure(
                asked.config, failure, places.record, command=asked.command, since_s=time.time()
            )
            print(f"error: {error} (record: {places.record})", file=sys.stderr)
        return 1
    except RunFailed as failure:
        cause = failure.__cause__ or failure
        if isinstance(cause, Stopped):
            if process_rank() == 0:
                print(_stopped(cause, places), file=sys.stderr, flush=True)
            return STOPPED_EXIT_CODE
        report_failure(cause)
        if not is_launched_rank():
            if not isinstance(cause, OSError):
                traceback.print_exception(cause)
            print(f"error: {failure} (record: {places.record})", file=sys.stderr)
        return 1
    if outcome.record is None:
        return 0
    try:
        print("\n".join(_results(outcome, places, asked.show)), flush=True)
    except OSError as error:  # the training itself is done and recorded
        print(f"error: figures: {error} (record: {places.record})", file=sys.stderr)
        return 1
    return 0


def _stopped(cause: Stopped, places: RunPaths) -> str:
    if places.checkpoints is None:
        return f"{cause}; nothing is saved, as --no-checkpoint asks (record: {places.record})"
    return f"{cause}; go on with the same command and --resume (saved in {places.checkpoints})"


def _train_in_ranks(asked: RunRequest, places: RunPaths) -> int:
    parallel = asked.config.parallel
    fork = parallel.accelerator == "cpu"  # where that is safe: ranks need not import again
    if fork and parallel.uses_deepspeed:
        prepare_deepspeed("cpu")
    os.environ[RUN_FOLDER] = str(places.folder)
    started_at_s = time.time() - 1  # file systems round
    try:
        ended = launch(
            parallel.devices,
            lambda: _be_rank(asked, places),
            command=[sys.executable, "-m", f"recipes.{asked.recipe}", *asked.arguments],
            fork=fork,
        )
    finally:
        del os.environ[RUN_FOLDER]
    if isinstance(ended, RankFailure):
        return _tell(ended, asked, places, since_s=started_at_s)
    if ended > 128:
        name = signal.Signals(ended - 128).name
        print(f"error: stopped by {name} (folder: {places.folder})", file=sys.stderr)
    return ended


def _be_rank(asked: RunRequest, places: RunPaths) -> int:
    try:
        return _train_here(asked, places)
    except (ValueError, OSError) as error:
        report_failure(error, is_bad_usage=True)
        return 2


def _tell(failure: RankFailure, asked: RunRequest, places: RunPaths, *, since_s: float) -> int:
    """Say and record which rank failed first, and why; returns the exit code."""
    if failure.is_bad_usage:
        raise ValueError(failure.message)
    record_failure(asked.config, failure, places.record, command=asked.command, since_s=since_s)
    if failure.type != "CheckpointError":
        print("\n".join(failure.lines), file=sys.stderr)
    where = f"rank {failure.rank} of {asked.config.parallel.world_size}"
    print(f"error: {where}: {failure.message} (record: {places.record})", file=sys.stderr)
    return 1


def _results(outcome: RunOutcome, places: RunPaths, show: Show) -> list[str]:
    """The block a run ends with."""
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
    shown = (
        ["predictions none: the network is divided, and too large to be whole on one rank"]
        if outcome.network is None
        else show(outcome, places.folder / "figures")
    )
    return [
        *(["", "last lines:", *record["log"][-5:]] if sys.stdout.isatty() else []),
        "",
        f"validation  loss {validation['loss']:.4f}, {metric} "
        f"{metric_in_words(metric, validation['value'])}{_against(baseline)}",
        *measured_lines(record),
        *shown,
        f"checkpoint  {places.checkpoints or 'none'}",
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

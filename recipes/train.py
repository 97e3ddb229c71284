"""Runs a parsed command: trains in this process, or launches ranks and watches them.

Functions return exit codes. Results go to standard output, errors to standard error.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401

from recipes.results import measured_lines
from unitransformer.checkpoint.callbacks import ResumeMode
from unitransformer.config import RunConfig
from unitransformer.files import write_atomically
from unitransformer.launch.devices import ResolvedConfig
from unitransformer.launch.environment import (
    TORCHRUN_MARK,
    agree_on_folder,
    check_nodes,
    launched_shape,
    process_rank,
)
from unitransformer.launch.failures import (
    RankFailure,
    failure_of,
    is_launched_rank,
    is_out_of_memory,
    report_failure,
)
from unitransformer.launch.gc_pause import heavy_import
from unitransformer.launch.launcher import launch
from unitransformer.launch.signals import STOPPED_EXIT_CODE, Stopped
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.parallel.deepspeed import prepare_deepspeed
from unitransformer.record.units import format_metric
from unitransformer.recording import record_failure
from unitransformer.run import RunFailed, RunOutcome, RunPaths, run

MIN_CURVE_STEPS = 2  # a curve of one point shows nothing

# Shows what a trained network predicts: writes figures into a folder, returns lines to print.
Show = Callable[[RunOutcome, Path], list[str]]


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A run that a command line asks for, resolved on this machine."""

    recipe: str
    arguments: Sequence[str]
    show: Show
    resolved: ResolvedConfig
    choose_paths: Callable[[], RunPaths]  # each call looks for the next free folder
    resume: ResumeMode

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def command(self) -> str:
        """The command that runs it again."""
        return f"python -m recipes.{self.recipe} {shlex.join(self.arguments)}".strip()


def train(request: RunRequest) -> int:
    """Trains alone, as a rank of a launcher, or in ranks that it launches; returns the exit code.

    Raises:
        ValueError: unsuitable hardware, data or checkpoint, or several nodes without a launcher;
            nothing has been written.
    """
    parallel = request.config.parallel
    if launched_shape() is not None:
        may_restart = TORCHRUN_MARK in os.environ  # and then finds its folder again
        if RUN_FOLDER not in os.environ and (parallel.world_size > 1 or may_restart):
            os.environ[RUN_FOLDER] = agree_on_folder(
                lambda: str(claim_folder(request)[0].folder),
                resumes=request.resume in (True, "auto"),
            )
        return _train_here(request, request.choose_paths())
    check_nodes(parallel, f"recipes.{request.recipe}", request.arguments)
    paths, made = claim_folder(request)
    try:
        if parallel.world_size == 1:
            return _train_here(request, paths)
        return _train_in_ranks(request, paths)
    except (ValueError, OSError):
        # A refused run leaves nothing, unless another run has begun to use a folder.
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def claim_folder(request: RunRequest) -> tuple[RunPaths, list[Path]]:
    """Creates the folder of this run, which no concurrent run gets.

    Returns the paths of the run and the folders that were created, inner ones first.
    """
    if RUN_FOLDER in os.environ:  # created by the process that repeats this run
        return request.choose_paths(), []
    while True:
        paths = request.choose_paths()
        folder = paths.folder.absolute()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if request.resume:
                return paths, []
        else:
            return paths, missing


def _train_here(request: RunRequest, paths: RunPaths) -> int:
    try:
        outcome = run(
            request.resolved,
            paths,
            command=request.command,
            resume=request.resume,
            show_bar=sys.stdout.isatty(),
        )
    except RunFailed as failure:
        cause = failure.__cause__ or failure
        if isinstance(cause, Stopped):
            advice = f"to continue, add --resume to the command (saved in {paths.checkpoints})"
            if paths.checkpoints is None:
                advice = f"--no-checkpoint: no checkpoint is saved (record: {paths.record})"
            if process_rank() == 0:
                print(f"{cause}; {advice}", file=sys.stderr, flush=True)
            return STOPPED_EXIT_CODE
        report_failure(cause)
        if not is_launched_rank():
            if not isinstance(cause, OSError | FloatingPointError):
                traceback.print_exception(cause)
            print(f"error: {failure} (record: {paths.record})", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if not report_failure(error):  # while the weights are allocated
            memory_failure, now_s = failure_of(error), time.time()
            record_failure(
                request.config, memory_failure, paths.record, command=request.command, since_s=now_s
            )
            what = (str(error) or "out of memory").splitlines()[0]
            print(f"error: {what} (record: {paths.record})", file=sys.stderr)
        return 1
    if outcome.record is None:
        return 0
    try:
        print("\n".join(_results(outcome, paths, request.show)), flush=True)
    except OSError as error:  # training is done and recorded
        print(f"error: figures: {error} (record: {paths.record})", file=sys.stderr)
        return 1
    return 0


def _train_in_ranks(request: RunRequest, paths: RunPaths) -> int:
    parallel = request.config.parallel
    fork = parallel.accelerator == "cpu"  # ranks need not import again; unsafe with GPUs
    if fork and parallel.uses_deepspeed:
        prepare_deepspeed("cpu")
    os.environ[RUN_FOLDER] = str(paths.folder)
    started_at_s = time.time() - 1  # file systems round times

    def train_as_rank() -> int:
        try:
            return _train_here(request, paths)
        except (ValueError, OSError) as error:
            report_failure(error, is_bad_usage=True)
            return 2

    try:
        ended = launch(
            parallel.devices,
            train_as_rank,
            command=[sys.executable, "-m", f"recipes.{request.recipe}", *request.arguments],
            fork=fork,
        )
    finally:
        del os.environ[RUN_FOLDER]
    if isinstance(ended, RankFailure):
        return _report(ended, request, paths, since_s=started_at_s)
    if ended > 128:
        name = signal.Signals(ended - 128).name
        print(f"error: stopped by {name} (folder: {paths.folder})", file=sys.stderr)
    return ended


def _report(failure: RankFailure, request: RunRequest, paths: RunPaths, *, since_s: float) -> int:
    """Prints and records which rank failed first; returns the exit code."""
    if failure.is_bad_usage:
        raise ValueError(failure.message)
    record_failure(request.config, failure, paths.record, command=request.command, since_s=since_s)
    if failure.type not in ("CheckpointError", "FloatingPointError"):  # their messages say all
        print("\n".join(failure.lines), file=sys.stderr)
    where = f"rank {failure.rank} of {request.config.parallel.world_size}"
    print(f"error: {where}: {failure.message} (record: {paths.record})", file=sys.stderr)
    return 1


def _results(outcome: RunOutcome, paths: RunPaths, show: Show) -> list[str]:
    """Writes the loss figure; returns the lines that a run ends with."""
    record = outcome.record
    assert record is not None
    validation = record["validation"]
    metric, baseline = validation["metric"], validation["baseline"]
    to_beat = (baseline["name"], baseline["loss"]) if baseline and baseline["loss"] else None
    baseline_text = ""
    if baseline and baseline["loss"] is not None:
        baseline_text = (
            " (to beat: "
            f"{baseline['name'].replace('unigram entropy', 'predicting a token by its frequency')}"
            f", loss {baseline['loss']:.4f})"
        )
    elif baseline:
        baseline_text = f" (to beat: {baseline['name']}, {baseline['accuracy']:.2%})"
    figures = paths.folder / "figures"
    if len(record["loss"]) >= MIN_CURVE_STEPS:
        with heavy_import("unitransformer.plots"):  # and matplotlib, which takes half a second
            from unitransformer.plots import figure_bytes, loss_figure
        title = f"{record['recipe']} {record['size']}"
        curve = loss_figure(record["loss"], validation["history"], title=title, baseline=to_beat)
        write_atomically(figures / "loss.png", figure_bytes(curve, "png"))
    if outcome.network is None:
        predictions = ["predictions none: the sharded network is too large for one rank"]
    else:
        predictions = show(outcome, figures)
    last_lines = ["", "last lines:", *record["log"][-5:]] if sys.stdout.isatty() else []
    return [
        *last_lines,
        "",
        f"validation  loss {validation['loss']:.4f}, {metric} "
        f"{format_metric(metric, validation['value'])}{baseline_text}",
        *measured_lines(record),
        *predictions,
        f"checkpoint  {paths.checkpoints or 'none'}",
        f"record      {paths.record}",
        f"logs        {paths.folder / 'csv'}, {paths.folder / 'tensorboard'}",
        f"figures     {figures if figures.exists() else 'none: a loss curve needs two steps'}",
    ]

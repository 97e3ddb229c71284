"""run(config) -> Outcome: joins data, network, trainer, instruments and record."""

import contextlib
import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning.pytorch as pl

from unitransformer.callbacks import build_callbacks
from unitransformer.checkpoint.callbacks import (
    Resume,
    ResumeMode,
    SaveCheckpoints,
    find_resume,
    lock_folder,
)
from unitransformer.checkpoint.reader import RunState
from unitransformer.config import RunConfig, to_dict
from unitransformer.costs.flops import count_parameters
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import ResolvedConfig, resolve, set_up_process
from unitransformer.launch.environment import process_rank
from unitransformer.launch.signals import Stopped, StopSignalListener
from unitransformer.launch.variables import PROGRESS_FILE
from unitransformer.machine.software import describe_code
from unitransformer.measure.clock import StepClock
from unitransformer.measure.communication import timed_waits, why_communication_missing
from unitransformer.measure.instruments import Instruments
from unitransformer.record.schema import Record, write_record
from unitransformer.recording import build_record
from unitransformer.training.history import (
    ClockError,
    History,
    current_history,
    find_fault,
    gather,
    read_history,
)
from unitransformer.training.module import TrainingModule
from unitransformer.training.progress import LogLines, TimeLeft
from unitransformer.training.stop import AgreeToStop
from unitransformer.training.trainer import build_trainer
from unitransformer.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """Where a run puts what it makes."""

    folder: Path  # logs and figures
    checkpoints: Path | None  # None: nothing is saved
    record: Path
    trace: Path | None = None  # folder of a profiler's trace, if one is asked for


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What a finished run leaves in memory; the record and the trained network are rank 0's."""

    record: Record | None
    network: Transformer | None  # whole; None: divided and too large for one rank
    config: RunConfig
    data: DataModule


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a run consists of, ready to train."""

    config: RunConfig  # with its device and strategy
    places: RunPaths
    is_first: bool  # whether this is rank 0
    resume: Resume | None
    before: History  # of earlier launches
    data: DataModule
    module: TrainingModule
    clock: StepClock
    instruments: Instruments
    lines: LogLines
    trainer: pl.Trainer

    def history(self, *, all_ranks: bool) -> History:
        return current_history(self.before, self.module, self.clock, all_ranks=all_ranks)


class RunFailed(Exception):
    """Training began and did not end well; its cause is chained, its record written."""


def run(
    config: RunConfig | ResolvedConfig,
    places: RunPaths,
    *,
    command: str,
    resume: ResumeMode = False,
    say: Callable[[str], None] | None = None,
    show_bar: bool = False,
) -> RunOutcome:
    """Train `config` and write its record, whether it ends well or not.

    Args:
        config: a plain one is resolved for this machine first.
        command: what a person types to run this again; goes into the record.
        resume: continue from the newest checkpoint of `places`; "auto": if there is one.
        say: takes each line for people, by default standard output; only rank 0 speaks.
        show_bar: a moving bar in place of the lines during training.

    Raises:
        ValueError: hardware, data or checkpoint that do not fit; nothing has been written.
        MemoryError, torch.OutOfMemoryError: there is not even room for the weights; the same.
        RunFailed: from whatever stopped the training, after its record is written; from `Stopped`
            if that was a signal, which all ranks obey at the end of a step, when they have saved.
    """
    with StopSignalListener() as signals:
        started: Record = {
            "command": command,
            "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code": describe_code(),  # before anybody edits it under a long run
        }
        resolved = resolve(config) if isinstance(config, RunConfig) else config
        parallel = resolved.config.parallel
        set_up_process(parallel, parallel.accelerator)
        say = (say or _print_at_once) if process_rank() == 0 else _print_nothing
        checkpoint = find_resume(resolved.config, places.checkpoints, resume=resume)
        parts = _build(
            resolved.config, places, checkpoint, signals=signals, say=say, show_bar=show_bar
        )
        _introduce(parts, say)
        error = _train(parts)
        record = _record(parts, started, error)
    network = parts.module.full_network
    return RunOutcome(
        record=record,
        network=None if network is None else network.eval(),
        config=parts.config,
        data=parts.data,
    )


# --------------------------------------------------------------------------------------- build


def _build(
    config: RunConfig,
    places: RunPaths,
    resume: Resume | None,
    *,
    signals: StopSignalListener,
    say: Callable[[str], None],
    show_bar: bool,
) -> _Parts:
    parallel, device = config.parallel, config.parallel.accelerator
    is_first = process_rank() == 0
    before = read_history({} if resume is None else resume.run_state)
    data = _build_data(config, resume, before, show_progress=is_first)
    module = _build_module(config, resume, before)
    clock = StepClock(
        on_gpu=device == "cuda",
        measures_communication=why_communication_missing(parallel, device) is None,
    )
    instruments = Instruments(config, first_step=module.first_step, trace_folder=places.trace)
    lines = LogLines(
        config,
        clock,
        _print_nothing if show_bar else say,
        places.folder / PROGRESS_FILE if is_first else None,
        places.record,
    )

    def describe() -> RunState:
        history = current_history(before, module, clock, all_ranks=True)
        return {"config": to_dict(config), **asdict(history)}

    callbacks = build_callbacks(
        config,
        clock,
        agreement=AgreeToStop(signals),
        instruments=instruments,
        lines=lines,
        saver=(
            None
            if places.checkpoints is None
            else SaveCheckpoints(
                places.checkpoints, every=config.checkpoint_every, get_run_state=describe
            )
        ),
        resume=resume,
        time_left=(
            TimeLeft(config, clock, say, lambda: instruments.matmul_flops_per_s)
            if is_first
            else None
        ),
        has_bar=show_bar and is_first,
    )
    trainer = build_trainer(
        config,
        device=device,
        run_dir=places.folder,
        callbacks=callbacks,
        launch=len(before.segments),
    )
    return _Parts(
        config=config,
        places=places,
        is_first=is_first,
        resume=resume,
        before=before,
        data=data,
        module=module,
        clock=clock,
        instruments=instruments,
        lines=lines,
        trainer=trainer,
    )


def _build_data(
    config: RunConfig, resume: Resume | None, before: History, *, show_progress: bool
) -> DataModule:
    """The data from the next step on; raises ValueError if a checkpoint was trained on other."""
    source = load_source(config, show_progress=show_progress)
    if resume is not None and before.sha256 != source.sha256:
        raise ValueError(
            f"data {config.data.source} is not what {resume.path} was trained on: its sha256 is "
            f"{source.sha256} now and was {before.sha256}; start without --resume"
        )
    before.sha256 = source.sha256
    data = DataModule(config, source)
    data.start_step = len(before.loss)
    return data


def _build_module(config: RunConfig, resume: Resume | None, before: History) -> TrainingModule:
    # A checkpoint brings its own weights: the file that the first came from may be gone.
    try:
        module = TrainingModule(config if resume is None else replace(config, init_from=None))
    except RuntimeError as failure:
        raise _as_memory_error(failure) from failure
    module.first_step = len(before.loss)
    module.validation = list(before.validation)
    return module


def _introduce(parts: _Parts, say: Callable[[str], None]) -> None:
    config = parts.config
    say(f"data    {parts.data.source.description}")
    say(f"model   {config.recipe} {config.size}, {count_parameters(config.model):,} parameters")
    if parts.resume is not None:
        step, schedule = len(parts.before.loss), config.optimizer.schedule_steps
        say(f"resume  {parts.resume.path}, after step {step}; cosine to step {schedule}")


# --------------------------------------------------------------------------------------- train


def _train(parts: _Parts) -> BaseException | None:
    """Train; returns what stopped it."""
    parallel = parts.config.parallel
    with contextlib.ExitStack() as held:
        if parts.is_first and parts.places.checkpoints is not None:
            held.enter_context(lock_folder(parts.places.checkpoints))
        held.enter_context(timed_waits(parts.clock, parallel, parallel.accelerator))
        try:
            parts.trainer.fit(parts.module, datamodule=parts.data)
        except BaseException as error:
            return _as_memory_error(error)
    return None


def _as_memory_error(error: BaseException) -> BaseException:
    """Convert the RuntimeError that torch's CPU allocator raises when out of memory."""
    if type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate" in str(error):
        return MemoryError(str(error).splitlines()[0])
    return error


# -------------------------------------------------------------------------------------- record


def _record(parts: _Parts, started: Record, error: BaseException | None) -> Record | None:
    """Write and return the record on rank 0; None on the others.

    Raises:
        RunFailed: from `error`, or from what is wrong with the history, or with the disk.
    """
    is_together = error is None or isinstance(error, Stopped)  # ranks can still communicate
    record: Record | None = None
    if parts.is_first or is_together:
        reading = parts.instruments.reading(parts.trainer.strategy.root_device)
        readings = gather(reading, parts.module) if is_together else [reading]
        history, error = _end_history(parts, error, is_together=is_together)
        if parts.is_first:
            lines = parts.lines.lines
            record = build_record(parts.config, parts.data, history, readings, lines, error)
            record = _write(record | started, parts.places.record, error)
    if isinstance(error, Exception):
        raise RunFailed(str(error)) from error
    if error is not None:
        raise error
    return record


def _end_history(
    parts: _Parts, error: BaseException | None, *, is_together: bool
) -> tuple[History, BaseException | None]:
    """All steps that can be trusted, and what stopped the training or is wrong with them."""
    try:
        history = parts.history(all_ranks=is_together)
    except ClockError as disagreement:  # of all ranks alike: only the steps are not known
        history, error = parts.history(all_ranks=False), disagreement
    return history, find_fault(history) or error


def _write(record: Record, path: Path, error: BaseException | None) -> Record:
    try:
        return write_record(record, path)
    except OSError as full:
        before = f"{error}; " if error else ""
        raise RunFailed(f"{before}the record could not be written: {full}") from (error or full)


def _print_at_once(line: str) -> None:
    """Print without waiting for a full buffer: a pipe or a batch log shows a run as it goes."""
    print(line, flush=True)


def _print_nothing(_: str) -> None:
    """What ranks other than 0 print."""

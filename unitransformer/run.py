"""run(config) -> outcome: the one place where data, network, trainer, clock and record meet."""

import contextlib
import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl

from unitransformer.checkpoint.callbacks import Resume, SaveCheckpoints, sole_user
from unitransformer.checkpoint.reader import (
    Told,
    check_files,
    check_same_run,
    list_checkpoints,
    newest_checkpoint,
    read_told,
)
from unitransformer.config import RunConfig, to_dict
from unitransformer.costs.flops import count_parameters
from unitransformer.costs.memory import choose_strategy
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import device_memory_bytes, find_device, set_up_process
from unitransformer.launch.environment import process_rank
from unitransformer.launch.signals import Stopped, StopSignals
from unitransformer.launch.variables import PROGRESS
from unitransformer.machine.software import describe_code
from unitransformer.measure.clock import ClockStarts, ClockStops, StepClock
from unitransformer.measure.communication import ClocksReduction, clocked_waits, why_untold
from unitransformer.measure.instruments import Instruments
from unitransformer.record.log_lines import is_due
from unitransformer.record.schema import Record, write_record
from unitransformer.recording import build_record
from unitransformer.stats.stopping_rule import is_look
from unitransformer.training.history import (
    ClockError,
    find_fault,
    gather,
    history_now,
    read_history,
)
from unitransformer.training.module import TrainingModule
from unitransformer.training.progress import Bar, LogLines, TimeLeft
from unitransformer.training.stop import AgreeToStop, UntilInterval
from unitransformer.training.trainer import build_trainer
from unitransformer.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run puts what it makes."""

    folder: Path  # logs and figures
    checkpoints: Path | None  # None: nothing is saved
    record: Path
    trace: Path | None = None  # folder of a profiler's trace, if one is asked for


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves in memory; the record and the trained network are rank 0's."""

    record: Record | None
    network: Transformer | None  # whole; None: divided and too large for one rank
    config: RunConfig
    data: DataModule


Resuming = bool | Literal["auto"]


class RunFailed(Exception):
    """Training began and did not end well; its cause is chained, its record written."""


def run(
    config: RunConfig,
    places: Places,
    *,
    command: str,
    resume: Resuming = False,
    say: Callable[[str], None] | None = None,
    show_bar: bool = False,
) -> Outcome:
    """Train `config` and write its record, whether it ends well or not.

    Args:
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
    with StopSignals() as signals:
        return _run(
            config,
            places,
            command=command,
            resume=resume,
            say=say or _say_at_once,
            show_bar=show_bar,
            signals=signals,
        )


def _run(
    config: RunConfig,
    places: Places,
    *,
    command: str,
    resume: Resuming,
    say: Callable[[str], None],
    show_bar: bool,
    signals: StopSignals,
) -> Outcome:
    started: Record = {
        "command": command,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": describe_code(),  # before anybody edits it under a long run
    }
    device = find_device(config.parallel)
    config = replace(config, parallel=replace(config.parallel, accelerator=device))
    config, _ = choose_strategy(config, device_memory_bytes(config.parallel, device))
    set_up_process(config.parallel, device)
    is_first = process_rank(config.parallel) == 0
    say = say if is_first else _say_nothing

    checkpoint, told = _find_checkpoint(config, places.checkpoints, resume=resume)
    history = read_history(told)
    source = load_source(config, show_progress=is_first)
    if checkpoint is not None and history.sha256 != source.sha256:
        raise ValueError(
            f"data {config.data.source} is not what {checkpoint} was trained on: its sha256 is "
            f"{source.sha256} now and was {history.sha256}; start without --resume"
        )
    history.sha256 = source.sha256
    # A checkpoint brings its own weights: the file that the first came from may be gone.
    try:
        module = TrainingModule(config if checkpoint is None else replace(config, init_from=None))
    except RuntimeError as failure:
        raise _named(failure) from failure
    data = DataModule(config, source)
    module.first_step = data.start_step = len(history.loss)
    module.validation = list(history.validation)
    tells_communication = why_untold(config.parallel, device) is None
    clock = StepClock(on_gpu=device == "cuda", tells_communication=tells_communication)
    instruments = Instruments(config, first_step=module.first_step, trace_folder=places.trace)
    lines = LogLines(
        config,
        clock,
        _say_nothing if show_bar else say,
        places.folder / PROGRESS if is_first else None,
        places.record,
    )
    savers: list[pl.Callback] = []
    if places.checkpoints is not None:
        savers.append(
            SaveCheckpoints(
                places.checkpoints,
                every=config.checkpoint_every,
                tell=lambda: {
                    "config": to_dict(config),
                    **asdict(history_now(history, module, clock, is_whole=True)),
                },
            )
        )
    others: list[pl.Callback] = []
    if is_first:
        others.append(TimeLeft(config, clock, say, lambda: instruments.matmul_flops_per_s))
        others += [Bar(config, lines)] if show_bar else []
    agreeing = AgreeToStop(signals)
    watchers: list[pl.Callback] = [agreeing, instruments]
    if instruments.trace is not None:
        # Behind `agreeing`, whose question must be answered before a profiler stops.
        watchers.insert(1, instruments.trace)
    if config.until_interval is not None:
        watchers.append(UntilInterval(config.until_interval, clock, lambda: instruments.unsteady))
    if checkpoint is not None:
        others.append(Resume(checkpoint, told))
    trainer = build_trainer(
        config,
        device=device,
        run_dir=places.folder,
        callbacks=[
            ClockStops(clock),
            *([ClocksReduction(clock)] if config.parallel.strategy == "ddp" else []),
            *watchers,
            lines,
            *savers,
            *others,
            agreeing.asking,
            ClockStarts(clock, lambda step: _is_pause(config, instruments, step)),
        ],
        launch=len(history.launches),
    )
    say(f"data    {source.description}")
    say(f"model   {config.recipe} {config.size}, {count_parameters(config.model):,} parameters")
    if checkpoint is not None:
        schedule = config.optimizer.schedule_steps
        say(f"resume  {checkpoint}, after step {len(history.loss)}; cosine to step {schedule}")

    with contextlib.ExitStack() as held:
        if is_first and places.checkpoints is not None:
            held.enter_context(sole_user(places.checkpoints))
        held.enter_context(clocked_waits(clock, config.parallel, device))
        error = _fit(trainer, module, data)
    is_together = error is None or isinstance(error, Stopped)
    if is_first or is_together:
        reading = instruments.reading(trainer.strategy.root_device)
        readings = gather(reading, module) if is_together else [reading]
        try:
            now = history_now(history, module, clock, is_whole=is_together)
        except ClockError as disagreement:  # of all ranks alike: only the steps are not known
            now, error = history_now(history, module, clock, is_whole=False), disagreement
        error = find_fault(now) or error
        record = build_record(config, data, now, readings, lines.lines, error) | started
    if is_first:
        try:
            record = write_record(record, places.record)
        except OSError as full:
            before = f"{error}; " if error else ""
            raise RunFailed(f"{before}the record could not be written: {full}") from (error or full)
    if isinstance(error, Exception):
        raise RunFailed(str(error)) from error
    if error is not None:
        raise error
    return Outcome(
        record=record if is_first else None,
        network=network.eval() if (network := module.whole_network) else None,
        config=config,
        data=data,
    )


def _is_pause(config: RunConfig, instruments: Instruments, step: int) -> bool:
    """Whether some rank has more to do than train after `step` steps of the run."""
    looks = config.until_interval is not None and is_look(step - instruments.first_step)
    return looks or is_due(config, step) or instruments.is_pause(step)


def _fit(trainer: pl.Trainer, module: TrainingModule, data: DataModule) -> BaseException | None:
    """Train; returns what stopped it."""
    try:
        trainer.fit(module, datamodule=data)
    except BaseException as error:
        return _named(error)
    return None


def _named(error: BaseException) -> BaseException:
    """torch's allocator on a CPU has no type for a lack of memory: it gets the one it deserves."""
    if type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate" in str(error):
        return MemoryError(str(error).splitlines()[0])
    return error


def _say_at_once(line: str) -> None:
    """Print without waiting for a full buffer: a pipe or a batch log shows a run as it goes."""
    print(line, flush=True)


def _say_nothing(_: str) -> None:
    """What ranks beside the first say."""


def _find_checkpoint(
    config: RunConfig, folder: Path | None, *, resume: Resuming
) -> tuple[Path | None, Told]:
    if folder is None:
        if resume is True:
            raise ValueError("resume: this run has no place for checkpoints; name one")
        return None, {}
    rank = process_rank(config.parallel)
    if not resume:
        if list_checkpoints(folder) and rank == 0:
            raise ValueError(
                f"checkpoint-dir {folder} holds {newest_checkpoint(folder)}; "
                "add --resume to go on from it, or choose another folder"
            )
        return None, {}
    path = newest_checkpoint(folder)
    if path is None:
        if resume == "auto":
            return None, {}
        raise ValueError(
            f"checkpoint-dir {folder} holds no checkpoint to resume; run without --resume first"
        )
    told = read_told(path)
    check_same_run(told, config, path)
    if resume is True and len(told["loss"]) >= config.max_steps:
        raise ValueError(
            f"checkpoint {path} is at step {len(told['loss'])} of max-steps {config.max_steps}: "
            "nothing is left to do; raise --max-steps"
        )
    check_files(path, part=rank, parts=config.parallel.world_size)
    return path, told

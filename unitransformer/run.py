"""Trains a config and writes its record.

`run` connects the data, the network, the trainer, the instruments and the record.
"""

import contextlib
import datetime
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from unitransformer.callbacks import build_callbacks
from unitransformer.checkpoint.callbacks import (
    Resume,
    ResumeMode,
    SaveCheckpoints,
    find_resume,
    lock_folder,
)
from unitransformer.checkpoint.names import NUM_KEPT, step_of
from unitransformer.checkpoint.reader import RunState, list_checkpoints
from unitransformer.checkpoint.writer import SET_ASIDE
from unitransformer.config import RunConfig, to_dict
from unitransformer.costs.flops import count_parameters, describe_padding
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import ResolvedConfig, keep_freed_memory, resolve, set_up_process
from unitransformer.launch.environment import join_attempt, note_begin, process_rank
from unitransformer.launch.signals import StopSignalListener
from unitransformer.launch.variables import PROGRESS_FILE
from unitransformer.machine.loss_blocks import LossBlocks
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
    """Where a run writes its files."""

    folder: Path  # logs and figures
    checkpoints: Path | None  # None: nothing is saved
    keep_checkpoints: int = NUM_KEPT
    record: Path
    trace: Path | None = None  # folder of the profiler's trace


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The result of a run in memory; only rank 0 has the record and the trained network."""

    record: Record | None
    network: Transformer | None  # None also if it is sharded and too large for one rank
    data: DataModule  # its `config` is the resolved one


class RunFailed(Exception):
    """Training started but failed; the cause is chained and the record is written."""


def run(
    config: RunConfig | ResolvedConfig,
    paths: RunPaths,
    *,
    command: str,
    resume: ResumeMode = False,
    print_line: Callable[[str], None] | None = None,
    show_bar: bool = False,
) -> RunOutcome:
    """Trains `config` and writes its record, also if training fails.

    Args:
        config: a plain config is first resolved for this machine.
        command: the command line that repeats this run; goes into the record.
        resume: continue from the newest checkpoint of `paths`, or from the one at a path; "auto":
            from the newest if there is one, as ranks do that torchrun has restarted.
        print_line: prints a line on rank 0; default: to standard output.
        show_bar: show a progress bar instead of lines during training.

    Raises:
        ValueError: the hardware, the data or the checkpoint does not fit; nothing was written.
        RuntimeError, MemoryError: the weights do not fit; nothing was written.
        RunFailed: training failed, after its record was written. Its cause is `Stopped` if a
            signal stopped all ranks at the end of a step, after they saved a checkpoint.
    """
    with StopSignalListener() as signals:
        start: Record = {
            "command": command,
            "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "code": describe_code(),  # now, as the code may be edited during a long run
        }
        resolved = resolve(config) if isinstance(config, RunConfig) else config
        parallel = resolved.config.parallel
        set_up_process(parallel, parallel.accelerator)
        keep_freed_memory(parallel.accelerator)
        # Flushed, so that a pipe or a batch log shows each line at once.
        print_line = print_line or functools.partial(print, flush=True)
        if process_rank() != 0:
            print_line = _print_nothing
        # A run that began from a checkpoint elsewhere begins there again until it has saved one.
        if join_attempt() and paths.checkpoints and list_checkpoints(paths.checkpoints):
            resume = "auto"
        checkpoint = find_resume(resolved.config, paths.checkpoints, resume=resume)
        this_run = _Run(
            resolved.config, paths, checkpoint, signals, print_line=print_line, show_bar=show_bar
        )
        this_run.print_introduction(print_line)
        note_begin()
        error = this_run.train()
        record = this_run.record(start, error)
    network = this_run.module.full_network
    if network is not None:
        network.eval()
    return RunOutcome(record=record, network=network, data=this_run.data)


class _Run:
    """The parts of a run on this rank, ready to train."""

    def __init__(
        self,
        config: RunConfig,
        paths: RunPaths,
        resume: Resume | None,
        signals: StopSignalListener,
        *,
        print_line: Callable[[str], None],
        show_bar: bool,
    ) -> None:
        parallel, device = config.parallel, config.parallel.accelerator
        self.config, self.paths, self.resume = config, paths, resume
        self.is_first = process_rank() == 0
        self.earlier = read_history({} if resume is None else resume.run_state)
        self.data = _load_data(config, resume, self.earlier, show_progress=self.is_first)
        self.module = _build_module(config, resume, self.earlier)
        self.clock = StepClock(
            on_gpu=device == "cuda",
            measures_communication=why_communication_missing(parallel, device) is None,
            host_runs_ahead=not parallel.waits_for_gpu,
        )
        self.instruments = Instruments(
            config, first_step=self.module.first_step, trace_folder=paths.trace
        )
        self.lines = LogLines(
            config,
            self.clock,
            _print_nothing if show_bar else print_line,
            paths.folder / PROGRESS_FILE if self.is_first else None,
            paths.record,
        )
        saver = time_left = None
        if paths.checkpoints is not None:
            saver = SaveCheckpoints(
                paths.checkpoints,
                every=config.checkpoint_every,
                keep=paths.keep_checkpoints,
                get_run_state=self._run_state,
            )
        if self.is_first:
            time_left = TimeLeft(
                config, self.clock, print_line, lambda: self.instruments.matmul_flops_per_s
            )
        callbacks = build_callbacks(
            config,
            self.clock,
            agreement=AgreeToStop(signals),
            instruments=self.instruments,
            lines=self.lines,
            saver=saver,
            resume=resume,
            time_left=time_left,
            has_bar=show_bar and self.is_first,
        )
        self.trainer = build_trainer(
            config,
            run_dir=paths.folder,
            callbacks=callbacks,
            segment=len(self.earlier.segment_starts),
        )

    def print_introduction(self, print_line: Callable[[str], None]) -> None:
        config, num_parameters = self.config, count_parameters(self.config.model)
        print_line(f"data    {self.data.source.description}")
        padded = describe_padding(config)
        print_line(f"model   {config.recipe} {config.size}, {num_parameters:,} parameters{padded}")
        if self.resume is not None:
            step, last_step = len(self.earlier.loss), config.optimizer.schedule_steps
            print_line(
                f"resume  {self.resume.path}, after step {step}; "
                f"the learning rate decays until step {last_step}"
            )
            folder = self.paths.checkpoints or self.resume.path.parent
            names = [path.name for path in list_checkpoints(folder)]
            if newer := [name for name in names if step_of(name) > step]:
                print_line(f"resume  moves {', '.join(newer)} to {folder / SET_ASIDE}")

    def train(self) -> BaseException | None:
        """Trains; returns the exception that stopped training, if any."""
        parallel = self.config.parallel
        with contextlib.ExitStack() as stack:
            if self.is_first and self.paths.checkpoints is not None:
                stack.enter_context(lock_folder(self.paths.checkpoints))
            stack.enter_context(timed_waits(self.clock, parallel, parallel.accelerator))
            try:
                self.trainer.fit(self.module, datamodule=self.data)
            except BaseException as error:
                return error
        return None

    def record(self, start: Record, error: BaseException | None) -> Record | None:
        """Writes and returns the record on rank 0; returns None on the others.

        Raises:
            RunFailed: `error` stopped training, the history is faulty, or the disk is full.
        """
        # All ranks have left training at the same step, and can still communicate.
        all_ranks = error is None or error is self.module.stop_error
        record: Record | None = None
        if self.is_first or all_ranks:
            reading = self.instruments.reading(self.trainer.strategy.root_device)
            if all_ranks:
                reading["flags"] += self.clock.flags()
            readings = gather(reading, self.module) if all_ranks else [reading]
            try:
                history = self._history(all_ranks=all_ranks)
            except ClockError as disagreement:  # raised on all ranks alike
                history, error = self._history(all_ranks=False), disagreement
            error = find_fault(history) or error
            if self.is_first:
                lines = self.lines.lines
                record = build_record(self.config, self.data, history, readings, lines, error)
                record = _write(record | start, self.paths.record, error)
        if isinstance(error, Exception):
            raise RunFailed(str(error)) from error
        if error is not None:
            raise error
        return record

    def _history(self, *, all_ranks: bool) -> History:
        return current_history(self.earlier, self.module, self.clock, all_ranks=all_ranks)

    def _run_state(self) -> RunState:
        blocks = self.module.loss_blocks
        return {
            "config": to_dict(self.config),
            "loss_blocks": None if blocks is None else asdict(blocks),
            **asdict(self._history(all_ranks=True)),
        }


def _load_data(
    config: RunConfig, resume: Resume | None, earlier: History, *, show_progress: bool
) -> DataModule:
    """Loads the data; raises ValueError if the checkpoint was trained on other data."""
    source = load_source(config, show_progress=show_progress)
    if resume is not None and earlier.sha256 != source.sha256:
        raise ValueError(
            f"data {config.data.source} is not what {resume.path} was trained on: its sha256 is "
            f"{source.sha256} now and was {earlier.sha256}; start without --resume"
        )
    earlier.sha256 = source.sha256
    data = DataModule(config, source)
    data.start_step = len(earlier.loss)
    return data


def _build_module(config: RunConfig, resume: Resume | None, earlier: History) -> TrainingModule:
    # A checkpoint holds the weights: the file of the initial weights may no longer exist.
    module = TrainingModule(config if resume is None else replace(config, init_from=None))
    module.first_step = len(earlier.loss)
    module.validation = list(earlier.validation)
    if resume is not None and (blocks := resume.run_state.get("loss_blocks")):
        module.resumed_loss_blocks = LossBlocks(**blocks)
    return module


def _write(record: Record, path: Path, error: BaseException | None) -> Record:
    try:
        return write_record(record, path)
    except OSError as disk_error:
        cause = f"{error}; " if error else ""
        message = f"{cause}the record could not be written: {disk_error}"
        raise RunFailed(message) from (error or disk_error)


def _print_nothing(_: str) -> None:
    """Prints nothing on ranks other than 0."""

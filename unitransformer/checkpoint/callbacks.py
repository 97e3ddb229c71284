"""Callbacks that save a run while it trains, and resume it."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed
from filelock import FileLock, Timeout

from unitransformer.checkpoint.reader import (
    CheckpointReader,
    RunState,
    check_files,
    check_same_run,
    first_line,
    list_checkpoints,
    newest_checkpoint,
    read_run_state,
    read_tensors,
)
from unitransformer.checkpoint.state import State, capture_state, count_updates, restore_state
from unitransformer.checkpoint.writer import CheckpointWriter, remove_leftovers, start_saving
from unitransformer.config import RunConfig
from unitransformer.launch.environment import process_rank
from unitransformer.launch.failures import report_failure
from unitransformer.launch.signals import Stopped
from unitransformer.training.module import TrainingModule

DEEPSPEEDS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ResumeMode = bool | Literal["auto"]  # "auto": if there is a checkpoint
MAX_WAIT_S = 4.0  # that a run which fails waits for other ranks to write their parts


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder of checkpoints; ends with the process, however it ends.

    Raises:
        ValueError: another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"checkpoint-dir {folder} is in use by another run; wait for its end, or choose "
            "another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


class SaveCheckpoints(pl.Callback):
    """Saves every `every` optimizer steps (0: never) and at the last; keeps the newest.

    A checkpoint on the way is copied and written while training goes on; the last is written
    where it stands.

    Args:
        tell: what `run.json` says; called on every rank.

    Raises:
        CheckpointError: naming the folder; the checkpoint before stays. For one that was written
            while training went on it is raised at the next, on every rank.
    """

    def __init__(self, folder: Path, *, every: int, get_run_state: Callable[[], RunState]) -> None:
        self.folder, self.every, self.get_run_state = folder, every, get_run_state
        self._saved_step = 0
        self._pending: tuple[int, Future[None]] | None = None
        self._group: torch.distributed.ProcessGroup | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
        if torch.distributed.is_initialized():
            # Its own, as a thread writes beside the training; also keeps others from starting
            # before the remains are gone.
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        is_last = step == trainer.max_steps or trainer.should_stop
        is_due = is_last or (self.every and step % self.every == 0)
        if not is_due or step <= self._saved_step:
            return
        num_updates = count_updates(trainer)
        if num_updates == 0:
            return  # every gradient has overflowed: nothing is learned yet, there are no moments
        self._saved_step = step
        self._finish(trainer)
        told = self.get_run_state()
        assert len(told["loss"]) == step
        _check_losses(told["loss"])
        told |= {"num_updates": num_updates, "loss_scaler": _loss_scaler(trainer)}
        writer = CheckpointWriter(self.folder, step, told)
        state = capture_state(pl_module, trainer)
        self._pending = (step, start_saving(state, writer, self._group, wait=is_last))
        if is_last:
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint that is being written."""
        if self._pending is None:
            return
        step, done = self._pending
        try:
            done.result()
        except Exception as error:
            self._pending = None
            if trainer.is_global_zero:
                remove_leftovers(self.folder)  # no rank writes any more; the disk may be full
            raise self._explain(step, error) from error
        self._pending = None

    def _explain(self, step: int, error: Exception) -> CheckpointError:
        kept = newest_checkpoint(self.folder)
        stays, again = (f"; {kept.name} stays", " with --resume") if kept else ("", "")
        return CheckpointError(
            f"checkpoint-dir {self.folder}: step {step} could not be saved "
            f"({first_line(error)}){stays}; free space and run again{again}"
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._pending is None:
            return
        if isinstance(exception, Exception) and not isinstance(exception, Stopped):
            report_failure(exception)  # whoever watches need not wait for what is being written
        (_, done), self._pending = self._pending, None
        # What is half written may still become whole; what is wrong with it is not the news.
        wait([done], timeout=None if self._group is None else MAX_WAIT_S)
        if trainer.is_global_zero and done.done() and done.exception() is not None:
            remove_leftovers(self.folder)


def _check_losses(losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {step}; the checkpoint before stays; "
                "lower optimizer.learning_rate"
            )


class Resume(pl.Callback):
    """Takes a run up where a checkpoint left it, whatever strategy wrote it."""

    def __init__(self, path: Path, run_state: RunState) -> None:
        self.path, self.run_state = path, run_state

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = len(self.run_state["loss"])

        reader = CheckpointReader(self.path)

        def read(state: State) -> None:
            read_tensors(reader, state)

        with torch.no_grad():
            restore_state(pl_module, trainer, read, step=self.run_state["num_updates"])
        _set_loss_scaler(trainer, self.run_state["loss_scaler"])
        trainer.fit_loop.load_state_dict(_loops_after(trainer, step, pl_module.config.accumulate))


def find_resume(config: RunConfig, folder: Path | None, *, resume: ResumeMode) -> Resume | None:
    """Resumes from the newest checkpoint of `folder`, which is verified; None starts afresh.

    Raises:
        ValueError: no checkpoint where there must be one, one of another run, or one where a new
            run would write.
    """
    if folder is None:
        if resume is True:
            raise ValueError("resume: this run has no place for checkpoints; name one")
        return None
    rank = process_rank()
    if not resume:
        if list_checkpoints(folder) and rank == 0:
            raise ValueError(
                f"checkpoint-dir {folder} holds {newest_checkpoint(folder)}; "
                "add --resume to go on from it, or choose another folder"
            )
        return None
    path = newest_checkpoint(folder)
    if path is None:
        if resume == "auto":
            return None
        raise ValueError(
            f"checkpoint-dir {folder} holds no checkpoint to resume; run without --resume first"
        )
    told = read_run_state(path)
    check_same_run(told, config, path)
    if resume is True and len(told["loss"]) >= config.max_steps:
        raise ValueError(
            f"checkpoint {path} is at step {len(told['loss'])} of max-steps {config.max_steps}: "
            "nothing is left to do; raise --max-steps"
        )
    check_files(path, part=rank, parts=config.parallel.world_size)
    return Resume(path, told)


def _loops_after(trainer: pl.Trainer, step: int, accumulate: int) -> dict[str, Any]:
    """The state of Lightning's loops in `on_train_batch_end` of the last micro-batch of `step`."""
    state = trainer.fit_loop.state_dict()
    done = step * accumulate
    for part in ("current", "total"):
        state["epoch_loop.batch_progress"][part] = {
            "ready": done,
            "started": done,
            "processed": done,
            "completed": done - 1,
        }
        state["epoch_progress"][part] |= {"ready": 1, "started": 1}
        progress = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        progress["step"][part] = {"ready": step, "completed": step}
        progress["zero_grad"][part] = {"ready": step, "started": step, "completed": step}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    return state


def _loss_scaler(trainer: pl.Trainer) -> dict[str, Any]:
    """State of the float16 loss scaler; empty where there is none."""
    scaler = _deepspeeds_scaler(trainer)
    if scaler is not None:
        return {name: getattr(scaler, name) for name in DEEPSPEEDS_SCALE}
    state: dict[str, Any] = json.loads(json.dumps(trainer.precision_plugin.state_dict()))
    return state


def _set_loss_scaler(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    scaler = _deepspeeds_scaler(trainer)
    if scaler is not None and state.keys() >= set(DEEPSPEEDS_SCALE):
        for name in DEEPSPEEDS_SCALE:
            setattr(scaler, name, state[name])
    elif "scale" in state and getattr(trainer.precision_plugin, "scaler", None) is not None:
        trainer.precision_plugin.load_state_dict(state)


def _deepspeeds_scaler(trainer: pl.Trainer) -> Any:
    scaler = getattr(getattr(trainer.strategy.model, "optimizer", None), "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None

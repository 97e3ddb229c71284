"""Lightning callbacks that save and resume a run."""

import contextlib
import functools
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

from unitransformer.checkpoint import reader
from unitransformer.checkpoint.names import NUM_KEPT
from unitransformer.checkpoint.reader import RunState
from unitransformer.checkpoint.state import capture_state, count_updates, restore_state
from unitransformer.checkpoint.writer import (
    CheckpointWriter,
    remove_leftovers,
    set_newer_aside,
    start_saving,
)
from unitransformer.config import RunConfig
from unitransformer.launch.environment import process_rank
from unitransformer.launch.failures import report_failure
from unitransformer.launch.signals import Stopped
from unitransformer.training.history import DIVERGED_FIX
from unitransformer.training.module import TrainingModule

DEEPSPEED_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ResumeMode = bool | Literal["auto"] | Path  # "auto": if there is a checkpoint; or one of them
MAX_WAIT_S = 4.0  # for other ranks to write their parts, after a failure


class CheckpointError(OSError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder of checkpoints against other runs; a process that dies releases the lock.

    Raises:
        ValueError: another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"checkpoint-dir {folder} is in use by another run; wait or choose another folder"
        ) from None
    with lock:
        yield


class SaveCheckpoints(pl.Callback):
    """Saves every `every` optimizer steps (0: never) and after the last; keeps the newest `keep`.

    The state is copied and written while training continues; after the last step training waits.

    Args:
        get_run_state: returns the content of `run.json`; called on every rank.

    Raises:
        CheckpointError: a write failed; the previous checkpoints are kept. If training continued
            meanwhile, every rank raises it at the next checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int = NUM_KEPT,
        get_run_state: Callable[[], RunState],
    ) -> None:
        self.folder, self.every, self.get_run_state = folder, every, get_run_state
        self.keep = keep
        self._saved_step = 0
        self._pending: tuple[int, Future[None]] | None = None
        self._group: torch.distributed.ProcessGroup | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
            set_newer_aside(self.folder, trainer.global_step)
        if torch.distributed.is_initialized():
            # A separate group, because a thread uses it during training. Creating it is also a
            # barrier: no rank saves before the leftovers are deleted.
            group: Any = torch.distributed.new_group(backend="gloo")
            self._group = group

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        is_last = step == trainer.max_steps or trainer.should_stop
        is_due = is_last or (self.every and step % self.every == 0)
        if not is_due or step <= self._saved_step:
            return
        num_updates = count_updates(trainer)
        if num_updates == 0:
            return  # every gradient has overflowed, so AdamW has no moments yet
        self._saved_step = step
        self._finish(trainer)
        run_state = self.get_run_state()
        assert len(run_state["loss"]) == step
        for number, loss in enumerate(run_state["loss"], start=1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {number}; {DIVERGED_FIX}")
        run_state |= {"num_updates": num_updates, "loss_scaler": _loss_scaler(trainer)}
        writer = CheckpointWriter(self.folder, step, run_state, keep=self.keep)
        state = capture_state(pl_module, trainer)
        self._pending = (step, start_saving(state, writer, self._group, wait=is_last))
        if is_last:
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Waits for the checkpoint that is being written."""
        if self._pending is None:
            return
        step, done = self._pending
        try:
            done.result()
        except Exception as error:
            self._pending = None
            if trainer.is_global_zero:
                remove_leftovers(self.folder)  # no rank is writing now, and the disk may be full
            newest = reader.newest_checkpoint(self.folder)
            kept, option = (f"; {newest.name} is kept", " with --resume") if newest else ("", "")
            raise CheckpointError(
                f"checkpoint-dir {self.folder}: step {step} could not be saved "
                f"({reader.first_line(error)}){kept}; free space and run again{option}"
            ) from error
        self._pending = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._pending is None:
            return
        if isinstance(exception, Exception) and not isinstance(exception, Stopped):
            report_failure(exception)  # now, because the wait below takes seconds
        (_, done), self._pending = self._pending, None
        # Let the write finish if it can. An error in it must not hide the exception of the run.
        wait([done], timeout=None if self._group is None else MAX_WAIT_S)
        if trainer.is_global_zero and done.done() and done.exception() is not None:
            remove_leftovers(self.folder)


class Resume(pl.Callback):
    """Restores a run from a checkpoint, whichever strategy wrote it."""

    def __init__(self, path: Path, run_state: RunState) -> None:
        self.path, self.run_state = path, run_state

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = len(self.run_state["loss"])
        read = functools.partial(reader.read_tensors, reader.CheckpointReader(self.path))
        with torch.no_grad():
            restore_state(pl_module, trainer, read, step=self.run_state["num_updates"])
        _set_loss_scaler(trainer, self.run_state["loss_scaler"])
        trainer.fit_loop.load_state_dict(_loops_after(trainer, step, pl_module.config.accumulate))


def find_resume(config: RunConfig, folder: Path | None, *, resume: ResumeMode) -> Resume | None:
    """Verifies the newest checkpoint of `folder`, or the given one, and returns its callback.

    Returns None for a new run.

    Raises:
        ValueError: `resume` is True without a checkpoint; the checkpoint is damaged or of another
            run; or a run that does not continue the checkpoints of `folder` would overwrite them.
    """
    is_required = resume not in (False, "auto")
    if folder is None:
        if is_required:
            raise ValueError("resume needs a checkpoint folder; give --checkpoint-dir")
        return None
    rank = process_rank()
    is_elsewhere = isinstance(resume, Path) and resume.parent.resolve() != folder.resolve()
    if not resume or is_elsewhere:
        if reader.list_checkpoints(folder) and rank == 0:
            raise ValueError(
                f"checkpoint-dir {folder} holds {reader.newest_checkpoint(folder)}; "
                "add --resume to continue from it, or choose another folder"
            )
        if not resume:
            return None
    path = resume if isinstance(resume, Path) else reader.newest_checkpoint(folder)
    if path is None:
        if resume == "auto":
            return None
        raise ValueError(
            f"checkpoint-dir {folder} holds no checkpoint to resume; run without --resume first"
        )
    if not path.exists():
        raise ValueError(f"resume {path} does not exist; give the path of a checkpoint")
    run_state = reader.read_run_state(path)
    reader.check_same_run(run_state, config, path)
    step = len(run_state["loss"])
    if is_required and step >= config.max_steps:
        raise ValueError(
            f"checkpoint {path} is at step {step} of max-steps {config.max_steps}: "
            "nothing is left to do; raise --max-steps"
        )
    reader.check_files(path, part=rank, parts=config.parallel.world_size)
    return Resume(path, run_state)


def _loops_after(trainer: pl.Trainer, step: int, accumulate: int) -> dict[str, Any]:
    """Returns the state of Lightning's loops in the last `on_train_batch_end` of step `step`."""
    state = trainer.fit_loop.state_dict()
    done = step * accumulate
    for part in ("current", "total"):
        batches = {"ready": done, "started": done, "processed": done, "completed": done - 1}
        state["epoch_loop.batch_progress"][part] = batches
        state["epoch_progress"][part] |= {"ready": 1, "started": 1}
        progress = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        progress["step"][part] = {"ready": step, "completed": step}
        progress["zero_grad"][part] = {"ready": step, "started": step, "completed": step}
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    return state


def _loss_scaler(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the state of the float16 loss scaler; empty without one."""
    scaler = _deepspeed_scaler(trainer)
    if scaler is not None:
        return {name: getattr(scaler, name) for name in DEEPSPEED_SCALER_FIELDS}
    state: dict[str, Any] = json.loads(json.dumps(trainer.precision_plugin.state_dict()))
    return state


def _set_loss_scaler(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    scaler = _deepspeed_scaler(trainer)
    if scaler is not None and state.keys() >= set(DEEPSPEED_SCALER_FIELDS):
        for name in DEEPSPEED_SCALER_FIELDS:
            setattr(scaler, name, state[name])
    elif "scale" in state and getattr(trainer.precision_plugin, "scaler", None) is not None:
        trainer.precision_plugin.load_state_dict(state)


def _deepspeed_scaler(trainer: pl.Trainer) -> Any:
    scaler = getattr(getattr(trainer.strategy.model, "optimizer", None), "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None

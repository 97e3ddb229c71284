"""Checkpoints: written whole or not at all, found again, and refused when they are not ours."""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from unitransformer.config import RunConfig, from_dict
from unitransformer.records import open_atomically

KEY = "unitransformer"  # what marks a checkpoint as ours
_NAME = re.compile(r"step-(\d+)\.ckpt")


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, flushes to disk, renames; a failure leaves what was there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        with open_atomically(Path(path)) as file:
            torch.save(checkpoint, file)


class SaveCheckpoints(pl.Callback):
    """Saves every `every` optimizer steps (0: never) and at the last; keeps the newest.

    Raises:
        OSError: naming the folder; the checkpoint before stays.
    """

    def __init__(self, folder: Path, *, every: int, extra: Callable[[], dict[str, Any]]) -> None:
        self.folder, self.every, self.extra = folder, every, extra
        self._saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        is_due = step == trainer.max_steps or (self.every and step % self.every == 0)
        if is_due and step > self._saved_step:
            self._saved_step = step
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = self._extra

    def save(self, trainer: pl.Trainer) -> None:
        self._extra = self.extra()
        last = self._extra["loss"][-1]
        if not math.isfinite(last):
            raise FloatingPointError(
                f"loss is {last} at step {trainer.global_step}; the checkpoint before stays; "
                "lower optimizer.learning_rate"
            )
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:
            # torch's zip writer stumbles over a full disk, with a RuntimeError of its own
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = newest_checkpoint(self.folder)
            stays, again = (f"; {kept.name} stays", " with --resume") if kept else ("", "")
            raise CheckpointError(
                f"checkpoint-dir {self.folder}: step {trainer.global_step} could not be saved "
                f"({_first_line(reason)}){stays}; free space and run again{again}"
            ) from error
        if trainer.is_global_zero:
            for other in list_checkpoints(self.folder):
                if other != path:
                    other.unlink()


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def newest_checkpoint(folder: Path) -> Path | None:
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours; nothing in it is executed (`weights_only=True`).

    Raises:
        ValueError: damaged, or written by something else.
    """
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} holds more than tensors and plain values, and nothing in it is "
            "executed; choose another --checkpoint-dir"
        ) from error
    except Exception as error:  # what the readers raise for a damaged file is anything
        raise ValueError(
            f"checkpoint {path} is damaged ({_first_line(error)}); "
            "delete it and start again without --resume"
        ) from error
    ours = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict) or not {"config", "loss"} <= ours.keys():
        raise ValueError(
            f"checkpoint {path} was not written by this program; choose another --checkpoint-dir"
        )
    return cast(dict[str, Any], checkpoint)


def _check_sums(path: Path) -> None:
    """Compare the checksums torch writes beside each tensor, which it does not do by itself."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")


def check_same_run(saved: dict[str, Any], config: RunConfig, path: Path) -> None:
    """A checkpoint continues only the run that wrote it.

    Raises:
        ValueError: the first field that differs, with both values.
    """
    before = from_dict(RunConfig, saved["config"], f"checkpoint {path}: config").identity()
    now = config.identity()
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {path} is of another run: {name} is {before.get(name)} there and "
                f"{now.get(name)} here; give the same options, or start without --resume"
            )
    done = len(saved["loss"])
    if done >= config.max_steps:
        raise ValueError(
            f"checkpoint {path} is at step {done} of max-steps {config.max_steps}: "
            "nothing is left to do; raise --max-steps"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

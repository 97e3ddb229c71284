"""Writes a checkpoint atomically.

The ranks write into `.step-00000100.partial`. Rank 0 renames it when all are done, and then deletes
the oldest checkpoints. Where the environment names a node-local disk, a rank writes its part there
first and copies it to the shared folder in one stream.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.futures
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from unitransformer.checkpoint.names import checkpoint_name, step_of
from unitransformer.checkpoint.reader import (
    CHECKSUMS_FILE,
    METADATA_FILE,
    RUN_FILE,
    RunState,
    checksum,
    ignore_undistributed_warning,
    list_checkpoints,
    root_cause,
)
from unitransformer.checkpoint.state import State
from unitransformer.files import open_atomically, write_atomically
from unitransformer.launch.variables import LOCAL_DISK

SET_ASIDE = "set-aside"
STREAM_BYTES = 1 << 22
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|old)")


class CheckpointWriter(FileSystemWriter):
    """Torch's writer into a partial folder, with checksums; rank 0's `finish` renames it.

    Args:
        keep: how many checkpoints `finish` leaves, with the new one.
    """

    def __init__(self, folder: Path, step: int, run_state: RunState, *, keep: int = 1) -> None:
        self.final = folder / checkpoint_name(step)
        self.run_state, self.keep = run_state, keep
        super().__init__(folder / f".{self.final.name}.partial", overwrite=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Writes this rank's part; `finish` gets where its tensors are, and its checksums."""
        local = os.environ.get(LOCAL_DISK)
        written = None if local is None else self._write_staged(Path(local), plan, planner)
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(written or self._write_into(Path(self.path), plan, planner))
        return done

    def _write_staged(self, disk: Path, plan: Any, planner: Any) -> Any:
        """Writes into a temporary folder on `disk`, and copies the files from there.

        Returns None, and warns, if they cannot be written on `disk`.
        """
        shared = Path(self.path)
        with contextlib.ExitStack() as stack:
            try:
                disk.mkdir(parents=True, exist_ok=True)
                made = tempfile.TemporaryDirectory(dir=disk, ignore_cleanup_errors=True)
                folder = Path(stack.enter_context(made))
                written = self._write_into(folder, plan, planner)
            except OSError as error:
                reason = f"cannot stage checkpoints on {disk} ({error})"
                warnings.warn(f"{reason}; writing to {shared.parent} directly", stacklevel=1)
                return None
            for file in folder.iterdir():
                _copy_to_shared(file, shared / file.name)
        return written

    def _write_into(self, folder: Path, plan: Any, planner: Any) -> Any:
        shared = self.path
        self.path = folder
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # For a full disk torch's zip writer raises its own error; the system's says why.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        finally:
            self.path = shared
        files = folder.glob(f"{plan.storage_data.prefix}*")
        return written, {path.name: checksum(path) for path in files}

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On rank 0, when all have written: turns the partial folder into the newest checkpoint."""
        partial = Path(self.path)
        super().finish(metadata, [written for written, _ in results])
        write_atomically(partial / RUN_FILE, json.dumps(self.run_state).encode())
        sums = {name: checksum(partial / name) for name in (METADATA_FILE, RUN_FILE)}
        for _, rank_sums in results:
            sums |= rank_sums
        for name in sums:
            if not (partial / name).exists():  # the nodes do not share this folder
                raise FileNotFoundError(f"{name}, which another rank has written, is missing")
        write_atomically(partial / CHECKSUMS_FILE, json.dumps(sums, indent=1).encode())
        _fsync_folder(partial)
        partial.rename(self.final)
        _fsync_folder(self.final.parent)
        others = [path for path in list_checkpoints(self.final.parent) if path.is_dir()]
        others.remove(self.final)
        for other in others[: max(0, len(others) + 1 - self.keep)]:
            _remove_checkpoint(other)


def start_saving(
    state: State, writer: CheckpointWriter, group: ProcessGroup | None, *, wait: bool
) -> "Future[None]":
    """Starts to write `state`; every rank of `group` calls this.

    Args:
        group: gloo group of all ranks for this purpose alone; None for a single process.
        wait: write now, without a copy; otherwise copy, and write in a thread.
    """
    ignore_undistributed_warning()
    done: Future[None] = Future()
    snapshot = state if wait else writer.stage(state)
    is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpu = torch.cuda.current_device() if is_on_gpu else None

    def write() -> None:
        try:
            if gpu is not None:  # a new thread is on GPU 0, and `save` uses the current one
                torch.cuda.set_device(gpu)
            save(snapshot, storage_writer=writer, process_group=group, no_dist=group is None)
        except BaseException as error:
            done.set_exception(root_cause(error))
        else:
            done.set_result(None)

    if wait:
        write()
    else:
        # A daemon thread, so that a rank can exit when its peers are dead.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()
    return done


def _copy_to_shared(source: Path, target: Path) -> None:
    with source.open("rb") as reader, open_atomically(target) as writer:
        shutil.copyfileobj(reader, writer, STREAM_BYTES)


def remove_leftovers(folder: Path) -> None:
    """Deletes partly written and partly deleted checkpoints; call it on rank 0 only."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def set_newer_aside(folder: Path, step: int) -> None:
    """Moves checkpoints after `step`, to which a run has gone back, into another folder."""
    for path in list_checkpoints(folder):
        if path.is_dir() and step_of(path.name) > step:
            target = folder / SET_ASIDE / path.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)


def _remove_checkpoint(checkpoint: Path) -> None:
    # Rename first, so that a partly deleted checkpoint does not look complete.
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writes a checkpoint's folder, whole or not at all.

All goes into `.step-00000100.partial`, which is renamed when every rank is done. Then the
checkpoints before are deleted. A rank writes its part on the node's own disk first, where it is
told of one, and hands it to the folder, which all nodes share, in one stream.
"""

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

import torch.distributed
import torch.futures
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from unitransformer.checkpoint.names import checkpoint_name
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
from unitransformer.files import write_atomically
from unitransformer.launch.variables import LOCAL_DISK

STREAM_BYTES = 1 << 22
_REMAINS = re.compile(r"\.step-\d{8,}\.(partial|old)")


class CheckpointWriter(FileSystemWriter):
    """Torch's, into a partial folder, with checksums; the first rank's `finish` renames it."""

    def __init__(self, folder: Path, step: int, run_state: RunState) -> None:
        self.final = folder / checkpoint_name(step)
        self.run_state = run_state
        super().__init__(folder / f".{self.final.name}.partial", overwrite=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's part; `finish` gets where its tensors lie, and its checksums."""
        shared = Path(self.path)
        local = os.environ.get(LOCAL_DISK)
        try:
            written = None if local is None else self._write_by(Path(local), plan, planner)
        except OSError as error:
            warnings.warn(f"checkpoints go straight to {shared.parent}: {error}", stacklevel=1)
            written = None
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(written or self._write_into(shared, plan, planner))
        return done

    def _write_by(self, disk: Path, plan: Any, planner: Any) -> Any:
        """Write into a folder on `disk`, and hand the files on from there."""
        shared = Path(self.path)
        disk.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=disk))
        try:
            written = self._write_into(place, plan, planner)
            for file in place.iterdir():
                _copy_to_shared(file, shared / file.name)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return written

    def _write_into(self, place: Path, plan: Any, planner: Any) -> Any:
        shared = self.path
        self.path = place
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # Torch's zip writer has an error of its own for a full disk; the system's own says why.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        finally:
            self.path = shared
        own = place.glob(f"{plan.storage_data.prefix}*")
        return written, {path.name: checksum(path) for path in own}

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the first rank, when all have written: make the partial folder the newest one."""
        partial = Path(self.path)
        super().finish(metadata, [written for written, _ in results])
        write_atomically(partial / RUN_FILE, json.dumps(self.run_state).encode())
        sums = {name: checksum(partial / name) for name in (METADATA_FILE, RUN_FILE)}
        for _, own in results:
            sums |= own
        for name in sums:
            if not (partial / name).exists():  # ranks that do not share a disk
                raise FileNotFoundError(f"{name}, which another rank has written, is not there")
        write_atomically(partial / CHECKSUMS_FILE, json.dumps(sums, indent=1).encode())
        _fsync_folder(partial)
        partial.rename(self.final)
        _fsync_folder(self.final.parent)
        for other in list_checkpoints(self.final.parent):
            if other != self.final and other.is_dir():
                _remove_checkpoint(other)


def start_saving(
    state: State,
    writer: CheckpointWriter,
    group: torch.distributed.ProcessGroup | None,
    *,
    wait: bool,
) -> "Future[None]":
    """Begin to write `state`; every rank of `group` calls this.

    Args:
        group: over all ranks and CPUs, used for nothing else; None for a process alone.
        wait: write here and now, without a copy; otherwise copy and write in a thread.
    """
    ignore_undistributed_warning()
    done: Future[None] = Future()
    kept = state if wait else writer.stage(state)

    def write() -> None:
        try:
            save(kept, storage_writer=writer, process_group=group, no_dist=group is None)
        except BaseException as error:
            done.set_exception(root_cause(error))
        else:
            done.set_result(None)

    if wait:
        write()
    else:
        # A daemon: a rank whose peers are gone does not wait for them when it ends.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()
    return done


def _copy_to_shared(file: Path, place: Path) -> None:
    """Copy to a place on another disk, and wait until it has arrived."""
    with file.open("rb") as source, place.open("wb") as target:
        shutil.copyfileobj(source, target, STREAM_BYTES)
        target.flush()
        os.fsync(target.fileno())


def remove_leftovers(folder: Path) -> None:
    """Delete what a run left half written or half deleted; only the first rank does."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _REMAINS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _remove_checkpoint(checkpoint: Path) -> None:
    # Renamed first: a checkpoint that is half deleted is not taken for one.
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

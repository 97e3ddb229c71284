"""Writes a checkpoint's folder, whole or not at all.

All goes into `.step-00000100.partial`, which is renamed when every rank is done. Then the
checkpoints before are deleted.
"""

import json
import os
import re
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed
import torch.futures
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from unitransformer.checkpoint_names import checkpoint_name
from unitransformer.checkpoints import (
    METADATA,
    RUN,
    SUMS,
    Told,
    checksum,
    list_checkpoints,
    quieten_torch,
    root_of,
)
from unitransformer.records import write_atomically
from unitransformer.states import State

_REMAINS = re.compile(r"\.step-\d{8,}\.(partial|old)")


class Writer(FileSystemWriter):
    """Torch's, into a partial folder, with checksums; the first rank's `finish` renames it."""

    def __init__(self, folder: Path, step: int, told: Told) -> None:
        self.final = folder / checkpoint_name(step)
        self.told = told
        super().__init__(folder / f".{self.final.name}.partial", overwrite=False)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's part; `finish` gets where its tensors lie, and its checksums."""
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # Torch's zip writer has an error of its own for a full disk; the system's own says why.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        own = Path(self.path).glob(f"{plan.storage_data.prefix}*")
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result((written, {path.name: checksum(path) for path in own}))
        return done

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the first rank, when all have written: make the partial folder the newest one."""
        partial = Path(self.path)
        super().finish(metadata, [written for written, _ in results])
        write_atomically(partial / RUN, json.dumps(self.told).encode())
        sums = {name: checksum(partial / name) for name in (METADATA, RUN)}
        for _, own in results:
            sums |= own
        write_atomically(partial / SUMS, json.dumps(sums, indent=1).encode())
        _flush(partial)
        partial.rename(self.final)
        _flush(self.final.parent)
        for other in list_checkpoints(self.final.parent):
            if other != self.final and other.is_dir():
                _remove(other)


def start_saving(
    state: State, writer: Writer, group: torch.distributed.ProcessGroup | None, *, wait: bool
) -> "Future[None]":
    """Begin to write `state`; every rank of `group` calls this.

    Args:
        group: over all ranks and CPUs, used for nothing else; None for a process alone.
        wait: write here and now, without a copy; otherwise copy and write in a thread.
    """
    quieten_torch()
    done: Future[None] = Future()
    kept = state if wait else writer.stage(state)

    def write() -> None:
        try:
            save(kept, storage_writer=writer, process_group=group, no_dist=group is None)
        except BaseException as error:
            done.set_exception(root_of(error))
        else:
            done.set_result(None)

    if wait:
        write()
    else:
        # A daemon: a rank whose peers are gone does not wait for them when it ends.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()
    return done


def remove_remains(folder: Path) -> None:
    """Delete what a run left half written or half deleted; only the first rank does."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _REMAINS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a checkpoint that is half deleted is not taken for one.
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: folders that are found again, checked, and read without executing anything.

    step-00000100/
        __0_0.distcp ...   weights and moments, each rank's part (torch.distributed.checkpoint)
        .metadata          which part lies where
        run.json           config, losses and times so far
        sums.json          CRC-32 of each file; the last to be written

`writing` makes them: whole or not at all.
"""

import functools
import json
import pickle
import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from unitransformer.checkpoint.names import is_checkpoint_name
from unitransformer.checkpoint.state import State
from unitransformer.config import RunConfig, from_dict

RunState = dict[str, Any]  # what `run.json` holds
METADATA_FILE, RUN_FILE, CHECKSUMS_FILE = ".metadata", "run.json", "sums.json"
_TOLD = {  # what it holds at least
    "config": dict,
    "loss": list,
    "num_updates": int,
    "loss_scaler": dict,
}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_checkpoint_name(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(folder: Path) -> Path | None:
    found = list_checkpoints(folder)
    return found[-1] if found else None


# ------------------------------------------------------------------------------------ the run


def read_run_state(path: Path) -> RunState:
    """What a checkpoint says of its run.

    Raises:
        ValueError: damaged, or written by something else.
    """
    told = None
    if any((path / name).is_file() for name in (RUN_FILE, CHECKSUMS_FILE)):
        try:
            _compare(path, _read_sums(path), [RUN_FILE])
            told = json.loads((path / RUN_FILE).read_bytes())
        except Exception as error:  # what the reader raises for a damaged file is anything
            raise damaged_error(path, error) from error
    if not isinstance(told, dict) or not all(
        isinstance(told.get(key), kind) for key, kind in _TOLD.items()
    ):
        raise ValueError(
            f"checkpoint {path} was not written by this program; choose another folder"
        )
    return told


def check_same_run(run_state: RunState, config: RunConfig, path: Path) -> None:
    """A checkpoint continues only the run that wrote it.

    Raises:
        ValueError: the first field that differs, with both values.
    """
    before = from_dict(RunConfig, run_state["config"], f"checkpoint {path}: config").identity()
    now = config.identity()
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {path} is of another run: {name} is {before.get(name)} there and "
                f"{now.get(name)} here; give the same options, or start without --resume"
            )


# ---------------------------------------------------------------------------------- the files


def check_files(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with their checksums, and see that they hold tensors.

    Args:
        part: which of `parts` equal parts of the files to read; ranks share the work.

    Raises:
        ValueError: a file that is missing, damaged or holds more than numbers.
    """
    try:
        sums = _read_sums(path)
        _compare(path, sums, [METADATA_FILE])
        own = sorted(sums)[part::parts]
        _compare(path, sums, own)
        reader = CheckpointReader(path)
        if unknown := reader.files() - sums.keys():
            raise OSError(f"{min(unknown)} has no checksum")
        reader.check_tensors(own)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} holds more than tensors and plain values ({first_line(error)}), "
            "and nothing in it is executed; choose another folder"
        ) from error
    except Exception as error:  # what the readers raise for a damaged file is anything
        raise damaged_error(path, error) from error


def checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            total = zlib.crc32(piece, total)
    return total


def _read_sums(path: Path) -> dict[str, int]:
    sums = json.loads((path / CHECKSUMS_FILE).read_bytes())
    if not isinstance(sums, dict):
        raise ValueError(f"{CHECKSUMS_FILE} lists no files")
    return sums


def _compare(path: Path, sums: dict[str, int], names: Collection[str]) -> None:
    for name in names:
        if name not in sums or Path(name).name != name:
            raise OSError(f"{name} has no checksum")
        if checksum(path / name) != sums[name]:
            raise OSError(f"{name} does not have its checksum")


# -------------------------------------------------------------------------------- the tensors


class CheckpointReader(FileSystemReader):
    """Torch's, but nothing of a file is executed: its list of parts is a pickle."""

    @functools.cached_property
    def metadata(self) -> Metadata:
        """Which tensors there are, and which part of each lies where."""
        with (Path(self.path) / METADATA_FILE).open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it lists no parts")
        kinds = metadata.state_dict_metadata.values()
        if not all(isinstance(kind, TensorStorageMetadata) for kind in kinds):
            raise pickle.UnpicklingError("it lists more than tensors")  # torch would execute those
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def files(self) -> set[str]:
        """Names of the files that hold tensors."""
        return {part.relative_path for part in self.metadata.storage_data.values()}

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all saved tensors by name."""
        return {name: kind.size for name, kind in self._tensors().items()}

    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        return cast(dict[str, TensorStorageMetadata], self.metadata.state_dict_metadata)

    def check_tensors(self, names: Collection[str]) -> None:
        """See that the files `names` hold the tensors that they should; reads only their heads.

        Raises:
            UnpicklingError: something else.
        """
        sizes = {
            MetadataIndex(name, chunk.offsets): chunk.sizes
            for name, kind in self._tensors().items()
            for chunk in kind.chunks
        }
        for index, part in self.metadata.storage_data.items():
            if part.relative_path not in names:
                continue
            with (Path(self.path) / part.relative_path).open("rb") as file:
                found = _load_head(self._slice_file(file, part))
            if not isinstance(found, Tensor) or found.shape != sizes[index]:
                raise pickle.UnpicklingError(f"{index.fqn} is not the tensor it should be")


def _load_head(file: Any) -> Any:
    """What `torch.save` wrote, without its numbers; None if that is not plain."""
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        return None


class _PlainUnpickler(pickle.Unpickler):
    """Makes only what a list of parts is made of. Names are whole ones: no way leads on from them.

    A name like `threading.Thread` would be found in any module that imports threading.
    """

    _NAMES = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "_MEM_FORMAT_ENCODING",
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a list of parts")


def read_tensors(reader: CheckpointReader, state: State) -> None:
    """Fill each tensor of `state`, whole or divided, with its saved values.

    Raises:
        ValueError: one that is missing or has another shape.
    """
    ignore_undistributed_warning()
    try:
        load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise damaged_error(Path(reader.path), root_cause(error)) from error


def ignore_undistributed_warning() -> None:
    """No warning that a process reads or writes alone: here that is never by mistake.

    For good, as a thread that writes is not within any block of this one.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


# ------------------------------------------------------------------------------------- errors


def damaged_error(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"checkpoint {path} is damaged ({first_line(error)}); "
        "delete it and start again without --resume"
    )


def root_cause(error: BaseException) -> BaseException:
    """What went wrong, where torch has wrapped it: on the first rank on which it did."""
    if isinstance(error, CheckpointException):
        return error.failures[min(error.failures)][0]
    return error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

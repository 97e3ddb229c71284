"""Finds, verifies and reads checkpoints without executing anything in them.

step-00000100/
    __0_0.distcp ...   weights and moments, each rank's part (torch.distributed.checkpoint)
    .metadata          which part is in which file
    run.json           config, losses and times so far
    sums.json          CRC-32 of each file; written last
"""

import contextlib
import functools
import json
import pickle
import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from unitransformer.checkpoint.names import is_checkpoint_name, step_of
from unitransformer.checkpoint.state import State
from unitransformer.config import RunConfig, from_dict

RunState = dict[str, Any]  # what `run.json` holds
METADATA_FILE, RUN_FILE, CHECKSUMS_FILE = ".metadata", "run.json", "sums.json"
_METADATA = "torch.distributed.checkpoint.metadata"
_REQUIRED_FIELDS = {"config": dict, "loss": list, "num_updates": int, "loss_scaler": dict}


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if is_checkpoint_name(path.name)]
    return sorted(paths, key=lambda path: step_of(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(list_checkpoints(folder)), None)


def read_run_state(path: Path) -> RunState:
    """Returns the content of `run.json`.

    Raises:
        ValueError: it is damaged, or another program wrote it.
    """
    run_state = None
    is_ours = any((path / name).is_file() for name in (RUN_FILE, CHECKSUMS_FILE))
    if is_ours or _find_sound_before(path) is not None:
        try:
            _compare(path, _read_checksums(path), [RUN_FILE])
            run_state = json.loads((path / RUN_FILE).read_bytes())
        except Exception as error:  # a damaged file can raise anything
            raise damaged_error(path, error) from error
    fields = run_state if isinstance(run_state, dict) else {}
    if not all(isinstance(fields.get(key), kind) for key, kind in _REQUIRED_FIELDS.items()):
        raise ValueError(
            f"checkpoint {path} was not written by this program; choose another folder"
        )
    return fields


def check_same_run(run_state: RunState, config: RunConfig, path: Path) -> None:
    """Raises ValueError, with the first field that differs, for a checkpoint of another run."""
    before = from_dict(RunConfig, run_state["config"], f"checkpoint {path}: config").identity()
    now = config.identity()
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"checkpoint {path} is of another run: {name} is {before.get(name)} there and "
                f"{now.get(name)} here; give the same options, or start without --resume"
            )


def check_files(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compares the files of a checkpoint with their checksums, and checks that they hold tensors.

    Args:
        part: read only one of `parts` equal parts of the files; ranks share the work.

    Raises:
        ValueError: a file is missing, damaged or holds more than numbers.
    """
    try:
        _check_part(path, part, parts)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} holds more than tensors and plain values ({first_line(error)}); "
            "nothing was executed; choose another folder"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise damaged_error(path, error) from error


def _check_part(path: Path, part: int, parts: int) -> None:
    sums = _read_checksums(path)
    _compare(path, sums, [METADATA_FILE])
    names = sorted(sums)[part::parts]
    _compare(path, sums, names)
    reader = CheckpointReader(path)
    stored = {part.relative_path for part in reader.metadata.storage_data.values()}
    if unknown := stored - sums.keys():
        raise OSError(f"{min(unknown)} has no checksum")
    reader.check_tensors(names)


def checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total = zlib.crc32(chunk, total)
    return total


def _read_checksums(path: Path) -> dict[str, int]:
    try:
        checksums = json.loads((path / CHECKSUMS_FILE).read_bytes())
    except ValueError:
        checksums = None
    if not isinstance(checksums, dict):
        raise ValueError(f"{CHECKSUMS_FILE} lists no files")
    return checksums


def _compare(path: Path, sums: dict[str, int], names: Collection[str]) -> None:
    for name in names:
        if name not in sums or Path(name).name != name:
            raise OSError(f"{name} has no checksum")
        if checksum(path / name) != sums[name]:
            raise OSError(f"{name} does not match its checksum")


class CheckpointReader(FileSystemReader):
    """Torch's reader with a restricted unpickler for the metadata, so that no code is executed."""

    @functools.cached_property
    def metadata(self) -> Metadata:
        """The saved tensors, and where each of their parts is stored."""
        with (Path(self.path) / METADATA_FILE).open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA_FILE} is not metadata")
        kinds = metadata.state_dict_metadata.values()
        if not all(isinstance(kind, TensorStorageMetadata) for kind in kinds):
            raise pickle.UnpicklingError("it lists more than tensors")  # torch would unpickle those
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def check_tensors(self, names: Collection[str]) -> None:
        """Raises UnpicklingError unless files `names` hold the listed tensors; reads no values."""
        kinds: dict[str, Any] = self.metadata.state_dict_metadata
        sizes = {
            MetadataIndex(name, chunk.offsets): chunk.sizes
            for name, kind in kinds.items()
            for chunk in kind.chunks
        }
        for index, part in self.metadata.storage_data.items():
            if part.relative_path not in names:
                continue
            with (Path(self.path) / part.relative_path).open("rb") as file:
                try:
                    data = self._slice_file(file, part)
                    tensor = torch.load(data, map_location="meta", weights_only=True)
                except pickle.UnpicklingError:
                    tensor = None
            if not isinstance(tensor, Tensor) or tensor.shape != sizes[index]:
                raise pickle.UnpicklingError(f"{index.fqn} is not the listed tensor")


class _PlainUnpickler(pickle.Unpickler):
    """Creates only the types that the metadata consists of.

    Compares full names, because a dotted name could reach other modules through an allowed one.
    """

    _NAMES = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            (_METADATA, "_MEM_FORMAT_ENCODING"),
            (_METADATA, "BytesStorageMetadata"),
            (_METADATA, "ChunkStorageMetadata"),
            (_METADATA, "Metadata"),
            (_METADATA, "MetadataIndex"),
            (_METADATA, "StorageMeta"),
            (_METADATA, "TensorProperties"),
            (_METADATA, "TensorStorageMetadata"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of metadata")


def read_tensors(reader: CheckpointReader, state: State) -> None:
    """Fills `state`, full or sharded; raises ValueError for a missing tensor or another shape."""
    ignore_undistributed_warning()
    try:
        load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise damaged_error(Path(reader.path), root_cause(error)) from error


def ignore_undistributed_warning() -> None:
    """Hides the warning that a process reads or writes alone, for good and for all threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


def damaged_error(path: Path, error: BaseException) -> ValueError:
    """Returns an error that offers the newest older checkpoint that is sound, if there is one."""
    older = _find_sound_before(path)
    is_last_of_several = list_checkpoints(path.parent)[1:][-1:] == [path]
    which = f"all in {path.parent}" if is_last_of_several else "it"
    fix = f"delete {which} and start again without --resume"
    if older is not None:
        fix = f"{older} is sound: give that one (--resume {older}), or delete the damaged one"
    reason = first_line(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError) and error.filename:
        reason = f"{Path(error.filename).name} is missing"
    return ValueError(f"checkpoint {path} is damaged ({reason}); {fix}")


def _find_sound_before(path: Path) -> Path | None:
    if not is_checkpoint_name(path.name):
        return None
    for other in reversed(list_checkpoints(path.parent)):
        if step_of(other.name) < step_of(path.name):
            with contextlib.suppress(Exception):  # a damaged file can raise anything
                _check_part(other, 0, 1)
                return other
    return None


def root_cause(error: BaseException) -> BaseException:
    """Returns the error that torch has wrapped, of the lowest rank that has one."""
    if isinstance(error, CheckpointException):
        return error.failures[min(error.failures)][0]
    return error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

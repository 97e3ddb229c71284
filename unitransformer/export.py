"""Exports the weights of a checkpoint to one file: `python -m unitransformer.export DIR OUT`.

Exit codes: 0 done, 1 could not be written, 2 bad usage. torch is imported only when the options are
valid, nothing in the checkpoint is executed, and one tensor is in memory at a time.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from unitransformer.checkpoint.names import is_checkpoint_name
from unitransformer.cli import Parser, explain_parse_error, fail, only_reports, run_main
from unitransformer.cli_help import HelpFormatter
from unitransformer.config import RunConfig, from_dict
from unitransformer.files import why_not_writable


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, prints what was written and returns the exit code."""
    parser = Parser(
        prog="python -m unitransformer.export",
        description="Write the weights of a run's newest checkpoint as one float32 state dict. "
        "--init-from reads it, and load_state_dict of the plain model.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a run's folder, or a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="a file that ends in .safetensors")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    try:
        options = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        out = options.out
        _check_out(out, force=options.force)
        only_reports()
        print(export(options.dir, out))
    except jsonargparse.ArgumentError as error:
        explained = explain_parse_error(str(error), parser)
        hint = "; --help shows what is needed" if "required" in explained else ""
        return fail(explained + hint, 2)
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"out {out} could not be written ({error})", 1)
    return 0


def _check_out(out: Path, *, force: bool) -> None:
    """Raises ValueError if `out` must not or cannot be written."""
    if out.is_dir():
        raise ValueError(f"out {out} is a folder; name a file in it")
    if out.suffix != ".safetensors":
        raise ValueError(f"out {out} does not end in .safetensors; name such a file")
    if out.exists() and not force:
        raise ValueError(f"out {out} exists; name another file, or replace it with --force")
    if problem := why_not_writable(out.parent):
        parent, why = problem
        raise ValueError(f"out {out}: {parent} cannot be written ({why}); name another file")


def export(folder: Path, out: Path) -> str:
    """Writes the newest checkpoint of `folder`; returns a line that describes it.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or another program wrote it.
        OSError: `out` could not be written.
    """
    while True:
        checkpoint = find_checkpoint(folder)
        try:
            return _write(checkpoint, out)
        except ValueError:
            if checkpoint.exists():
                raise
        # Otherwise a run in progress has just replaced it with a newer one.


def find_checkpoint(folder: Path) -> Path:
    """Returns `folder` if it is a checkpoint, or else the newest checkpoint in it."""
    from unitransformer.checkpoint.reader import RUN_FILE, newest_checkpoint

    if not folder.is_dir():
        raise ValueError(f"dir {folder} is not a folder; give a run's folder or a checkpoint")
    if is_checkpoint_name(folder.name) or (folder / RUN_FILE).is_file():
        return folder
    newest = newest_checkpoint(folder / "checkpoints") or newest_checkpoint(folder)
    if newest is None:
        raise ValueError(
            f"dir {folder} holds no checkpoint; give a run's folder, its --checkpoint-dir or one "
            "checkpoint"
        )
    return newest


def _write(checkpoint: Path, out: Path) -> str:
    """Writes the weights of one checkpoint; returns a line that describes it."""
    import torch

    from unitransformer.checkpoint.reader import (
        CheckpointReader,
        check_files,
        read_run_state,
        read_tensors,
    )
    from unitransformer.transformer import PositionalEncoding, Transformer
    from unitransformer.weights import write_weights

    state = read_run_state(checkpoint)
    config = from_dict(RunConfig, state["config"], f"checkpoint {checkpoint}: config")
    check_files(checkpoint)
    reader = CheckpointReader(checkpoint)
    with torch.device("meta"):
        network = Transformer(config.model)
    weights = network.state_dict(keep_vars=True)
    # A tied head has two names, but the checkpoint holds it once.
    saved = {id(parameter): name for name, parameter in network.named_parameters()}

    def read(name: str) -> Any:  # a tensor
        if id(weights[name]) not in saved:  # the table of positions is not in the checkpoint
            positions = PositionalEncoding(config.model.num_positions, config.model.width)
            positions.init_weights()
            return positions.pe
        tensor = torch.empty(weights[name].shape)
        read_tensors(reader, {f"weight.{saved[id(weights[name])]}": tensor})
        return tensor

    step = len(state["loss"])
    metadata = {"recipe": config.recipe, "size": config.size, "step": str(step)}
    write_weights(weights, read, out, metadata | {"config_hash": config.hash()})
    return f"{out}: {config.recipe} {config.size} after step {step}, from {checkpoint}"


if __name__ == "__main__":
    sys.exit(run_main(main))

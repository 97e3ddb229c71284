"""The command line of `python -m scaling replay`."""

import tempfile
from pathlib import Path
from typing import Any

import jsonargparse

from scaling.recipe_process import can_fork, run_alone, start_worker
from scaling.replay.rerun import load_original, replay
from unitransformer.files import check_writable


def build_replay_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Measure the same cell again. Exit code 0: reproduced, 1: not reproduced, "
        "3: inconclusive, such as too wide an interval.",
        exit_on_error=False,
    )
    parser.add_argument(
        "cell", type=Path, metavar="CELL", help="a record, an outcome.json, or a cell's folder"
    )
    parser.add_argument("--repeats", type=int, default=1, help="launches")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share of a step that counts as the same"
    )
    parser.add_argument("--out", type=Path | None, default=None, help="folder that keeps the runs")
    return parser


def run_replay(given: Any) -> int:
    """Replays the cell, prints the verdict and returns the exit code; raises as `replay` does."""
    if given.out is not None:
        check_writable("out", given.out, is_folder=True)
    record = load_original(given.cell).record
    accelerator = "auto" if record is None else record["config"]["parallel"]["accelerator"]
    with (
        tempfile.TemporaryDirectory(prefix="replay-") as folder,
        start_worker(Path(folder, "worker.log")) as worker,
    ):
        verdict = replay(
            given.cell,
            runner=worker if can_fork(accelerator) else run_alone,
            print_line=lambda line: print(line, flush=True),
            repeats=given.repeats,
            tolerance=given.tolerance,
            out=given.out,
        )
    print("\n".join([verdict.word, *verdict.lines]))
    return verdict.exit_code

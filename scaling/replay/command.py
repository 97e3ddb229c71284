"""`python -m scaling replay CELL`: runs a recorded run again by its command and compares the two.

CELL is a record, an outcome.json or the folder of either.
Exit codes: 0 reproduced | 1 not reproduced | 3 inconclusive (2 is bad usage, as everywhere).
"""

import contextlib
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from scaling.exit_status import decide_status
from scaling.paths import why_missing
from scaling.recipe_process import Runner, can_fork, run_alone, start_worker
from scaling.replay.compare import (
    DAY_S,
    OriginalRun,
    ReplayLaunch,
    ReplayVerdict,
    compare,
    measured_loss_blocks,
)
from scaling.store.outcome import FILE, is_outcome, read_outcome
from unitransformer.config import Recipe
from unitransformer.files import check_is_utf8, check_writable
from unitransformer.launch.process_tree import count_oom_kills
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.checksums import read_json
from unitransformer.record.schema import load_record
from unitransformer.record.units import format_count

# Options of a recipe, each with a value, that set output paths or the number of launches.
OUTPUT_OPTIONS = ("--out", "--record", "--checkpoint-dir", "--trace", "--repeats")


def run_replay(given: Any) -> int:
    """Replays the cell, prints the verdict and returns the exit code; raises as `replay` does."""
    if given.out is not None:
        check_is_utf8("out", given.out)
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


def replay(
    path: Path,
    *,
    runner: Runner,
    print_line: Callable[[str], None],
    repeats: int = 1,
    tolerance: float = 0.05,
    out: Path | None = None,
) -> ReplayVerdict:
    """Runs the cell again and compares status, loss curve and median steady step.

    Reproduced: the losses are equal up to the parity bound of the precision, and the whole 95 %
    interval of the ratio of the median steps (now over then) is within `tolerance` of 1. Not
    reproduced: other losses, another status, or the whole interval is outside. A failure is
    reproduced by the same status, a crash by the same exception or exit code. Otherwise, and if a
    signal stopped a launch: inconclusive.

    Args:
        path: a record, an outcome.json, or the folder of either.
        runner: runs the recipe, such as `recipe_process.run_alone`.
        print_line: called with each line of progress.
        repeats: launches; from two on, the interval includes the variance between launches.
        tolerance: relative, of the step time.
        out: folder that keeps the new runs; None: they are deleted.

    Raises:
        ValueError: no cell there, not a recipe's command, a launch that resolves to another config
            on this machine, or arguments out of range.
        RuntimeError: a launch exited with 0 and left no record.
        OSError: files cannot be read or written.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; give a share between 0 and 1, such as 0.05")
    original = load_original(path)
    recipe, arguments = read_command(original.command)
    launches: list[ReplayLaunch] = []
    if out is not None and any(out.glob("launch-*")):
        raise ValueError(f"out {out} holds launches of a replay; choose another with --out")
    if reason := _why_no_speed(original):
        print_line(
            f"only losses can be compared, so that the best result is inconclusive: then {reason}"
        )
    with tempfile.TemporaryDirectory(prefix="replay-") as temporary:
        folder = Path(temporary) if out is None else out
        for number in range(1, repeats + 1):
            print_line(f"launch {number} of {repeats}: {original.command}")
            launch_folder = folder / f"launch-{number}"
            launches.append(_launch(recipe, arguments, launch_folder, original, runner))
            if launches[-1].status != "ok":
                break
    return compare(original, launches, tolerance=tolerance)


def _why_no_speed(original: OriginalRun) -> str | None:
    """Returns why the speed of a run that ended well cannot be compared with any replay."""
    if original.status != "ok" or original.record is None:
        return None
    if not (metrics := original.record["metrics"]):
        return f"no steady state: {original.record['no_steady_state_reason']}"
    return str(metrics["interval"]) if metrics["low_step_s"] is None else None


def load_original(path: Path) -> OriginalRun:
    """Returns the run to reproduce.

    Raises:
        ValueError: not a record or an outcome, or nothing that a replay can be compared with.
        OSError: it cannot be read.
    """
    file = _file_of(path)
    try:
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if is_outcome(values):
        outcome = read_outcome(values, str(file))
        original = OriginalRun(
            command=outcome.command,
            status=outcome.status,
            record=load_record(file.parent / outcome.record) if outcome.record else None,
            exit_code=outcome.exit_code,
            # A cell that timed out gets the same time again.
            limit_s=outcome.elapsed_s if outcome.status == "timeout" else DAY_S,
            memory_limit_bytes=outcome.memory_limit_bytes,
        )
    elif not _is_run(values):
        raise ValueError(f"{file} is not a run record; name a record, an {FILE} or a cell")
    else:
        record = load_record(file)
        original = OriginalRun(command=record["command"], status=record["status"], record=record)
    if original.status == "preempted":
        raise ValueError(f"{file}: a signal stopped this run; replay a run that ended by itself")
    if original.status == "ok" and original.record is None:
        raise ValueError(f"{file}: its status is ok but it names no record to compare with")
    return original


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise ValueError(
            f"{path} {why_missing(path)}; give a record, an {FILE} or the folder of a cell"
        )
    if not path.is_dir():
        return path
    if (path / FILE).exists():
        return path / FILE
    files = [file for file in sorted(path.glob("*.json")) if _may_be_run(file)]
    if len(files) != 1:
        raise ValueError(
            f"{path} holds {format_count(len(files), 'possible record')}; name the record itself"
        )
    return files[0]


def _may_be_run(file: Path) -> bool:
    """Says whether a file is a run record, or damaged so that it may have been one."""
    with contextlib.suppress(OSError, ValueError):
        return file.is_file() and _is_run(read_json(file))
    return True


def _is_run(values: Any) -> bool:
    return isinstance(values, Mapping) and "step_s" in values


def read_command(command: str) -> tuple[Recipe, list[str]]:
    """Returns recipe and options of `python -m recipes.X options`, without `OUTPUT_OPTIONS`.

    Raises:
        ValueError: another command, or one that resumes an earlier run.
    """
    arguments = shlex.split(command)
    recipe = next(
        (name for name in get_args(Recipe) if arguments[2:3] == [f"recipes.{name}"]), None
    )
    if recipe is None or arguments[1:2] != ["-m"]:
        raise ValueError(f"command is {command!r}; it must be `python -m recipes.X options`")
    options = arguments[3:]
    names = [option.partition("=")[0] for option in options]
    if "--resume" in names:
        raise ValueError(f"command is {command!r}: it resumes another run; replay that one")
    kept = [
        option
        for before, name, option in zip(["", *options], names, options, strict=False)
        if before not in OUTPUT_OPTIONS and name not in OUTPUT_OPTIONS
    ]
    return recipe, kept


def _launch(
    recipe: Recipe, arguments: Sequence[str], folder: Path, original: OriginalRun, runner: Runner
) -> ReplayLaunch:
    folder.mkdir(parents=True)
    record_path, log = folder / "record.json", folder / "log"
    # A file given with --config may set paths as well: the last option wins.
    outputs = ["--record", str(record_path), "--repeats", "1"]
    blocks = {} if original.record is None else measured_loss_blocks(original.record)
    sizes = [text for n, size in blocks.items() for text in (f"--{n.replace('_', '-')}", str(size))]
    killed_before = count_oom_kills()
    result = runner(
        recipe,
        [*arguments, *sizes, *outputs],
        log=log,
        limit_s=original.limit_s,
        memory_limit_bytes=original.memory_limit_bytes,
        variables={RUN_FOLDER: str(folder)},
    )
    record = load_record(record_path) if record_path.exists() else None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if result.exit_code == 0 and record is None:
        raise RuntimeError(f"{recipe} exited with 0 and left no record in {folder}")
    return ReplayLaunch(
        status=decide_status(result, record, killed_by_kernel=count_oom_kills() > killed_before),
        record=record,
        last_line=lines[-1].replace(str(folder), "…") if lines else "its log is empty",
        exit_code=result.exit_code,
    )

"""A run that was recorded goes in, is run again by its own command; whether it comes out the same.

`python -m scaling replay CELL`, where CELL is a record, an outcome.json or the folder of either.
Exit codes: 0 reproduced | 1 not reproduced | 3 inconclusive (2 is bad usage, as everywhere).
"""

import contextlib
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_args

from scaling.exit_status import count_oom_kills, decide_status
from scaling.recipe_process import Runner
from scaling.replay.compare import DAY_S, ReplayLaunch, OriginalRun, ReplayVerdict, compare
from scaling.store.outcome import FILE, CellOutcome, is_outcome, read_outcome
from unitransformer.config import Recipe
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.schema import load_record
from unitransformer.record.checksums import read_json
from unitransformer.record.units import count

Say = Callable[[str], None]

# Options of a recipe that say where things go or how often; each takes a value.
PLACES = ("--out", "--record", "--checkpoint-dir", "--trace", "--repeats")


def replay(
    path: Path,
    *,
    runner: Runner,
    say: Say,
    repeats: int = 1,
    tolerance: float = 0.05,
    out: Path | None = None,
) -> ReplayVerdict:
    """Run it again and compare: status, loss curve, median steady step.

    Reproduced: the losses are equal up to the parity bound of the precision, and the whole 95 %
    interval of the ratio of the median steps (now over then) is within `tolerance` of 1. Not
    reproduced: other losses, another status, or the whole interval is beyond. A cell that failed
    is reproduced by failing with the same status, a crash by the same exception or exit code.
    Inconclusive too: a launch that was stopped from outside.

    Args:
        path: a record, an outcome.json, or the folder of either.
        runner: `processes.run_alone`, or a worker.
        say: told each line of progress.
        repeats: launches; from two on their own variance is in the interval.
        tolerance: share of a step.
        out: folder that keeps the new runs; None: nothing is kept.

    Raises:
        ValueError: no cell there, a command that is no recipe's, a launch that resolves to another
            config on this machine, arguments out of range.
        RuntimeError: a launch ended well and left no record.
        OSError: files that cannot be read or written.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; give a share between 0 and 1, such as 0.05")
    original = load_original(path)
    recipe, arguments = read_command(original.command)
    launches: list[ReplayLaunch] = []
    with _folder(out) as folder:
        for number in range(1, repeats + 1):
            say(f"launch {number} of {repeats}: {original.command}")
            place = folder / f"launch-{number}"
            launches.append(_launch(recipe, arguments, place, original, runner))
            if launches[-1].status != "ok":
                break
    return compare(original, launches, tolerance=tolerance)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.glob("launch-*")):
            raise ValueError(f"out {out} holds launches of a replay; choose another with --out")
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="replay-") as temporary:
        yield Path(temporary)


# ------------------------------------------------------------------------------ the original


def load_original(path: Path) -> OriginalRun:
    """Read what is to be reproduced.

    Raises:
        ValueError: nothing of the kind there, or it was stopped from outside.
        OSError: it cannot be read.
    """
    file = _file_of(path)
    try:
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if is_outcome(values):
        outcome = read_outcome(values, str(file))
        return _of_outcome(outcome, file)
    record = load_record(file)
    return _checked(
        OriginalRun(command=record["command"], status=record["status"], record=record), file
    )


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a record, an {FILE} or the folder of a cell")
    if not path.is_dir():
        return path
    if (path / FILE).exists():
        return path / FILE
    found = sorted(path.glob("*.json"))
    if len(found) != 1:
        raise ValueError(f"{path} holds {count(len(found), 'JSON file')}; name the record itself")
    return found[0]


def _of_outcome(outcome: CellOutcome, file: Path) -> OriginalRun:
    record = None if outcome.record is None else load_record(file.parent / outcome.record)
    return _checked(
        OriginalRun(
            command=outcome.command,
            status=outcome.status,
            record=record,
            exit_code=outcome.exit_code,
            # What took too long is given as long again.
            limit_s=outcome.elapsed_s if outcome.status == "timeout" else DAY_S,
            memory_limit_bytes=outcome.memory_limit_bytes,
        ),
        file,
    )


def _checked(original: OriginalRun, file: Path) -> OriginalRun:
    if original.status == "preempted":
        raise ValueError(f"{file}: it was stopped from outside; replay a run that ended by itself")
    if original.status == "ok" and original.record is None:
        raise ValueError(f"{file}: it ended well and names no record; there is nothing to compare")
    return original


def read_command(command: str) -> tuple[Recipe, list[str]]:
    """Recipe and options of `python -m recipes.X options`, without those that name places.

    Raises:
        ValueError: another command, or one that goes on with an earlier run.
    """
    words = shlex.split(command)
    recipe = next((name for name in get_args(Recipe) if words[2:3] == [f"recipes.{name}"]), None)
    if recipe is None or words[1:2] != ["-m"]:
        raise ValueError(f"command is {command!r}; it must be `python -m recipes.X options`")
    options = words[3:]
    if any(word.partition("=")[0] == "--resume" for word in options):
        raise ValueError(f"command is {command!r}: it goes on with another run; replay that one")
    kept = [
        word
        for before, word in pairwise(["", *options])
        if before not in PLACES and word.partition("=")[0] not in PLACES
    ]
    return recipe, kept


# ------------------------------------------------------------------------------ running again


def _launch(
    recipe: Recipe, arguments: Sequence[str], folder: Path, original: OriginalRun, runner: Runner
) -> ReplayLaunch:
    folder.mkdir(parents=True)
    record_path, log = folder / "record.json", folder / "log"
    # A file given with --config may name places as well: the last word wins.
    places = ["--record", str(record_path), "--repeats", "1"]
    killed_before = count_oom_kills()
    ended = runner(
        recipe,
        [*arguments, *places],
        log=log,
        limit_s=original.limit_s,
        memory_limit_bytes=original.memory_limit_bytes,
        variables={RUN_FOLDER: str(folder)},
    )
    record = load_record(record_path) if record_path.exists() else None
    if ended.exit_code == 0 and record is None:
        raise RuntimeError(f"{recipe} ended well and left no record in {folder}")
    return ReplayLaunch(
        status=decide_status(ended, record, killed_by_kernel=count_oom_kills() > killed_before),
        record=record,
        last_words=_last_words(log, folder),
        exit_code=ended.exit_code,
    )


def _last_words(log: Path, folder: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].replace(str(folder), "…") if lines else "nothing was said"

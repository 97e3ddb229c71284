"""What a report keeps of runs that did not end well, and of files that are no runs: Markdown."""

from pathlib import PurePosixPath

from scaling.markdown import code_block, command_lines, details, escaped, shortened, table
from scaling.report import run_formatting
from scaling.report.environment import without_places
from scaling.report.table_notes import Columns, draw
from scaling.store.outcome import STUDY
from scaling.store.reader import LeftOut, Store
from scaling.store.run import Run
from unitransformer.record.units import count

LONGEST_MESSAGE = 160  # letters of an error in a table; the record has all of them

OF_A_SWEEP = (STUDY, "largest-batches.json")  # what a sweep writes beside its cells


def failures(store: Store) -> list[str]:
    failed = [run for run in store.single_runs if not run.is_ok]
    if not failed:
        return []
    columns: Columns = {
        "#": [str(number) for number in range(1, len(failed) + 1)],
        "recipe": [escaped(run_formatting.label(run)) for run in failed],
        "devices": [run_formatting.devices(run) for run in failed],
        "precision": [run.config.parallel.precision for run in failed],
        "batch": [run_formatting.batch(run) for run in failed],
        "steps": [f"{run.num_steps:,} of {run.config.max_steps:,}" for run in failed],
        "status": [str(run.record["status"]) for run in failed],
        "error": [_error(run) for run in failed],
        "record": [run_formatting.record(run) for run in failed],
    }
    commands = [
        f"# {number}\n{command_lines(str(run.record['command']))}"
        for number, run in enumerate(failed, 1)
    ]
    return [
        "## Runs that failed",
        *draw(columns, ("#", "status", "error")),
        details("Commands of the runs that failed", code_block("\n".join(commands), "sh")),
    ]


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "no error recorded"
    message = without_places(str(error.get("message") or "no message"), run.record["hardware"])
    told = f"{error.get('type') or 'error of unknown type'}: {message}"
    return escaped(shortened(told, LONGEST_MESSAGE))


def left_out(store: Store) -> list[str]:
    """Damaged and double records; files that are something else are folded."""
    rows = [
        (escaped(file.name), file.kind, escaped(file.reason))
        for file in store.left_out
        if file.kind != "foreign"
    ]
    foreign = [
        file for file in store.left_out if file.kind == "foreign" and not _is_of_a_sweep(file)
    ]
    blocks = [table(("file", "kind", "reason"), rows)] if rows else []
    if foreign:
        lines = "\n".join(f"- {escaped(file.name)}: {escaped(file.reason)}" for file in foreign)
        head = f"{count(len(foreign), 'more file')} ignored: not finished runs"
        blocks.append(details(head, lines))
    return ["## Files left out", *blocks] if blocks else []


def _is_of_a_sweep(file: LeftOut) -> bool:
    return PurePosixPath(file.name).name in OF_A_SWEEP

"""What a report keeps of runs that did not end well, and of files that are no runs: Markdown."""

from pathlib import PurePosixPath

from scaling.markdown import count, escaped, table
from scaling.report import run_formatting
from scaling.report.environment import without_places
from scaling.store.outcome import STUDY
from scaling.store.reader import LeftOut, Store
from scaling.store.run import Run

LONGEST_MESSAGE = 300  # letters of an error in a table; the record has all of them

OF_A_SWEEP = (STUDY, "largest-batches.json")  # what a sweep writes beside its cells


def failures(store: Store) -> list[str]:
    failed = [run for run in store.single_runs if not run.is_ok]
    if not failed:
        return []
    headers = (
        "recipe",
        "devices",
        "precision",
        "batch",
        "steps",
        "status",
        "error",
        "command",
        "record",
    )
    rows = [
        (
            escaped(run_formatting.label(run)),
            run_formatting.devices(run),
            run.config.parallel.precision,
            run_formatting.batch(run),
            f"{run.num_steps:,} of {run.config.max_steps:,}",
            run.record["status"],
            _error(run),
            escaped(str(run.record["command"])),
            run_formatting.record(run),
        )
        for run in failed
    ]
    return ["## Runs that did not end well", table(headers, rows)]


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "not told: the record holds none"
    message = without_places(str(error.get("message") or "no message"), run.record["hardware"])
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}…"
    return escaped(f"{error.get('type') or 'error of a type not told'}: {message}")


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
        head = f"{count(len(foreign), 'more file')}: not a finished run, and passed by"
        blocks.append(f"<details>\n<summary>{head}</summary>\n\n{lines}\n\n</details>")
    return ["## Files left out", *blocks] if blocks else []


def _is_of_a_sweep(file: LeftOut) -> bool:
    return PurePosixPath(file.name).name in OF_A_SWEEP

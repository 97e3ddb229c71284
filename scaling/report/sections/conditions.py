"""The page of conditions: hardware, versions, commits, data, failed runs and files left out."""

from collections.abc import Callable, Iterable, Sequence

from scaling.markdown import details, escaped, folded_commands, link, note, shortened, table
from scaling.parity.certificate import find_other_bounds
from scaling.report import run_formatting
from scaling.report.run_formatting import without_paths
from scaling.report.table_notes import draw
from scaling.store.reader import Store
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.record.units import format_bytes, format_count

SHORT = 12  # characters of a commit
MOST_NAMED = 3
LONGEST_MESSAGE = 160  # characters of an error in a table; the record has all of them
OTHER_BOUNDS = (
    "The bounds of loss parity have changed since these certificates were written. The tables use "
    "those of today."
)


def conditions_page(store: Store) -> list[str]:
    runs = store.successful_runs
    certificates = [
        f"{link(certificate.name)}: {escaped('; '.join(bounds))}"
        for certificate in store.certificates
        if (bounds := find_other_bounds(certificate))
    ]
    return [
        *(_conditions(runs) if runs else ["No run ended well."]),
        *note(OTHER_BOUNDS, certificates),
        *_failed_runs([run for run in store.single_runs if not run.is_ok]),
        *_left_out(store),
    ]


def measured_on(runs: Sequence[Run]) -> str:
    """Returns processors, devices, torch versions, commits and days, each once, as plain text."""
    machines: dict[str, None] = {}
    for host in (host for run in runs for host in run.record["hardware"]):
        parts = [] if host["device"] == "cpu" else [host["device"]]
        parts.append(str(host.get("cpu") or "processor unknown"))
        parts += [f"{cores} cores"] if (cores := host.get("cpu_cores")) else []
        parts += [f"{format_bytes(size)} memory"] if (size := host.get("memory_bytes")) else []
        machines[", ".join(parts)] = None
    torch = _few(str(run.record["versions"].get("torch")) for run in runs)
    commits = _few(str(run.record["code"]["commit"])[:SHORT] for run in runs)
    days = sorted({str(run.record.get("started_at"))[:10] for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(machines)}; torch {torch}; commit {commits}; {when}"


def _few(values: Iterable[str]) -> str:
    """Returns different values, or their number if there are many."""
    different = list(dict.fromkeys(values))
    return " and ".join(different) if len(different) <= MOST_NAMED else f"{len(different)} of them"


def _conditions(runs: Sequence[Run]) -> list[str]:
    rows: dict[str, Callable[[Run], str]] = {
        "Hardware": lambda run: run_formatting.describe_hardware(run.record["hardware"]),
        "Versions": lambda run: run_formatting.describe_versions(run.record["versions"]),
        "Commit": lambda run: run_formatting.describe_commit(run.record["code"]),
        "Data": _data,
    }
    return [block for name in rows for block in (f"## {name}", _distinct(runs, rows[name]))]


def _distinct(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """Lists different descriptions, with their recipes unless all runs share one."""
    recipes: dict[str, set[Recipe]] = {}
    for run in runs:
        recipes.setdefault(describe(run), set()).add(run.config.recipe)
    if len(recipes) == 1:
        return f"- {escaped(*recipes)}"
    lines = []
    for text, names in recipes.items():
        titles = [title for name, title in run_formatting.TITLES.items() if name in names]
        lines.append(f"- {', '.join(titles)}: {escaped(text)}")
    return "\n".join(lines)


def _data(run: Run) -> str:
    data = run.record["data"]
    digest = f"sha256 {data['sha256']}" if data["sha256"] else "no files, so no sha256"
    return f"{without_paths(data['description'], run.record['hardware'])}; {digest}"


def _failed_runs(failed: Sequence[Run]) -> list[str]:
    if not failed:
        return []
    rows, commands = [], []
    for number, run in enumerate(failed, 1):
        row = {
            "#": str(number),
            "recipe": escaped(run_formatting.label(run)),
            "devices": run_formatting.devices(run),
            "precision": run.config.parallel.precision,
            "batch": run_formatting.batch(run),
            "steps": f"{run.num_steps:,} of {run.config.max_steps:,}",
            "status": str(run.record["status"]),
            "error": _error(run),
            "record": run_formatting.record(run),
        }
        rows.append(row)
        commands.append((str(number), run.record["command"]))
    return [
        "## Runs that failed",
        *draw(rows, always=("#", "status", "error")),
        folded_commands("Commands of the runs that failed", commands),
    ]


def _error(run: Run) -> str:
    error = run.record["error"]
    if error is None:
        return "no error recorded"
    message = without_paths(str(error.get("message") or "no message"), run.record["hardware"])
    text = f"{error.get('type') or 'error of unknown type'}: {message}"
    return escaped(shortened(text, LONGEST_MESSAGE))


def _left_out(store: Store) -> list[str]:
    """Shows damaged and duplicate records; files that are something else are folded."""
    rows, foreign = [], []
    for file in store.left_out:
        if file.kind != "foreign":
            rows.append((escaped(file.name), file.kind, escaped(file.reason)))
        else:
            foreign.append(f"- {escaped(file.name)}: {escaped(file.reason)}")
    blocks = [table(("file", "kind", "reason"), rows)] if rows else []
    if foreign:
        head = f"{format_count(len(foreign), 'more file')} ignored: not finished runs"
        blocks.append(details(head, "\n".join(foreign)))
    return ["## Files left out", *blocks] if blocks else []

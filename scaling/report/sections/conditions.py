"""The page of conditions: hardware, versions, commits, data, failed runs, files left out."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import get_args

from scaling.markdown import escaped, link
from scaling.parity.certificate import find_other_bounds
from scaling.report import run_formatting
from scaling.report.environment import (
    describe_commit,
    describe_hardware,
    describe_versions,
    without_places,
)
from scaling.report.sections.failures import failures, left_out
from scaling.store.reader import Store
from scaling.store.run import Run
from unitransformer.config import Recipe
from unitransformer.record.units import gib

SHORT = 12  # letters of a commit
MOST_NAMED = 3


def conditions_page(store: Store) -> list[str]:
    return [
        *_conditions([run for run in store.runs if run.is_ok]),
        *_other_bounds(store),
        *failures(store),
        *left_out(store),
    ]


def measured_on(runs: Sequence[Run]) -> str:
    """Processors, devices, torch versions, commits and days, each once."""
    kinds = dict.fromkeys(
        (host["device"], host.get("cpu"), host.get("cpu_cores"), host.get("memory_bytes"))
        for run in runs
        for host in run.record["hardware"]
    )
    machines = []
    for device, cpu, cores, memory in kinds:
        size = [f"{cores} cores"] if cores else []
        size += [f"{gib(memory)} memory"] if memory else []
        parts = [] if device == "cpu" else [device]
        machines.append(", ".join([*parts, str(cpu or "processor unknown"), *size]))
    torch = _few(str(run.record["versions"].get("torch")) for run in runs)
    commits = _few(str(run.record["code"]["commit"])[:SHORT] for run in runs)
    days = sorted({str(run.record.get("started_at"))[:10] for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    about = f"{'; '.join(dict.fromkeys(machines))}; torch {torch}; commit {commits}; {when}"
    return escaped(about)


def _few(values: Iterable[str]) -> str:
    """Each once; of many only the number."""
    different = list(dict.fromkeys(values))
    return " and ".join(different) if len(different) <= MOST_NAMED else f"{len(different)} of them"


def _conditions(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["No run ended well."]
    rows: dict[str, Callable[[Run], str]] = {
        "Hardware": lambda run: describe_hardware(run.record["hardware"]),
        "Versions": lambda run: describe_versions(run.record["versions"]),
        "Commit": lambda run: describe_commit(run.record["code"]),
        "Data": _data,
    }
    return [block for name in rows for block in (f"## {name}", _distinct(runs, rows[name]))]


def _distinct(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """A list of what is told, with the recipes it is of unless all runs share it."""
    recipes: dict[str, set[Recipe]] = {}
    for run in runs:
        recipes.setdefault(escaped(describe(run)), set()).add(run.config.recipe)
    if len(recipes) == 1:
        return f"- {next(iter(recipes))}"
    return "\n".join(f"- {_in_order(own)}: {value}" for value, own in recipes.items())


def _in_order(recipes: Collection[Recipe]) -> str:
    return ", ".join(
        run_formatting.TITLES[recipe] for recipe in get_args(Recipe) if recipe in recipes
    )


def _data(run: Run) -> str:
    data = run.record["data"]
    proof = f"sha256 {data['sha256']}" if data["sha256"] else "no files, so no sha256"
    return f"{without_places(data['description'], run.record['hardware'])}; {proof}"


def _other_bounds(store: Store) -> list[str]:
    """A box with the certificates that were judged by other bounds; nothing if none was."""
    found = [
        (certificate.name, find_other_bounds(certificate)) for certificate in store.certificates
    ]
    lines = [f"> - {link(name)}: {escaped('; '.join(bounds))}" for name, bounds in found if bounds]
    words = (
        "> The code holds loss parity to other bounds than when these certificates were written. "
        "The tables judge by today's."
    )
    return ["\n".join(["> [!NOTE]", words, ">", *lines])] if lines else []

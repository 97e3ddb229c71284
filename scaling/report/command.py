"""Runs `python -m scaling report`: loads a store and writes pages, plots and exports."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaling.report.options import ReportOptions, read_report_options
from scaling.report.results_md import draw_plots, render_pages
from scaling.report.rows import rows, to_csv, to_json, with_predictions
from scaling.report.staleness import compare_with_today
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store, load_store, relative_name
from unitransformer.cli import only_reports
from unitransformer.files import check_writable, write_atomically
from unitransformer.launch.background import start_in_background
from unitransformer.launch.gc_pause import pause_gc
from unitransformer.record.units import format_count

FOLDERS = {"plots", "pages"}  # outputs that are folders; they may be the same one
OUTPUTS = ("out", "plots", "pages", "html", "csv", "json")


def run_report(given: Any) -> int:
    """Writes all files, prints how many records they come from, and returns exit code 0.

    Raises:
        ValueError: folders without records, or places that cannot be written.
        OSError: a file could not be written.
    """
    options = read_report_options(given)
    places = [(name, path) for name in OUTPUTS if (path := getattr(options, name)) is not None]
    for name, path in places:
        check_writable(name, path, is_folder=name in FOLDERS)
    _refuse_same(places)
    only_reports()
    with pause_gc():
        _write(options)
    return 0


def _refuse_same(places: Iterable[tuple[str, Path]]) -> None:
    """Raises ValueError if two outputs, given as option and path, would overwrite each other."""
    owners: dict[Path, str] = {}
    for option, path in places:
        owner = owners.setdefault(path.resolve(), option)
        if owner != option and not {owner, option} <= FOLDERS:
            raise ValueError(f"{option} {path} is written by --{owner} too; choose another path")


def _write(options: ReportOptions) -> None:
    folder = options.out.parent
    store = load_store(options.folders, relative_to=folder)
    used = (store.runs, store.certificates, store.comparisons, store.self_tests, store.cells)
    if not any(used):
        folders = " and ".join(map(str, options.folders))
        raise ValueError(
            f"{folders}: no run record below; {_left_out(store)}; give a folder that holds run "
            "records, such as runs, or train one first: python -m recipes.gpt"
        )
    read: list[Any] = [*itertools.chain(*used), *store.left_out]
    names = {*store.own_files, *store.jobs, *(file.name for file in read)}
    for option in ("html", "csv", "json"):
        path = getattr(options, option)
        if path is not None and relative_name(path, folder) in names:
            raise ValueError(f"{option} {path} is there and no export; choose another --{option}")
    analysis = StoreAnalysis(store, compare_with_today(store, Path(__file__).parents[2]))
    draw = functools.partial(draw_plots, analysis)
    wait_for_plots = start_in_background(draw) or draw
    pages = render_pages(analysis, options)
    files = [("plots", options.plots / name, drawn) for name, drawn in wait_for_plots().items()]
    if options.csv is not None or options.json is not None:
        exported = with_predictions(rows(store), analysis.predictions[0])
        if options.csv is not None:
            files.append(("csv", options.csv, to_csv(exported).encode(errors="replace")))
        if options.json is not None:
            files.append(("json", options.json, to_json(exported).encode()))
    if options.html is not None:
        from scaling.report.html.page import render_html

        page = render_html(analysis, title="Results").encode(errors="replace")
        files.append(("html", options.html, page))
    # RESULTS.md comes last: the plots and pages that it links exist by then.
    for name, text in reversed(pages.items()):
        option = "out" if str(name) == options.out.name else "pages"
        files.append((option, folder / name, text.encode()))
    _refuse_same([(option, path) for option, path, _ in files])
    for _, path, content in files:
        write_atomically(path, content)
        print(path)
    print(f"{_used(store)}; {_left_out(store)}")


def _used(store: Store) -> str:
    counts = _counts(str(run.record["status"]) for run in store.runs)
    parts = [f"{format_count(len(store.runs), 'record')} used ({counts or 'none'})"]
    if store.cells:
        parts.append(f"{format_count(len(store.cells), 'cell')} of sweeps")
    if store.certificates:
        parts.append(format_count(len(store.certificates), "certificate"))
    if store.comparisons:
        parts.append(
            format_count(len(store.comparisons), "comparison with a peer", "comparisons with peers")
        )
    if store.self_tests:
        parts.append(format_count(len(store.self_tests), "self-test"))
    return ", ".join(parts)


def _left_out(store: Store) -> str:
    """Returns how many files were left out and why, with the reason of the first damaged one."""
    if not store.left_out:
        return "no file left out"
    counts = _counts(file.kind for file in store.left_out)
    damaged = [f"{file.name}: {file.reason}" for file in store.left_out if file.kind == "damaged"]
    about = "; ".join([counts, *(" ".join(reason.split()) for reason in damaged[:1])])
    return f"{format_count(len(store.left_out), 'file')} left out ({about})"


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(Counter(names).items()))

"""A report as it was asked for: files written, what they stand on told."""

from collections import Counter
from pathlib import Path

from scaling.report.exports import to_csv, to_json
from scaling.report.options import ReportOptions, report_command
from scaling.report.results_md import draw_plots, render_pages
from scaling.report.rows import rows
from scaling.report.staleness import look
from scaling.store.reader import Store, load_store, relative_name
from unitransformer.files import check_writable, write_atomically
from unitransformer.launch.gc_pause import pause_gc
from unitransformer.record.units import count

EXPORTS = ("html", "csv", "json")
TITLE = "Results"


def run_report(options: ReportOptions) -> None:
    """Write what was asked for and say how many records it stands on.

    Raises:
        ValueError: folders without records, or places that cannot be written.
        OSError: a file could not be written after all.
    """
    out, plots = options.out, options.plots
    check_writable("out", out, is_folder=False)
    check_writable("plots", plots, is_folder=True)
    check_writable("pages", options.pages, is_folder=True)
    for name in EXPORTS:
        if getattr(options, name) is not None:
            check_writable(name, getattr(options, name), is_folder=False)
    with pause_gc():
        _write(options)


def _write(options: ReportOptions) -> None:
    out, plots = options.out, options.plots
    store = load_store(options.folders, relative_to=out.parent)
    if not (store.runs or store.certificates or store.cells):
        folders = " and ".join(map(str, options.folders))
        raise ValueError(f"{folders}: no run record below; {_left_out(store)}")
    drawn = draw_plots(store)
    pages = render_pages(
        store,
        command=report_command(options),
        plots=relative_name(plots, out.parent),
        pages=relative_name(options.pages, out.parent),
        name=out.name,
        today=look(store, Path(__file__).parents[2]),
    )
    # RESULTS.md comes last: it never names a plot or a page that is not there.
    files = {plots / name: content for name, content in drawn.items()} | _exports(options, store)
    files |= {out.parent / name: text.encode() for name, text in reversed(pages.items())}
    for path, content in files.items():
        write_atomically(path, content)
        print(path)
    print(f"{_used(store)}; {_left_out(store)}")


def _exports(options: ReportOptions, store: Store) -> dict[Path, bytes]:
    """The same rows for other tools, where they were asked for."""
    files: dict[Path, bytes] = {}
    if options.csv is not None:
        files[options.csv] = to_csv(rows(store)).encode()
    if options.json is not None:
        files[options.json] = to_json(rows(store)).encode()
    if options.html is not None:
        from scaling.report.html.page import render_html

        files[options.html] = render_html(store, title=TITLE).encode()
    return files


def _used(store: Store) -> str:
    statuses = Counter(str(run.record["status"]) for run in store.runs)
    counts = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items()))
    told = [f"{count(len(store.runs), 'record')} used ({counts or 'none'})"]
    if store.cells:
        told.append(f"{count(len(store.cells), 'cell')} of sweeps")
    if store.certificates:
        told.append(count(len(store.certificates), "certificate"))
    return ", ".join(told)


def _left_out(store: Store) -> str:
    """How many files were left out and why; the reason itself where it is a single one."""
    kinds = Counter(file.kind for file in store.left_out)
    if not kinds:
        return "no file left out"
    total = len(store.left_out)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    damaged = [f"{file.name}: {file.reason}" for file in store.left_out if file.kind == "damaged"]
    first = " ".join(damaged[0].split()) if damaged else ""
    return f"{count(total, 'file')} left out ({counts}{first and '; ' + first})"

"""The linter accepts a report as it was written, and names one injected fault of each kind."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.lint.check import lint, render
from scaling.lint.contradictions import check_rows, find_superlinear
from scaling.parity.certificate_file import write_certificate
from scaling.report.options import ReportOptions
from scaling.report.results_md import render_pages
from scaling.report.rows import Row, rows
from scaling.report.staleness import CurrentCode, compare_with_today, read_state, state_comment
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store, load_store
from tests.builders.certificates import RESULTS, make_certificate
from tests.builders.records import make_record
from tests.builders.runs import strong
from tests.builders.sweeps import make_study, make_tasks, work
from unitransformer.record.schema import Record, write_record


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report with a record of each recipe, two of GPT, and a certificate."""
    monkeypatch.chdir(tmp_path)
    for recipe in ("bert", "gpt", "vit"):
        write_record(make_record(recipe), Path("runs", f"{recipe}.json"))
    write_record(make_record("gpt", started_at="2026-02-02"), Path("runs/gpt-2.json"))
    write_certificate(make_certificate(), Path("runs"))
    assert main(["report", "runs"]) == 0
    return tmp_path / "RESULTS.md"


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    after = change(before)
    assert before != after
    path.write_text(after)


def test_a_report_as_it_was_written_has_no_errors(report: Path) -> None:
    findings = lint(report)
    assert findings.errors == ()
    assert findings.exit_code == 0
    assert "samples of 4 records, 1 certificate and 0 comparisons" in render(findings)


def test_exports_beside_the_records_change_neither_the_report_nor_its_check(report: Path) -> None:
    before = report.read_bytes()
    exports = ["--json", "runs/rows.json", "--csv", "runs/rows.csv", "--html", "runs/page.html"]
    for _ in range(2):
        assert main(["report", "runs", *exports]) == 0
        assert report.read_bytes() == before
        assert lint(report).errors == ()


def test_an_export_replaces_no_record(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("runs/gpt.json").read_bytes()
    Path("runs/mine.json").write_text("{}")
    for path in ("runs/gpt.json", "runs/mine.json"):
        assert main(["report", "runs", "--json", path]) == 2
        message = f"error: json {path} is there and no export; choose another --json\n"
        assert capsys.readouterr().err == message
    assert Path("runs/gpt.json").read_bytes() == before


def test_one_changed_digit_is_shown_with_its_line(report: Path) -> None:
    edit(report, lambda text: text.replace("2.0000 nats", "2.0001 nats", 1))
    findings = lint(report)
    assert findings.exit_code == 1
    ((where, what),) = findings.errors
    line = int(where.removeprefix("RESULTS.md:"))
    assert "2.0001 nats" in report.read_text().split("\n")[line - 1]
    assert re.search(r"- .*2\.0001 nats.*\n  \+ .*2\.0000 nats", what)


def test_a_deleted_row_is_shown(report: Path) -> None:
    edit(report, lambda text: re.sub(r"\| metric .*\n", "", text, count=1))
    ((_, what),) = lint(report).errors
    assert re.search(r"\+ .*metric", what)


def test_a_page_that_was_changed_or_is_gone_is_named(report: Path) -> None:
    pages = report.parent / "RESULTS-pages"
    edit(pages / "runs.md", lambda text: text.replace("100.0 ms", "90.0 ms", 1))
    (pages / "parity.md").unlink()
    places = [where for where, _ in lint(report).errors]
    assert "RESULTS-pages/parity.md" in places
    assert any(re.fullmatch(r"RESULTS-pages/runs\.md:\d+", place) for place in places)


def test_a_changed_rate_with_updated_checksum_contradicts_its_samples(report: Path) -> None:
    record = make_record("vit", images_per_s=21.0)
    write_record(record, report.parent / "runs" / "vit.json")
    errors = lint(report).errors
    assert (
        "runs/vit.json",
        "images_per_s is 21.0 in the record, 20.0 by its samples and config",
    ) in (errors)
    assert any("mfu.matmul.flops_per_s" in what and "21" in what for _, what in errors)


def test_flops_of_an_older_count_are_a_warning(report: Path) -> None:
    write_record(make_record("gpt", flops_per_token={}), report.parent / "runs" / "gpt.json")
    assert main(["report", "runs"]) == 0
    findings = lint(report)
    assert findings.errors == ()
    assert any("flops_per_token.palm is nothing" in what for _, what in findings.warnings)


def test_an_edited_certificate_is_an_error(report: Path) -> None:
    edited = make_certificate(results=[*RESULTS[:3], RESULTS[3] | {"verdict": "equal"}])
    write_certificate(edited, Path("runs"))
    assert main(["report", "runs"]) == 0
    assert any("verdict of fsdp x 2, 32-true is equal" in what for _, what in lint(report).errors)


def test_a_plot_that_was_changed_or_is_gone_is_named(report: Path) -> None:
    plots = report.parent / "plots"
    edit(plots / "gpt-loss.svg", lambda text: text.replace("<?xml", "<?xml ", 1))
    (plots / "vit-loss.svg").unlink()
    assert [where for where, _ in lint(report).errors] == [
        "plots/gpt-loss.svg",
        "plots/vit-loss.svg",
    ]


def test_pages_and_plots_of_an_earlier_report_are_warnings(report: Path) -> None:
    pages, plots = report.parent / "RESULTS-pages", report.parent / "plots"
    (pages / "night.md").write_bytes((pages / "runs.md").read_bytes())
    (pages / "mine.md").write_text("# Notes\n\nNot of a report.\n")
    other = (pages / "runs.md").read_text().replace("[RESULTS.md](", "[OTHER.md](")
    (pages / "other.md").write_text(other)
    for name in ("gpt-night-speed-by-batch.svg", "mine.svg"):
        (plots / name).write_bytes((plots / "gpt-loss.svg").read_bytes())
    findings = lint(report)
    assert findings.errors == ()
    places = [where for where, _ in findings.warnings]
    assert [place for place in places if place.startswith(("plots", "RESULTS-pages"))] == [
        "RESULTS-pages/night.md",
        "plots/gpt-night-speed-by-batch.svg",
    ]


def test_a_report_without_its_command_or_its_records_is_an_error(report: Path) -> None:
    edit(report, lambda text: text.replace("scaling report runs", "scaling report gone"))
    assert any("gone does not exist" in what for _, what in lint(report).errors)
    edit(report, lambda text: text.replace("scaling report gone", "scaling repot"))
    ((_, what),) = lint(report).errors
    assert "does not end with its `python -m scaling report DIR`" in what
    edit(report, lambda text: text.replace("<!-- scaling report", "<!-- "))
    ((_, what),) = lint(report).errors
    assert "does not end with its `python -m scaling report DIR`" in what
    with pytest.raises(ValueError, match="is not a file; give a report"):
        lint(report.parent / "nothing.md")
    (report.parent / "README.md").write_text("# Another page\n")
    with pytest.raises(ValueError, match=r"README\.md is no report; give one that `python -m"):
        lint(report.parent / "README.md")


def test_damaged_files_are_warnings(report: Path) -> None:
    Path("runs/old.json").write_text('{"schema": 1, "step_s": []}')
    assert main(["report", "runs"]) == 0
    findings = lint(report)
    assert findings.errors == ()
    assert any(
        where == "runs/old.json" and "schema is 1; this version reads" in what
        for where, what in findings.warnings
    )


def test_records_under_different_conditions_share_a_table_only_with_a_note(report: Path) -> None:
    # Both records of GPT were made with uncommitted changes, and the text says so.
    page = report.parent / "RESULTS-pages" / "runs.md"
    assert "code may not be its commit" in page.read_text()
    edit(page, lambda text: text.replace("code may not be its commit", "all is well"))
    (_, (_, what)) = lint(report).errors
    assert what.startswith("GPT: 2 records in one table, and nothing says: code may not be its")


def test_cells_under_different_conditions_share_a_table_only_with_a_note_in_their_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work(tmp_path / "night", make_tasks(make_study()))  # with uncommitted changes
    main(["report", "night"])  # their values are invented, which the report says
    report, note = tmp_path / "RESULTS.md", "code may not be its commit"
    page = tmp_path / "RESULTS-pages" / "night.md"

    def joined() -> list[str]:
        return [what for _, what in lint(report).errors if "in one table" in what]

    assert joined() == []
    edit(page, lambda text: f"{text.replace(note, 'all is well')}\n## Else\n\n{note}\n")
    (what,) = joined()
    assert what.startswith(f"night, GPT: 5 records in one table, and nothing says: {note}")


# ------------------------------------------------------------------------------ arithmetic


def rows_of(report: Path) -> tuple[list[Row], Store]:
    store = load_store([report.parent / "runs"], relative_to=report.parent)
    return rows(store), store


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"units_per_s": 30.0}, "units_per_s is 30; "),
        ({"low_units_per_s": 1e9, "high_units_per_s": 2e9}, "is not between 1000000000.0 and"),
        ({"low_step_s": 9.0, "high_step_s": 9.5}, "is not between 9.0 and 9.5"),
        ({"global_batch_size": 480}, "global_batch_size is 480; "),
        ({"units_per_s_per_device": 1.0}, "1.0 on each of 1 devices"),
        ({"median_step_s": 9.0}, "the tokens of a step make"),
        ({"samples_per_s": 9e9}, "the samples of a step make"),
        ({"mfu_matmul": 1.01}, "mfu_matmul is 1.01; mfu.matmul of the record says None"),
        ({"share_of_ceiling_6n": 1.2}, "share_of_ceiling_6n is 1.2; mfu.6n of the record"),
    ],
)
def test_a_possible_printed_cell_is_accepted(
    report: Path, changes: dict[str, Any], words: str
) -> None:
    made, store = rows_of(report)
    assert list(check_rows(made, store.runs)) == []
    row = next(row for row in made if row.recipe == "gpt")
    found = [what for _, what in check_rows([replace(row, **changes)], store.runs)]
    assert any(words in what for what in found), found


def test_printed_flops_per_second_follow_from_the_printed_rate(report: Path) -> None:
    record = make_record("gpt")
    row = record["mfu"][2]
    row["flops_per_s"] *= 1.02
    row["units_per_s"] *= 1.02
    row["share_of_ceiling"] *= 1.02
    write_record(record, report.parent / "runs" / "gpt.json")
    assert any("mfu.matmul.flops_per_s is" in what for _, what in lint(report).errors)


def test_an_efficiency_above_1_is_a_warning_and_no_error(report: Path) -> None:
    once, *rest = (strong(step_s, devices) for step_s, devices in ((0.1, 1), (0.05, 2), (0.02, 4)))
    assert list(find_superlinear([once, rest[0]])) == []
    for devices, run in ((1, once), (4, rest[1])):
        write_record(run.record, Path(f"runs/{devices}.json"))
    assert main(["report", "runs"]) == 0
    findings = lint(report)
    assert findings.errors == ()
    ((_, what),) = [
        (w, what) for w, what in findings.warnings if w.startswith("strong scaling of ddp on 4")
    ]
    assert what.startswith("efficiency is 1.2500, above 1, with an interval from 1.2")


def test_a_stored_share_of_the_ceiling_above_1_needs_its_flag(report: Path) -> None:
    record = make_record("bert")
    row = record["mfu"][0]
    row |= {"share_of_ceiling": 1.2, "flag": None}
    row["ceiling_flops_per_s"] = row["flops_per_s"] / 1.2
    write_record(record, report.parent / "runs" / "bert.json")
    assert main(["report", "runs"]) == 0
    findings = lint(report)
    assert findings.errors == (
        ("runs/bert.json", "mfu.6n.share_of_ceiling is 1.200, above 1 without a flag"),
    )
    assert any("mfu.6n.share_of_ceiling is 1.2" in what for _, what in findings.warnings)


# ------------------------------------------------------------------------------ staleness


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit of the code that determines measurements."""
    folder = tmp_path / "checkout"
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "gpt.py").write_text("STEPS = 1\nprint(STEPS)\n")
    (folder / "notes.md").write_text("1")
    git(tmp_path, "init", "-q", "checkout")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def stale(report: Path, checkout: Path, **changes: Any) -> list[str]:
    """What lint says about a record of BERT."""
    record: Record = make_record("bert", **changes)
    write_record(record, report.parent / "runs" / "bert.json")
    findings = lint(report, code=checkout)
    return [what for where, what in findings.warnings if where == "runs/bert.json"]


def test_a_record_is_stale_once_the_code_that_decides_has_changed(
    report: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    code = {"commit": git(checkout, "rev-parse", "HEAD"), "is_dirty": False}
    assert stale(report, checkout, code=code) == []
    (checkout / "notes.md").write_text("2")
    git(checkout, "commit", "-qam", "notes")
    assert stale(report, checkout, code=code) == []
    (checkout / "recipes" / "gpt.py").write_text("STEPS = 2\nprint(STEPS)\n")
    git(checkout, "commit", "-qam", "code")
    short = code["commit"][:12]
    assert stale(report, checkout, code=code) == [
        f"stale: the code has changed since its commit {short}"
    ]


def test_another_torch_unknown_commits_and_dirty_trees_are_reported(
    report: Path, checkout: Path
) -> None:
    found = stale(report, checkout, versions={"torch": "1.0"})
    assert [re.sub("; .*", "", what) for what in found] == [
        "stale: measured with torch 1.0",
        "stale: measured with uncommitted changes",
        "stale: its commit 0123456789ab is not in this checkout",
    ]
    nothing = {"commit": None, "is_dirty": None}
    assert "stale: its commit is not recorded" in stale(report, checkout, code=nothing)


def test_lint_outside_a_checkout_says_so_in_one_line(report: Path) -> None:
    findings = lint(report, code=report.parent)
    assert "code: not compared, for it is in no git checkout" in findings.checked
    assert not [what for _, what in findings.warnings if "checkout" in what]


# ------------------------------------------------------------------------------ marks in the report


def write_compared(report: Path, checkout: Path) -> str:
    """The report written next to a checkout."""
    store = load_store([report.parent / "runs"], relative_to=report.parent)
    today = compare_with_today(store, checkout)
    options = ReportOptions(
        folders=(report.parent / "runs",),
        out=report,
        plots=report.parent / "plots",
        pages=report.parent / "RESULTS-pages",
    )
    pages = render_pages(StoreAnalysis(store, today), options)
    for path, page in pages.items():
        (report.parent / path).write_text(page)
    return "\n".join(pages.values())


def test_lint_reproduces_the_stale_marks_of_a_report_after_later_commits(
    report: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    first = git(checkout, "rev-parse", "HEAD")
    code = {"commit": first, "is_dirty": False}
    write_record(make_record("bert", code=code), Path("runs/bert.json"))
    write_record(make_record("vit", code=code, versions={"torch": "1.0"}), Path("runs/vit.json"))
    assert main(["report", "runs"]) == 0  # its plots
    fresh = write_compared(report, checkout)
    assert "[record](runs/bert.json) " in fresh
    assert "[record](runs/vit.json)†" in fresh, "another torch"
    assert "[record](../runs/vit.json)†" in fresh, "on every page"
    assert fresh.count("† after a record: it is stale") == 1
    (checkout / "recipes" / "gpt.py").write_text("STEPS = 2\nprint(STEPS)\n")
    git(checkout, "commit", "-qam", "code")
    assert lint(report, code=checkout).errors == (), "the text is right about what it was beside"
    assert (
        "RESULTS.md",
        "its marks of stale records are outdated; write the report again",
    ) in lint(report, code=checkout).warnings
    marked = write_compared(report, checkout)
    assert "[record](runs/bert.json)†" in marked
    assert marked == write_compared(report, checkout)
    assert f"Code: changed since {first[:12]}; not known at 0123456789ab. " in marked
    assert lint(report, code=checkout).errors == ()
    assert not [what for _, what in lint(report, code=checkout).warnings if "marks" in what]


@pytest.mark.parametrize(
    "today",
    [
        CurrentCode(torch=None, is_checkout=False),
        CurrentCode(torch="2.13.0+cpu", is_checkout=True),
        CurrentCode(torch="2.13", is_checkout=True, changed=frozenset({"0a", "0b"})),
        CurrentCode(
            torch=None, is_checkout=True, changed=frozenset({"0a"}), unknown=frozenset({"0c"})
        ),
    ],
)
def test_the_staleness_comparison_is_read_back_from_a_report(today: CurrentCode) -> None:
    state = read_state(f"# Results\n\n{state_comment('python -m scaling report a-->b', today)}\n")
    assert state == ("python -m scaling report a-->b", today)


def test_a_report_without_a_checkout_marks_nothing_and_says_so_once(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    outside = write_compared(report, report.parent)
    assert outside.count("not compared, for it is in no git checkout") == 1
    assert "json)†" not in outside
    assert lint(report).errors == ()

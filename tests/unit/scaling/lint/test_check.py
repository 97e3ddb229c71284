"""The linter accepts a report as it was written, and names one injected fault of each kind."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.lint.check import Findings, lint, render
from scaling.lint.table_arithmetic import check_tables, read_tables
from scaling.parity.certificate_file import write_certificate
from scaling.report.results_md import render_report
from scaling.report.staleness import Today, explain, look, read_today
from scaling.store.reader import load_store
from tests.builders.certificates import make_certificate
from tests.builders.records import make_record
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


def told(findings: Findings) -> str:
    return render(findings)


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    after = change(before)
    assert before != after
    path.write_text(after)


def test_a_report_as_it_was_written_has_no_errors(report: Path) -> None:
    findings = lint(report)
    assert findings.errors == ()
    assert findings.exit_code == 0
    assert "bytes and arithmetic against 4 records and 1 certificate" in told(findings)


def test_one_changed_digit_is_shown_with_its_line(report: Path) -> None:
    edit(report, lambda text: text.replace("2.0000 nats", "2.0001 nats", 1))
    findings = lint(report)
    assert findings.exit_code == 1
    ((where, what),) = findings.errors
    line = int(where.removeprefix("RESULTS.md:"))
    assert "2.0001 nats" in report.read_text().split("\n")[line - 1]
    assert re.search(r"- .*2\.0001 nats.*\n  \+ .*2\.0000 nats", what)


def test_a_deleted_row_is_shown(report: Path) -> None:
    edit(report, lambda text: re.sub(r"\| precision .*\n", "", text, count=1))
    ((_, what),) = lint(report).errors
    assert re.search(r"\+ .*precision", what)


def test_a_changed_rate_with_updated_checksum_contradicts_its_samples(report: Path) -> None:
    record = make_record("vit", images_per_s=21.0)
    write_record(record, report.parent / "runs" / "vit.json")
    errors = lint(report).errors
    assert (
        "runs/vit.json",
        "images_per_s is 21.0 in the record, 20.0 by its samples and config",
    ) in (errors)
    assert any("passport.matmul.flops_per_s" in what and "21" in what for _, what in errors)
    assert errors[0][0].startswith("RESULTS.md:"), "its warning is missing in the text"


def test_a_plot_that_was_changed_or_is_gone_is_named(report: Path) -> None:
    plots = report.parent / "plots"
    edit(plots / "gpt-loss.svg", lambda text: text.replace("<?xml", "<?xml ", 1))
    (plots / "vit-loss.svg").unlink()
    assert [where for where, _ in lint(report).errors] == [
        "plots/gpt-loss.svg",
        "plots/vit-loss.svg",
    ]


def test_a_report_without_its_command_or_its_records_is_an_error(report: Path) -> None:
    edit(report, lambda text: text.replace("scaling report runs", "scaling report gone"))
    assert any("gone does not exist" in what for _, what in lint(report).errors)
    edit(report, lambda text: text.replace("scaling report gone", "scaling repot"))
    ((_, what),) = lint(report).errors
    assert "holds no `python -m scaling report DIR`" in what
    with pytest.raises(ValueError, match="is no file; give a report"):
        lint(report.parent / "nothing.md")


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
    # Both records of GPT have uncommitted changes, which the report says.
    assert "code may not be its commit" in report.read_text()
    edit(report, lambda text: text.replace("code may not be its commit", "all is well"))
    (_, (_, what)) = lint(report).errors
    assert what.startswith("GPT: 2 records in one table, and nothing says: code may not be its")


def test_cells_under_different_conditions_share_a_table_only_with_a_note_in_their_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work(tmp_path / "night", make_tasks(make_study()))  # with uncommitted changes
    main(["report", "night"])  # their values are invented, which the report says
    report, note = tmp_path / "RESULTS.md", "code may not be its commit"

    def joined() -> list[str]:
        return [what for _, what in lint(report).errors if "in one table" in what]

    assert joined() == []
    edit(report, lambda text: f"{text.replace(note, 'all is well')}\n## Else\n\n{note}\n")
    (what,) = joined()
    assert what.startswith(f"night, GPT: 5 records in one table, and nothing says: {note}")


# ------------------------------------------------------------------------------ arithmetic


def wrong(headers: str, row: str, *, heading: str = "## GPT") -> list[str]:
    text = f"{heading}\n\n| {headers} |\n|---|\n| {row} |\n"
    return [what for _, what in check_tables(list(read_tables(text)))]


@pytest.mark.parametrize(
    ("headers", "row", "words"),
    [
        ("devices | efficiency", "4 | 1.3 (1.2 to 1.4)", "efficiency 1.3 (1.2 to 1.4): its int"),
        ("devices | efficiency", "4 | 130.0% (120.0% to 140.0%)", "interval from 120.0 is above 1"),
        ("devices | efficiency", "4 | 130.0%", "it has no interval"),
        ("figure | value", "speed | 300 tokens/s (310 to 320)", "300 is not between 310 and 320"),
        ("figure | value", "median steady step | 9.0 ms, x; 9.1 ms to 9.2 ms", "not between 9.1"),
        ("figure | value", "batch | 512 = 8 a device x 4 micro-batches x 15 devices", "make 480"),
        ("convention | share of the data sheet", "`matmul` | MFU 101.0%", "above 1"),
        ("convention | share of the ceiling", "`6n` | 116.3%", "above 1 without a flag"),
        ("convention | share of the ceiling", "`6n` | 95.0% (96.0% to 97.0%)", "not between 96"),
    ],
)
def test_an_impossible_printed_cell_is_named(headers: str, row: str, words: str) -> None:
    (what,) = wrong(headers, row)
    assert words in what


@pytest.mark.parametrize(
    ("headers", "row"),
    [
        ("devices | efficiency", "4 | 1.02 (0.98 to 1.06)"),
        ("devices | efficiency", "4 | 97.5% (96.0% to 99.0%)"),
        ("figure | value", "speed | 1,300 tokens/s (1,290 to 1,320)"),
        ("figure | value", "batch | 512 = 8 a device x 4 micro-batches x 16 devices"),
        ("convention | share of the ceiling", "`6n` | 116.3%; above the ceiling (1.163 of it)"),
        ("convention | share of the ceiling", "`6n` | 116.3% (114.0% to 117.0%); above it"),
    ],
)
def test_a_possible_printed_cell_is_accepted(headers: str, row: str) -> None:
    assert wrong(headers, row) == []


def test_printed_flops_per_second_follow_from_the_printed_rate() -> None:
    # 300 tokens per second of 2 MFLOP each are 600 MFLOP/s: 150 MFLOP/s on each of 4 devices.
    text = (
        "## GPT\n\n| figure | value |\n|---|---|\n| speed | 300 tokens/s |\n"
        "| spread over | 2 nodes x 2 x cuda, strategy ddp |\n\n"
        "| convention | FLOPs per token | FLOP/s a device |\n|---|---|---|\n"
        "| `matmul` | 2,000,000 | 150 MFLOP/s |\n| `6n` | 2,000,000 | 152 MFLOP/s (149 to 153) |\n"
    )
    ((line, what),) = check_tables(list(read_tables(text)))
    assert text.split("\n")[line - 1].startswith("| `6n`")
    assert "6e+08 FLOP/s; 152 MFLOP/s (149 to 153) x 4 are 6.08e+08" in what


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2 | 400 tokens/s | 200 tokens/s | 2 MFLOP per token | 400 MFLOP/s", None),
        ("2 | 400 tokens/s | 200 tokens/s | 2 MFLOP per token | 0.4 GFLOP/s", None),
        ("2 | 400 tokens/s | 200 tokens/s | 2 MFLOP per token | 410 MFLOP/s", "4e+08 FLOP/s; 410"),
        ("1 | 400 tokens/s | 200 tokens/s | 2 MFLOP per token | 400 MFLOP/s", "each of 1 dev"),
        ("2 | blank, no steady state: short | | 2 MFLOP per token | ", None),
    ],
)
def test_a_printed_sweep_row_is_consistent(row: str, words: str | None) -> None:
    found = wrong("devices | speed | a device | FLOPs | FLOP/s a device", row)
    assert found == [] if words is None else words in found[0]


def test_a_stored_share_of_the_ceiling_above_1_needs_its_flag(report: Path) -> None:
    record = make_record("bert")
    row = record["passport"][0]
    row |= {"share_of_ceiling": 1.2, "flag": None}
    write_record(record, report.parent / "runs" / "bert.json")
    assert main(["report", "runs"]) == 0
    assert lint(report).errors == (
        ("runs/bert.json", "passport.6n.share_of_ceiling is 1.200, above 1 without a flag"),
    )


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
    (folder / "recipes" / "a.py").write_text("1")
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
    (checkout / "recipes" / "a.py").write_text("2")
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
    assert "stale: its commit is not told" in stale(report, checkout, code=nothing)


def test_lint_outside_a_checkout_says_so_in_one_line(report: Path) -> None:
    findings = lint(report, code=report.parent)
    assert "code: not compared, for it is in no git checkout" in findings.checked
    assert not [what for _, what in findings.warnings if "checkout" in what]


# ------------------------------------------------------------------------------ marks in the report


def held_against(report: Path, checkout: Path) -> str:
    """The report written next to a checkout."""
    store = load_store([report.parent / "runs"], relative_to=report.parent)
    today = look(store, checkout)
    text = render_report(store, command="python -m scaling report runs", plots="plots", today=today)
    report.write_text(text)
    return text


def test_lint_reproduces_the_stale_marks_of_a_report_after_later_commits(
    report: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    first = git(checkout, "rev-parse", "HEAD")
    code = {"commit": first, "is_dirty": False}
    write_record(make_record("bert", code=code), Path("runs/bert.json"))
    write_record(make_record("vit", code=code, versions={"torch": "1.0"}), Path("runs/vit.json"))
    assert main(["report", "runs"]) == 0  # its plots
    fresh = held_against(report, checkout)
    assert "[bert.json](runs/bert.json) " in fresh
    assert "[vit.json](runs/vit.json)†" in fresh, "another torch"
    assert fresh.count("† after a record") == 1
    (checkout / "recipes" / "a.py").write_text("2")
    git(checkout, "commit", "-qam", "code")
    assert lint(report, code=checkout).errors == (), "the text is right about what it was beside"
    assert ("RESULTS.md", "its marks of what is stale are not today's; write it again") in lint(
        report, code=checkout
    ).warnings
    stale_ = held_against(report, checkout)
    assert "[bert.json](runs/bert.json)†" in stale_
    assert stale_ == held_against(report, checkout)
    assert f"Code: changed since {first[:12]}; not known at 0123456789ab. " in stale_
    assert lint(report, code=checkout).errors == ()
    assert not [what for _, what in lint(report, code=checkout).warnings if "marks" in what]


@pytest.mark.parametrize(
    "today",
    [
        Today(torch=None, is_checkout=False),
        Today(torch="2.13.0+cpu", is_checkout=True),
        Today(torch="2.13", is_checkout=True, changed=frozenset({"0a", "0b"})),
        Today(torch=None, is_checkout=True, changed=frozenset({"0a"}), unknown=frozenset({"0c"})),
    ],
)
def test_the_staleness_comparison_is_read_back_from_a_report(today: Today) -> None:
    assert read_today(f"# Results\n\n{explain(today)}\n") == today


def test_a_report_without_a_checkout_marks_nothing_and_says_so_once(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")
    outside = held_against(report, report.parent)
    assert outside.count("not compared, for it is in no git checkout") == 1
    assert "json)†" not in outside
    assert lint(report).errors == ()

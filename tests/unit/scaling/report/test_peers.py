"""Tests that RESULTS.md shows comparisons with peers, and that lint recomputes them."""

import json
from dataclasses import replace
from pathlib import Path

from scaling.__main__ import main
from scaling.lint.check import lint
from scaling.peers.record import read_comparison, write_comparison
from scaling.store.reader import Store
from tests.builders.comparisons import make_comparison
from tests.builders.records import make_record
from tests.builders.reports import make_store, pages_of
from unitransformer.record.schema import write_record


def test_results_md_says_who_is_faster_before_the_table() -> None:
    contents = [make_comparison("plain"), make_comparison("nanogpt", factor=0.5)]
    comparisons = tuple(read_comparison(c, f"runs/{i}.json") for i, c in enumerate(contents))
    store: Store = replace(make_store(make_record()), comparisons=comparisons)
    text = pages_of(store)["RESULTS.md"]
    section = " ".join(text.partition("## Against other implementations")[2].split())
    assert section.startswith("**GPT tiny trains 0.50x (0.50 to 0.50) as fast as the best peer")
    assert "this peer beats us" in section
    assert section.index("| nanoGPT-style code |") < section.index("| plain PyTorch")
    assert "(runs/1.json)" in section
    assert "1 run and 2 comparisons with other implementations" in text


def test_without_comparisons_there_is_no_section() -> None:
    assert "Against other" not in pages_of(make_store(make_record()))["RESULTS.md"]


def test_lint_finds_an_edited_block_time(tmp_path: Path) -> None:
    runs, report = tmp_path / "runs", tmp_path / "RESULTS.md"
    write_record(make_record(), runs / "a.json")
    path = write_comparison(make_comparison("plain"), runs)
    command = ["report", str(runs), "--out", str(report)]
    assert main(command) == 0
    assert lint(report).errors == ()
    content = json.loads(path.read_text())
    content["sides"]["ours"]["wall_s"] = [0.5] * 6
    path.write_text(json.dumps(content))
    assert main(command) == 0
    found = [what for where, what in lint(report).errors if where == f"runs/{path.name}"]
    assert "speed.median is 2.0 in the record, 4.0 by its samples" in found

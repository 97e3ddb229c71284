"""Tests the records of comparisons: written, read again, and refused when they are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from scaling.peers.record import find_contradictions, read_comparison, write_comparison
from scaling.store.reader import load_store
from tests.builders.comparisons import OURS_S, make_comparison


def test_a_record_is_read_back_by_the_store(tmp_path: Path) -> None:
    paths = [write_comparison(make_comparison(factor=f), tmp_path) for f in (2.0, 3.0)]
    assert [path.name[-7:] for path in paths] == ["-1.json", "-2.json"]
    store = load_store([tmp_path], relative_to=tmp_path)
    assert (len(store.comparisons), store.left_out) == (2, ())
    first = store.comparisons[0]
    assert first.ours is not None
    assert (tuple(first.ours.wall_s), first.ours.training_bytes) == (OURS_S, 100 * 2**20)
    assert find_contradictions(first) == []


def test_two_comparisons_that_choose_one_number_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_comparison(make_comparison(factor=2.0), tmp_path)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(()))  # as listed before
    write_comparison(make_comparison(factor=3.0), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_has_no_samples(tmp_path: Path) -> None:
    content = make_comparison(failure="peer: out of memory")
    comparison = read_comparison(json.loads(write_comparison(content, tmp_path).read_text()), "a")
    assert (comparison.failure, comparison.ours) == ("peer: out of memory", None)
    assert find_contradictions(comparison) == []


def test_an_edited_time_contradicts_the_stored_ratio() -> None:
    content = make_comparison()
    content["sides"]["ours"]["wall_s"] = [0.5] * 6
    (found, *_) = find_contradictions(read_comparison(content, "a"))
    assert found == "speed.median is 2.0 in the record, 4.0 by its samples"
    del content["derived"]
    assert len(find_contradictions(read_comparison(content, "a"))) == 10


def damaged(path: str, value: Any) -> dict[str, Any]:
    """A record with one value replaced, by its dotted name."""
    whole: Any = make_comparison()
    content = whole
    *outer, last = path.split(".")
    for name in outer:
        content = content[name]
    content[last] = value
    return dict(whole)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema is 2; this version reads 1"),
        ("config_hash", "0", "config_hash is '0'; its config says"),
        ("peer", "timm", "peer 'timm' is none of recipe gpt"),
        ("form", "own loss", "form is 'own loss', which peer plain lacks"),
        ("compile", "on", "compile is 'on'"),
        ("versions", {"torch": 2}, "versions.torch is 2"),
        ("sides", None, "samples and a failure, or neither"),
        ("sides", {"ours": {}}, "not a group of ours and peer"),
        ("first", ["us"], "first does not say"),
        ("first", [[]] * 6, "first does not say"),
        ("first", ["ours"], "are not pairs"),
        ("steps_per_block", 0, "steps_per_block is 0; it must be at least 1"),
        ("sides.peer.first_losses", [6.0], "first_losses holds 2 of ours, 1 of the peer"),
        ("sides.ours.wall_s", [1.0], "not of the same blocks"),
        ("sides.peer.wall_s", [0.0] * 6, "a block took no time"),
        ("sides.peer.peak_bytes", 0, "peak_bytes or base_bytes"),
        ("sides.peer.first_losses", ["a"], "first_losses is not a list"),
        ("machine", {}, "machine.fingerprint is missing"),
    ],
)
def test_a_damaged_record_is_refused_with_its_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"comparison.*{message}"):
        read_comparison(damaged(path, value), "a")

"""Tests that a stored comparison implies its verdict, or is refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scaling.comparison import record
from scaling.comparison.interleave import Side, judge_starts
from scaling.comparison.plot import write_plot
from scaling.comparison.verdict import Verdict
from scaling.store.reader import load_store
from tests.builders.pairs import make_start


def stored(folder: Path, losses: Sequence[float] = (1.0,)) -> Path:
    starts = [make_start(20, 0.1, seed, losses=([1.0], list(losses))) for seed in range(8)]
    side = Side(label="old", recipe="gpt", arguments=(), code=folder, python=Path("python"))
    content = record.describe(
        {"base": side, "candidate": side},
        starts,
        judge_starts(starts),
        clock="processor",
        threshold=0.02,
        stop_faster=0.1,
        about={"command": "python -m scaling compare old new"},
    )
    record.write(content, folder / "comparison.json")
    return folder / "comparison.json"


def test_the_same_verdict_follows_from_the_stored_pairs(tmp_path: Path) -> None:
    read = record.read(stored(tmp_path))
    assert read.judgement == judge_starts([make_start(20, 0.1, seed) for seed in range(8)])
    assert read.judgement.verdict is Verdict.SLOWER


def test_losses_that_are_no_numbers_are_stored(tmp_path: Path) -> None:
    losses = [1.0, float("nan"), float("inf"), -float("inf")]
    path = stored(tmp_path, losses)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    read = record.read(path)
    assert repr(read.starts[1].candidate.losses) == repr(losses)


def test_another_estimate_of_what_is_detectable_is_no_damage(tmp_path: Path) -> None:
    path = stored(tmp_path)
    content = json.loads(path.read_text())
    content["judgement"] |= {"detectable": 0.5, "reason": "as an older version put it"}
    path.write_text(json.dumps(content))
    assert record.read(path).judgement.verdict is Verdict.SLOWER


def test_a_record_of_an_earlier_rule_is_judged_by_the_one_of_today(tmp_path: Path) -> None:
    path = stored(tmp_path)
    content = json.loads(path.read_text())
    del content["rule"]
    content["judgement"] |= {"verdict": "INCONCLUSIVE", "low": 1.0, "high": 2.0}
    path.write_text(json.dumps(content))
    assert record.read(path).judgement.verdict is Verdict.SLOWER
    content["judgement"]["ratio"] = 3.0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"ratio is 3\.0, its pairs say"):
        record.read(path)


def damage(name: str) -> Callable[[dict[str, Any]], None]:
    def damages(content: dict[str, Any]) -> None:
        if name == "pairs":
            seconds = content["starts"][0]["candidate"]["processor_s"]
            seconds[:] = [0.8 * s for s in seconds]
        elif name == "verdict":
            content["judgement"]["verdict"] = "NOT SLOWER"
        elif name == "schema":
            content["schema"] = 99
        elif name == "kind":
            content["kind"] = "peers"
        elif name == "lengths":
            content["starts"][0]["base"]["wall_s"].pop()
        elif name == "time":
            content["starts"][0]["base"]["processor_s"][0] = -1.0
        elif name == "versions":
            del content["starts"][1]["about"]["candidate"]["versions"]
        elif name == "commit":
            del content["sides"]["base"]["commit"]
        else:
            del content[name]

    return damages


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs", "verdict is SLOWER, its pairs say|ratio is|reason is"),
        ("verdict", "verdict is NOT SLOWER, its pairs say SLOWER"),
        ("schema", "schema is 99; this version reads 1"),
        ("kind", "is no record of a comparison"),
        ("lengths", "is damaged: its times are not pairs"),
        ("time", r"is damaged: base\[0\] is -1.0"),
        ("starts", "is damaged: comparison: starts"),
        ("machine", "is damaged: comparison: machine"),
        ("versions", "is damaged: about candidate: versions is missing"),
        ("commit", "is damaged: comparison: sides.base.commit"),
        ("judgement", "is damaged: comparison: judgement"),
    ],
)
def test_a_record_that_was_changed_is_refused(tmp_path: Path, name: str, message: str) -> None:
    path = stored(tmp_path)
    content = json.loads(path.read_text())
    damage(name)(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        record.read(path)


def test_a_record_that_is_missing_or_cut_off_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        record.read(tmp_path / "nowhere.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="is damaged: "):
        record.read(path)


def test_a_store_knows_the_record_of_a_comparison(tmp_path: Path) -> None:
    stored(tmp_path)
    store = load_store([tmp_path], relative_to=tmp_path)
    assert store.own_files == ("comparison.json",)
    assert not store.left_out


def test_sides_on_two_devices_have_a_plot_without_pairs(tmp_path: Path) -> None:
    start = make_start(3, devices=("NVIDIA H100", "cpu"))
    start.base.gpu_s[:] = start.base.processor_s
    write_plot(tmp_path / "a.png", [start], judge_starts([start]), clock="gpu")
    assert (tmp_path / "a.png").exists()


def test_a_plot_is_the_same_each_time(tmp_path: Path) -> None:
    starts = [make_start(20, 0.1, seed) for seed in range(8)]
    for name in ("a.svg", "b.svg", "c.png"):
        judgement = judge_starts(starts)
        write_plot(tmp_path / name, starts, judgement, clock="processor")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

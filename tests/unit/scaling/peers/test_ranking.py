"""Tests which peer counts as the best, and what is said about it."""

from typing import Any

from scaling.peers.ranking import answer, find_workloads, has_single_launches, our_rate, rows
from scaling.peers.record import read_comparison
from tests.builders.comparisons import make_comparison


def workload(*contents: dict[str, Any]) -> Any:
    (found,) = find_workloads(
        read_comparison(content, f"{number}.json") for number, content in enumerate(contents)
    )
    return found


def test_the_best_variant_of_the_best_peer_is_named_first() -> None:
    found = workload(
        make_comparison("plain", factor=3.0),
        make_comparison("plain", factor=2.5, mode="default"),
        make_comparison("gpt2", factor=1.5, form="own loss", mib=400),
        make_comparison("gpt2", factor=2.0, form="cross entropy"),
    )
    assert answer(found) == (
        "GPT tiny trains 1.50x (1.50 to 1.50) as fast as the best peer, Hugging Face GPT-2, own "
        "loss, not compiled, with 0.25x its memory."
    )
    assert [row["our speed"] for row in rows(found)] == [
        "1.50x (1.50 to 1.50)",
        "2.50x (2.50 to 2.50)",
    ]
    assert rows(found)[1]["variant"] == "best of 2: compiled (default)"


def test_a_peer_that_beats_us_is_said_in_the_same_sentence() -> None:
    found = workload(make_comparison("plain", factor=0.8), make_comparison("nanogpt", factor=0.9))
    assert answer(found).endswith(
        "; this peer beats us, and so do nanoGPT-style code, not compiled (0.90x)."
    )


def test_failures_are_rows_and_never_the_best() -> None:
    found = workload(
        make_comparison("plain", failure="peer: out of memory: 8 GiB"),
        make_comparison("nanogpt", factor=2.0),
    )
    assert "nanoGPT-style code" in answer(found)
    assert rows(found)[1]["our speed"] == "failed: peer: out of memory: 8 GiB"
    assert answer(workload(make_comparison("plain", failure="peer: no"))).endswith(
        "none could be measured."
    )


def test_launches_are_pooled_and_other_code_is_not() -> None:
    newer = {"started_at": "2026-02-01T00:00:00+00:00"}
    found = workload(scattered(2.0), scattered(2.2) | newer)
    # All 12 pairs would lie between 1.90 and 2.32; two launches alone say far less.
    assert found.best.speed.low < 1.5
    assert found.best.speed.high > 3.0
    (row,) = rows(found)
    assert row["pairs"] == "12 in 2 launches"
    assert not has_single_launches(found)
    other = {"code": {"commit": "fedcba", "is_dirty": False}}
    found = workload(make_comparison(factor=2.0), make_comparison(factor=3.0, **newer, **other))
    assert (found.best.speed.pairs, round(found.best.speed.median, 6)) == (6, 3.0)
    assert has_single_launches(found)
    compiled = make_comparison(factor=4.0, mode="default", **newer, **other)
    found = workload(make_comparison(factor=2.0), compiled)
    assert [round(variant.speed.median, 6) for variant in found.results[0].variants] == [2.0, 4.0]


def scattered(factor: float) -> dict[str, Any]:
    """A comparison whose pairs scatter by 5 % around a factor."""
    content = make_comparison(factor=factor)
    times = content["sides"]["peer"]["wall_s"]
    times[:] = [s * t for s, t in zip(times, (0.95, 0.97, 1.0, 1.0, 1.03, 1.05), strict=True)]
    return content


def test_losses_agree_where_the_mathematics_is_the_same() -> None:
    cells = [
        rows(workload(make_comparison("plain", peer_loss=loss)))[0]["losses agree"]
        for loss in (6.0, 6.0003, 6.06)
    ]
    assert cells[:2] == ["yes", "yes"]
    assert cells[2].startswith("no: 1.")
    (row,) = rows(workload(make_comparison("gpt2", form="own loss", peer_loss=9.0)))
    assert row["losses agree"] == "not comparable: learned positions, a final norm"


def test_our_rate_is_that_of_the_median_step() -> None:
    found = workload(make_comparison())
    per_step = found.config.batch_size * found.config.sequence_length
    assert our_rate(found) == f"{per_step / 0.5:.2f} tokens/s"  # blocks of 1 s have two steps

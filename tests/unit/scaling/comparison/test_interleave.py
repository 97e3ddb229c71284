"""Tests how steps of two sides are taken in turn and judged."""

import itertools
import json
import math
import random
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.comparison import interleave
from scaling.comparison.interleave import (
    Answer,
    Side,
    SideFailed,
    SideName,
    Start,
    compare_sides,
    from_json,
    judge_starts,
    look_until_decided,
    run_start,
    split_into_starts,
    take_pairs,
    to_json,
)
from scaling.comparison.verdict import LOOKS, Judgement, Verdict, looks_upto
from tests.builders.pairs import make_start

TINY = (
    *("--devices", "1", "--strategy", "single", "--data", "synthetic", "--dropout", "0"),
    *("--model.width", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--model.num-classes", "64", "--batch-size", "2"),
)
ABOUT: dict[SideName, dict[str, Any]] = {
    "base": {"device": "cpu", "clock": "processor"},
    "candidate": {"device": "cpu", "clock": "processor"},
}


def asking(
    turns: list[tuple[str, int]], step_s: float
) -> dict[SideName, Callable[[Answer], Answer]]:
    """Returns sides that take `step_s` per step and note their turns."""

    def ask_for(name: str) -> Callable[[Answer], Answer]:
        def ask(request: Answer) -> Answer:
            steps = request["steps"]
            turns.append((name, steps))
            return {
                "processor_s": steps * step_s,
                "wall_s": 3 * steps * step_s,
                "gpu_s": None,
                "losses": [1.0] * steps,
                "peak_bytes": len(turns),
            }

        return ask

    return {"base": ask_for("base"), "candidate": ask_for("candidate")}


def a_side(code: Path, *arguments: str) -> Side:
    return Side(
        label="a side", recipe="gpt", arguments=(*TINY, *arguments), code=code,
        python=Path(sys.executable),
    )  # fmt: skip


def test_both_sides_take_turns_after_each_step_in_random_order() -> None:
    turns: list[tuple[str, int]] = []
    start = take_pairs(asking(turns, 0.01), 20, ABOUT, seed=0)
    assert [steps for _, steps in turns] == [1] * (6 + 400)  # three of each side to warm up
    assert start.steps_per_block == 10  # of 10 ms, to fill 100 ms
    names = [name for name, _ in turns[6:]]
    assert all({*names[i : i + 2]} == {"base", "candidate"} for i in range(0, 400, 2))
    assert 70 < names[::2].count("base") < 130
    assert names[::20] == list(start.first)
    assert start.base.processor_s == [pytest.approx(0.1)] * 20
    assert len(start.base.losses) == 3 + 200


def test_a_block_is_one_step_if_a_step_is_long() -> None:
    assert take_pairs(asking([], 1.0), 2, ABOUT, seed=0).steps_per_block == 1


def starts_of(slowdowns: Sequence[float], seed: int = 0) -> list[Start]:
    return [make_start(20, slower, seed + number) for number, slower in enumerate(slowdowns)]


def test_processor_time_decides_without_a_gpu() -> None:
    starts = starts_of([0.1] * 16)
    for start in starts:
        start.candidate.wall_s[:] = start.base.wall_s
    assert judge_starts(starts).verdict is Verdict.SLOWER
    assert judge_starts(starts, "wall").verdict is Verdict.NOT_SLOWER


@pytest.mark.parametrize(
    ("slowdown", "verdict"),
    [(0.1, Verdict.SLOWER), (0.0, Verdict.NOT_SLOWER), (-0.3, Verdict.FASTER)],
)
def test_fewer_than_four_starts_have_no_verdict(slowdown: float, verdict: Verdict) -> None:
    starts = [make_start(640, slowdown, seed) for seed in range(4)]
    few = judge_starts(starts[:3])
    assert few.verdict is Verdict.INCONCLUSIVE
    assert few.reason == "only 3 starts, and a verdict takes 4"
    assert few.detectable is None
    assert judge_starts(starts).verdict is verdict


def exact_start(log_ratios: Sequence[float]) -> Start:
    """Returns a start whose pairs have exactly these log-ratios."""
    start = make_start(len(log_ratios))
    start.base.processor_s[:] = [1.0] * len(log_ratios)
    start.candidate.processor_s[:] = map(math.exp, log_ratios)
    return start


def test_the_interval_allows_for_how_much_starts_differ() -> None:
    """Student's t by hand: four starts of mean 3 % and deviation 1 % reach 12.92 / 2 % from it."""
    by_hand = math.sqrt(1.5)  # scales -1, 0, 0, 1 to a deviation of 1
    starts = [exact_start([0.03 + 0.01 * by_hand * d] * 20) for d in (-1, 0, 0, 1)]
    judgement = judge_starts(starts)
    assert judgement.low is not None
    assert judgement.high is not None
    assert math.log(judgement.low) == pytest.approx(0.03 - 0.0646, abs=1e-4)
    assert math.log(judgement.high) == pytest.approx(0.03 + 0.0646, abs=1e-4)
    assert judgement.verdict is Verdict.INCONCLUSIVE  # though every start is slower by 1.8 %


def judged_until_decided(slowdown: float, scatter: float, rng: random.Random) -> Judgement:
    """Judges starts that are slower or faster by chance, besides 1 % of noise of their pairs."""
    starts: list[Start] = []

    def judge_more(pairs: int) -> Judgement:
        for size in split_into_starts(pairs):
            mean = math.log1p(slowdown) + rng.gauss(0, scatter)
            starts.append(exact_start([rng.gauss(mean, 0.01) for _ in range(size)]))
        return judge_starts(starts)

    return look_until_decided(judge_more, LOOKS)


@pytest.mark.parametrize("scatter", [0.005, 0.01])
def test_equal_code_whose_processes_differ_is_rarely_called_slower(scatter: float) -> None:
    """One in 500 would be 0 or 1 of these; two agreeing starts called several of them slower."""
    rng = random.Random(0)
    judged = [judged_until_decided(0.0, scatter, rng).verdict for _ in range(150)]
    assert judged.count(Verdict.SLOWER) <= 1


def test_5_percent_is_found_though_processes_differ_by_1_percent() -> None:
    rng = random.Random(0)
    judged = [judged_until_decided(0.05, 0.01, rng).verdict for _ in range(100)]
    assert judged.count(Verdict.SLOWER) >= 98


@pytest.mark.parametrize("scatter", [0.0, 0.01])
def test_the_slowdown_that_is_called_detectable_is_found_though_starts_differ(
    scatter: float,
) -> None:
    """Each start is slower or faster by chance, besides the noise of its pairs."""
    rng = random.Random(0)

    def starts(slowdown: float) -> list[Start]:
        by_chance = [(1 + slowdown) * math.exp(rng.gauss(0, scatter)) - 1 for _ in range(16)]
        return starts_of(by_chance, rng.randrange(10**6))

    judged = [judge_starts(starts(0.0)).detectable for _ in range(60)]
    detectable = statistics.median(share for share in judged if share is not None)
    found = [judge_starts(starts(detectable)).verdict is Verdict.SLOWER for _ in range(100)]
    assert sum(found) >= 93  # of 95


def test_the_pairs_that_a_single_start_lacks_make_four_starts() -> None:
    judgement = judge_starts([make_start(60, 0.3)])
    assert judgement.pairs_needed is not None
    assert sum(split_into_starts(judgement.pairs_needed)) == judgement.pairs_needed
    assert len(split_into_starts(judgement.pairs_needed)) >= 4


@pytest.mark.parametrize("most", [160, 200, 239, 320, 1000])
def test_pairs_are_spread_over_starts_of_at_least_20(most: int) -> None:
    looks = looks_upto(most)
    sizes = [split_into_starts(b - a) for a, b in itertools.pairwise((0, *looks))]
    assert [*itertools.accumulate(map(sum, sizes))] == [*looks]
    assert min(map(min, sizes)) >= 20
    assert max(map(max, sizes)) < 40
    assert sum(map(len, sizes)) >= 4


def test_a_side_that_fails_ends_the_other_one_which_still_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_begun, has_ended = threading.Event(), threading.Event()
    waited: list[bool] = []

    def refuse(line: str) -> str:
        has_begun.wait(10)
        raise ValueError("no such option")

    def start_slowly(line: str) -> str:
        has_begun.set()
        waited.append(has_ended.wait(10))
        raise RuntimeError("it was ended")

    @contextmanager
    def opened(side: Side, folder: Path) -> Iterator[Callable[[str], str]]:
        try:
            yield refuse if folder.name == "base" else start_slowly
        finally:
            has_ended.set()

    monkeypatch.setattr(interleave, "_open", opened)
    sides: dict[SideName, Side] = {"base": a_side(tmp_path), "candidate": a_side(tmp_path)}
    with pytest.raises(ValueError, match="a side: no such option"):
        run_start(sides, 2, seed=0)
    assert waited == [True]


def test_the_clock_of_a_gpu_is_refused_without_one_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(line: str) -> str:
        assert "steps" not in line
        return json.dumps(ABOUT["base"])

    monkeypatch.setattr(interleave, "open_command", lambda *_, **options: nullcontext(answer))
    sides: dict[SideName, Side] = {"base": a_side(tmp_path), "candidate": a_side(tmp_path)}
    with pytest.raises(ValueError, match="clock is gpu, but base trains on cpu; choose processor"):
        run_start(sides, 2, seed=0, clock="gpu")


def test_options_and_variables_of_the_user_come_before_those_of_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[tuple[Sequence[str], str]] = []

    def start(module: str, command: Sequence[str], *, limit_s: float, variables: Any) -> None:
        started.append((command, variables["OMP_WAIT_POLICY"]))

    monkeypatch.setattr(interleave, "open_command", start)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    side = replace(a_side(tmp_path), arguments=("--ceiling-s", "1"))
    interleave._open(side, tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    interleave._open(side, tmp_path)
    (command, asleep), (_, given) = started
    values = [command[i + 1] for i, text in enumerate(command) if text == "--ceiling-s"]
    assert values == ["0", "1"]  # the last one counts
    assert (asleep, given) == ("passive", "active")


def test_sides_on_different_devices_are_inconclusive() -> None:
    judgement = judge_starts([make_start(80, 0.5, devices=("cpu", "NVIDIA H100"))] * 2)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert judgement.reason == "the conditions differ: device: cpu and NVIDIA H100"


def test_each_20_pairs_start_both_sides_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def start_of(sides: Any, pairs: int, *, seed: int, clock: Any) -> Start:
        asked.append(pairs)
        return make_start(pairs, 0.05, seed)

    monkeypatch.setattr(interleave, "run_start", start_of)
    lines: list[str] = []
    starts, judgement = compare_sides({}, (80, 160, 320), print_line=lines.append)
    assert judgement.verdict is Verdict.SLOWER
    assert asked == [20] * len(starts)
    assert len(starts) in (4, 8, 16)
    assert lines[-1] == f"{20 * len(starts)} of at most 320 pairs: SLOWER"


def test_a_start_is_the_same_after_it_was_stored() -> None:
    start = make_start(3)
    assert from_json(json.loads(json.dumps(to_json(start)))) == start


def test_stored_times_that_are_no_pairs_are_refused() -> None:
    stored = to_json(make_start(3))
    stored["candidate"]["processor_s"].pop()
    with pytest.raises(ValueError, match="its times are not pairs"):
        from_json(stored)


def test_both_sides_train_their_recipes(repository: Path) -> None:
    sides: dict[SideName, Side] = {
        "base": a_side(repository),
        "candidate": a_side(repository, "--seed", "1"),
    }
    start = run_start(sides, 2, seed=0)
    assert len(start.base.processor_s) == len(start.candidate.wall_s) == 2
    assert min(start.base.processor_s + start.base.wall_s) > 0
    assert start.base.gpu_s == []
    assert len(start.base.losses) == len(start.candidate.losses) > 0
    assert start.base.losses != start.candidate.losses
    assert start.base.peak_bytes > 2**20
    assert start.deciding_clock == "processor"
    assert start.about["base"]["versions"].keys() >= {"python", "torch", "lightning"}


@pytest.fixture
def broken(tmp_path: Path) -> Side:
    """A side that cannot be imported."""
    for package in ("unitransformer", "recipes"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('it does not build')")
    return a_side(tmp_path)


def test_an_option_that_a_side_does_not_know_names_the_side(broken: Side, repository: Path) -> None:
    unknown = a_side(repository, "--no-such-option", "1")
    sides: dict[SideName, Side] = {"base": unknown, "candidate": broken}  # the first is named
    with pytest.raises(ValueError, match="a side: --no-such-option is not an option"):
        run_start(sides, 2, seed=0)


def test_a_side_that_cannot_be_imported_fails(broken: Side) -> None:
    sides: dict[SideName, Side] = {"base": broken, "candidate": broken}
    with pytest.raises(SideFailed, match="a side: RuntimeError: it does not build"):
        run_start(sides, 2, seed=0)

"""Records read and reported: the work grows as their number, and what is fast is the same to the
last bit."""

import copy
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.lint.contradictions import find_contradictions
from scaling.report.results_md import render_pages
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store, load_store
from scaling.store.run import Run
from tests.builders.records import make_record
from tests.builders.reports import OPTIONS
from unitransformer.config import RunConfig, from_dict
from unitransformer.record.metrics import compute_metrics, find_last_steady_state
from unitransformer.record.schema import write_record
from unitransformer.stats import intervals
from unitransformer.stats.autocorrelation import centered_ranks

STEPS = 100
RECORDS = 100


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Some records, and twice as many; no two alike."""
    record = make_record("vit")
    made = []
    for number in (RECORDS, 2 * RECORDS):
        folder = tmp_path_factory.mktemp(f"records-{number}")
        for seed in range(number):
            write_record(_vary(copy.deepcopy(record), seed), folder / f"{seed}.json")
        made.append(folder)
    return made[0], made[1]


def _vary(record: dict[str, Any], seed: int) -> dict[str, Any]:
    drawn = random.Random(seed)
    step_s = [0.1 * drawn.lognormvariate(0, 0.1) for _ in range(STEPS)]
    shares = {"cpu_s": 1.9, "data_s": 0.01, "forward_backward_s": 0.9, "optimizer_s": 0.08}
    samples = {name: [share * s for s in step_s] for name, share in shares.items()}
    samples["slowest_rank"] = [0] * STEPS
    record["config"]["seed"] = seed
    config = from_dict(RunConfig, record["config"])
    steady = find_last_steady_state(step_s, segment_starts=[0], excluded_steps=[])
    metrics = compute_metrics(
        step_s, samples, steady, segment_starts=[0], units_per_step=config.global_batch_size
    )
    assert metrics is not None
    return record | {
        "step_s": step_s,
        "samples": samples,
        "loss": [1 + drawn.random() for _ in range(STEPS)],
        "learning_rate": [1e-3] * STEPS,
        "excluded_steps": [],
        "steady_from": steady.start,
        "metrics": metrics.as_dict(),
        "images_per_s": metrics.units_per_s,
    }


def read_whole(folder: Path) -> Store:
    """What a report asks of every record."""
    store = load_store([folder], relative_to=folder)
    for run in store.runs:
        assert run.metrics is not None
        assert run.mfu
    return store


def seconds_of(folder: Path) -> float:
    """Of the processor: others may use it meanwhile."""
    started_s = time.process_time()
    read_whole(folder)
    return time.process_time() - started_s


@pytest.mark.alone
def test_twice_the_records_take_no_more_than_three_times_as_long(
    folders: tuple[Path, Path], benchmark: Any
) -> None:
    some, twice = folders
    store = benchmark.pedantic(read_whole, args=(some,), rounds=1, warmup_rounds=1)
    assert len(store.runs) == RECORDS
    pairs = [(seconds_of(some), seconds_of(twice)) for _ in range(3)]
    _print_time(
        "read and checked", statistics.median((b - a) / RECORDS for a, b in pairs), benchmark
    )
    assert statistics.median(b / a for a, b in pairs) < 3


def test_a_report_finds_no_figure_again_in_the_samples(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = read_whole(folders[0])
    assert all(find_contradictions(run) == [] for run in store.runs)
    for name in (
        "unitransformer.record.metrics.describe",
        "unitransformer.record.metrics.find_steady_state",
    ):
        monkeypatch.setattr(name, lambda *_: pytest.fail("found again"))
    assert render(read_whole(folders[0])) == render(store)


def test_eight_times_the_rows_take_no_more_than_sixteen_times_as_long(
    folders: tuple[Path, Path], benchmark: Any
) -> None:
    some = read_whole(folders[0])
    few, many = (copies_of(some, number) for number in (5, 40))
    text = benchmark.pedantic(render, args=(few,), rounds=1, warmup_rounds=1)
    assert text.count("-copy.json)") > len(few.runs)
    (few_s, many_s) = (min(seconds_to_render(store) for _ in range(3)) for store in (few, many))
    _print_time("written", (many_s - few_s) / (35 * RECORDS), benchmark)
    assert many_s / few_s < 16


def copies_of(store: Store, number: int) -> Store:
    """So many of each run, under names of their own and with the figures already found."""
    runs = []
    for run in store.runs:
        _ = run.metrics, run.launch, run.mfu
        runs += [_renamed(run, f"{run.name}-{place}-copy.json") for place in range(number)]
    return Store(runs=tuple(runs), left_out=())


def _renamed(run: Run, name: str) -> Run:
    renamed = copy.copy(run)
    object.__setattr__(renamed, "name", name)
    return renamed


def render(store: Store) -> str:
    pages = render_pages(StoreAnalysis(store), OPTIONS)
    return "\n".join(pages.values())


def seconds_to_render(store: Store) -> float:
    """Of the processor."""
    started_s = time.process_time()
    render(store)
    return time.process_time() - started_s


def _print_time(what: str, record_s: float, benchmark: Any) -> None:
    """Seconds of one core for 10,000 records of 100 steps: for people, no test fails on them."""
    benchmark.extra_info[f"10,000 records {what}, s"] = round(10_000 * record_s, 1)
    print(f"10,000 records {what} in {10_000 * record_s:.1f} s of one core")


# ------------------------------------------------------------------------------ the same bits


def make_series(number: int) -> list[float]:
    """Step times with neighbours alike, ties, a change of level: of every kind some."""
    drawn = random.Random(number)
    count, rho = drawn.choice((50, 64, 97, 128, 200, 333)), drawn.choice((0.0, 0.3, 0.5, 0.8))
    digits, noise, series = drawn.choice((2, 3, 17)), 0.0, []
    for _ in range(count):
        noise = rho * noise + drawn.gauss(0, 1)
        series.append(max(0.01, round(0.1 * math.exp(0.1 * noise), digits)))
    changed = count // 3 if number % 3 == 0 else 0
    return [1.5 * s for s in series[:changed]] + series[changed:]


def resampled_interval(samples: Sequence[float], block: int) -> tuple[float, float]:
    """The percentile interval by its definition: every resample is built, its median taken."""
    values = np.asarray(samples)
    count = len(values)
    starts = np.random.default_rng(intervals.SEED).integers(
        0, count, (intervals.RESAMPLES, math.ceil(count / block))
    )
    places = (starts[:, :, None] + np.arange(block)).reshape(len(starts), -1)[:, :count] % count
    ordered = np.sort(values[places], axis=1)
    tail = intervals._tail(count / block, intervals.CONFIDENCE)

    def quantile(level: float) -> float:
        middles = (ordered[:, (count - 1) // 2], ordered[:, count // 2])
        lower, upper = (
            float(np.sort(middle)[math.ceil(level * len(middle) - 1e-9) - 1]) for middle in middles
        )
        return (lower + upper) / 2

    return quantile(tail), quantile(1 - tail)


def test_intervals_of_200_series_are_those_of_their_resamples() -> None:
    actual = 0
    for number in range(200):
        series = make_series(number)
        figures = intervals.describe(series)
        if figures.block_length is not None:
            actual += 1
            expected = resampled_interval(series, figures.block_length)
            assert (figures.low, figures.high) == expected, number
    assert actual > 100


def test_ranks_of_200_series_are_the_middle_of_their_ties() -> None:
    for number in range(200):
        series = np.asarray(make_series(number))
        _, which, counts = np.unique(series, return_inverse=True, return_counts=True)
        middle = (np.cumsum(counts) - (counts - 1) / 2)[which] - (len(series) + 1) / 2
        assert centered_ranks(list(series)).tobytes() == middle.tobytes(), number

"""Tests that no configuration is used for its own prediction, and what is said without one."""

from dataclasses import replace

import pytest

from scaling.prediction import fit_file, fitting
from scaling.prediction.held_out import HeldOut, predict_held_out
from scaling.prediction.measured_rows import FEWEST
from scaling.store.run import Run
from tests.builders.records import HOST
from tests.builders.runs import make_spread

BATCHES = range(1, FEWEST + 3)


def runs_of(factor_of: dict[int, float], seed: int = 0) -> list[Run]:
    """Runs whose step takes 10 ms a sample, times a factor."""
    return [
        make_spread(
            0.01 * batch * factor_of.get(batch, 1.0),
            f"{batch:02}-{seed}.json",
            steps=10,
            batch_size=batch,
            seed=seed,
        )
        for batch in BATCHES
    ]


def predicted(runs: list[Run]) -> dict[int, HeldOut]:
    found, reasons = predict_held_out(runs)
    assert not reasons
    return {item.config.batch_size: item for item in found}


@pytest.fixture(scope="module")
def plain() -> dict[int, HeldOut]:
    return predicted(runs_of({}))


@pytest.fixture(scope="module")
def changed() -> dict[int, HeldOut]:
    return predicted(runs_of({4: 5.0}))


def test_a_configuration_is_predicted_without_its_own_runs(
    plain: dict[int, HeldOut], changed: dict[int, HeldOut]
) -> None:
    assert changed[4].measured_s == pytest.approx(5 * plain[4].measured_s)
    assert changed[4].step_s.value == pytest.approx(plain[4].step_s.value)
    # The others are predicted with it.
    assert changed[5].step_s.value > 1.001 * plain[5].step_s.value


def test_launches_with_other_seeds_are_held_out_together(plain: dict[int, HeldOut]) -> None:
    both = predicted([*runs_of({}), *runs_of({4: 5.0}, seed=1)])
    assert len(both[4].runs) == 2
    assert both[4].step_s.value == pytest.approx(plain[4].step_s.value)


def test_two_launches_count_by_the_median_of_both(plain: dict[int, HeldOut]) -> None:
    both = predicted([*runs_of({}), *runs_of(dict.fromkeys(BATCHES, 3.0), seed=1)])
    for batch, item in both.items():
        assert item.measured_s == pytest.approx(2 * plain[batch].measured_s)
        # A fit to the faster launches would predict the plain time.
        assert item.step_s.value == pytest.approx(2 * plain[batch].step_s.value, rel=0.2)


def test_stale_runs_are_predicted_but_change_no_other_prediction(
    plain: dict[int, HeldOut], changed: dict[int, HeldOut]
) -> None:
    runs = runs_of({4: 5.0})
    runs.append(replace(runs[6], name="old.json"))  # batch 7, beside a launch that is not stale
    found, _ = predict_held_out(runs, lambda run: run.name in ("04-0.json", "old.json"))
    items = {item.config.batch_size: item for item in found}
    assert [batch for batch, item in items.items() if item.is_stale] == [4]
    assert items[4].step_s.value == pytest.approx(plain[4].step_s.value)
    assert items[5].step_s.value != pytest.approx(changed[5].step_s.value, rel=1e-3)
    assert [run.name for run in items[7].runs] == ["07-0.json"]
    without, _ = predict_held_out([run for run in runs if run.name != "old.json"])
    assert len(without) == len(found)


def test_a_machine_with_stale_runs_alone_has_no_prediction() -> None:
    found, (reason,) = predict_held_out(runs_of({}), lambda _: True)
    assert not found
    assert "there are 0 beside 12 that only stale records measured" in reason


def test_predictions_are_the_same_in_any_order_of_the_runs(changed: dict[int, HeldOut]) -> None:
    backward = predicted(runs_of({4: 5.0})[::-1])
    assert {batch: item.step_s for batch, item in backward.items()} == {
        batch: item.step_s for batch, item in changed.items()
    }


def test_peaks_are_compared_with_the_formula(plain: dict[int, HeldOut]) -> None:
    item = plain[1]
    assert item.measured_bytes == 2**30
    assert item.memory_bytes is not None
    assert item.step_s.low < item.step_s.value < item.step_s.high
    assert item.memory_error == pytest.approx(item.memory_bytes.value / 2**30 - 1)


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (3, {}, "needs 10 configurations with a steady state and a ceiling, and there are 3"),
        (3, {"ceiling": [None]}, "no run measured its ceilings, which calibrate a CPU"),
        (3, {"hardware": [HOST | {"device": "Example GPU"}]}, "no hardware file describes it"),
    ],
)
def test_a_machine_without_a_calibration_has_one_line_that_says_so(
    number: int, changes: dict[str, object], reason: str
) -> None:
    runs = [replace(run, record=run.record | changes) for run in runs_of({})[:number]]
    found, reasons = predict_held_out(runs)
    assert not found
    (line,) = reasons
    assert reason in line
    assert line.startswith(f"Example {'GPU' if 'hardware' in changes else '9000'}: no prediction")


def test_times_predicted_together_are_those_predicted_one_by_one() -> None:
    samples = [run.sample for run in fit_file.published_runs()][:40]
    samples.append(replace(samples[0], gpu="unseen", software="unseen"))
    known: fitting.Fit = fit_file.default_model().fit
    for sample, (log_s, deviation) in zip(samples, known.log_times(samples), strict=True):
        alone = known.estimate(sample)
        assert (log_s, deviation) == pytest.approx((alone.log_s, alone.deviation), rel=1e-9)

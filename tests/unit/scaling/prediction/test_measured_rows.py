import dataclasses

import pytest

from scaling.prediction.fit_file import default_model
from scaling.prediction.fitting import Sample, fit
from scaling.prediction.hardware import THIS_MACHINE, Hardware, Link
from scaling.prediction.measured_rows import CPU_PRIORS, FEWEST, calibrate, cpu_of, model_for
from scaling.prediction.time import predict_time
from scaling.prediction.work import StepWork
from tests.builders.runs import make_spread
from unitransformer.config import ModelConfig, RunConfig


def work(seconds: float) -> StepWork:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(StepWork)), 0.0)
    sizes = dict.fromkeys(("layers", "micro_batches", "parameters", "ranks"), 1.0)
    shape = {"width": 512.0, "head_width": 64.0, "positions": 512.0, "matmul_s": seconds}
    return StepWork(**(fields | sizes | shape))


def test_measured_rows_improve_the_next_prediction() -> None:
    measured = [Sample(work=work(s), gpu="cpu", software="ddp", step_s=6 * s) for s in (0.5, 1, 2)]
    wanted = Sample(work=work(4.0), gpu="cpu", software="ddp", step_s=24.0)

    errors = [
        abs(fit(samples, CPU_PRIORS).estimate(wanted).seconds / wanted.step_s - 1)
        for samples in (measured[:1], measured)
    ]

    assert errors[1] < errors[0]


def test_no_usable_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="measure longer"):
        calibrate([])


def test_a_cpu_without_measured_runs_is_extrapolated_from_priors() -> None:
    hardware = Hardware(
        name=THIS_MACHINE,
        gpu=None,
        devices_per_node=1,
        memory_bytes=2**34,
        context_bytes=0,
        peak_flops={"float32": 3e11},
        memory_bytes_per_s=2e10,
        intra_node=Link(latency_s=1e-4, bytes_per_s=1e9),
        inter_node=Link(latency_s=1e-4, bytes_per_s=1e9),
    )
    model = ModelConfig(
        width=256,
        num_layers=4,
        num_heads=4,
        feedforward_width=1024,
        num_classes=1000,
        num_positions=64,
        causal=True,
    )

    time = predict_time(
        RunConfig(recipe="gpt", size="custom", model=model), hardware, model_for(hardware)
    )

    assert time.provenance == "extrapolated"
    assert 0 < time.low_s < time.total_s / 1.5
    assert time.high_s > time.total_s * 1.5


def test_intervals_are_as_wide_as_the_errors_of_rows_that_a_fit_has_not_seen() -> None:
    runs = [
        make_spread(0.02 + 0.001 * batch, f"runs/{batch}.json", steps=10, batch_size=batch)
        for batch in range(1, 21)
    ]
    few, many = calibrate(runs[: FEWEST - 1]), calibrate(runs)
    assert few.deviations == default_model().deviations
    assert 0 < many.deviations < few.deviations  # their times follow a line exactly
    halves = [0.98, 1.02] * 10  # each of them off by two percent
    scattered = [
        make_spread(s * (0.02 + 0.001 * b), f"runs/{b}.json", steps=10, batch_size=b)
        for b, s in enumerate(halves, 1)
    ]
    assert calibrate(scattered).deviations > many.deviations


def test_a_measured_configuration_has_the_median_of_its_launches() -> None:
    launches = [
        make_spread(step_s, f"runs/{seed}.json", steps=10, seed=seed)
        for seed, step_s in enumerate((0.020, 0.021, 0.030))
    ]
    (measured,) = calibrate(launches).measured.values()
    assert measured.seconds == pytest.approx(0.021)
    assert measured.low_s <= 0.0201
    assert measured.high_s >= 0.0299
    (single,) = calibrate(launches[:1]).measured.values()
    # Ten equal steps have no interval; another run may still differ by five percent.
    assert (single.low_s, single.high_s) == pytest.approx((0.020 / 1.05, 0.020 * 1.05), rel=1e-3)
    longer = dataclasses.replace(launches[0].config, max_steps=999, seed=7)
    time = predict_time(longer, cpu_of(launches[0]), calibrate(launches))
    assert time.provenance == "measured"
    assert time.total_s == pytest.approx(0.021)

import dataclasses

import pytest

from scaling.prediction.fitting import Sample, fit
from scaling.prediction.measured_rows import CPU_PRIORS, calibrate
from scaling.prediction.work import StepWork


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

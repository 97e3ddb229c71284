import numpy as np
import pytest

from scaling.prediction.fit_file import PATH as FIT_FILE
from scaling.prediction.fit_file import default_model, published_runs, runs_hash
from scaling.prediction.fitting import fit


def test_the_shipped_fit_is_that_of_the_published_runs() -> None:
    shipped = default_model().fit
    again = fit([run.sample for run in published_runs()], start=shipped)

    assert again.keys == shipped.keys
    np.testing.assert_allclose(again.values, shipped.values, atol=0.02)


def test_the_shipped_fit_names_the_file_of_published_runs() -> None:
    assert runs_hash() in FIT_FILE.read_text(encoding="utf-8")


def test_an_unseen_gpu_widens_the_interval() -> None:
    fitted, sample = default_model().fit, published_runs()[0].sample
    unseen = type(sample)(work=sample.work, gpu="new", software=sample.software)

    assert fitted.estimate(unseen).deviation > 2 * fitted.estimate(sample).deviation


def test_twice_as_slow_measurements_double_the_prediction() -> None:
    samples = [run.sample for run in published_runs() if run.row.model == "MPT-1b"]
    slow = [
        type(s)(work=s.work, gpu=s.gpu, software=s.software, source=s.source, step_s=2 * s.step_s)
        for s in samples
    ]

    ratio = fit(slow).estimate(samples[0]).seconds / fit(samples).estimate(samples[0]).seconds

    assert ratio == pytest.approx(2, rel=0.1)

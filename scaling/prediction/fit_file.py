"""Keeps the coefficients fitted to the published runs in `fit.json`, so that no prediction refits.

`python -m scaling.prediction.fit_file` writes it again, which is needed when `runs.csv` or a prior
changes; a test compares it with a new fit.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.prediction.fitting import PRIORS, Fit, Sample, fit
from scaling.prediction.published_work import PublishedRun, describe_run
from scaling.prediction.time import RANGE_FIELDS, TimeModel
from scaling.published.csv_rows import BUILTIN_ROWS, load_rows
from unitransformer.files import write_atomically

PATH = Path(__file__).with_name("fit.json")
LEVEL = 0.9  # of the intervals


def published_runs(path: Path | None = None) -> list[PublishedRun]:
    """Returns the published runs that the model can describe, of `runs.csv` or another file."""
    return [run for row in load_rows(path) if (run := describe_run(row)) is not None]


def cross_validate(
    samples: Sequence[Sample], groups: Sequence[str], whole: Fit
) -> list[tuple[float, float]]:
    """Predicts each group of samples by a fit without it.

    Returns, per sample, the error of the logarithm of its time and its predicted deviation.
    """
    found: dict[int, tuple[float, float]] = {}
    for group in sorted(set(groups)):
        left = [s for s, g in zip(samples, groups, strict=True) if g != group]
        partial = fit(left, whole.priors, start=whole)
        members = [i for i, name in enumerate(groups) if name == group]
        estimates = partial.log_times([samples[i] for i in members])
        for i, (log_s, deviation) in zip(members, estimates, strict=True):
            found[i] = (log_s - float(np.log(samples[i].step_s)), deviation)
    return [found[i] for i in range(len(samples))]


def half_width(errors: Sequence[tuple[float, float]]) -> float:
    """Returns in how many deviations 90 % of the errors lie (split conformal prediction).

    Source: Lei et al. 2018, "Distribution-free predictive inference for regression".
    """
    return float(np.quantile([abs(error) / deviation for error, deviation in errors], LEVEL))


def model_of(run: PublishedRun) -> str:
    """Returns the model of a run; one whose name is assumed counts as that model."""
    name = run.row.model.split(" (")[0]
    return "Llama-3.1-8B" if name == "Llama-3-8B" else name


def ranges_of(samples: Sequence[Sample]) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns the lowest and highest values of the samples of each family of GPUs."""
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    for gpu in sorted({sample.gpu for sample in samples}):
        works = [sample.work for sample in samples if sample.gpu == gpu]
        ranges[gpu] = {}
        for name in RANGE_FIELDS:
            values = [float(getattr(work, name)) for work in works]
            ranges[gpu][name] = (min(values), max(values))
    return ranges


def fit_published(runs: Sequence[PublishedRun]) -> TimeModel:
    """Fits the coefficients to published runs, and the intervals to models left out in turn."""
    samples = [run.sample for run in runs]
    whole = fit(samples)
    errors = cross_validate(samples, [model_of(run) for run in runs], whole)
    return TimeModel(fit=whole, ranges=ranges_of(samples), deviations=half_width(errors))


@functools.cache
def default_model() -> TimeModel:
    """Returns the model fitted to the built-in published runs.

    Raises:
        ValueError: `fit.json` is missing or damaged.
    """
    try:
        return _from_json(json.loads(PATH.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{PATH} cannot be read: {error!r}; write it by python -m scaling.prediction.fit_file"
        ) from error


def runs_hash() -> str:
    """Returns the SHA-256 of the file with the published runs."""
    return hashlib.sha256(BUILTIN_ROWS.read_bytes()).hexdigest()


def to_json(model: TimeModel) -> dict[str, Any]:
    """Returns a model as JSON values; the covariance is a lower triangle."""
    fitted = model.fit
    return {
        "runs_sha256": runs_hash(),
        "num_samples": fitted.num_samples,
        "deviations": round(model.deviations, 4),
        "ranges": model.ranges,
        "keys": [list(key) for key in fitted.keys],
        "values": [float(f"{value:.6g}") for value in fitted.values],
        "covariance": [
            [float(f"{value:.4g}") for value in row[: i + 1]]
            for i, row in enumerate(fitted.covariance)
        ],
    }


def _from_json(values: dict[str, Any]) -> TimeModel:
    triangle = values["covariance"]
    covariance = np.zeros((len(triangle), len(triangle)))
    for i, row in enumerate(triangle):
        covariance[i, : i + 1] = covariance[: i + 1, i] = row
    return TimeModel(
        fit=Fit(
            priors=PRIORS,
            keys=tuple((name, kind, group) for name, kind, group in values["keys"]),
            values=np.array(values["values"]),
            covariance=covariance,
            num_samples=values["num_samples"],
        ),
        ranges={
            gpu: {name: (low, high) for name, (low, high) in ranges.items()}
            for gpu, ranges in values["ranges"].items()
        },
        deviations=values["deviations"],
    )


def write_fit() -> None:
    """Writes `fit.json` from the built-in published runs."""
    text = json.dumps(to_json(fit_published(published_runs()))).replace("], [", "],\n[")
    write_atomically(PATH, (text + "\n").encode())


if __name__ == "__main__":
    write_fit()

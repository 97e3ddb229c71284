"""Estimates how strongly neighboring samples of a series depend on each other, and how far.

Import it within functions: numpy is slow to import, and a login node may lack it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


def block_length(samples: Sequence[float]) -> int:
    """Returns the block length of a circular bootstrap, at least the cube root of the count.

    Politis & White 2004, "Automatic block-length selection for the dependent bootstrap",
    Econometric Reviews 23, with the correction of Patton, Politis & White 2009. Applied to ranks,
    because a few spikes would hide the autocorrelation of the values.
    """
    count = len(samples)
    covariance = autocovariance(centered_ranks(samples))
    least = math.ceil(math.cbrt(count))
    if count < 3 or covariance[0] == 0:
        return min(least, count)
    lags, weights = _flat_top(covariance)
    # Negative autocorrelation would ask for blocks of any length; short ones err on the safe side.
    slope = max(0.0, 2 * float(np.sum(weights * lags * covariance[lags])))
    spectrum = _spectrum_at_zero(covariance)
    best = math.cbrt(1.5 * (slope / spectrum) ** 2 * count)  # 2 G^2 over D = 4/3 g(0)^2
    most = min(3 * math.sqrt(count), count / 3)
    return math.ceil(max(least, min(best, most)))


def centered_ranks(samples: Sequence[float] | Floats) -> Floats:
    """Returns the rank of each sample less the mean rank; ties share their middle rank."""
    values = np.asarray(samples)
    in_order = np.sort(values)
    below, upto = (np.searchsorted(in_order, values, side) for side in ("left", "right"))
    ranks: Floats = (below + upto - len(values)) / 2
    return ranks


def autocovariance(centered: Floats) -> Floats:
    """Returns the autocovariance at every lag, by a Fourier transform in n log n."""
    count = len(centered)
    power = np.abs(np.fft.rfft(centered, 2 * count)) ** 2
    covariance: Floats = np.fft.irfft(power, 2 * count)[:count] / count
    return covariance


def long_run_variance(centered: Floats) -> float:
    """Returns the variance of the mean of a long series, times its length.

    It is never below that of independent samples.
    """
    covariance = autocovariance(centered)
    if covariance[0] <= 0 or len(centered) < 3:
        return max(0.0, float(covariance[0]))
    return _spectrum_at_zero(covariance)


def _spectrum_at_zero(covariance: Floats) -> float:
    """Returns the flat-top estimate of Politis & White 2004, at least the variance."""
    lags, weights = _flat_top(covariance)
    estimate = float(covariance[0] + 2 * np.sum(weights * covariance[lags]))
    return max(estimate, float(covariance[0]))


def _flat_top(covariance: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Returns lags and weights: 1 up to the last significant lag, falling to 0 at twice it."""
    last = _last_lag(covariance)
    lags = np.arange(1, min(2 * last, len(covariance) - 1) + 1)
    return lags, np.minimum(1, 2 * (1 - lags / (2 * last)))


def _last_lag(covariance: Floats) -> int:
    """Returns the last lag before a run of insignificant autocorrelations, at least 1."""
    count = len(covariance)
    run = max(5, math.ceil(math.log10(count)))
    bound = 2 * math.sqrt(math.log10(count) / count)
    most = min(math.ceil(math.sqrt(count)) + run, count - 1)
    correlation = covariance[1 : most + 1] / covariance[0]
    is_significant = [abs(float(value)) >= bound for value in correlation]
    for lag in range(len(is_significant) - run + 1):
        if not any(is_significant[lag : lag + run]):
            return max(1, lag)
    return max((lag for lag, is_it in enumerate(is_significant, start=1) if is_it), default=1)

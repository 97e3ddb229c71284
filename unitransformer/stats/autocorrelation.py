"""How much neighbours in a series have in common, and how long that lasts. Plain arithmetic."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy is slow to import, and a login node may have none
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def block_length(samples: Sequence[float]) -> int:
    """Samples in a block of the circular bootstrap, at least the cube root of their number.

    Politis & White 2004, "Automatic block-length selection for the dependent bootstrap",
    Econometric Reviews 23, with the correction of Patton, Politis & White 2009. Applied to ranks:
    a few spikes hide from it how much neighbours have in common.
    """
    import numpy as np

    count = len(samples)
    covariance = autocovariance(centred_ranks(samples))
    least = math.ceil(math.cbrt(count))
    if count < 3 or covariance[0] == 0:
        return min(least, count)
    cut = last_lag(covariance / covariance[0], count)
    lags, weights = _flat_top(cut, count)
    # Where neighbours cancel, short blocks err on the safe side, and the rule would ask for any.
    slope = max(0.0, 2 * float(np.sum(weights * lags * covariance[lags])))
    spectrum = float(covariance[0] + 2 * np.sum(weights * covariance[lags]))
    spectrum = max(spectrum, float(covariance[0]))
    best = math.cbrt(1.5 * (slope / spectrum) ** 2 * count)  # 2 G^2 over D = 4/3 g(0)^2
    most = min(3 * math.sqrt(count), count / 3)
    return math.ceil(max(least, min(best, most)))


def centred_ranks(samples: "Sequence[float] | Floats") -> "Floats":
    """Place of each sample in their order, equal ones in the middle of theirs, less the mean."""
    import numpy as np

    values = np.asarray(samples)
    in_order = np.sort(values)
    below, upto = (np.searchsorted(in_order, values, side) for side in ("left", "right"))
    ranks: Floats = (below + upto - len(values)) / 2
    return ranks


def autocovariance(centred: "Floats") -> "Floats":
    """Of every lag, over the number of samples; by a Fourier transform, n log n."""
    import numpy as np

    count = len(centred)
    power = np.abs(np.fft.rfft(centred, 2 * count)) ** 2
    covariance: Floats = np.fft.irfft(power, 2 * count)[:count] / count
    return covariance


def last_lag(correlation: "Floats", count: int) -> int:
    """The lag after which a row of autocorrelations is none to speak of, at least 1."""
    row = max(5, math.ceil(math.log10(count)))
    bound = 2 * math.sqrt(math.log10(count) / count)
    most = min(math.ceil(math.sqrt(count)) + row, count - 1)
    told = [abs(float(value)) >= bound for value in correlation[1 : most + 1]]
    for lag in range(len(told) - row + 1):
        if not any(told[lag : lag + row]):
            return max(1, lag)
    return max((lag for lag, is_told in enumerate(told, start=1) if is_told), default=1)


def long_run_variance(centred: "Floats") -> float:
    """Variance of the mean of a long series, times its length; never below that of independence.

    The flat-top estimate of Politis & White 2004, up to the lag where autocorrelation ends.
    """
    import numpy as np

    covariance = autocovariance(centred)
    if covariance[0] <= 0 or len(centred) < 3:
        return max(0.0, float(covariance[0]))
    lags, weights = _flat_top(last_lag(covariance / covariance[0], len(centred)), len(centred))
    estimate = float(covariance[0] + 2 * np.sum(weights * covariance[lags]))
    return max(estimate, float(covariance[0]))


def _flat_top(cut: int, count: int) -> tuple["NDArray[np.int64]", "Floats"]:
    """Lags up to twice `cut` and their weights: whole up to `cut`, then falling to nothing."""
    import numpy as np

    lags = np.arange(1, min(2 * cut, count - 1) + 1)
    return lags, np.minimum(1, 2 * (1 - lags / (2 * cut)))

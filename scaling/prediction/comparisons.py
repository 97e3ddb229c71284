"""Compares predictions, and says so; of an extrapolation in ranges alone.

A single value beside the known time of another row would give away that of the extrapolated row.
"""

import math
from collections.abc import Iterator

from scaling.prediction.fitting import SHARES
from scaling.prediction.predict import Interval, Prediction
from scaling.prediction.time import TimeModel, sample_for


def hours_ratio(one: Prediction, other: Prediction, model: TimeModel) -> Interval:
    """Returns the hours of `one` over those of `other`, for as many tokens or images.

    It is surer than two single intervals say, as most of their errors are the same.
    """
    value = other.units_per_s.value / one.units_per_s.value
    if "measured" in (one.time.provenance, other.time.provenance):  # its error is its own
        half = math.hypot(*(math.log(p.step_s.high / p.step_s.low) / 2 for p in (one, other)))
    else:
        samples = [sample_for(p.config, p.hardware) for p in (one, other)]
        half = model.deviations * model.fit.ratio_deviation(*samples)
    return Interval(value=value, low=value / math.exp(half), high=value * math.exp(half))


def step_shares(prediction: Prediction, model: TimeModel) -> list[Interval]:
    """Returns the shares of the step of `SHARES`: the last is beside the others."""
    sample = sample_for(prediction.config, prediction.hardware)
    deviations = model.fit.share_deviations(sample)
    found = []
    for name, deviation in deviations.items():
        share = getattr(prediction.time, name) / prediction.time.total_s
        factor = math.exp(model.deviations * deviation)  # of the odds
        low, high = (share * f / (1 - share + share * f) for f in (1 / factor, factor))
        found.append(Interval(value=share, low=low, high=high))
    return found


def format_lag(prediction: Prediction, best: Prediction, model: TimeModel) -> str:
    """Says how much slower a prediction is; an extrapolation in a range alone."""
    ratio = hours_ratio(prediction, best, model)
    if is_known(prediction, best):
        return f"{ratio.value - 1:.0%} slower" if ratio.value >= 1.005 else "as fast"
    return format_range(ratio.low - 1, ratio.high - 1, "slower", "faster")


def is_known(*predictions: Prediction) -> bool:
    return all(p.time.provenance != "extrapolated" for p in predictions)


def format_range(low: float, high: float, more: str, less: str) -> str:
    """Formats shares such as "2% to 9% slower"; a negative one is the other way round."""
    if low >= 0:
        return f"{low:.0%} to {high:.0%} {more}"
    if high <= 0:
        return format_range(-high, -low, less, more)
    return f"between {-low:.0%} {less} and {high:.0%} {more}"


def format_saving(cheap: Prediction, other: Prediction, model: TimeModel) -> str:
    """Says how much less a prediction costs than another one, such as "18% less"."""
    ratio = hours_ratio(cheap, other, model)
    devices = cheap.config.parallel.world_size / other.config.parallel.world_size
    if is_known(cheap, other):
        less = 1 - ratio.value * devices
        return f"{less:.0%} less" if less >= 0.005 else "as much"
    return format_range(1 - ratio.high * devices, 1 - ratio.low * devices, "less", "more")


def format_shares(prediction: Prediction, model: TimeModel) -> Iterator[str]:
    """Yields what a step is spent on; of an extrapolation only the ranges."""
    if is_known(prediction):
        time = prediction.time
        yield from (f"{getattr(time, name) / time.total_s:.0%}" for name in SHARES)
        return
    for share in step_shares(prediction, model):
        low, high = f"{share.low:.0%}", f"{share.high:.0%}"
        yield low if low == high else f"{low} to {high}"

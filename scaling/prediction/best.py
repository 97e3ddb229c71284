"""Chooses among predictions: the fastest that fits, and the cheapest to train some tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scaling.prediction.fitting import NORMAL, SCATTER
from scaling.prediction.hardware import Hardware
from scaling.prediction.memory import FREE_SHARE
from scaling.prediction.options import MAX_BATCH
from scaling.prediction.predict import Prediction
from scaling.prediction.time import TimeModel
from unitransformer.config import RunConfig

LEAST_GAIN = 1.01  # in speed, of a batch twice as large; a smaller gain ends the search


def search_batches(
    configs: Sequence[RunConfig], predict: Callable[[RunConfig], Prediction]
) -> list[Prediction]:
    """Doubles the batch of each config while it fits and the speed rises; returns all predictions.

    A larger batch hides more communication and host time, so that the speed rises until it is
    limited by computation.
    """
    found = []
    for config in configs:
        known = 0.0
        while config.batch_size <= MAX_BATCH:
            prediction = predict(config)
            rate = _rate(prediction)
            if rate < LEAST_GAIN * known:
                break
            found.append(prediction)
            if not prediction.fits:
                break
            known, config = rate, replace(config, batch_size=2 * config.batch_size)
    return found


def largest_batch(fits: Callable[[int], bool]) -> int:
    """Returns the largest batch of a device that fits; 0 if not even 1 does."""
    low, high = 0, 1
    while high <= MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def usable_bytes(hardware: Hardware) -> float:
    """Returns the largest predicted peak that fits: fragmentation takes a share beside it."""
    context = hardware.context_bytes
    return context + (hardware.memory_bytes - context) / (1 + FREE_SHARE)


def fastest_by_devices(predictions: Sequence[Prediction]) -> dict[int, Prediction | None]:
    """Returns the fastest prediction that fits by number of devices; None where none fits."""
    best: dict[int, Prediction | None] = {}
    for prediction in predictions:
        devices = prediction.config.parallel.world_size
        known = best.setdefault(devices, None)
        if prediction.fits and (known is None or _rate(prediction) > _rate(known)):
            best[devices] = prediction
    return best


def runners_up(predictions: Sequence[Prediction], best: Prediction) -> list[Prediction]:
    """Returns the fastest that fits of every other combination on as many devices, best first.

    A combination is a config without its batch: a neighbouring batch is no alternative.
    """
    devices = best.config.parallel.world_size
    found: dict[RunConfig, Prediction] = {}
    for prediction in predictions:
        if prediction.config.parallel.world_size != devices or not prediction.fits:
            continue
        kind = replace(prediction.config, batch_size=1)
        if kind not in found or _rate(prediction) > _rate(found[kind]):
            found[kind] = prediction
    found.pop(replace(best.config, batch_size=1), None)
    return sorted(found.values(), key=_rate, reverse=True)


def tie_share(model: TimeModel) -> float:
    """Returns the lead in speed below which two predictions on one hardware are a tie.

    It is half the 90 % interval of the ratio of two runs of one configuration. The intervals of
    predictions are wider, but most of their errors are those of the GPU and the software, which
    move both predictions alike.
    """
    return math.exp(max(NORMAL, model.deviations) * math.sqrt(2) * SCATTER) - 1


def cheapest(predictions: Sequence[Prediction]) -> Prediction | None:
    """Returns the prediction that fits with the fewest device-seconds per token or image."""
    fitting = [prediction for prediction in predictions if prediction.fits]
    return max(fitting, key=_rate_per_device, default=None)


def fastest_at_cost(predictions: Sequence[Prediction], least: Prediction, tie: float) -> Prediction:
    """Returns the fastest that fits of those that cost as much as `least`, as far as is known.

    Args:
        tie: a lead below this share is none.
    """
    enough = _rate_per_device(least) / (1 + tie)
    tied = [p for p in predictions if p.fits and _rate_per_device(p) > enough]
    return max([least, *tied], key=_rate)


def _rate_per_device(prediction: Prediction) -> float:
    return _rate(prediction) / prediction.config.parallel.world_size


def _rate(prediction: Prediction) -> float:
    return prediction.units_per_s.value

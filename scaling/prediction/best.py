"""Chooses among predictions: the fastest that fits, and the cheapest to train some tokens."""

from collections.abc import Sequence

from scaling.prediction.predict import Prediction


def fastest_by_devices(predictions: Sequence[Prediction]) -> dict[int, Prediction | None]:
    """Returns the fastest prediction that fits by number of devices; None where none fits."""
    best: dict[int, Prediction | None] = {}
    for prediction in predictions:
        devices = prediction.config.parallel.world_size
        known = best.setdefault(devices, None)
        if prediction.fits and (known is None or _rate(prediction) > _rate(known)):
            best[devices] = prediction
    return best


def cheapest(predictions: Sequence[Prediction]) -> Prediction | None:
    """Returns the prediction that fits with the fewest device-seconds per token or image."""
    fitting = [prediction for prediction in predictions if prediction.fits]
    return max(fitting, key=lambda p: _rate(p) / p.config.parallel.world_size, default=None)


def _rate(prediction: Prediction) -> float:
    return prediction.units_per_s.value

"""What each task is measured by, and how its figures are written. Plain words and arithmetic."""

import math

from unitransformer.config import Recipe

METRIC: dict[Recipe, str] = {"gpt": "perplexity", "bert": "masked accuracy", "vit": "top-1"}
UNIT: dict[Recipe, str] = {"gpt": "tokens", "bert": "tokens", "vit": "images"}
LARGEST_EXPONENT = 700.0  # e to a little more is no float any longer


def perplexity(loss: float) -> float:
    """The exponential of a mean cross entropy in nats."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def metric_value(recipe: Recipe, *, loss: float, accuracy: float) -> float:
    """Perplexity of GPT, accuracy of BERT (masked words) and ViT (top-1)."""
    return perplexity(loss) if METRIC[recipe] == "perplexity" else accuracy


def metric_in_words(metric: str, value: float) -> str:
    return f"{value:,.1f}" if metric == "perplexity" else f"{value:.2%}"


def rate_in_words(per_s: float, unit: str) -> str:
    """Three digits or more: 2.68 images/s, 3,455 tokens/s."""
    digits = 0 if per_s >= 100 else 2
    return f"{per_s:,.{digits}f} {unit}/s"


def si(number: float) -> str:
    """Three digits and the prefix of the unit that follows: "6.01 M"."""
    scale, prefix = _prefix(number)
    return f"{number / scale:.3g} {prefix}"


def si_interval(number: float, low: float, high: float, unit: str) -> str:
    """The same with its unit, and its interval in that: "6.01 MFLOP/s (5.98 to 6.05)"."""
    scale, prefix = _prefix(number)
    digits = max(0, 3 - len(str(round(number / scale))))
    middle, *ends = (f"{each / scale:.{digits}f}" for each in (number, low, high))
    return f"{middle} {prefix}{unit} ({' to '.join(ends)})"


def _prefix(number: float) -> tuple[float, str]:
    prefixes = ["", "k", "M", "G", "T", "P"]
    scale = 1.0
    while number / scale >= 999.5 and len(prefixes) > 1:
        scale *= 1000
        prefixes.pop(0)
    return scale, prefixes[0]

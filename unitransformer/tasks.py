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
    prefixes = ["", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}"

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


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


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


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def is_small(num_bytes: int) -> bool:
    """Whether MiB say more than GiB."""
    return num_bytes < 2**30 / 10


def gib(num_bytes: int) -> str:
    if is_small(num_bytes):
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"

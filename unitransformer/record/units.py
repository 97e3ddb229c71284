"""Says what each task is measured by, and formats numbers with their units."""

import math

from unitransformer.config import Recipe

METRIC: dict[Recipe, str] = {"gpt": "perplexity", "bert": "masked accuracy", "vit": "top-1"}

UNIT: dict[Recipe, str] = {"gpt": "tokens", "bert": "tokens", "vit": "images"}

MAX_EXPONENT = 700.0  # e to the power of a little more overflows a float


def perplexity(loss: float) -> float:
    """Returns the exponential of a mean cross entropy in nats."""
    return math.exp(min(loss, MAX_EXPONENT))


def metric_value(recipe: Recipe, *, loss: float, accuracy: float) -> float:
    return perplexity(loss) if METRIC[recipe] == "perplexity" else accuracy


def format_metric(metric: str, value: float) -> str:
    return f"{value:,.1f}" if metric == "perplexity" else f"{value:.2%}"


def format_rate(per_s: float, unit: str) -> str:
    """Formats with three digits or more: 2.68 images/s, 3,455 tokens/s."""
    digits = 0 if per_s >= 100 else 2
    return f"{per_s:,.{digits}f} {unit}/s"


def format_duration(seconds: float) -> str:
    """Formats as 45 s, 12 min or 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def format_count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def format_si(number: float) -> str:
    """Formats three digits and the prefix of the unit that follows: "6.01 M"."""
    scale, prefix = _prefix(number)
    return f"{number / scale:.3g} {prefix}"


def format_si_interval(number: float, low: float, high: float, unit: str) -> str:
    """Formats a number and its interval with one prefix: "6.01 MFLOP/s (5.98 to 6.05)"."""
    scale, prefix = _prefix(number)
    digits = max(0, 3 - len(str(round(number / scale))))
    middle, *ends = (f"{value / scale:.{digits}f}" for value in (number, low, high))
    return f"{middle} {prefix}{unit} ({' to '.join(ends)})"


def _prefix(number: float) -> tuple[float, str]:
    scale = 1.0
    for prefix in ("", "k", "M", "G", "T"):
        if number / scale < 999.5:
            return scale, prefix
        scale *= 1000
    return scale, "P"


def format_ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def is_shown_in_mib(num_bytes: int) -> bool:
    return num_bytes < 2**30 / 10


def format_bytes(num_bytes: int) -> str:
    if is_shown_in_mib(num_bytes):
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"

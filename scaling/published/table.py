"""Replayed rows in, what a person reads out."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from scaling.markdown import count, table
from scaling.published.recompute import Check, Replayed

HEADERS = (
    "source",
    "rows",
    "convention",
    "compared",
    "largest difference",
    "beyond printed digits",
    "flagged",
)
MEANINGS = (
    "palm: 6N + 12LdT, N with word vectors and learned positions | matmul: 6 per parameter that is "
    "multiplied, attention in full | matmul_causal: the same, attention halved | -: the source "
    "prints no rate of FLOPs"
)


def build_published_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Recompute MFU and TFLOP/s of published runs from their tokens/s and shapes, "
        "each under the convention of its source, and say which rows contradict themselves.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--rows",
        type=Path | None,
        default=None,
        metavar="FILE",
        help="CSV file with the columns of scaling/published/runs.csv; by default that file",
    )
    return parser


def render_replay(replayed: Sequence[Replayed]) -> str:
    """A line for each source, then each flagged row with its reasons, then what is left out."""
    names = list(dict.fromkeys(one.row.source for one in replayed))
    lines = [_line([one for one in replayed if one.row.source == name]) for name in names]
    flagged = [one for one in replayed if one.flags]
    total = f"{count(len(replayed), 'row')}, {len(flagged)} flagged"
    parts = [table(HEADERS, lines), MEANINGS, "\n".join([total, *map(_flagged, flagged)])]
    left_out = Counter(f"{one.row.source}, {one.left_out}" for one in replayed if one.left_out)
    if left_out:
        reasons = [f"- {reason} ({count(n, 'row')})" for reason, n in left_out.items()]
        parts.append("\n".join(["not compared", *reasons]))
    return "\n\n".join(parts)


def _line(group: Sequence[Replayed]) -> tuple[str, ...]:
    source = group[0].source
    convention = (source.convention or "-") if source else "unknown"
    checks = [check for one in group for check in one.checks]
    figures = Counter(check.figure for check in checks)
    compared = [f"{n} {figure}" for figure, n in figures.items()]
    held = sum(one.num_larger > 0 for one in group)
    compared += [f"{held} with more GPUs"] if held else []
    rates = [check for check in checks if check.figure != "parameters"]
    return (
        group[0].row.source,
        str(len(group)),
        convention,
        ", ".join(compared) or "nothing",
        _largest(rates),
        f"{max(check.excess for check in rates):.2%}" if rates else "",
        str(sum(bool(one.flags) for one in group)),
    )


def _largest(rates: Sequence[Check]) -> str:
    """Of each figure, since TFLOP/s that are cut to whole ones differ more than MFU does."""
    largest: dict[str, float] = {}
    for check in rates:
        largest[check.figure] = max(largest.get(check.figure, 0.0), abs(check.difference))
    return ", ".join(f"{figure} {share:.2%}" for figure, share in sorted(largest.items()))


def _flagged(one: Replayed) -> str:
    row = one.row
    what = f"{row.source}, {row.model}, {row.num_gpus} x {row.gpu}"
    return f"- {what}: {'; '.join(one.flags)}\n  {row.url}"

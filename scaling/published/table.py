"""Prints recomputed rows as a table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.markdown import table
from scaling.published.csv_rows import load_rows
from scaling.published.recompute import Check, RecomputedRow, recompute_rows
from unitransformer.cli import Parser
from unitransformer.record.units import format_count

MEANINGS = (
    "palm: 6N + 12LdT, N with embeddings and learned positions | matmul: 6 per parameter of a "
    "matrix product, attention in full | matmul_causal: the same, attention halved | -: the source "
    "prints no FLOP/s"
)


def build_published_parser() -> Parser:
    parser = Parser(
        description="Recompute MFU or TFLOP/s of the published runs that print either, from their "
        "tokens/s and shapes, each under the convention of its source, and say which rows "
        "contradict themselves. Of the other runs it checks the number of parameters, and that "
        "more GPUs with the same work per GPU make none faster, where they print enough.",
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


def run_published(given: Any) -> int:
    """Prints the recomputed rows, and returns the exit code."""
    print(render_rows(recompute_rows(load_rows(given.rows))))
    return 0


def render_rows(rows: Sequence[RecomputedRow]) -> str:
    """Returns a line per source, each flagged row with its reasons, and what is not compared."""
    names = list(dict.fromkeys(row.row.source for row in rows))
    lines = [_line([row for row in rows if row.row.source == name]) for name in names]
    flagged = [row for row in rows if row.flags]
    recomputed = sum(any(c.figure != "parameters" for c in row.checks) for row in rows)
    total = (
        f"{format_count(len(rows), 'row')}, {recomputed} with a recomputed MFU or TFLOP/s, "
        f"{len(flagged)} flagged"
    )
    parts = [
        table(list(lines[0]), [list(line.values()) for line in lines]),
        MEANINGS,
        "\n".join([total, *map(_flagged, flagged)]),
    ]
    left_out = Counter(f"{row.row.source}, {row.left_out}" for row in rows if row.left_out)
    if left_out:
        reasons = [f"- {reason} ({format_count(n, 'row')})" for reason, n in left_out.items()]
        parts.append("\n".join(["not compared", *reasons]))
    return "\n\n".join(parts)


def _line(group: Sequence[RecomputedRow]) -> dict[str, str]:
    source = group[0].source
    convention = (source.convention or "-") if source else "unknown"
    checks = [check for row in group for check in row.checks]
    figures = Counter(check.figure for check in checks)
    compared = [f"{n} {figure}" for figure, n in figures.items()]
    held = sum(row.num_larger > 0 for row in group)
    compared += [f"{held} with more GPUs"] if held else []
    rates = [check for check in checks if check.figure != "parameters"]
    return {
        "source": group[0].row.source,
        "rows": str(len(group)),
        "convention": convention,
        "compared": ", ".join(compared) or "nothing",
        "largest difference": _largest(rates),
        "beyond printed digits": f"{max(c.excess for c in rates):.2%}" if rates else "",
        "flagged": str(sum(bool(row.flags) for row in group)),
    }


def _largest(rates: Sequence[Check]) -> str:
    """Per figure, since TFLOP/s cut to whole numbers differ more than MFU does."""
    largest: dict[str, float] = {}
    for check in rates:
        largest[check.figure] = max(largest.get(check.figure, 0.0), abs(check.difference))
    return ", ".join(f"{figure} {share:.2%}" for figure, share in sorted(largest.items()))


def _flagged(recomputed: RecomputedRow) -> str:
    row = recomputed.row
    what = f"{row.source}, {row.model}, {row.num_gpus} x {row.gpu}"
    return f"- {what}: {'; '.join(recomputed.flags)}\n  {row.url}"

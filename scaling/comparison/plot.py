"""Draws the pairs of a comparison: each ratio, in order, and the interval of their median."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from scaling.comparison.interleave import Start
from scaling.comparison.paired_calls import Clock
from scaling.comparison.verdict import Judgement, format_judgement
from unitransformer.files import write_atomically
from unitransformer.plots import INK, TITLE, TRAIN, VALIDATION, WIDTH, figure_bytes

TITLE_LETTERS = 90  # in a line


def write_plot(path: Path, starts: Sequence[Start], judgement: Judgement, *, clock: Clock) -> None:
    """Writes the figure in the format of the file's name; raises OSError."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    ratios = [
        candidate / base
        for start in starts
        if judgement.ratio is not None  # sides on two devices may have no common clock
        for base, candidate in zip(*start.pairs(clock), strict=True)
    ]
    axes.plot(range(1, len(ratios) + 1), ratios, ".", color=TRAIN, markersize=4)
    axes.axhline(1, color=INK, linewidth=1)
    if judgement.low is not None and judgement.high is not None:
        axes.axhspan(judgement.low, judgement.high, color=VALIDATION, alpha=0.25)
    if judgement.ratio is not None:
        axes.axhline(judgement.ratio, color=VALIDATION)
    for end in list(itertools.accumulate(len(start.first) for start in starts))[:-1]:
        axes.axvline(end + 0.5, color=INK, linestyle=":", linewidth=1)  # both started again
    axes.set(xlabel="pair, in the order measured", ylabel=f"candidate over base, {clock} time")
    title = textwrap.fill(format_judgement(judgement, clock).replace("$", r"\$"), TITLE_LETTERS)
    axes.set_title(title, loc="left", fontsize=TITLE, color=INK)
    write_atomically(path, figure_bytes(figure, "svg" if path.suffix == ".svg" else "png"))

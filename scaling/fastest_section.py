"""The fastest strategy in the report: comparisons in, Markdown out."""

from collections.abc import Iterable, Mapping, Sequence

from scaling import cells
from scaling.crossover import UNPROVEN, Comparison, Way
from scaling.markdown import escaped
from scaling.parity_section import describe_proof
from scaling.row_notes import (
    differing,
    draw,
    figure,
    flags_of,
    if_told,
    in_words,
    lines_of,
    rows_in_words,
    shared,
    speed,
    unlike,
)

FASTEST = (
    "Ways to do the same work on the same devices. Only a way whose loss parity is proven is "
    "ranked, the others are struck out; one whose ratio to the fastest may be 1 is a tie. A way's "
    "column tells its speed over that of the fastest, and its speed. Intervals are of 95 %."
)
OF_A_WAY = {
    *("batch_size", "accumulate", "parallel.devices", "parallel.strategy", "parallel.compile"),
    *("parallel.activation_checkpointing", "parallel.cpu_offload"),
}


def fastest_blocks(comparisons: Sequence[Comparison]) -> list[str]:
    """Blocks of Markdown; none where there is nothing to compare."""
    if not comparisons:
        return []
    return ["### Fastest strategy", FASTEST, *_map(comparisons)]


def _map(comparisons: Sequence[Comparison]) -> list[str]:
    """Which way is the fastest where, and how far the others are behind."""
    configs = [comparison.config for comparison in comparisons]
    names = sorted({way.name for comparison in comparisons for way in comparison.ways})
    columns = {
        "row": [str(number) for number in range(1, len(comparisons) + 1)],
        **differing(configs, OF_A_WAY),
        "global batch": [f"{config.global_batch_size:,}" for config in configs],
        "devices": [str(config.parallel.world_size) for config in configs],
        "FLOPs": [_flops(comparison) for comparison in comparisons],
        "fastest": [_winner(comparison) for comparison in comparisons],
        **if_told("ahead", [_lead(comparison) for comparison in comparisons]),
        **{name: [_standing(name, comparison) for comparison in comparisons] for name in names},
        "flags": [_flags_of_ways(comparison) for comparison in comparisons],
    }
    apart = [(line, n) for n, own in enumerate(comparisons, 1) for line in _marked(own)]
    return [
        *filter(None, [shared(configs, OF_A_WAY)]),
        draw(columns),
        "\n".join(_notes_on_ways(comparisons)),
        *unlike(apart, len(comparisons), "from the fastest way on, those that are ranked first"),
    ]


def _flops(comparison: Comparison) -> str:
    """All ways do the same work."""
    return cells.flops(comparison.ways[0].point.middle)


def _winner(comparison: Comparison) -> str:
    if not comparison.ranked:
        return "none is ranked"
    best, *others = comparison.ranked
    told = best.name if others else f"{best.name}, the only one ranked"
    ties = [way.name for way in others if way.ties]
    if ties:
        told += f", in a tie with {' and '.join(ties)}"
    doubtful = [way.name for way in others if way.ties is None]
    if doubtful:
        told += f", perhaps in a tie with {' and '.join(doubtful)}, without an interval to tell"
    return told


def _lead(comparison: Comparison) -> str:
    """Of the fastest before the next that is no tie."""
    slower = next((way for way in comparison.ranked[1:] if way.ties is False), None)
    if slower is None or slower.against_fastest is None:
        return ""
    return f"{figure(slower.against_fastest.inverse(), '{:.2f}')} x {slower.name}"


def _standing(name: str, comparison: Comparison) -> str:
    way = next((way for way in comparison.ways if way.name == name), None)
    if way is None:
        return "no steady run"
    told, records = speed(way.point), ", ".join(map(cells.record, way.point.runs))
    if way in comparison.ranked[:1]:
        return f"**{told}**, {records}"
    if way.against_fastest is not None:
        told = f"{figure(way.against_fastest, '{:.3f}')}, {told}"
    return f"{told}, {records}" if way.unranked is None else f"~~{told}~~, {records}"


def _flags_of_ways(comparison: Comparison) -> str:
    told = [(way.name, flags_of(way.point)) for way in comparison.ways]
    return "; ".join(f"{name}: {flags}" for name, flags in told if flags) or "none"


def _notes_on_ways(comparisons: Sequence[Comparison]) -> list[str]:
    """Loss parity of each way, and why it has no interval, with its rows."""
    told: dict[str, dict[str, list[int]]] = {}
    for number, comparison in enumerate(comparisons, 1):
        for way in sorted(comparison.ways, key=lambda way: way.name):
            for text in _about(way):
                told.setdefault(text, {}).setdefault(way.name, []).append(number)
    return lines_of({text: _places(of, len(comparisons)) for text, of in told.items()})


def _about(way: Way) -> Iterable[str]:
    if way.proof is None:
        yield f"not ranked: {UNPROVEN}"
    else:
        yield f"{'loss parity' if way.proof.holds else 'not ranked'}: {describe_proof(way.proof)}"
    if way.point.rate.reason is not None:
        yield f"no interval: {escaped(way.point.rate.reason)}"


def _places(of: Mapping[str, Sequence[int]], num_rows: int) -> str:
    """Ways with their rows; those of the same rows together."""
    names: dict[str, list[str]] = {}
    for name, numbers in of.items():
        names.setdefault(rows_in_words(numbers, num_rows), []).append(name)
    return "; ".join(f"{' and '.join(own)} in {rows}" for rows, own in names.items())


def _marked(comparison: Comparison) -> list[str]:
    return in_words(comparison.apart, [run for way in comparison.ways for run in way.point.runs])

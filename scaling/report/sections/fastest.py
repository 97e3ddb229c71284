"""The fastest strategy in the report: comparisons in, Markdown out."""

from collections.abc import Iterable, Mapping, Sequence

from scaling.analysis.fastest import UNPROVEN, Comparison, Way
from scaling.analysis.proof import doubts
from scaling.markdown import escaped
from scaling.report import run_formatting
from scaling.report.sections.parity import describe_proof
from scaling.report.table_notes import (
    differing,
    draw,
    flags_of,
    if_told,
    in_words,
    lines_of,
    ratio_figure,
    rows_in_words,
    shared,
    speed,
    unlike,
)

FASTEST = (
    "Ways to do the same work on the same devices. Only a way whose loss parity is proven is "
    "ranked, the others are struck out; one whose ratio to the fastest may be 1 is a tie. A way's "
    "column tells its speed over that of the fastest, and its speed, or what became of it where no "
    "run of it was steady. Intervals are of 95 %. That of one launch says nothing of another: a "
    "lead is told only where both sides have two launches, or where the ceilings that their jobs "
    "measured differ by less than the least lead that the interval leaves."
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
    names = sorted({name for comparison in comparisons for name in comparison.names})
    columns = {
        "row": [str(number) for number in range(1, len(comparisons) + 1)],
        **differing(configs, OF_A_WAY),
        "global batch": [f"{config.global_batch_size:,}" for config in configs],
        "devices": [str(config.parallel.world_size) for config in configs],
        "FLOPs": [run_formatting.flops(config) for config in configs],
        "fastest": [_winner(comparison) for comparison in comparisons],
        **if_told("ahead", [_lead(comparison) for comparison in comparisons]),
        **{name: [_standing(name, comparison) for comparison in comparisons] for name in names},
        "flags": [_flags_of_ways(comparison) for comparison in comparisons],
    }
    apart = [(line, n) for n, own in enumerate(comparisons, 1) for line in _marked(own)]
    return [
        *filter(None, [shared(configs, OF_A_WAY)]),
        draw(columns),
        *filter(None, ["\n".join(_notes_on_ways(comparisons))]),
        *unlike(apart, len(comparisons), "from the fastest way on, those that are ranked first"),
    ]


def _winner(comparison: Comparison) -> str:
    if not comparison.ways:
        return "none has a steady run"
    if not comparison.ranked:
        return "none is ranked"
    ranked, tried = len(comparison.ranked), len(comparison.names)
    told = f"{_best(comparison)}{_doubts(comparison)}"
    if ranked == 1:
        return f"{told}, the only one ranked of {tried}"
    return told if ranked == tried else f"{told}, fastest of {ranked} of {tried}"


def _best(comparison: Comparison) -> str:
    """A name, or why it is only a guess."""
    best, *others = comparison.ranked
    open_ = [way for way in others if way.is_undecided]
    if not open_:
        return best.name
    told = [way.drift for way in open_ if way.drift is not None]
    machine = "nothing tells by how much the machine itself differed"
    if len(told) == len(open_):
        machine = f"the machine itself differed by {max(told):.1%}"
    sides = "a side" if all(len(way.point.runs) == 1 for way in (best, *open_)) else "of a side"
    guess = f"best guess {best.name}, before {' and '.join(way.name for way in open_)}"
    return f"not decided: one launch {sides}, and {machine} ({guess})"


def _doubts(comparison: Comparison) -> str:
    others = comparison.ranked[1:]
    ties = [way.name for way in others if way.ties]
    told = f", in a tie with {' and '.join(ties)}" if ties else ""
    doubtful = [way.name for way in others if way.ties is None]
    if doubtful:
        told += f", perhaps in a tie with {' and '.join(doubtful)}, without an interval to tell"
    return told


def _lead(comparison: Comparison) -> str:
    """Of the fastest before the next that is told to be slower."""
    slower = next((way for way in comparison.ranked[1:] if way.is_slower), None)
    if slower is None or slower.against_fastest is None:
        return ""
    return f"{ratio_figure(slower.against_fastest.inverse(), 2)} x {slower.name}"


def _standing(name: str, comparison: Comparison) -> str:
    way = next((way for way in comparison.ways if way.name == name), None)
    if way is None:
        return next((own.why for own in comparison.missing if own.name == name), "not tried")
    told, records = speed(way.point), ", ".join(map(run_formatting.record, way.point.runs))
    if way in comparison.ranked[:1]:
        is_guess = any(other.is_undecided for other in comparison.ranked)
        return f"{told}, {records}" if is_guess else f"**{told}**, {records}"
    if way.against_fastest is not None:
        told = f"{ratio_figure(way.against_fastest, 3)}, {told}"
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
        found = [doubts(way.proof, run.record["code"]) for run in way.point.runs]
        for doubt in dict.fromkeys(filter(None, found)):
            yield f"the proof may be of other code: its certificate is {escaped(doubt)}"
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

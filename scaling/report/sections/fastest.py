"""The fastest strategy in the report: comparisons in, Markdown out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from scaling.analysis.fastest import UNPROVEN, StrategyComparison, Candidate
from scaling.analysis.proof import doubts
from scaling.markdown import escaped
from scaling.report import run_formatting
from scaling.report.sections.parity import describe_proof
from scaling.report.table_notes import (
    differing,
    draw,
    flags_of,
    in_words,
    lines_of,
    ratio_figure,
    rows_in_words,
    shared,
    speed,
    unlike,
)

FASTEST = (
    "Configurations that do the same work on the same devices: same model, precision and global "
    "batch. "
    "Only those with proven loss parity are ranked. "
    "The ratio is speed over that of the fastest; where its 95 % interval holds 1 it is a tie. "
    "The interval of one launch alone says nothing about another launch: then a lead counts only "
    "where both sides have two launches, or where the ceilings that their jobs measured differ by "
    "less than the lead."
)
KEPT = ("group", "configuration")  # columns of the table whatever they hold
OF_A_WAY = {
    *("batch_size", "accumulate", "parallel.devices", "parallel.strategy", "parallel.compile"),
    *("parallel.activation_checkpointing", "parallel.cpu_offload"),
}


def fastest_blocks(comparisons: Sequence[StrategyComparison]) -> list[str]:
    """Blocks of Markdown; none where there is nothing to compare."""
    if not comparisons:
        return []
    configs = [comparison.config for comparison in comparisons]
    settings = differing(configs, OF_A_WAY)
    rows = [
        {"group": str(number), **{head: told[number - 1] for head, told in settings.items()}}
        | {
            "global batch": f"{comparison.config.global_batch_size:,}",
            "devices": str(comparison.config.parallel.world_size),
            "FLOPs": run_formatting.flops(comparison.config),
        }
        | row
        for number, comparison in enumerate(comparisons, 1)
        for row in _rows(comparison)
    ]
    apart = [(line, n) for n, own in enumerate(comparisons, 1) for line in _marked(own)]
    return [
        FASTEST,
        shared(configs, OF_A_WAY),
        *draw({head: [row[head] for row in rows] for head in rows[0]}, KEPT),
        "\n".join(_notes_on_ways(comparisons)),
        *unlike(apart, len(comparisons), "from the fastest on, ranked ones first", "group"),
    ]


def _rows(comparison: StrategyComparison) -> Iterator[dict[str, str]]:
    """One for each configuration that was tried, the fastest first."""
    for way in comparison.candidates:
        point = way.point
        against = way.against_fastest
        is_best = way in comparison.ranked[:1]
        yield {
            "configuration": f"**{way.name}**" if is_best and _is_alone(comparison) else way.name,
            "speed": speed(point),
            "ratio": "" if is_best or against is None else ratio_figure(against, 3),
            "standing": _standing(way, comparison),
            "launches": str(len(point.runs)),
            "flags": flags_of(point) or "none",
            "record": run_formatting.record(point.middle),
        }
    for missing in comparison.missing:
        yield dict.fromkeys(("speed", "ratio", "launches", "flags", "record"), "") | {
            "configuration": missing.name,
            "standing": missing.why,
        }


def _is_alone(comparison: StrategyComparison) -> bool:
    """Whether all others are known to be slower."""
    return all(way.is_slower for way in comparison.ranked[1:])


def _standing(way: Candidate, comparison: StrategyComparison) -> str:
    if way.why_unranked is not None:
        return "not ranked"
    if way is comparison.ranked[0]:
        if any(way.is_undecided for way in comparison.ranked):
            return "best guess"
        return "fastest" if _is_alone(comparison) else "fastest, in a tie"
    if way.is_slower:
        return "slower"
    if way.is_undecided:
        return _undecided(way)
    return "tie" if way.is_tie else "undecided: no interval"


def _undecided(way: Candidate) -> str:
    """One launch is not enough, and the machine may have differed by as much."""
    if way.drift is None:
        return "undecided: one launch, and the drift of the machine is not known"
    return f"undecided: one launch, and the machine drifted by {way.drift:.1%}"


def _notes_on_ways(comparisons: Sequence[StrategyComparison]) -> list[str]:
    """Loss parity of each way, and why it has no interval, with its rows."""
    told: dict[str, dict[str, list[int]]] = {}
    for number, comparison in enumerate(comparisons, 1):
        for way in sorted(comparison.candidates, key=lambda way: way.name):
            for text in _about(way):
                told.setdefault(text, {}).setdefault(way.name, []).append(number)
    return lines_of({text: _places(of, len(comparisons)) for text, of in told.items()})


def _about(way: Candidate) -> Iterable[str]:
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
        names.setdefault(rows_in_words(numbers, num_rows, "group"), []).append(name)
    return "; ".join(f"{', '.join(own)} in {rows}" for rows, own in names.items())


def _marked(comparison: StrategyComparison) -> list[str]:
    return in_words(
        comparison.differing_conditions,
        [run for way in comparison.candidates for run in way.point.runs],
    )

"""Shows how the configurations compare that do the same work on the same devices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from scaling.analysis.fastest import UNPROVEN, Candidate, StrategyComparison
from scaling.analysis.proof import doubts
from scaling.markdown import escaped
from scaling.report import run_formatting, table_notes
from scaling.report.sections.parity import describe_proof

FASTEST = (
    "Configurations that do the same work on the same devices: same model, precision and global "
    "batch. Only those with proven loss parity are ranked. The ratio is speed over that of the "
    "fastest; where its 95 % interval contains 1 it is a tie. The interval of one launch alone "
    "says nothing about another launch: then a lead counts only where both sides have two "
    "launches, or where the ceilings that their jobs measured differ by less than the lead."
)
VARYING = {  # settings in which the candidates of a comparison may differ
    "batch_size", "accumulate", "parallel.devices", "parallel.strategy", "parallel.compile",
    "parallel.activation_checkpointing", "parallel.cpu_offload",
}  # fmt: skip


def fastest_blocks(comparisons: Sequence[StrategyComparison]) -> list[str]:
    """Returns a table with a group of rows per comparison; nothing without comparisons."""
    if not comparisons:
        return []
    configs = [comparison.config for comparison in comparisons]
    settings = table_notes.differing(configs, VARYING)
    rows, conditions = [], []
    for number, comparison in enumerate(comparisons, 1):
        group = {
            "group": str(number),
            **{heading: cells[number - 1] for heading, cells in settings.items()},
            "global batch": f"{comparison.config.global_batch_size:,}",
            "devices": str(comparison.config.parallel.world_size),
            "FLOPs": run_formatting.flops(comparison.config),
        }
        rows += [group | row for row in _rows(comparison)]
        runs = [run for candidate in comparison.candidates for run in candidate.point.runs]
        lines = table_notes.condition_lines(comparison.differing_conditions, runs)
        conditions += [(line, number) for line in lines]
    order = "from the fastest on, ranked ones first"
    return [
        FASTEST,
        table_notes.shared(configs, VARYING),
        *table_notes.draw(rows, always=("group", "configuration")),
        run_formatting.explain_flags(rows),
        _notes(comparisons),
        *table_notes.different_conditions(conditions, len(comparisons), order, "group"),
    ]


def _rows(comparison: StrategyComparison) -> Iterator[dict[str, str]]:
    is_decided = all(candidate.is_slower for candidate in comparison.ranked[1:])
    for candidate in comparison.candidates:
        point, against = candidate.point, candidate.against_fastest
        is_best = candidate in comparison.ranked[:1]
        yield {
            "configuration": f"**{candidate.name}**" if is_best and is_decided else candidate.name,
            "speed": run_formatting.pooled_speed(point),
            "ratio": "" if is_best or against is None else run_formatting.ratio(against, 3),
            "standing": _standing(candidate, comparison.ranked, is_decided=is_decided),
            "launches": str(len(point.runs)),
            "flags": run_formatting.flag_cell(point.runs) or "none",
            "record": run_formatting.record(point.middle),
        }
    for name, why in comparison.missing.items():
        yield {"configuration": name, "speed": "", "ratio": "", "standing": why}


def _standing(candidate: Candidate, ranked: Sequence[Candidate], *, is_decided: bool) -> str:
    if candidate.why_unranked is not None:
        return "not ranked"
    if candidate is ranked[0]:
        if any(not other.is_slower and not other.is_tie for other in ranked[1:]):
            return "best guess"
        return "fastest" if is_decided else "fastest, in a tie"
    if candidate.is_slower:
        return "slower"
    if not candidate.is_undecided:
        return "tie" if candidate.is_tie else "not confirmed: no interval"
    if candidate.drift is None:
        return "not confirmed: one launch, and the drift of the machine is not known"
    return f"not confirmed: one launch, and the machine drifted by {candidate.drift:.1%}"


def _notes(comparisons: Sequence[StrategyComparison]) -> str:
    """Lists the loss parity of each candidate, and why it has no interval, with its groups."""
    groups: dict[str, dict[str, list[int]]] = {}
    for number, comparison in enumerate(comparisons, 1):
        for candidate in sorted(comparison.candidates, key=lambda candidate: candidate.name):
            for text in _about(candidate):
                groups.setdefault(text, {}).setdefault(candidate.name, []).append(number)
    num_groups = len(comparisons)
    return table_notes.list_of({text: _places(groups[text], num_groups) for text in groups})


def _about(candidate: Candidate) -> Iterable[str]:
    proof = candidate.proof
    if proof is None:
        yield f"not ranked: {UNPROVEN}"
    else:
        yield f"{'loss parity' if proof.holds else 'not ranked'}: {describe_proof(proof)}"
        reasons = [doubts(proof, run.record["code"]) for run in candidate.point.runs]
        for reason in dict.fromkeys(filter(None, reasons)):
            yield f"the proof may be of other code: its certificate is {escaped(reason)}"
    if candidate.point.rate.reason is not None:
        yield f"no interval: {escaped(candidate.point.rate.reason)}"


def _places(groups: Mapping[str, Sequence[int]], num_groups: int) -> str:
    """Lists candidates with their groups; those of the same groups together."""
    names: dict[str, list[str]] = {}
    for name, numbers in groups.items():
        names.setdefault(table_notes.rows_of(numbers, num_groups, "group"), []).append(name)
    return "; ".join(f"{', '.join(same)} in {places}" for places, same in names.items())

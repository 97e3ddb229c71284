"""Answers which configuration is the fastest on how many devices, in one table per recipe."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from scaling.analysis.efficiency import Curve, MeasuredPoint
from scaling.analysis.fastest import Candidate, name_of, rank
from scaling.analysis.same_work import work_of
from scaling.markdown import escaped, note
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.table_notes import condition_lines, differing, draw
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import ModelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import format_count

UNDECIDED = "not confirmed:"  # begins a lead that other launches may not show
MOST_ROWS = 12  # of a table; the pages have the others

# What all configurations for the same work on the same kind of processors share.
Work = tuple[RunConfig, str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was measured of one model on one number of devices."""

    work: Work
    devices: int
    ranked: tuple[Candidate, ...]  # with proven loss parity, fastest first
    unranked: tuple[Candidate, ...]
    others: int = 0  # configurations of their studies that are no points
    missing: int = 0  # those of them that have not ended

    @property
    def model(self) -> ModelConfig:
        return self.work[0].model

    @property
    def points(self) -> list[MeasuredPoint]:
        return [candidate.point for candidate in (*self.ranked, *self.unranked)]


def find_answers(
    points: Iterable[MeasuredPoint],
    certificates: Sequence[Certificate],
    count_others: Callable[[Iterable[Run]], tuple[int, int]] = lambda _: (0, 0),
) -> list[Answer]:
    """Ranks the points of every model with several configurations; the largest model first.

    Args:
        count_others: how many other configurations the studies of some runs name, and how many
            of these have not ended.
    """
    works: dict[Work, dict[int, list[MeasuredPoint]]] = {}
    for point in points:
        work = work_of(point.config), point.runs[0].processors
        counts = works.setdefault(work, {})
        counts.setdefault(point.devices, []).append(point)
    answers = []
    for work in sorted(works, key=lambda work: (-count_parameters(work[0].model), repr(work))):
        if sum(map(len, works[work].values())) > 1:
            for devices, candidates in sorted(works[work].items()):
                ranked, unranked = rank(candidates, certificates)
                others, missing = count_others(run for c in candidates for run in c.runs)
                answer = Answer(work=work, devices=devices, ranked=ranked, unranked=unranked)
                answers.append(replace(answer, others=others, missing=missing))
    return answers


def answer_blocks(answers: Sequence[Answer], curves: Sequence[Curve]) -> list[str]:
    """Returns the table of one recipe, and what its rows share."""
    shown = answers[:MOST_ROWS]
    if not shown:
        return ["No model was measured in more than one configuration."]
    rows = [
        {
            **_model(answer),
            **_other_work(answer, answers),
            "devices": str(answer.devices),
            **_fastest(answer, answers, curves),
            "tried": _tried(answer),
            "of these": _ties_and_doubts(answer),
        }
        for answer in shown
    ]
    more = len(answers) - len(shown)
    return [
        *draw(rows, always=("devices", "speed")),
        *_different_conditions(shown),
        f"{format_count(more, 'row')} more: see the pages of the sweeps." if more else "",
    ]


def summary(answer: Answer) -> str:
    """Returns the fastest configuration and its speed in a line of plain text."""
    place = f"{run_formatting.shape(answer.model)}, {format_count(answer.devices, 'device')}"
    if not answer.ranked:
        return f"{place}: none has proven loss parity"
    fastest = answer.ranked[0].point
    speed = run_formatting.pooled_speed(fastest)
    return f"{place}: {configuration(fastest.config)}, {speed}"


def _model(answer: Answer) -> dict[str, str]:
    return {
        "model": run_formatting.shape(answer.model),
        "dropout": f"{answer.model.dropout:g}",
    }


def _other_work(answer: Answer, answers: Iterable[Answer]) -> dict[str, str]:
    """The settings and processors in which work differs though its model looks the same."""
    works = list(dict.fromkeys(a.work for a in answers if _model(a) == _model(answer)))
    place = works.index(answer.work)
    columns = differing([config for config, _ in works], ignored=())
    if len({processors for _, processors in works}) > 1:
        columns["processors"] = [escaped(processors) for _, processors in works]
    return {heading: cells[place] for heading, cells in columns.items()}


def _fastest(answer: Answer, answers: Sequence[Answer], curves: Sequence[Curve]) -> dict[str, str]:
    if not answer.ranked:
        return {"fastest configuration": "none has proven loss parity"}
    point = answer.ranked[0].point
    mfu, share = run_formatting.pooled_shares(point)
    tried = len(answer.points)
    few = f"best of {tried} measured: " if tried < answer.missing else ""
    cells = {
        "fastest configuration": f"{few}{configuration(point.config)}",
        "speed": run_formatting.pooled_speed(point),
        "launches": run_formatting.launches(point),
        "peak memory": run_formatting.peak(point.runs),
        "utilisation": f"MFU {mfu}" if mfu else _of_ceiling(point, share),
        "weak efficiency": _efficiency(answer, answers, curves),
        "runner-up": "none",
    }
    if len(answer.ranked) > 1:
        second = answer.ranked[1]
        assert second.against_fastest is not None
        lead = run_formatting.ratio(second.against_fastest.inverse(), 2)
        if not second.is_slower:
            lead = f"tie: {lead}" if second.is_tie else f"{UNDECIDED} {lead}, {_why(point, second)}"
        cells["runner-up"] = configuration(second.point.config)
        cells["lead"] = lead
    return cells


def _of_ceiling(point: MeasuredPoint, share: str) -> str:
    """A share of the ceiling, which differs between number formats."""
    ceiling = run_formatting.mfu_row(point.runs[0]).dtype
    return f"{share} of the {ceiling} ceiling" if share else ""


def _why(fastest: MeasuredPoint, second: Candidate) -> str:
    """Why the lead of the fastest is not confirmed."""
    counts = {len(fastest.runs), len(second.point.runs)}
    launches = "one launch each" if counts == {1} else "one launch of one" if 1 in counts else ""
    if not second.is_undecided:
        return ", ".join(filter(None, [launches, "no interval"]))
    drift = "unknown" if second.drift is None else f"{second.drift:.1%}"
    return f"{launches}, machine drift {drift}"


def configuration(config: RunConfig) -> str:
    """Returns everything that distinguishes one way to train a model from another."""
    parallel = config.parallel
    nodes = f", {parallel.num_nodes} nodes" if parallel.num_nodes > 1 else ""
    return f"{name_of(config)}, {parallel.precision}, {config.batch_size:,} per device{nodes}"


def _efficiency(answer: Answer, answers: Sequence[Answer], curves: Sequence[Curve]) -> str:
    """The fastest configuration against itself on the fewest devices."""
    if answer.devices == min(other.devices for other in answers if other.work == answer.work):
        return "baseline"
    fastest = answer.ranked[0].point
    for curve in curves:
        for point in curve.points[1:] if curve.scaling == "weak" else ():
            if point.runs[0] in fastest.runs:
                efficiency = run_formatting.estimate(curve.efficiency(point), "{:.1%}")
                ideal = curve.ideal(point)
                return efficiency if ideal == 1 else f"{efficiency}; ideal {ideal:.0%}"
    return "not measured on fewer devices"


def _tried(answer: Answer) -> str:
    number = f"{len(answer.points)}"
    return f"{number} of {len(answer.points) + answer.others}" if answer.others else number


def _ties_and_doubts(answer: Answer) -> str:
    """How many of those tried tie with the fastest, are not confirmed, or have no proof."""
    others = answer.ranked[1:]
    counts = {
        "tie": sum(bool(other.is_tie) for other in others),
        "not confirmed": sum(not other.is_tie and not other.is_slower for other in others),
        "without proven parity": len(answer.unranked),
    }
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number)


def _different_conditions(answers: Sequence[Answer]) -> list[str]:
    lines = []
    for answer in answers:
        runs = [run for point in answer.points for run in point.runs]
        for line in condition_lines(differences([run.record for run in runs]), runs):
            lines.append(f"{format_count(answer.devices, 'device')}: {line.partition(':')[0]}")
    head = "The configurations of these rows were measured under different conditions."
    return note(head, list(dict.fromkeys(lines)))

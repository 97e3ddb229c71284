"""The answer of the report: on how many devices which configuration is the fastest, and how sure.

Builds one table per recipe out of its runs and the certificates of loss parity.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from scaling.analysis.candidates import name_of
from scaling.analysis.efficiency import Curve, MeasuredPoint, find_scatters, pool
from scaling.analysis.fastest import Candidate, rank
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.table_notes import (
    Columns,
    draw,
    figure,
    in_words,
    ratio_figure,
    shape_in_words,
    speed,
)
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import count, rate_in_words

MOST_ROWS = 12  # of a table; the pages have the others

Work = tuple[RunConfig, str]  # what is trained, and on which kind of processors


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was measured of one model on one number of devices."""

    work: Work
    devices: int
    ranked: tuple[Candidate, ...]  # with proven loss parity, the fastest first
    unranked: tuple[Candidate, ...]
    curves: Sequence[Curve]

    @property
    def points(self) -> list[MeasuredPoint]:
        return [way.point for way in (*self.ranked, *self.unranked)]


def find_answers(
    runs: Iterable[Run], curves: Sequence[Curve], certificates: Sequence[Certificate]
) -> list[Answer]:
    """For every model of which several configurations were measured: the largest model first.

    Args:
        curves: as `find_curves` finds them in these runs.
    """
    steady = [run for run in runs if run.is_ok and run.metrics is not None]
    scatters = find_scatters(steady)
    points: dict[Work, dict[int, list[MeasuredPoint]]] = {}
    for point in pool(sorted(steady, key=lambda run: run.name), scatters):
        places = points.setdefault(_work(point), {})
        places.setdefault(point.devices, []).append(point)
    answers = []
    for work in sorted(points, key=_reading_order):
        if sum(map(len, points[work].values())) > 1:
            for devices, own in sorted(points[work].items()):
                ranked, unranked = rank(own, certificates)
                answers.append(
                    Answer(
                        work=work,
                        devices=devices,
                        ranked=ranked,
                        unranked=unranked,
                        curves=[curve for curve in curves if curve.scaling == "weak"],
                    )
                )
    return answers


def _work(point: MeasuredPoint) -> Work:
    """Runs that train the same model on the same kind of machine, in whatever way."""
    config = replace(
        point.config,
        parallel=ParallelConfig(accelerator=point.config.parallel.accelerator),
        batch_size=1,
        accumulate=1,
        max_steps=1,
        seed=0,
    )
    return config, point.runs[0].processors


def _reading_order(work: Work) -> tuple[int, str]:
    return -count_parameters(work[0].model), repr(work)


def answer_blocks(answers: Sequence[Answer]) -> list[str]:
    """The table of one recipe, and what its rows share."""
    shown = answers[:MOST_ROWS]
    if not shown:
        return ["No model was measured in more than one configuration."]
    more = len(answers) - len(shown)
    return [
        *draw(_columns(shown), aside=("devices", "speed")),
        *_apart(shown),
        *([f"{count(more, 'row')} more: see the pages of the sweeps."] if more else []),
    ]


def _columns(answers: Sequence[Answer]) -> Columns:
    works = list(dict.fromkeys(answer.work for answer in answers))
    models = list(dict.fromkeys(config.model for config, _ in works))
    several = len(works) > len(models)
    return {
        "model": [shape_in_words(answer.work[0].model) for answer in answers],
        **({"work": [str(works.index(a.work) + 1) for a in answers]} if several else {}),
        "devices": [str(answer.devices) for answer in answers],
        "fastest configuration": [_best(answer) for answer in answers],
        "speed": [speed(a.ranked[0].point) if a.ranked else "" for a in answers],
        "launches": [launches(a.ranked[0].point) if a.ranked else "" for a in answers],
        "peak memory": [
            run_formatting.peak(a.ranked[0].point.runs) if a.ranked else "" for a in answers
        ],
        "utilisation": [utilisation(a.ranked[0].point) if a.ranked else "" for a in answers],
        "weak efficiency": [_efficiency(a, answers) if a.ranked else "" for a in answers],
        "runner-up": [_runner_up(answer) for answer in answers],
        "lead": [_lead(answer) for answer in answers],
        "tried": [_tried(answer) for answer in answers],
    }


def configuration(config: RunConfig) -> str:
    """Everything that tells one way to train a model from another."""
    parallel = config.parallel
    nodes = f", {parallel.num_nodes} nodes" if parallel.num_nodes > 1 else ""
    return f"{name_of(config)}, {parallel.precision}, {config.batch_size:,} per device{nodes}"


def launches(point: MeasuredPoint) -> str:
    """The number of launches, and of several the range of their speeds."""
    rates = sorted(run.units_per_s or 0.0 for run in point.runs)
    if len(rates) == 1:
        return "1"
    low, high = (rate_in_words(rate, "").removesuffix(" /s") for rate in (rates[0], rates[-1]))
    return f"{len(rates)}: {low} to {high}"


def utilisation(point: MeasuredPoint) -> str:
    """MFU where a data sheet tells the peak, else the share of the measured ceiling; the median of
    the launches."""
    rows = [run_formatting.passport_row(run) for run in point.runs]
    mfu = [row.utilisation for row in rows if row.utilisation is not None]
    shares = [row.share_of_ceiling for row in rows if row.share_of_ceiling is not None]
    if len(mfu) == len(rows):
        return f"MFU {median(mfu):.1%}"
    return f"{median(shares):.1%} of ceiling" if len(shares) == len(rows) else ""


def _best(answer: Answer) -> str:
    if not answer.ranked:
        return "none has proven loss parity"
    return configuration(answer.ranked[0].point.config)


def _efficiency(answer: Answer, answers: Sequence[Answer]) -> str:
    """Of the fastest configuration, against itself on the fewest devices."""
    if answer.devices == min(other.devices for other in answers if other.work == answer.work):
        return "baseline"
    config = answer.ranked[0].point.config
    for curve in answer.curves:
        for point in curve.points[1:]:
            if point.config == config and point.runs[0] in answer.ranked[0].point.runs:
                ideal = curve.ideal(point)
                told = figure(curve.efficiency(point), "{:.1%}")
                return told if ideal == 1 else f"{told}; ideal {ideal:.0%}"
    return "not measured on fewer devices"


def _runner_up(answer: Answer) -> str:
    if len(answer.ranked) < 2:
        return "none"
    return configuration(answer.ranked[1].point.config)


def _lead(answer: Answer) -> str:
    """By how much the fastest is ahead of the runner-up, or that this is not decided."""
    if len(answer.ranked) < 2:
        return ""
    second = answer.ranked[1]
    assert second.against_fastest is not None
    told = ratio_figure(second.against_fastest.inverse(), 2)
    if second.is_slower:
        return told
    return f"{'tie' if second.is_tie else 'undecided'}: {told}"


def _tried(answer: Answer) -> str:
    """Configurations, how many of them tie with the fastest, and how many have no proof."""
    others = answer.ranked[1:]
    tied = sum(bool(way.is_tie) for way in others)
    undecided = sum(not way.is_tie and not way.is_slower for way in others)
    about = [f"{tied} tie"] if tied else []
    about += [f"{undecided} undecided"] if undecided else []
    about += [f"{len(answer.unranked)} without proven parity"] if answer.unranked else []
    return f"{len(answer.points)} ({', '.join(about)})" if about else f"{len(answer.points)}"


def _apart(answers: Sequence[Answer]) -> list[str]:
    """A box if the configurations of a row were not measured under the same conditions."""
    lines = []
    for answer in answers:
        runs = [run for point in answer.points for run in point.runs]
        for line in in_words(differences([run.record for run in runs]), runs):
            field = line.partition(":")[0]
            lines.append(f"> - {count(answer.devices, 'device')}: {field}")
    if not lines:
        return []
    head = "> The configurations of these rows were measured under different conditions."
    return ["\n".join(["> [!NOTE]", head, ">", *dict.fromkeys(lines)])]

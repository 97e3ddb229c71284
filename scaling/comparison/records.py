"""Compares two folders of run records, cell by cell: what was measured at different times.

The machine may have changed in between, which no statistics of the steps can see. Each record
holds what the machine reached just then, its ceiling: the interval is widened by as much as the
ceilings differ. Records of other machines, clocks or versions are never compared.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scaling.comparison.verdict import CONFIDENCE, Judgement, Verdict, decide, inconclusive
from scaling.store.conditions import differences
from scaling.store.reader import load_store
from scaling.store.run import Run
from unitransformer.config import RunConfig
from unitransformer.record.metrics import recorded_steady_state
from unitransformer.stats.comparisons import (
    MIN_LAUNCHES,
    LaunchVariance,
    describe_launch,
    split_variance,
)
from unitransformer.stats.intervals import CONFIDENCE as LAUNCH_CONFIDENCE
from unitransformer.stats.intervals import t_quantile

# Conditions in which base and candidate differ on purpose.
OF_THE_CODE = ("commit differ", "code may not be")
CEILINGS = ("matmul_flops_per_s", "copy_bytes_per_s")
# The worst first: the verdict on all cells is that of the worst.
WORST = (Verdict.SLOWER, Verdict.INCONCLUSIVE, Verdict.FASTER, Verdict.NOT_SLOWER)


@dataclass(frozen=True, kw_only=True)
class CellJudgement:
    """The verdict on one config that both folders hold."""

    label: str
    launches: tuple[int, int]  # of base and candidate
    clock: str
    judgement: Judgement


def compare_records(
    base: Path, candidate: Path, *, threshold: float, stop_faster: float
) -> list[CellJudgement]:
    """Judges each config of which either folder holds records.

    Raises ValueError for a folder without a usable run, or with a damaged record.
    """
    before, after = _launches(base), _launches(candidate)
    return [
        _compare_cell(
            config,
            before.get(config, []),
            after.get(config, []),
            threshold=threshold,
            stop_faster=stop_faster,
        )
        for config in {**before, **after}
    ]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=WORST.index)


def _launches(folder: Path) -> dict[RunConfig, list[Run]]:
    store = load_store([folder], relative_to=folder)
    for file in store.left_out:
        if file.kind == "damaged":
            raise ValueError(f"{folder / file.name} is damaged: {file.reason}")
    found: dict[RunConfig, list[Run]] = {}
    for run in store.successful_runs:
        found.setdefault(run.config, []).append(run)
    if not found:
        raise ValueError(f"{folder} holds no run that ended well; measure one, or check the path")
    return found


def _compare_cell(
    config: RunConfig,
    base: Sequence[Run],
    candidate: Sequence[Run],
    *,
    threshold: float,
    stop_faster: float,
) -> CellJudgement:
    parallel = config.parallel
    by_processor = parallel.accelerator == "cpu" and parallel.world_size == 1
    cell = CellJudgement(
        label=f"{config.recipe} {config.size}, {parallel.devices * parallel.num_nodes} x "
        f"{parallel.strategy}, {parallel.precision}, batch {config.batch_size} ({config.hash()})",
        launches=(len(base), len(candidate)),
        clock="processor" if by_processor else "wall",
        judgement=inconclusive("only one folder holds this config"),
    )
    if not base or not candidate:
        return cell
    lines = differences([run.record for run in (*base, *candidate)])
    if lines := [line for line in lines if not line.startswith(OF_THE_CODE)]:
        return replace(cell, judgement=inconclusive(f"the conditions differ: {lines[0]}"))
    if min(len(base), len(candidate)) < MIN_LAUNCHES:
        reason = f"too few launches: an interval takes {MIN_LAUNCHES} in each folder"
        return replace(cell, judgement=inconclusive(reason))
    try:
        before, after = (_variance(runs, by_processor=by_processor) for runs in (base, candidate))
        drift = max(
            abs(math.log(_ceiling(candidate, name) / _ceiling(base, name))) for name in CEILINGS
        )
    except ValueError as error:
        return replace(cell, judgement=inconclusive(str(error)))
    judgement = judge_launches(
        before, after, drift=drift, threshold=threshold, stop_faster=stop_faster
    )
    return replace(cell, judgement=judgement)


def judge_launches(
    base: LaunchVariance,
    candidate: LaunchVariance,
    *,
    drift: float,
    threshold: float,
    stop_faster: float,
) -> Judgement:
    """Judges the medians of launches that were measured at different times.

    Args:
        drift: how much the machine changed in between, as a logarithm of its speed.
    """
    if base.median is None or candidate.median is None:
        return inconclusive(base.reason or candidate.reason or "no interval")
    log = math.log(candidate.median / base.median)
    half = math.hypot(*map(_half_width, (base, candidate)))
    low, high = log - half - drift, log + half + drift
    verdict = decide(low, log, high, slow=math.log1p(threshold), fast=math.log1p(stop_faster))
    reason = None
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"the launches are too few or differ too much for a threshold of {threshold:.1%}"
        if drift > half:
            reason = f"drift: the machine itself reached {math.expm1(drift):.1%} more or less"
    return Judgement(
        verdict=verdict,
        ratio=math.exp(log),
        low=math.exp(low),
        high=math.exp(high),
        pairs=min(len(base.medians), len(candidate.medians)),
        detectable=math.expm1(2 * half + drift),
        reason=reason,
    )


def _half_width(launches: LaunchVariance) -> float:
    """Returns half of the interval of the logarithm, at the confidence of a comparison."""
    assert launches.low is not None
    assert launches.high is not None
    freedom = len(launches.medians) - 1
    wider = t_quantile((1 + CONFIDENCE) / 2, freedom) / t_quantile(
        (1 + LAUNCH_CONFIDENCE) / 2, freedom
    )
    return wider * math.log(launches.high / launches.low) / 2


def _variance(runs: Sequence[Run], *, by_processor: bool) -> LaunchVariance:
    if not by_processor:
        return split_variance([run.launch for run in runs])
    return split_variance([describe_launch(_processor_s(run)) for run in runs])


def _processor_s(run: Run) -> list[float]:
    if run.metrics is None:
        raise ValueError(f"{run.name} has no steady state; measure it for longer")
    record = run.record
    samples: Mapping[str, Sequence[float]] = record["samples"]
    steady = recorded_steady_state(record)
    return list(steady.select(samples["cpu_s"][record["segment_starts"][-1] :]))


def _ceiling(runs: Sequence[Run], name: str) -> float:
    reached: list[float] = [
        rank[name] for run in runs for rank in run.record["ceiling"] if rank is not None
    ]
    if not reached:
        raise ValueError("records hold no ceiling, so that a change of the machine cannot be seen")
    return statistics.median(reached)

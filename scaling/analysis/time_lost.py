"""Explains in which parts of a step a run lost time against the ideal speed-up."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.analysis.efficiency import steady_metrics
from scaling.store.run import Run
from unitransformer.record.metrics import recorded_steady_state

LossPart = Literal[
    "input",
    "exposed communication",
    "waiting for the slowest rank",
    "optimizer",
    "forward and backward",
]
Source = Literal["clock", "trace", "nothing"]  # of the communication time
Shares = Mapping[LossPart, float]  # of a step

NOT_SEPARATED = (
    "forward and backward includes smaller kernels, host time and communication; `--trace` on both "
    "runs separates communication"
)
FROM_THE_CLOCK = (
    "communication is the minimum over ranks at each step; the rest of the time in collectives is "
    "waiting for the slowest rank"
)
FROM_A_TRACE = (
    "communication is its share in the trace of one rank, subtracted from forward and backward; "
    "the other parts include idle time"
)
OF_DEEPSPEED = "some of the communication may belong to the optimizer; the trace does not show it"
WAITING = (
    "waiting for the slowest rank was not measured: the record holds only the times of that rank"
)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """How far the trace that gave the communication time is from an untraced step."""

    slowdown: float  # of a traced step over a steady one
    idle: float  # share of the traced steps
    baseline_idle: float | None  # None: the baseline was not traced


@dataclass(frozen=True, kw_only=True)
class Slowest:
    """The rank that was most often the slowest."""

    rank: int
    share: float  # of the steady steps
    chance: float  # the share if all ranks were equal


@dataclass(frozen=True, kw_only=True)
class TimeLost:
    """The time that a run lost against its baseline, as shares of its step.

    The parts add up to `share`; a negative part is a gain. If communication was not measured,
    forward and backward includes it, and the parts hold neither communication nor waiting.
    """

    share: float  # 1 - efficiency of these two runs
    parts: Mapping[LossPart, float]
    caveats: tuple[str, ...]
    traced: Traced | None  # None: communication does not come from a trace
    slowest: Slowest | None  # None: there is one rank


def explain(baseline: Run, run: Run) -> TimeLost:
    """Compares each part of a step with the ideal one.

    The ideal step takes T_0 (p_0 / p_n) (units_n / units_0) seconds for p devices, where 0 is the
    baseline. The same ratio is the ideal for each part.

    Raises ValueError if a run has no steady state, or the recipes differ.
    """
    if run.config.recipe != baseline.config.recipe:
        raise ValueError(
            f"run is of recipe {run.config.recipe} and baseline of {baseline.config.recipe}; "
            "compare runs of one recipe"
        )
    source, shares_before, shares_after = _communication(baseline, run)
    before, after = _parts_s(baseline, shares_before), _parts_s(run, shares_after)
    devices = baseline.config.parallel.world_size / run.config.parallel.world_size
    ideal = devices * run.units_per_step / baseline.units_per_step
    step_s = math.fsum(after.values())
    parts = {part: (after[part] - ideal * before[part]) / step_s for part in after}
    return TimeLost(
        share=1 - ideal * math.fsum(before.values()) / step_s,
        parts=parts,
        caveats=tuple(_caveats(run, source)),
        traced=_traced(baseline, run) if source == "trace" else None,
        slowest=_slowest(run),
    )


def _parts_s(run: Run, communication: Shares) -> dict[LossPart, float]:
    """Returns seconds of the median steady step, with the shares of all steady steps."""
    metrics = steady_metrics(run)
    step_s, shares = metrics.step.median, metrics.shares
    parts: dict[LossPart, float] = {"input": shares["data_s"] * step_s}
    parts |= {part: share * step_s for part, share in communication.items()}
    parts["optimizer"] = shares["optimizer_s"] * step_s
    parts["forward and backward"] = step_s - math.fsum(parts.values())
    return parts


def _trace(run: Run) -> Mapping[str, Any] | None:
    """Returns the trace of the first rank with a complete one."""
    traces = run.record.get("trace") or []
    return next((trace for trace in traces if trace and trace["rows"]), None)


def _communication(baseline: Run, run: Run) -> tuple[Source, Shares, Shares]:
    """Returns the best source that both runs have, and their shares by it."""
    if (before := _clock_shares(baseline)) and (after := _clock_shares(run)):
        return "clock", before, after
    if (before := _trace_shares(baseline)) and (after := _trace_shares(run)):
        return "trace", before, after
    return "nothing", {}, {}


def _clock_shares(run: Run) -> Shares:
    """Returns the shares of all steady steps; empty if they were not recorded."""
    metrics, is_alone = steady_metrics(run), run.config.parallel.world_size == 1
    waiting = 0.0 if is_alone else metrics.waiting_share
    if waiting is None:
        return {}
    communication = 0.0 if is_alone else metrics.shares["communication_s"] - waiting
    return {"exposed communication": communication, "waiting for the slowest rank": waiting}


def _trace_shares(run: Run) -> Shares:
    """Returns the share of a traced step in which only communication ran; empty if not traced."""
    if run.config.parallel.world_size == 1:
        return {"exposed communication": 0.0}
    trace = _trace(run)
    return {} if trace is None else {"exposed communication": _share_of(trace, "communication")}


def _share_of(trace: Mapping[str, Any], part: str) -> float:
    return math.fsum(row["share"] for row in trace["rows"] if row["part"] == part)


def _caveats(run: Run, source: Source) -> Iterable[str]:
    if run.config.parallel.world_size > 1 and source == "clock":
        yield FROM_THE_CLOCK
        return
    if source == "nothing":
        yield NOT_SEPARATED
    elif _trace(run) is not None:
        yield FROM_A_TRACE
        if run.config.parallel.uses_deepspeed:
            yield OF_DEEPSPEED
    if run.config.parallel.world_size > 1:
        yield WAITING


def _traced(baseline: Run, run: Run) -> Traced | None:
    trace, before = _trace(run), _trace(baseline)
    if trace is None:
        return None
    return Traced(
        slowdown=trace["step_s"] / steady_metrics(run).step.median,
        idle=_share_of(trace, "idle"),
        baseline_idle=None if before is None else _share_of(before, "idle"),
    )


def _slowest(run: Run) -> Slowest | None:
    world_size = run.config.parallel.world_size
    if world_size == 1:
        return None
    first = run.record["segment_starts"][-1]
    ranks = recorded_steady_state(run.record).select(run.record["samples"]["slowest_rank"][first:])
    worst = max(sorted(set(ranks)), key=ranks.count)
    return Slowest(rank=int(worst), share=ranks.count(worst) / len(ranks), chance=1 / world_size)

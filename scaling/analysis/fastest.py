"""Ranks the configurations that were tried for the same work by speed.

Only those with proven loss parity are ranked; those without a steady run have a reason.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling.analysis.efficiency import Estimate, MeasuredPoint, drift, find_scatters, pool, ratio
from scaling.analysis.proof import Proof, find_proof
from scaling.parity.certificate import Certificate
from scaling.store.conditions import differences
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.flops import count_parameters

UNPROVEN = "no certificate of loss parity covers it"
LEAST_LAUNCHES = 2  # of either side, from which an interval holds for another launch

# The options in which candidates differ, with their defaults; `strategy` has none.
DEFAULTS = {"compile": "off", "activation-checkpointing": "off", "cpu-offload": "no"}

Key = tuple[RunConfig, int]  # what all candidates of a comparison share, and their global batch
PLUS = " + "  # between the strategy and other settings in the name of a candidate


@dataclass(kw_only=True)
class TriedCandidates:
    """All candidates that were tried for one comparison."""

    config: RunConfig  # of the first candidate
    steady: list[Run] = field(default_factory=list)
    # Statuses in their order, by the name of a candidate.
    ended: dict[str, dict[str, None]] = field(default_factory=dict)

    def add_status(self, name: str, status: str) -> None:
        self.ended.setdefault(name, {})[status] = None

    @property
    def missing(self) -> dict[str, str]:
        """The names of candidates without a steady run, with every status of their runs."""
        steady = {name_of(run.config) for run in self.steady}
        ended = sorted(self.ended.items())
        return {name: ", ".join(statuses) for name, statuses in ended if name not in steady}

    @property
    def strategies(self) -> set[str]:
        steady = {run.config.parallel.strategy for run in self.steady}
        return steady | {name.partition(PLUS)[0] for name in self.ended}


def name_of(config: RunConfig) -> str:
    """Returns the strategy and every setting that is not the default."""
    parallel = config.parallel
    options = {
        "strategy": parallel.strategy,
        "compile": parallel.compile,
        "activation-checkpointing": parallel.activation_checkpointing,
        "cpu-offload": "yes" if parallel.cpu_offload else "no",
    }
    return _name(options, config.accumulate)


def _name(options: Mapping[str, str], accumulate: int) -> str:
    parts = [options["strategy"]]
    if accumulate > 1:
        parts.append(f"{accumulate} micro-batches")
    if options["compile"] != "off":
        parts.append(f"compile {options['compile']}")
    if options["activation-checkpointing"] != "off":
        parts.append(f"checkpointing {options['activation-checkpointing']}")
    if options["cpu-offload"] not in ("no", "false", "False"):
        parts.append("offloaded to the host")
    return PLUS.join(parts)


def find_tried(runs: Iterable[Run], cells: Sequence[Cell]) -> dict[Key, TriedCandidates]:
    """Groups runs, and cells without a record, by what the candidates of a comparison share.

    A cell that did not end well is no measurement, even if its record says that its run did.
    """
    groups: dict[Key, TriedCandidates] = {}
    failed = {
        cell.run.name: cell.outcome.status
        for cell in cells
        if cell.run is not None and cell.outcome.status != "ok"
    }

    def group_of(config: RunConfig) -> TriedCandidates:
        return groups.setdefault(_shared(config), TriedCandidates(config=config))

    for run in sorted(runs, key=lambda run: run.name):
        group = group_of(run.config)
        status = failed.get(run.name) or run.record["status"]
        if status == "ok" and run.metrics is not None:
            group.steady.append(run)
        else:
            group.add_status(name_of(run.config), "not steady" if status == "ok" else str(status))
    for config, name, status in _without_record(cells):
        group_of(config).add_status(name, status)
    return groups


def _shared(config: RunConfig) -> Key:
    parallel = _without_candidate(config.parallel)
    return replace(config, parallel=parallel, batch_size=1, accumulate=1), config.global_batch_size


@functools.lru_cache  # thousands of runs share few
def _without_candidate(parallel: ParallelConfig) -> ParallelConfig:
    plain = replace(parallel, strategy="auto", compile="off", cpu_offload=False)
    return replace(plain, activation_checkpointing="off")


def _without_record(cells: Sequence[Cell]) -> Iterator[tuple[RunConfig, str, str]]:
    """Yields a config of the same comparison, the name and the status of each cell without one.

    A cell whose options the recipe refused has no config. Another cell that differs only in
    candidate options lends it one.
    """
    configs: dict[tuple[Any, ...], RunConfig] = {}
    for cell in cells:
        if cell.outcome.config is not None:
            configs.setdefault(_place(cell), cell.outcome.config)
    for cell in sorted(cells, key=lambda cell: cell.name):
        if cell.run is not None:
            continue
        outcome = cell.outcome
        status = "without its record" if outcome.status == "ok" else outcome.status
        if outcome.config is not None:
            yield outcome.config, name_of(outcome.config), status
        elif (neighbor := configs.get(_place(cell))) is not None:
            plain = {"strategy": neighbor.parallel.strategy, **DEFAULTS}
            options = {name: str(outcome.options.get(name, plain[name])) for name in plain}
            yield neighbor, _name(options, neighbor.accumulate), status


def _place(cell: Cell) -> tuple[Any, ...]:
    """Returns everything about a cell except its candidate options."""
    options = {
        name: str(value)
        for name, value in cell.outcome.options.items()
        if name != "strategy" and name not in DEFAULTS
    }
    return cell.sweep, cell.outcome.recipe, *sorted(options.items())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration among others that do the same work."""

    point: MeasuredPoint
    proof: Proof | None
    against_fastest: Estimate | None  # its rate over that of the fastest; None: nothing is ranked
    drift: float | None  # of the machine, between its jobs and those of the fastest
    has_launches: bool  # whether it and the fastest have at least `LEAST_LAUNCHES`

    @property
    def name(self) -> str:
        """A name that is unique within the comparison."""
        return name_of(self.point.config)

    @property
    def why_unranked(self) -> str | None:
        """Why it is not ranked: speed means nothing if it trains another model."""
        if self.proof is None:
            return UNPROVEN
        return None if self.proof.holds else f"its certificate of loss parity: {self.proof.verdict}"

    @property
    def is_tie(self) -> bool | None:
        """Whether the interval of its ratio to the fastest contains 1; None without an interval."""
        against = self.against_fastest
        if against is None or against.low is None or against.high is None:
            return None
        return against.low <= 1 <= against.high

    @property
    def is_slower(self) -> bool:
        """Whether it is known to be slower than the fastest.

        The interval of a single launch does not cover another launch. With single launches, the
        lead must exceed the drift of the machine.
        """
        against = self.against_fastest
        if self.is_tie is not False or against is None or against.high is None:
            return False
        return self.has_launches or (self.drift is not None and 1 / against.high - 1 > self.drift)

    @property
    def is_undecided(self) -> bool:
        """Whether its interval excludes a tie, but does not cover other launches."""
        return self.is_tie is False and not self.is_slower


@dataclass(frozen=True, kw_only=True)
class StrategyComparison:
    """Candidates for the same work on the same number of devices."""

    config: RunConfig  # of one of them
    ranked: tuple[Candidate, ...]  # fastest first
    unranked: tuple[Candidate, ...]
    missing: Mapping[str, str]  # why candidates have no steady run, by their name
    differing_conditions: tuple[str, ...]  # record numbers follow `candidates`

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self.ranked + self.unranked


def compare_strategies(
    runs: Iterable[Run], certificates: Sequence[Certificate], cells: Sequence[Cell] = ()
) -> list[StrategyComparison]:
    """Returns a comparison for each work for which two strategies or more were tried.

    Candidates differ in strategy, `compile`, `activation_checkpointing`, `cpu_offload` and how the
    global batch is divided; everything else is equal. Only the parity reference, and candidates
    that a certificate calls equal to it, are ranked.
    """
    groups = find_tried(runs, cells)
    scatters = find_scatters(run for tried in groups.values() for run in tried.steady)
    several = [(key, tried) for key, tried in groups.items() if len(tried.strategies) > 1]
    several.sort(key=lambda item: _reading_order(*item[0]))
    comparisons = []
    for _, tried in several:
        ranked, unranked = rank(pool(tried.steady, scatters), certificates)
        candidates = ranked + unranked
        records = [run.record for candidate in candidates for run in candidate.point.runs]
        comparison = StrategyComparison(
            config=candidates[0].point.config if candidates else tried.config,
            ranked=ranked,
            unranked=unranked,
            missing=tried.missing,
            differing_conditions=tuple(differences(records)),
        )
        comparisons.append(comparison)
    return comparisons


def _reading_order(config: RunConfig, batch: int) -> tuple[int, str, int, int, str]:
    parallel, size = config.parallel, count_parameters(config.model)
    return size, parallel.precision, batch, parallel.world_size, repr(config)


def rank(
    points: Iterable[MeasuredPoint], certificates: Sequence[Certificate]
) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """Returns candidates with proven loss parity, and the others; both fastest first."""
    fastest_first = sorted(points, key=lambda point: -point.rate.value)
    proofs = [find_proof(point.runs[0], certificates) for point in fastest_first]
    proven = list(zip(fastest_first, proofs, strict=True))
    best = next((point for point, proof in proven if proof is not None and proof.holds), None)
    candidates = []
    for point, proof in proven:
        sides = [point] if best is None else [best, point]
        against = None if best is None else ratio(point.rate, best.rate)
        if point is best:
            against = Estimate(value=1.0, reason="the fastest itself")
        candidate = Candidate(
            point=point,
            proof=proof,
            against_fastest=against,
            drift=drift(sides),
            has_launches=all(side.is_pooled or len(side.runs) >= LEAST_LAUNCHES for side in sides),
        )
        candidates.append(candidate)
    ranked = tuple(each for each in candidates if each.why_unranked is None)
    return ranked, tuple(each for each in candidates if each.why_unranked is not None)

"""Runs, cells and certificates in; which way to train is the fastest, where ways compare, out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scaling.analysis.candidates import Key, MissingCandidate, TriedCandidates, find_tried, name_of
from scaling.analysis.efficiency import (
    Estimate,
    ModelOnMachine,
    MeasuredPoint,
    Scatter,
    drift,
    find_scatters,
    pool,
    ratio,
)
from scaling.analysis.proof import Proof, find_proof
from scaling.parity.certificate import Certificate
from scaling.store.conditions import differences
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_parameters

UNPROVEN = "no certificate of loss parity covers it"
LEAST_LAUNCHES = 2  # of either side, from which an interval holds for another launch


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train among others that do the same work."""

    point: MeasuredPoint
    proof: Proof | None
    against_fastest: Estimate | None  # its rate over that of the fastest; None: nothing is ranked

    drift: float | None  # of the machine, between its jobs and those of the fastest
    has_launches: bool  # whether it and the fastest have enough of them

    @property
    def name(self) -> str:
        """No two ways of a comparison share it."""
        return name_of(self.point.config)

    @property
    def why_unranked(self) -> str | None:
        """Why it is not ranked: fast and another model is not fast."""
        if self.proof is None:
            return UNPROVEN
        return None if self.proof.holds else f"its certificate of loss parity: {self.proof.verdict}"

    @property
    def is_tie(self) -> bool | None:
        """Whether the interval of its ratio to the fastest holds 1; None without an interval."""
        told = self.against_fastest
        if told is None or told.low is None or told.high is None:
            return None
        return told.low <= 1 <= told.high

    @property
    def is_slower(self) -> bool:
        """Whether it is told to be slower than the fastest.

        The interval of a single launch says nothing of another one: there the lead has to be
        beyond what the machine itself differed by.
        """
        told = self.against_fastest
        if self.is_tie is not False or told is None or told.high is None:
            return False
        return self.has_launches or (self.drift is not None and 1 / told.high - 1 > self.drift)

    @property
    def is_undecided(self) -> bool:
        """Whether it may be as fast for all that its interval says."""
        return self.is_tie is False and not self.is_slower


@dataclass(frozen=True, kw_only=True)
class StrategyComparison:
    """Ways to do the same work on the same number of devices, the fastest first."""

    config: RunConfig  # of one of them
    ranked: tuple[Candidate, ...]  # the first one is the fastest
    unranked: tuple[Candidate, ...]
    missing: tuple[MissingCandidate, ...]  # tried, and without a steady run
    differing_conditions: tuple[
        str, ...
    ]  # conditions in which the records differ, numbered along `candidates`

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self.ranked + self.unranked

    @property
    def names(self) -> tuple[str, ...]:
        """Of all ways that were tried."""
        return (*(way.name for way in self.candidates), *(missing.name for missing in self.missing))


def compare_strategies(
    runs: Iterable[Run], certificates: Sequence[Certificate], cells: Sequence[Cell] = ()
) -> list[StrategyComparison]:
    """One comparison for each size, device count, precision and global batch of a recipe.

    Everything else is equal too, but the strategy, `compile`, `activation_checkpointing`,
    `cpu_offload` and how the global batch is divided. At least two strategies were tried, whatever
    became of them. Only ways that a certificate calls equal to the reference, and the reference,
    are ranked.
    """
    runs = list(runs)
    tried, scatters = find_tried(runs, cells), find_scatters(runs)
    several = (key for key in tried if len(tried[key].strategies) > 1)
    return [
        _compare(tried[key], certificates, scatters) for key in sorted(several, key=_reading_order)
    ]


def _reading_order(key: Key) -> tuple[int, str, int, int, str]:
    config, batch = key
    parallel = config.parallel
    return (
        count_parameters(config.model),
        parallel.precision,
        batch,
        parallel.world_size,
        repr(config),
    )


def rank(
    points: Iterable[MeasuredPoint], certificates: Sequence[Certificate]
) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """Those with proven loss parity, the fastest first, each against it; then the others."""
    fastest_first = sorted(points, key=lambda point: -point.rate.value)
    proofs = [find_proof(point.runs[0], certificates) for point in fastest_first]
    told = list(zip(fastest_first, proofs, strict=True))
    best = next((point for point, proof in told if proof is not None and proof.holds), None)
    ways = [_way(point, proof, best) for point, proof in told]
    ranked = tuple(way for way in ways if way.why_unranked is None)
    return ranked, tuple(way for way in ways if way.why_unranked is not None)


def _compare(
    tried: TriedCandidates, certificates: Sequence[Certificate], scatters: Mapping[ModelOnMachine, Scatter]
) -> StrategyComparison:
    ranked, unranked = rank(pool(tried.steady, scatters), certificates)
    ways = ranked + unranked
    records = [run.record for way in (*ranked, *unranked) for run in way.point.runs]
    return StrategyComparison(
        config=ways[0].point.config if ways else tried.config,
        ranked=ranked,
        unranked=unranked,
        missing=tried.missing,
        differing_conditions=tuple(differences(records)),
    )


def _way(point: MeasuredPoint, proof: Proof | None, best: MeasuredPoint | None) -> Candidate:
    sides = [point] if best is None else [best, point]
    return Candidate(
        point=point,
        proof=proof,
        against_fastest=_against(point, best),
        drift=drift(sides),
        has_launches=all(side.is_pooled or len(side.runs) >= LEAST_LAUNCHES for side in sides),
    )


def _against(point: MeasuredPoint, best: MeasuredPoint | None) -> Estimate | None:
    if best is None:
        return None
    if point is best:
        return Estimate(value=1.0, reason="the fastest itself")
    return ratio(point.rate, best.rate)

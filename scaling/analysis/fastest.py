"""Ranks the candidates of each comparison by speed; only those with proven loss parity count."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scaling.analysis.candidates import MissingCandidate, TriedCandidates, find_tried, name_of
from scaling.analysis.efficiency import (
    Estimate,
    MeasuredPoint,
    ModelOnMachine,
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
    missing: tuple[MissingCandidate, ...]
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
    runs = list(runs)
    groups, scatters = find_tried(runs, cells).items(), find_scatters(runs)
    several = [(key, tried) for key, tried in groups if len(tried.strategies) > 1]
    several.sort(key=lambda item: _reading_order(*item[0]))
    return [_compare(tried, certificates, scatters) for _, tried in several]


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
    candidates = [_candidate(point, proof, best) for point, proof in proven]
    ranked = tuple(each for each in candidates if each.why_unranked is None)
    return ranked, tuple(each for each in candidates if each.why_unranked is not None)


def _compare(
    tried: TriedCandidates,
    certificates: Sequence[Certificate],
    scatters: Mapping[ModelOnMachine, Scatter],
) -> StrategyComparison:
    ranked, unranked = rank(pool(tried.steady, scatters), certificates)
    candidates = ranked + unranked
    records = [run.record for candidate in candidates for run in candidate.point.runs]
    return StrategyComparison(
        config=candidates[0].point.config if candidates else tried.config,
        ranked=ranked,
        unranked=unranked,
        missing=tried.missing,
        differing_conditions=tuple(differences(records)),
    )


def _candidate(point: MeasuredPoint, proof: Proof | None, best: MeasuredPoint | None) -> Candidate:
    sides = [point] if best is None else [best, point]
    against = None if best is None else ratio(point.rate, best.rate)
    if point is best:
        against = Estimate(value=1.0, reason="the fastest itself")
    return Candidate(
        point=point,
        proof=proof,
        against_fastest=against,
        drift=drift(sides),
        has_launches=all(side.is_pooled or len(side.runs) >= LEAST_LAUNCHES for side in sides),
    )

"""Runs and certificates in; which way to train is the fastest, where ways compare, out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scaling.certificates import Certificate
from scaling.efficiency import Estimate, Point, pool, ratio
from scaling.joining import differences
from scaling.parity_section import Proof, find_proof
from scaling.store import Run
from unitransformer.config import RunConfig

UNPROVEN = "no certificate of loss parity covers it"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train among others that do the same work."""

    point: Point
    proof: Proof | None
    against_fastest: Estimate | None  # its rate over that of the fastest; None: nothing is ranked

    @property
    def name(self) -> str:
        """The strategy, and what this way has that the plain one has not; no two ways of a
        comparison share it."""
        config, parallel = self.point.config, self.point.config.parallel
        told: list[str] = [parallel.strategy]
        if config.accumulate > 1:
            told.append(f"{config.accumulate} micro-batches")
        if parallel.compile != "off":
            told.append(f"compile {parallel.compile}")
        if parallel.activation_checkpointing != "off":
            told.append(f"checkpointing {parallel.activation_checkpointing}")
        if parallel.cpu_offload:
            told.append("offloaded to the host")
        return " + ".join(told)

    @property
    def unranked(self) -> str | None:
        """Why it is not ranked: fast and another model is not fast."""
        if self.proof is None:
            return UNPROVEN
        return None if self.proof.holds else f"its certificate of loss parity: {self.proof.verdict}"

    @property
    def ties(self) -> bool | None:
        """Whether the interval of its ratio to the fastest holds 1; None without an interval."""
        told = self.against_fastest
        if told is None or told.low is None or told.high is None:
            return None
        return told.low <= 1 <= told.high


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ways to do the same work on the same number of devices, the fastest first."""

    ranked: tuple[Way, ...]  # the first one is the fastest
    unranked: tuple[Way, ...]
    apart: tuple[str, ...]  # conditions in which the records differ, numbered along `ways`

    @property
    def ways(self) -> tuple[Way, ...]:
        return self.ranked + self.unranked

    @property
    def config(self) -> RunConfig:
        return self.ways[0].point.config


def compare_strategies(
    runs: Iterable[Run], certificates: Sequence[Certificate]
) -> list[Comparison]:
    """One comparison for each size, device count, precision and global batch of a recipe.

    Everything else is equal too, but the strategy, `compile`, `activation_checkpointing`,
    `cpu_offload` and how the global batch is divided. There are at least two strategies. Only ways
    that a certificate calls equal to the reference, and the reference, are ranked.
    """
    usable = [run for run in runs if run.is_ok and run.readout is not None]
    groups: dict[tuple[RunConfig, int], list[Run]] = {}
    for run in sorted(usable, key=lambda run: run.name):
        groups.setdefault(_way_aside(run.config), []).append(run)
    return [
        _compare(groups[key], certificates)
        for key in sorted(groups, key=_reading_order)
        if len({run.config.parallel.strategy for run in groups[key]}) > 1
    ]


def _way_aside(config: RunConfig) -> tuple[RunConfig, int]:
    """What all ways of a comparison share; the number is the global batch."""
    parallel = replace(
        config.parallel,
        strategy="auto",
        compile="off",
        activation_checkpointing="off",
        cpu_offload=False,
    )
    return replace(config, parallel=parallel, batch_size=1, accumulate=1), config.global_batch_size


def _reading_order(key: tuple[RunConfig, int]) -> tuple[str, str, int, int, str]:
    config, batch = key
    parallel = config.parallel
    return config.size, parallel.precision, batch, parallel.world_size, repr(config)


def _compare(runs: Sequence[Run], certificates: Sequence[Certificate]) -> Comparison:
    fastest_first = sorted(pool(runs), key=lambda point: -point.rate.value)
    proofs = [find_proof(point.runs[0], certificates) for point in fastest_first]
    told = list(zip(fastest_first, proofs, strict=True))
    best = next((point for point, proof in told if proof is not None and proof.holds), None)
    ways = [
        Way(point=point, proof=proof, against_fastest=_against(point, best))
        for point, proof in told
    ]
    ranked = tuple(way for way in ways if way.unranked is None)
    unranked = tuple(way for way in ways if way.unranked is not None)
    records = [run.record for way in (*ranked, *unranked) for run in way.point.runs]
    return Comparison(ranked=ranked, unranked=unranked, apart=tuple(differences(records)))


def _against(point: Point, best: Point | None) -> Estimate | None:
    if best is None:
        return None
    if point is best:
        return Estimate(value=1.0, reason="the fastest itself")
    return ratio(point.rate, best.rate)

"""Fits latency (alpha) and bandwidth (B) of a collective to its seconds by size.

n ranks | S bytes of the whole array | alpha seconds of one step | B bytes/s of one rank's link

A ring all-reduce takes 2 (n - 1) steps of S / n bytes, all-gather and reduce-scatter half as many:
t = 2 (n - 1) (alpha + S / (n B)) and t = (n - 1) (alpha + S / (n B)). Steps: Thakur, Rabenseifner
and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005. Bytes per rank:
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md. A pipelined broadcast sends all
of S through every link: t = (n - 1) alpha + S / B.

If a library uses a tree, or a switch that adds, alpha and B are those of a ring that would take as
long, and B can exceed the bandwidth of a link.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
MIN_SIZES = 5  # three to fit, two held out


@dataclass(frozen=True, kw_only=True)
class CollectiveTiming:
    """One size, measured several times."""

    size_bytes: int  # of the whole array, as nccl-tests counts it
    calls: int  # consecutive calls per sample
    seconds: tuple[float, ...]  # per sample, on the slowest rank

    def __post_init__(self) -> None:
        if self.size_bytes < 1 or self.calls < 1:
            raise ValueError(
                f"{self.calls} calls of {self.size_bytes} bytes; both must be at least 1"
            )
        if not self.seconds or not all(0 < second < float("inf") for second in self.seconds):
            raise ValueError(f"seconds of {self.size_bytes} bytes are {self.seconds}, not above 0")

    @property
    def call_s(self) -> float:
        return statistics.median(self.seconds) / self.calls


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """Predicts the seconds of a collective for any size."""

    collective: Collective
    num_ranks: int
    alpha_s: float  # of one step
    bytes_per_s: float  # of one rank's link
    # Of a model fitted without the held-out sizes: bytes -> predicted / measured - 1.
    held_out_error: Mapping[int, float] = field(default_factory=dict)

    def predict_s(self, size_bytes: float) -> float:
        steps, sent = ring(self.collective, self.num_ranks)
        return steps * self.alpha_s + sent * size_bytes / self.bytes_per_s

    @property
    def median_error(self) -> float:
        return statistics.median(map(abs, self.held_out_error.values()))

    @property
    def largest_error(self) -> float:
        return max(map(abs, self.held_out_error.values()))


def ring(collective: Collective, num_ranks: int) -> tuple[int, float]:
    """Returns the steps of a ring, and the share of the whole array that each rank sends."""
    others = num_ranks - 1
    match collective:
        case "all_reduce":
            return 2 * others, 2 * others / num_ranks
        case "all_gather" | "reduce_scatter":
            return others, others / num_ranks
        case "broadcast":
            return others, 1.0
        case unknown:
            assert_never(unknown)


def fit(collective: Collective, num_ranks: int, points: Sequence[CollectiveTiming]) -> AlphaBeta:
    """Fits a model to `points`; every second size between the ends is also held out.

    Raises ValueError for too few sizes or ranks, or times that do not grow with the size.
    """
    points = sorted(points, key=lambda point: point.size_bytes)
    if len({point.size_bytes for point in points}) < max(MIN_SIZES, len(points)):
        raise ValueError(
            f"{collective}: {len(points)} sizes; at least {MIN_SIZES} different ones needed"
        )
    # Both ends are fitted: these errors are of interpolation, not of extrapolation.
    held_out = points[1:-1:2]
    fitted = [point for point in points if point not in held_out]
    partial = _fit_model(collective, num_ranks, fitted)
    errors = {p.size_bytes: partial.predict_s(p.size_bytes) / p.call_s - 1 for p in held_out}
    return replace(_fit_model(collective, num_ranks, points), held_out_error=errors)


def _fit_model(
    collective: Collective, num_ranks: int, points: Sequence[CollectiveTiming]
) -> AlphaBeta:
    """Least squares of the relative error: small sizes determine alpha, large ones B."""
    if num_ranks < 2:
        raise ValueError(f"{collective}: {num_ranks} rank sends nothing; use 2 or more")
    steps, sent = ring(collective, num_ranks)
    # Each row is divided by its time: p alpha + q / B = 1.
    rows = [(steps / point.call_s, sent * point.size_bytes / point.call_s) for point in points]
    pp, pq, qq = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    p, q = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = pp * qq - pq * pq
    alpha_s, s_per_byte = (p * qq - q * pq) / determinant, (q * pp - p * pq) / determinant
    if alpha_s < 0:  # impossible: fit a line through the origin
        alpha_s, s_per_byte = 0.0, q / qq
    if s_per_byte <= 0:
        raise ValueError(f"{collective}: its time does not grow with the size; measure longer")
    return AlphaBeta(
        collective=collective, num_ranks=num_ranks, alpha_s=alpha_s, bytes_per_s=1 / s_per_byte
    )

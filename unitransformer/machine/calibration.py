"""A calibration: what a machine's ranks reached. Raw samples in, figures out; nothing but samples
is kept, every figure is computed from them.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from unitransformer.machine.alpha_beta import AlphaBetaFit, Collective, CollectiveTiming, fit
from unitransformer.machine.host import Machine


@dataclass(frozen=True, kw_only=True)
class WorkSamples:
    """One kind of work, done again and again."""

    name: str
    work: int  # FLOP or bytes of a sample
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = all(isinstance(second, int | float) for second in self.seconds)
        if not numbers or not all(0 < second < float("inf") for second in self.seconds):
            raise ValueError(f"{self.name}: seconds are {self.seconds}, not numbers above 0")
        if self.work < 1 or not self.seconds:
            raise ValueError(f"{self.name}: {self.work} FLOP or bytes, {len(self.seconds)} samples")

    @property
    def best_per_s(self) -> float:
        return self.work / min(self.seconds)

    @property
    def median_per_s(self) -> float:
        return self.work / statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What one rank reached at one dtype, while all ranks of its job did the same."""

    device: str  # as its driver names it
    dtype: str
    threads: int | None  # None: not on a CPU
    matmul: tuple[WorkSamples, ...]  # of FLOP, one for each product that was tried
    copy: WorkSamples  # of bytes, read and written
    elapsed_s: float

    @property
    def best_product(self) -> WorkSamples:
        return max(self.matmul, key=lambda samples: samples.best_per_s)

    @property
    def matmul_flops_per_s(self) -> float:
        """The ceiling: the best sample, for training must never be above it."""
        return self.best_product.best_per_s

    @property
    def copy_bytes_per_s(self) -> float:
        return self.copy.best_per_s

    def join(self, other: "Ceiling") -> "Ceiling":
        """Samples of both, as of before and after a training.

        Raises:
            ValueError: they are of unlike things.
        """
        for name in ("device", "dtype", "threads"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                raise ValueError(f"{name} is {own} and {theirs}; join ceilings of one alone")
        return replace(
            self,
            matmul=self.matmul + other.matmul,
            copy=_join(self.copy, other.copy),
            elapsed_s=self.elapsed_s + other.elapsed_s,
        )

    def as_dict(self) -> dict[str, Any]:
        """Samples and the figures they come to, as plain JSON values for a record."""
        told: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return told | {
            "matmul_flops_per_s": self.matmul_flops_per_s,
            "copy_bytes_per_s": self.copy_bytes_per_s,
        }


def _join(first: WorkSamples, second: WorkSamples) -> WorkSamples:
    """Samples of the same work; where it was not, for memory was short, the faster one's."""
    if first.work == second.work:
        return replace(first, seconds=first.seconds + second.seconds)
    return max(first, second, key=lambda samples: samples.best_per_s)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What all ranks of one launch reached."""

    machine: Machine
    made_at: str  # ISO 8601, UTC
    command: str
    device: str  # "cpu" or "cuda"
    num_ranks: int
    left_out: Mapping[str, str]  # dtypes that were not measured -> why
    ranks: tuple[tuple[Ceiling, ...], ...]  # of each rank, one a dtype
    collectives: Mapping[Collective, tuple[CollectiveTiming, ...]]  # empty for one rank
    elapsed_s: float

    def __post_init__(self) -> None:
        if len(self.ranks) != self.num_ranks or not self.ranks:
            raise ValueError(f"num_ranks is {self.num_ranks} and ranks holds {len(self.ranks)}")
        if not self.dtypes or any(
            tuple(ceiling.dtype for ceiling in rank) != self.dtypes for rank in self.ranks
        ):
            raise ValueError("ranks have not all measured the same dtypes, one at least")

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(ceiling.dtype for ceiling in self.ranks[0])

    def ceilings(self, dtype: str) -> tuple[Ceiling, ...]:
        """Of every rank.

        Raises:
            ValueError: it was not measured, and why.
        """
        if dtype not in self.dtypes:
            why = self.left_out.get(dtype, f"measured are {', '.join(self.dtypes)}")
            raise ValueError(f"dtype {dtype} was not measured: {why}")
        return tuple(c for rank in self.ranks for c in rank if c.dtype == dtype)

    def matmul_flops_per_s(self, dtype: str) -> float:
        """The best that any rank has reached: a ceiling of each, for their machines are alike."""
        return max(ceiling.matmul_flops_per_s for ceiling in self.ceilings(dtype))

    def copy_bytes_per_s(self) -> float:
        """The best that any rank has reached; bytes read and written."""
        return max(ceiling.copy_bytes_per_s for rank in self.ranks for ceiling in rank)

    def fit(self, collective: Collective) -> AlphaBetaFit:
        """Raises ValueError as `alpha_beta.fit` does, and for what was not measured."""
        if collective not in self.collectives:
            raise ValueError(f"{collective} was not measured: {self.num_ranks} rank")
        return fit(collective, self.num_ranks, self.collectives[collective])

    def metrics(self) -> dict[str, Any]:
        """All that is derived from samples; None, for a collective, with the reason beside it."""
        return {
            "matmul_flops_per_s": {dtype: self.matmul_flops_per_s(dtype) for dtype in self.dtypes},
            "copy_bytes_per_s": self.copy_bytes_per_s(),
            "collectives": {name: self._figures_of(name) for name in self.collectives},
        }

    def _figures_of(self, collective: Collective) -> dict[str, Any]:
        try:
            fitted = self.fit(collective)
        except ValueError as error:
            return {"alpha_s": None, "bytes_per_s": None, "reason": str(error)}
        return {
            "alpha_s": fitted.model.alpha_s,
            "bytes_per_s": fitted.model.bytes_per_s,
            "held_out_error": {str(size): e for size, e in fitted.held_out_error.items()},
        }

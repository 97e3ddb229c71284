"""Holds what the ranks of a machine reached in calibration: raw samples, and metrics from them."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from unitransformer.machine.alpha_beta import AlphaBeta, Collective, CollectiveTiming, fit
from unitransformer.machine.host import Machine


@dataclass(frozen=True, kw_only=True)
class WorkSamples:
    """Seconds of the same work, measured several times."""

    name: str
    work: int  # FLOPs or bytes of a sample
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(0 < second < float("inf") for second in self.seconds):
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
    threads: int | None  # None on a GPU
    matmul: tuple[WorkSamples, ...]  # FLOPs, one entry per product that was tried
    copy: WorkSamples  # bytes read and written
    elapsed_s: float

    def __post_init__(self) -> None:
        if not self.matmul:
            raise ValueError("matmul is empty; a ceiling needs at least one product")

    @property
    def best_product(self) -> WorkSamples:
        return max(self.matmul, key=lambda samples: samples.best_per_s)

    @property
    def matmul_flops_per_s(self) -> float:
        """The rate of the best sample, which training must never exceed."""
        return self.best_product.best_per_s

    @property
    def copy_bytes_per_s(self) -> float:
        return self.copy.best_per_s

    def merge(self, other: "Ceiling") -> "Ceiling":
        """Returns a ceiling with the samples of both, such as before and after training.

        Raises ValueError if device, dtype or threads differ.
        """
        for name in ("device", "dtype", "threads"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"{name} is {mine} and {theirs}; only equal ones can be merged")
        if self.copy.work == other.copy.work:
            copy = replace(self.copy, seconds=self.copy.seconds + other.copy.seconds)
        else:  # one had less memory: take the faster one
            copy = max(self.copy, other.copy, key=lambda samples: samples.best_per_s)
        return replace(
            self,
            matmul=self.matmul + other.matmul,
            copy=copy,
            elapsed_s=self.elapsed_s + other.elapsed_s,
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns samples and rates as plain JSON values for a record."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return plain | {
            "matmul_flops_per_s": self.matmul_flops_per_s,
            "copy_bytes_per_s": self.copy_bytes_per_s,
        }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What all ranks of one launch reached."""

    machine: Machine
    made_at: str  # ISO 8601, UTC
    command: str
    device: str  # "cpu" or "cuda"
    num_ranks: int
    left_out: Mapping[str, str]  # dtype -> why it was not measured
    ranks: tuple[tuple[Ceiling, ...], ...]  # per rank, per dtype
    collectives: Mapping[Collective, tuple[CollectiveTiming, ...]]  # empty for one rank
    elapsed_s: float

    def __post_init__(self) -> None:
        if len(self.ranks) != self.num_ranks or not self.ranks:
            raise ValueError(f"num_ranks is {self.num_ranks} and ranks holds {len(self.ranks)}")
        if not self.dtypes or any(
            tuple(ceiling.dtype for ceiling in rank) != self.dtypes for rank in self.ranks
        ):
            raise ValueError("ranks must all measure the same dtypes, at least one")

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(ceiling.dtype for ceiling in self.ranks[0])

    def ceilings(self, dtype: str) -> tuple[Ceiling, ...]:
        """Returns the ceiling of every rank; raises ValueError if it was not measured, and why."""
        if dtype not in self.dtypes:
            why = self.left_out.get(dtype, f"measured are {', '.join(self.dtypes)}")
            raise ValueError(f"dtype {dtype} was not measured: {why}")
        return tuple(c for rank in self.ranks for c in rank if c.dtype == dtype)

    def matmul_flops_per_s(self, dtype: str) -> float:
        """Returns the best rate of any rank, which limits each rank, as their devices are equal."""
        return max(ceiling.matmul_flops_per_s for ceiling in self.ceilings(dtype))

    def fit(self, collective: Collective) -> AlphaBeta:
        """Raises ValueError as `alpha_beta.fit` does, and for a collective without samples."""
        if collective not in self.collectives:
            raise ValueError(f"{collective} was not measured: {self.num_ranks} rank")
        return fit(collective, self.num_ranks, self.collectives[collective])

    def metrics(self) -> dict[str, Any]:
        """Returns everything derived from samples; None, with a reason, where a fit fails."""
        return {
            "matmul_flops_per_s": {dtype: self.matmul_flops_per_s(dtype) for dtype in self.dtypes},
            "copy_bytes_per_s": max(c.copy_bytes_per_s for rank in self.ranks for c in rank),
            "collectives": {name: self._fit_metrics(name) for name in self.collectives},
        }

    def _fit_metrics(self, collective: Collective) -> dict[str, Any]:
        try:
            fitted = self.fit(collective)
        except ValueError as error:
            return {"alpha_s": None, "bytes_per_s": None, "reason": str(error)}
        return {
            "alpha_s": fitted.alpha_s,
            "bytes_per_s": fitted.bytes_per_s,
            "held_out_error": {str(size): e for size, e in fitted.held_out_error.items()},
        }

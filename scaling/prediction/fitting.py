"""Fits the coefficients of a step's time to measured runs.

Each coefficient has a prior, which says what is physically plausible, and may differ by family of
GPU and by software by as much as another prior allows. The fit maximizes the posterior of the
logarithms of the times (Gelman et al., "Bayesian Data Analysis", chapter 5) by Gauss-Newton steps.
Large residuals weigh less (Huber, 1964), since published rows hold unlucky runs.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.prediction.step_model import Coefficients, Parts, step_parts
from scaling.prediction.work import StepWork, stack

Array = NDArray[np.float64]
SCATTER = 0.03  # of the logarithm of a time between equal runs
NORMAL = 1.645  # deviations in half a 90 % interval of a normal distribution
HUBER = 1.0  # residuals above so many scatters weigh less
ITERATIONS = 30
# Of the logarithm of a time on GPUs that are not in the fit: the errors met when all runs of one
# family are left out.
UNSEEN_GPU = 0.3
SHARES = ("compute_s", "exposed_communication_s", "optimizer_s", "hidden_communication_s")
STEP = 1e-5  # of a coefficient, for derivatives
LARGEST_STEP = 0.5  # of a coefficient in one iteration
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Where a coefficient is expected, and by how much its logarithm (or logit) may be off."""

    value: float
    spread: float
    by_gpu: float = 0.0  # spread between families of GPUs
    by_software: float = 0.0
    by_source: float = 0.0
    is_share: bool = False  # in (0, 1), so that its logit is fitted

    @property
    def by_group(self) -> dict[str, float]:
        return {"gpu": self.by_gpu, "software": self.by_software, "source": self.by_source}

    @property
    def center(self) -> float:
        if self.is_share:
            return float(np.log(self.value / (1 - self.value)))
        return float(np.log(self.value))


PRIORS = {
    "matmul_share": Prior(value=0.80, spread=0.4, by_gpu=0.4, is_share=True),
    "attention_share": Prior(value=0.55, spread=0.5, by_gpu=0.4, by_software=0.4, is_share=True),
    "half_width": Prior(value=100.0, spread=0.3),
    "half_head": Prior(value=16.0, spread=0.7),
    "half_positions": Prior(value=100.0, spread=0.3),
    "matmul_backward": Prior(value=1.10, spread=0.15),
    "attention_backward": Prior(value=1.7, spread=0.3),
    "element_passes": Prior(value=1.5, spread=0.3, by_software=0.3),
    "element_backward": Prior(value=1.7, spread=0.2),
    "logits_passes": Prior(value=1.3, spread=0.3, by_software=0.4),
    "score_passes": Prior(value=1.0, spread=0.5),
    "eight_bits_speed": Prior(value=1.4, spread=0.2),
    "layer_s": Prior(value=1e-3, spread=0.5, by_software=0.7),
    "start_s": Prior(value=2e-3, spread=0.5, by_software=0.7),
    "host_sharpness": Prior(value=2.5, spread=0.2),
    "update_passes": Prior(value=1.5, spread=0.3),
    "step_s": Prior(value=3e-3, spread=0.5),
    "link_share": Prior(value=0.75, spread=0.4, is_share=True),
    "contention": Prior(value=0.4, spread=0.4, by_software=0.4),
    "straggling": Prior(value=0.012, spread=0.3),
    "site": Prior(value=1.0, spread=0.01, by_source=0.1),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A step to predict, or one that was measured."""

    work: StepWork
    gpu: str  # family, or the processor
    software: str
    source: str = ""  # who measured
    step_s: float = math.nan


Key = tuple[str, str, str]  # coefficient; "", "gpu", "software" or "source"; name of the group
Priors = Mapping[str, Prior]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected seconds of a step, and how sure they are."""

    parts: Parts
    deviation: float  # of the logarithm: of the coefficients, and of equal runs from each other

    @property
    def seconds(self) -> float:
        return float(self.parts.total_s)

    @property
    def log_s(self) -> float:
        return math.log(self.seconds)


@dataclass(frozen=True, kw_only=True, eq=False)  # equal only to itself, so that it can be a key
class Fit:
    """Fitted coefficients in logarithms or logits: a common value, and differences of groups."""

    priors: Priors
    keys: tuple[Key, ...]
    values: Array  # of the keys
    covariance: Array  # of the values, after the fit
    num_samples: int

    def coefficients(self, gpu: str, software: str, source: str = "") -> Coefficients:
        """Returns the coefficients of a GPU and software; unseen ones get the common value."""
        points, _ = self.points(gpu, software, source)
        return Coefficients(
            **{name: _to_value(prior, points[name]) for name, prior in self.priors.items()}
        )

    def estimate(self, sample: "Sample") -> Estimate:
        """Returns the expected time; what is unknown of an unseen group widens its deviation."""
        columns, places, unseen = _derivative_plan(self, sample.gpu, sample.software, sample.source)
        # The first entry is the estimate; each other one moves a coefficient.
        parts = step_parts(sample.work, Coefficients(**columns))
        log_s = np.log(parts.total_s)
        slopes = (log_s[1:] - log_s[0]) / STEP
        gradient = slopes @ places
        variance = float(gradient @ self.covariance @ gradient + np.square(slopes) @ unseen)
        return Estimate(
            parts=Parts(**{f.name: float(getattr(parts, f.name).flat[0]) for f in fields(Parts)}),
            deviation=math.sqrt(variance + SCATTER**2),
        )

    def ratio_deviation(self, one: "Sample", other: "Sample") -> float:
        """Returns the deviation of the logarithm of a time over another one.

        Coefficients that both share move both alike; what is unknown of an unseen group does so if
        both are of it.
        """
        slopes, plans = [], []
        for sample in (one, other):
            columns, places, unseen = _derivative_plan(
                self, sample.gpu, sample.software, sample.source
            )
            log_s = np.log(step_parts(sample.work, Coefficients(**columns)).total_s)
            slopes.append((log_s[1:] - log_s[0]) / STEP)
            plans.append((places, unseen))
        gradient = slopes[0] @ plans[0][0] - slopes[1] @ plans[1][0]
        variance = float(gradient @ self.covariance @ gradient)
        if (one.gpu, one.software, one.source) == (other.gpu, other.software, other.source):
            variance += float(np.square(slopes[0] - slopes[1]) @ plans[0][1])
        else:
            variance += sum(float(np.square(s) @ p[1]) for s, p in zip(slopes, plans, strict=True))
        return math.sqrt(variance + 2 * SCATTER**2)

    def share_deviations(self, sample: "Sample") -> dict[str, float]:
        """Returns the deviation of the log odds of each part's share of the step; 0 if it is 0."""
        columns, places, unseen = _derivative_plan(self, sample.gpu, sample.software, sample.source)
        parts = step_parts(sample.work, Coefficients(**columns))
        found = {}
        for name in SHARES:
            share = getattr(parts, name) / parts.total_s
            found[name] = 0.0
            if np.all(share > 0):
                odds = np.log(share / (1 - share))
                slopes = (odds[1:] - odds[0]) / STEP
                gradient = slopes @ places
                variance = gradient @ self.covariance @ gradient + np.square(slopes) @ unseen
                found[name] = math.sqrt(float(variance))
        return found

    def log_times(self, samples: Sequence["Sample"]) -> list[tuple[float, float]]:
        """Returns the logarithm of each expected time and its deviation, as `estimate`, faster."""
        found = [(0.0, 0.0)] * len(samples)
        groups: dict[tuple[str, str, str], list[int]] = {}
        for i, sample in enumerate(samples):
            groups.setdefault((sample.gpu, sample.software, sample.source), []).append(i)
        for group, members in groups.items():
            columns, places, unseen = _derivative_plan(self, *group)
            # A row for each sample, a column for each coefficient that is moved.
            works = stack([samples[i].work for i in members], lambda v: np.array(v)[:, None])
            log_s = np.log(step_parts(works, Coefficients(**columns)).total_s)
            slopes = (log_s[:, 1:] - log_s[:, :1]) / STEP
            gradients = slopes @ places
            variances = np.einsum("ij,jk,ik->i", gradients, self.covariance, gradients)
            variances += np.square(slopes) @ unseen
            deviations = np.sqrt(variances + SCATTER**2)
            for i, log, deviation in zip(members, log_s[:, 0], deviations, strict=True):
                found[i] = (float(log), float(deviation))
        return found

    def knows_gpu(self, gpu: str) -> bool:
        return any(key[1:] == ("gpu", gpu) for key in self.keys)

    def points(
        self, gpu: str, software: str, source: str
    ) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Returns each coefficient as a logarithm or logit, and the places of its keys."""
        groups = {"": "", "gpu": gpu, "software": software, "source": source}
        used: dict[str, list[int]] = {name: [] for name in self.priors}
        for i, (name, kind, group) in enumerate(self.keys):
            if groups[kind] == group:
                used[name].append(i)
        return {name: float(self.values[at].sum()) for name, at in used.items()}, used


@functools.lru_cache(maxsize=256)  # thousands of configurations share few groups
def _derivative_plan(
    fit: Fit, gpu: str, software: str, source: str
) -> tuple[dict[str, Array], Array, Array]:
    """Returns what the derivatives by the coefficients of a group need.

    These are the coefficients of the group, once as they are and once with each of them moved; the
    places of their keys; and the variance of each that the group's absence from the fit leaves.
    """
    points, used = fit.points(gpu, software, source)
    names = list(fit.priors)
    columns, places = {}, np.zeros((len(names), len(fit.keys)))
    unseen = np.zeros(len(names))
    for i, (name, prior) in enumerate(fit.priors.items()):
        at = np.full(len(names) + 1, points[name])
        at[i + 1] += STEP
        columns[name] = _to_value(prior, at)
        places[i, used[name]] = 1.0
        kinds = {fit.keys[j][1] for j in used[name]}
        unseen[i] = sum(s**2 for kind, s in prior.by_group.items() if kind not in kinds)
    if not fit.knows_gpu(gpu):
        unseen[names.index("site")] += UNSEEN_GPU**2
    return columns, places, unseen


def _to_value(prior: Prior, x: Any) -> Any:
    return 1 / (1 + np.exp(-x)) if prior.is_share else np.exp(x)


def fit(samples: Sequence[Sample], priors: Priors = PRIORS, *, start: Fit | None = None) -> Fit:
    """Returns the coefficients that explain `samples` best.

    Args:
        start: a fit to similar samples, from which the search starts; it changes no result by more
            than the search's tolerance.
    """
    return _Problem(samples, priors).solve(start)


class _Problem:
    """The arrays of a fit.

    A key moves its coefficient in the rows of its group only, so the derivatives by a coefficient
    give those by all its keys.
    """

    def __init__(self, samples: Sequence[Sample], priors: Priors) -> None:
        self.priors = priors
        self.works = stack([sample.work for sample in samples], np.array)
        self.log_s = np.log([sample.step_s for sample in samples])
        groups = {
            "gpu": np.array([sample.gpu for sample in samples]),
            "software": np.array([sample.software for sample in samples]),
            "source": np.array([sample.source for sample in samples]),
        }
        self.keys: list[Key] = []
        self.rows: list[Array] = []  # per key, 1 where a sample belongs to its group
        spreads: list[float] = []
        for name, prior in priors.items():
            self.keys.append((name, "", ""))
            spreads.append(prior.spread)
            self.rows.append(np.ones(len(samples)))
            for kind, spread in prior.by_group.items():
                for group in sorted(set(groups[kind].tolist())) if spread else ():
                    self.keys.append((name, kind, group))
                    spreads.append(spread)
                    self.rows.append((groups[kind] == group).astype(float))
        self.spreads = np.array(spreads)
        self.center = np.array([priors[key[0]].center if not key[1] else 0.0 for key in self.keys])
        self.of = {name: [i for i, k in enumerate(self.keys) if k[0] == name] for name in priors}

    def _points(self, x: Array) -> dict[str, Array]:
        """Returns each coefficient of each sample, as a logarithm or logit."""
        return {
            name: np.sum([x[i] * self.rows[i] for i in keys], axis=0)
            for name, keys in self.of.items()
        }

    def _residuals(self, points: Mapping[str, Array]) -> Array:
        values = {name: _to_value(prior, points[name]) for name, prior in self.priors.items()}
        log_s: Array = np.log(step_parts(self.works, Coefficients(**values)).total_s)
        return log_s - self.log_s

    def linearize(self, x: Array) -> tuple[Array, Array]:
        """Returns the residuals, and their derivatives by the keys."""
        points = self._points(x)
        residuals = self._residuals(points)
        columns: list[Array] = [np.empty(0)] * len(self.keys)
        for name, keys in self.of.items():
            moved = self._residuals(points | {name: points[name] + STEP})
            derivative = (moved - residuals) / STEP
            for i in keys:
                columns[i] = derivative * self.rows[i]
        return residuals, np.array(columns).T

    def solve(self, start: Fit | None) -> Fit:
        """Returns the maximum of the posterior, and its covariance there (Laplace)."""
        x = self.center.copy()
        if start is not None:
            known = dict(zip(start.keys, start.values, strict=True))
            x = np.array([known.get(key, at) for key, at in zip(self.keys, x, strict=True)])
        for _ in range(ITERATIONS):
            residuals, jacobian = self.linearize(x)
            weights = np.sqrt(1 / np.maximum(1, np.abs(residuals) / (HUBER * SCATTER)))
            jacobian *= (weights / SCATTER)[:, None]
            gradient = jacobian.T @ (residuals * weights / SCATTER)
            gradient += (x - self.center) / self.spreads**2
            curvature = jacobian.T @ jacobian + np.diag(1 / self.spreads**2)
            step = np.linalg.solve(curvature, gradient)
            x = x - step * min(1.0, LARGEST_STEP / max(1e-12, np.abs(step).max()))
            if np.abs(step).max() < TOLERANCE:
                break
        return Fit(
            priors=self.priors,
            keys=tuple(self.keys),
            values=x,
            covariance=np.asarray(np.linalg.inv(curvature), dtype=np.float64),
            num_samples=len(self.log_s),
        )

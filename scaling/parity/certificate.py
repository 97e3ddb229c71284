"""The parity certificate: one JSON file a study of a recipe, with all raw samples.

Differences and verdicts are stored for other people's tools, and computed again from the samples
whenever a certificate is read: what was edited contradicts itself.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from scaling.parity.cases import (
    BOUNDS,
    Bound,
    Case,
    CurveComparison,
    Curves,
    ParityVerdict,
    compare,
)
from scaling.parity.evidence import Work, find_inactive_feature
from unitransformer.config import Precision, Recipe, RunConfig
from unitransformer.record.fields import NUMBER, RELATIVE_ERROR, Kinds, fits

SCHEMA = 1
KIND = "parity"

CASE_FIELDS: dict[str, Kinds] = {
    "verdict": str,
    "reason": (str, NoneType),
    "command": str,
    "elapsed_s": NUMBER,
    "loss_difference": (*NUMBER, NoneType),
    "loss_step": (int, NoneType),
    "gradient_norm_difference": (*NUMBER, NoneType),
    "gradient_norm_step": (int, NoneType),
    "first_loss_difference": (*NUMBER, NoneType),
}


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What came of a case: its curves, or why there are none."""

    case: Case
    told: ParityVerdict  # as stored; `Certificate.verdict` is what follows from the curves
    reason: str | None
    curves: Curves | None
    work: Work | None  # None: an older certificate, which did not ask
    elapsed_s: float
    command: str
    stored: Mapping[str, Any]  # as stored


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate, and what its raw samples say."""

    name: str  # of its file
    content: Mapping[str, Any]
    config: RunConfig  # of the reference
    reference: Curves
    bounds: Mapping[Precision, Bound]
    results: tuple[CaseResult, ...]

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    @functools.cached_property
    def verdicts_of_kinds(self) -> Mapping[tuple[str, ...], Sequence[tuple[Case, ParityVerdict]]]:
        """Every case with its verdict, by its kind: thousands of runs ask for the same few."""
        kinds: dict[tuple[str, ...], list[tuple[Case, ParityVerdict]]] = {}
        for result in self.results:
            kinds.setdefault(result.case.kind, []).append((result.case, self.verdict(result)))
        return kinds

    def comparison(self, result: CaseResult) -> CurveComparison | None:
        return None if result.curves is None else compare(self.reference, result.curves)

    def verdict(self, result: CaseResult) -> ParityVerdict:
        """What follows from the samples, by the bounds of this version of the code."""
        return self._verdict(result, BOUNDS)

    def verdict_then(self, result: CaseResult) -> ParityVerdict:
        """The same by the bounds that the certificate states."""
        return self._verdict(result, self.bounds)

    def _verdict(self, result: CaseResult, bounds: Mapping[Precision, Bound]) -> ParityVerdict:
        comparison = self.comparison(result)
        if comparison is None:
            return result.told
        if self.inactive_feature(result) is not None:
            return "different"
        return comparison.verdict(bounds[result.case.precision])

    def inactive_feature(self, result: CaseResult) -> str | None:
        """Why its losses prove nothing of it, if it did not do what it was to."""
        if result.work is None:
            return None
        return find_inactive_feature(
            result.case, result.work, num_layers=self.config.model.num_layers
        )


# ---------------------------------------------------------------------------------- out


def describe_result(
    case: Case,
    *,
    reference: Curves,
    curves: Curves | None,
    work: Work | None,
    inactive_feature: str | None,
    failure: tuple[ParityVerdict, str] | None,
    elapsed_s: float,
    command: str,
) -> dict[str, Any]:
    """A case as it is stored.

    Args:
        idleness: why it was not this case, whatever its curves are.
        failure: where there are no curves, whether it was refused or failed, and why.
    """
    comparison = None if curves is None else compare(reference, curves)
    if comparison is not None:
        verdict: ParityVerdict = (
            "different" if inactive_feature else comparison.verdict(BOUNDS[case.precision])
        )
        reason = inactive_feature
    else:
        assert failure is not None
        verdict, reason = failure
    return {
        **asdict(case),
        "verdict": verdict,
        "reason": reason,
        **_figures(comparison),
        "work": None if work is None else {k: list(v) for k, v in asdict(work).items()},
        "elapsed_s": elapsed_s,
        "command": command,
        "loss": [] if curves is None else list(curves.loss),
        "gradient_norm": [] if curves is None else list(curves.gradient_norm),
    }


def _figures(comparison: CurveComparison | None) -> dict[str, Any]:
    if comparison is None:
        return dict.fromkeys(
            name for name in CASE_FIELDS if name.endswith(("_difference", "_step"))
        )
    return {
        "loss_difference": comparison.loss.relative,
        "loss_step": comparison.loss.step,
        "gradient_norm_difference": comparison.gradient_norm.relative,
        "gradient_norm_step": comparison.gradient_norm.step,
        "first_loss_difference": comparison.first_loss,
    }


def describe_bounds() -> dict[str, Any]:
    """The bounds of this version of the code, as they are stored."""
    return {precision: asdict(bound) for precision, bound in BOUNDS.items()}


# ---------------------------------------------------------------------------------- doubt


def find_contradictions(certificate: Certificate) -> list[str]:
    """Stored verdicts and differences that do not follow from samples and stored bounds."""
    found = []
    for result in certificate.results:
        comparison = certificate.comparison(result)
        derived: dict[str, Any] = _figures(comparison)
        if comparison is not None:
            derived["verdict"] = certificate.verdict_then(result)
            derived["reason"] = certificate.inactive_feature(result)
        found += [
            f"{field} of {result.case.label} is {_said(result.stored[field])} in the "
            f"certificate, {_said(value)} by its samples"
            for field, value in derived.items()
            if not _agree(result.stored[field], value)
        ]
    return found


def find_other_bounds(certificate: Certificate) -> list[str]:
    """Bounds it was judged by that are not those of this version of the code."""
    judged = {result.case.precision for result in certificate.results if result.curves}
    return [
        f"{precision} was held to {_pair(bound)}, now to {_pair(BOUNDS[precision])}"
        for precision, bound in certificate.bounds.items()
        if precision in judged
        and (bound.loss, bound.gradient_norm)
        != (BOUNDS[precision].loss, BOUNDS[precision].gradient_norm)
    ]


def _pair(bound: Bound) -> str:
    return f"loss {bound.loss:g} and gradient norm {bound.gradient_norm:g}"


def _agree(stored: Any, derived: Any) -> bool:
    if fits(stored, NUMBER) and fits(derived, NUMBER):
        return math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)
    return bool(stored == derived)


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)


def newest_first(certificates: Sequence[Certificate]) -> list[Certificate]:
    """By when they were started; equally new ones by name."""
    by_name = sorted(certificates, key=lambda certificate: certificate.name)
    return sorted(by_name, key=lambda c: str(c.content["started_at"]), reverse=True)

"""A parity certificate: the raw samples of a study of one recipe, and the verdicts they imply.

Differences and verdicts are stored for other tools, and derived again from the samples whenever a
certificate is read. An edit therefore shows as a contradiction.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from unitransformer.config import Precision, Recipe, RunConfig
from unitransformer.record.fields import NUMBER, Kinds, agree

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
class Work:
    """What the compiler and checkpointing did on each rank; None: not recorded."""

    graphs: tuple[int | None, ...]
    graph_breaks: tuple[int, ...]
    late_recompiles: tuple[int, ...]  # after the first step, which compiles each layer once
    recomputed_layers: tuple[int | None, ...]


def work_of(record: Mapping[str, Any]) -> Work:
    ranks = record["compile"]
    return Work(
        graphs=tuple(rank["graphs"] for rank in ranks),
        graph_breaks=tuple(len(rank["graph_breaks"]) for rank in ranks),
        # A recompile without a step belongs to validation, which uses layers in another mode.
        late_recompiles=tuple(sum(bool(r["step"]) for r in rank["recompiles"]) for rank in ranks),
        recomputed_layers=tuple(record["recomputed_layers"]),
    )


def find_inactive_feature(case: Case, work: Work | None, num_layers: int) -> str | None:
    """Returns why a run was not `case`, whatever its losses are; None: it was, or is not known.

    A compiler that made no graph and checkpointing that recomputed nothing train the plain model;
    then equal losses prove nothing about these features.
    """
    if work is None:
        return None
    if case.compile != "off":
        if not all(work.graphs):
            return f"compile {case.compile} made no graph"
        if any(work.graph_breaks):
            return f"compile {case.compile} broke graphs {max(work.graph_breaks)} times"
        if any(work.late_recompiles):
            times = max(work.late_recompiles)
            return f"compile {case.compile} compiled again {times} times after the first step"
    checkpointing = case.activation_checkpointing
    expected = 0 if checkpointing == "off" else num_layers
    if any(number != expected for number in work.recomputed_layers):
        layers = ", ".join(sorted(set(map(str, work.recomputed_layers))))
        return f"checkpointing {checkpointing} computed {layers} of {num_layers} layers again"
    return None


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A case with its curves, or the reason why there are none."""

    case: Case
    stored_verdict: ParityVerdict  # `Certificate.verdict` derives it from the curves
    reason: str | None
    curves: Curves | None
    work: Work | None  # None: an older certificate without it
    command: str
    stored: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate whose fields were checked; verdicts are derived from its samples."""

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
        """Every case with its verdict, by kind; cached, since thousands of runs ask for a few."""
        kinds: dict[tuple[str, ...], list[tuple[Case, ParityVerdict]]] = {}
        for result in self.results:
            kinds.setdefault(result.case.kind, []).append((result.case, self.verdict(result)))
        return kinds

    def comparison(self, result: CaseResult) -> CurveComparison | None:
        return None if result.curves is None else compare(self.reference, result.curves)

    def verdict(
        self, result: CaseResult, bounds: Mapping[Precision, Bound] = BOUNDS
    ) -> ParityVerdict:
        """Returns the verdict that the samples imply, by default with this version's bounds."""
        comparison = self.comparison(result)
        if comparison is None:
            return result.stored_verdict
        if self.inactive_feature(result) is not None:
            return "different"
        return comparison.verdict(bounds[result.case.precision])

    def inactive_feature(self, result: CaseResult) -> str | None:
        """Returns why the run did not do what its case asks for; None if it did."""
        return find_inactive_feature(result.case, result.work, self.config.model.num_layers)


def describe_result(
    case: Case,
    *,
    reference: Curves,
    curves: Curves | None,
    work: Work | None,
    num_layers: int,
    failure: tuple[ParityVerdict, str] | None,
    elapsed_s: float,
    command: str,
) -> dict[str, Any]:
    """Returns a case as a certificate stores it; without curves, `failure` says why."""
    comparison = None if curves is None else compare(reference, curves)
    if comparison is not None:
        reason = find_inactive_feature(case, work, num_layers)
        verdict: ParityVerdict = "different"
        if reason is None:
            verdict = comparison.verdict(BOUNDS[case.precision])
    else:
        assert failure is not None
        verdict, reason = failure
    return {
        **asdict(case),
        "verdict": verdict,
        "reason": reason,
        **_describe_comparison(comparison),
        "work": None if work is None else {k: list(v) for k, v in asdict(work).items()},
        "elapsed_s": elapsed_s,
        "command": command,
        "loss": [] if curves is None else list(curves.loss),
        "gradient_norm": [] if curves is None else list(curves.gradient_norm),
    }


def _describe_comparison(comparison: CurveComparison | None) -> dict[str, Any]:
    if comparison is None:
        return {field.name: None for field in fields(CurveComparison)}
    return asdict(comparison)


def describe_bounds() -> dict[str, Any]:
    """Returns this version's bounds as a certificate stores them."""
    return {precision: asdict(bound) for precision, bound in BOUNDS.items()}


def describe_config(config: RunConfig) -> dict[str, Any]:
    """Returns the fields of a certificate that repeat the config of its reference."""
    return {
        "recipe": config.recipe,
        "config_hash": config.hash(),
        "identity_hash": config.identity_hash(),
        "accelerator": config.parallel.accelerator,
        "steps": config.max_steps,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
    }


def find_contradictions(certificate: Certificate) -> list[str]:
    """Returns stored verdicts and differences that the samples and stored bounds contradict."""
    contradictions = []
    for result in certificate.results:
        comparison = certificate.comparison(result)
        derived: dict[str, Any] = _describe_comparison(comparison)
        if comparison is not None:
            derived["verdict"] = certificate.verdict(result, certificate.bounds)
            derived["reason"] = certificate.inactive_feature(result)
        for field, value in derived.items():
            stored = result.stored[field]
            if not agree(stored, value):
                contradictions.append(
                    f"{field} of {result.case.label} is {_format(stored)} in the certificate, "
                    f"{_format(value)} by its samples"
                )
    return contradictions


def _format(value: Any) -> str:
    return "nothing" if value is None else str(value)


def find_other_bounds(certificate: Certificate) -> list[str]:
    """Returns the stored bounds that decided a verdict and differ from this version's."""
    decisive = {result.case.precision for result in certificate.results if result.curves}
    return [
        f"{precision} was held to {_format_bound(bound)}, now to {_format_bound(BOUNDS[precision])}"
        for precision, bound in certificate.bounds.items()
        if precision in decisive and replace(bound, why="") != replace(BOUNDS[precision], why="")
    ]


def _format_bound(bound: Bound) -> str:
    return f"loss {bound.loss:g} and gradient norm {bound.gradient_norm:g}"


def newest_first(certificates: Sequence[Certificate]) -> list[Certificate]:
    """Sorts by start time, newest first, then by name."""
    by_name = sorted(certificates, key=lambda certificate: certificate.name)
    return sorted(by_name, key=lambda c: str(c.content["started_at"]), reverse=True)

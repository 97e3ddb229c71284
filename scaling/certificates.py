"""The parity certificate: one JSON file a study of a recipe, with all raw samples.

Plain in, plain out. Differences and verdicts are stored for other people's tools, and computed
again from the samples whenever a certificate is read: what was edited contradicts itself.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from scaling.checks import HOST, NUMBER, RELATIVE_ERROR, Kinds, check_fields, check_lists, fits
from scaling.parity import BOUNDS, Bound, Case, Comparison, Curves, Verdict, compare
from scaling.parity_work import Work, find_idleness
from unitransformer.config import Precision, Recipe, RunConfig, from_dict, hash_of
from unitransformer.records import write_atomically

SCHEMA = 1
KIND = "parity"

FACTS: dict[str, Kinds] = {
    "config": dict,
    "bounds": dict,
    "versions": dict,
    "code.commit": (str, NoneType),
    "code.is_dirty": (bool, NoneType),
    "data.description": str,
    "data.sha256": (str, NoneType),
    "command": str,
    "started_at": str,
    "elapsed_s": NUMBER,
    "reference.command": str,
    "reference.elapsed_s": NUMBER,
}
LISTS: dict[str, Kinds] = {
    "device_counts": int,
    "hardware": dict,
    "cases": dict,
    "reference.loss": NUMBER,
    "reference.gradient_norm": NUMBER,
}
OF_A_CASE: dict[str, Kinds] = {
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
OF_WORK: dict[str, Kinds] = {
    "graphs": (int, NoneType),
    "graph_breaks": int,
    "late_recompiles": int,
    "recomputed_layers": (int, NoneType),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a case: its curves, or why there are none."""

    case: Case
    told: Verdict  # as stored; `Certificate.verdict` is what follows from the curves
    reason: str | None
    curves: Curves | None
    work: Work | None  # None: an older certificate, which did not ask
    elapsed_s: float
    command: str
    figures: Mapping[str, Any]  # as stored


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate, and what its raw samples say."""

    name: str  # of its file
    content: Mapping[str, Any]
    config: RunConfig  # of the reference
    reference: Curves
    bounds: Mapping[Precision, Bound]
    results: tuple[Result, ...]

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    def comparison(self, result: Result) -> Comparison | None:
        return None if result.curves is None else compare(self.reference, result.curves)

    def verdict(self, result: Result) -> Verdict:
        """What follows from the samples, by the bounds of this version of the code."""
        return self._verdict(result, BOUNDS)

    def verdict_then(self, result: Result) -> Verdict:
        """The same by the bounds that the certificate states."""
        return self._verdict(result, self.bounds)

    def _verdict(self, result: Result, bounds: Mapping[Precision, Bound]) -> Verdict:
        comparison = self.comparison(result)
        if comparison is None:
            return result.told
        if self.idleness(result) is not None:
            return "different"
        return comparison.verdict(bounds[result.case.precision])

    def idleness(self, result: Result) -> str | None:
        """Why its losses prove nothing of it, if it did not do what it was to."""
        if result.work is None:
            return None
        return find_idleness(result.case, result.work, num_layers=self.config.model.num_layers)


# ---------------------------------------------------------------------------------- out


def describe_result(
    case: Case,
    *,
    reference: Curves,
    curves: Curves | None,
    work: Work | None,
    idleness: str | None,
    failure: tuple[Verdict, str] | None,
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
        verdict: Verdict = "different" if idleness else comparison.verdict(BOUNDS[case.precision])
        reason = idleness
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


def _figures(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return dict.fromkeys(name for name in OF_A_CASE if name.endswith(("_difference", "_step")))
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


def write_certificate(content: Mapping[str, Any], folder: Path) -> Path:
    """Validate and write beside the records, under the hash of the reference and a new number.

    Raises:
        ValueError: the certificate is not valid.
        OSError: it cannot be written.
    """
    certificate = read_certificate(content, "certificate")
    stem = f"{KIND}-{certificate.recipe}-{certificate.config.hash()}"
    numbers = (path.stem.rpartition("-")[2] for path in folder.glob(f"{stem}-*.json"))
    number = max((int(n) for n in numbers if n.isdecimal()), default=0) + 1
    path = folder / f"{stem}-{number}.json"
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


# ---------------------------------------------------------------------------------- in


def is_certificate(content: Any) -> bool:
    """Whether JSON is meant to be one, valid or not."""
    return isinstance(content, Mapping) and content.get("kind") == KIND


def read_certificate(content: Mapping[str, Any], name: str) -> Certificate:
    """Check that `content` has this schema and can be judged.

    Raises:
        ValueError: the first field that is missing, of another kind or contradicts another.
    """
    if not is_certificate(content) or content.get("schema") != SCHEMA:
        raise ValueError(
            f"certificate: schema is {content.get('schema')!r}; this version reads {SCHEMA}"
        )
    check_fields(content, FACTS, "certificate")
    check_lists(content, LISTS, "certificate")
    config = from_dict(RunConfig, content["config"], "certificate: config")
    _check_told(content, config)
    reference = _curves(content["reference"], config.max_steps, "reference")
    if reference is None:
        raise ValueError("certificate: reference holds no loss")
    bounds = _bounds(content["bounds"])
    results = tuple(
        _result(case, config.max_steps, bounds, f"cases.{index}")
        for index, case in enumerate(content["cases"])
    )
    return Certificate(
        name=name,
        content=content,
        config=config,
        reference=reference,
        bounds=bounds,
        results=results,
    )


def _check_told(content: Mapping[str, Any], config: RunConfig) -> None:
    """Fields that repeat what the config says, and facts that a report needs."""
    derived = {
        "recipe": config.recipe,
        "accelerator": config.parallel.accelerator,
        "steps": config.max_steps,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "config_hash": hash_of(content["config"]),
        "identity_hash": config.identity_hash(),
    }
    for key, value in derived.items():
        if content.get(key) != value:
            raise ValueError(
                f"certificate: {key} is {content.get(key)!r}; its config says {value!r}"
            )
    for name, version in content["versions"].items():
        if not isinstance(version, str):
            raise ValueError(f"certificate: versions.{name} is {version!r}; it must be str")
    for key in ("hardware", "cases"):
        if not content[key]:
            raise ValueError(f"certificate: {key} is empty")
    for rank, host in enumerate(content["hardware"]):
        check_fields(host, HOST, f"certificate: hardware.{rank}", missing=None)


def _bounds(told: Mapping[str, Any]) -> dict[Precision, Bound]:
    bounds: dict[Precision, Bound] = {}
    for precision in get_args(Precision):
        if precision in told:
            where = f"certificate: bounds.{precision}"
            if not isinstance(told[precision], Mapping):
                raise ValueError(f"{where} is {told[precision]!r}; it must be a group of fields")
            check_fields(told[precision], {"loss": NUMBER, "gradient_norm": NUMBER}, where)
            bounds[precision] = from_dict(Bound, told[precision], where)
    return bounds


def _result(
    told: Mapping[str, Any], steps: int, bounds: Mapping[Precision, Bound], where: str
) -> Result:
    check_fields(told, OF_A_CASE, f"certificate: {where}")
    names = [field.name for field in fields(Case)]
    case = from_dict(
        Case, {name: told[name] for name in names if name in told}, f"certificate: {where}"
    )
    if case.precision not in bounds:
        raise ValueError(f"certificate: {where}: no bounds for precision {case.precision}")
    if min(case.devices, case.num_nodes, case.accumulate) < 1 or case.devices % case.num_nodes:
        raise ValueError(
            f"certificate: {where}: devices, num_nodes and accumulate must be at least 1, and the "
            "first a multiple of the second"
        )
    if told["verdict"] not in get_args(Verdict):
        raise ValueError(f"certificate: {where}: verdict is {told['verdict']!r}")
    curves = _curves(told, steps, where)
    if (curves is None) != (told["verdict"] in ("refused", "failed")):
        count = "no samples" if curves is None else "samples"
        raise ValueError(f"certificate: {where}: verdict is {told['verdict']} with {count}")
    return Result(
        case=case,
        told=told["verdict"],
        reason=told["reason"],
        curves=curves,
        work=_work(told.get("work"), where),
        elapsed_s=told["elapsed_s"],
        command=told["command"],
        figures=told,
    )


def _work(told: Any, where: str) -> Work | None:
    if told is None:
        return None
    where = f"certificate: {where}.work"
    if not isinstance(told, Mapping):
        raise ValueError(f"{where} is {told!r}; it must be a group of fields")
    check_lists(told, OF_WORK, where)
    return Work(**{name: tuple(told[name]) for name in OF_WORK})


def _curves(told: Mapping[str, Any], steps: int, where: str) -> Curves | None:
    """Loss and gradient norm of every step; None if there are neither."""
    where = f"certificate: {where}"
    check_lists(told, {"loss": NUMBER, "gradient_norm": NUMBER}, where)
    loss, norm = told["loss"], told["gradient_norm"]
    if not loss and not norm:
        return None
    if not len(loss) == len(norm) == steps:
        raise ValueError(f"{where} has {len(loss)} losses and {len(norm)} norms of {steps} steps")
    if min(*loss, *norm) <= 0:
        raise ValueError(f"{where} holds a loss or gradient norm that is not above 0")
    return Curves(loss=tuple(loss), gradient_norm=tuple(norm))


# ---------------------------------------------------------------------------------- doubt


def find_contradictions(certificate: Certificate) -> list[str]:
    """Stored verdicts and differences that do not follow from samples and stored bounds."""
    found = []
    for result in certificate.results:
        comparison = certificate.comparison(result)
        derived: dict[str, Any] = _figures(comparison)
        if comparison is not None:
            derived["verdict"] = certificate.verdict_then(result)
            derived["reason"] = certificate.idleness(result)
        found += [
            f"{field} of {result.case.label} is {_said(result.figures[field])} in the "
            f"certificate, {_said(value)} by its samples"
            for field, value in derived.items()
            if not _agree(result.figures[field], value)
        ]
    return found


def find_other_bounds(certificate: Certificate) -> list[str]:
    """Bounds it was judged by that are not those of this version of the code."""
    return [
        f"{precision} was held to {_pair(bound)}, now to {_pair(BOUNDS[precision])}"
        for precision, bound in certificate.bounds.items()
        if (bound.loss, bound.gradient_norm)
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

"""Reads and writes parity certificates as JSON files, with every field checked."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from scaling.numbered_file import write_numbered
from scaling.parity.cases import Bound, Case, Curves, ParityVerdict
from scaling.parity.certificate import (
    CASE_FIELDS,
    KIND,
    SCHEMA,
    CaseResult,
    Certificate,
    Work,
    describe_config,
)
from unitransformer.config import Precision, RunConfig, from_dict, hash_values
from unitransformer.record.fields import HOST_FIELDS, NUMBER, Kinds, check_fields, check_lists

REQUIRED_FIELDS: dict[str, Kinds] = {
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
WORK_FIELDS: dict[str, Kinds] = {
    "graphs": (int, NoneType),
    "graph_breaks": int,
    "late_recompiles": int,
    "recomputed_layers": (int, NoneType),
}


def write_certificate(content: Mapping[str, Any], folder: Path) -> Path:
    """Writes a certificate under the hash of the reference and a new number.

    Raises ValueError for a certificate that is not valid, and OSError.
    """
    certificate = read_certificate(content, "certificate")
    stem = f"{KIND}-{certificate.recipe}-{certificate.config.hash()}"
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return write_numbered(text.encode(), folder, stem)


def is_certificate(content: Any) -> bool:
    """Whether JSON claims to be a certificate, valid or not."""
    return isinstance(content, Mapping) and content.get("kind") == KIND


def read_certificate(content: Mapping[str, Any], name: str) -> Certificate:
    """Raises ValueError for a field that is missing, has another type or contradicts another."""
    if not is_certificate(content) or content.get("schema") != SCHEMA:
        raise ValueError(
            f"certificate: schema is {content.get('schema')!r}; this version reads {SCHEMA}"
        )
    check_fields(content, REQUIRED_FIELDS, "certificate")
    check_lists(content, LISTS, "certificate")
    config = from_dict(RunConfig, content["config"], "certificate: config")
    _check_derived(content, config)
    for package, version in content["versions"].items():
        if not isinstance(version, str):
            raise ValueError(f"certificate: versions.{package} is {version!r}; it must be str")
    for key in ("hardware", "cases"):
        if not content[key]:
            raise ValueError(f"certificate: {key} is empty")
    for rank, host in enumerate(content["hardware"]):
        check_fields(host, HOST_FIELDS, f"certificate: hardware.{rank}", missing=None)
    reference = _curves(content["reference"], config.max_steps, "reference")
    if reference is None:
        raise ValueError("certificate: reference holds no loss")
    bounds = _bounds(content["bounds"])
    return Certificate(
        name=name,
        content=content,
        config=config,
        reference=reference,
        bounds=bounds,
        results=tuple(
            _result(case, config.max_steps, bounds, f"cases.{index}")
            for index, case in enumerate(content["cases"])
        ),
    )


def _check_derived(content: Mapping[str, Any], config: RunConfig) -> None:
    derived = describe_config(config) | {"config_hash": hash_values(content["config"])}
    for key in sorted(derived, key=lambda key: key.endswith("_hash")):  # a value says more
        if content.get(key) != derived[key]:
            raise ValueError(
                f"certificate: {key} is {content.get(key)!r}; its config says {derived[key]!r}"
            )


def _bounds(stored: Mapping[str, Any]) -> dict[Precision, Bound]:
    bounds: dict[Precision, Bound] = {}
    for precision in get_args(Precision):
        if precision in stored:
            where = f"certificate: bounds.{precision}"
            values = _group(stored[precision], where)
            check_fields(values, {"loss": NUMBER, "gradient_norm": NUMBER}, where)
            bounds[precision] = from_dict(Bound, values, where)
    return bounds


def _group(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it must be a group of fields")
    return value


def _result(
    stored: Mapping[str, Any], steps: int, bounds: Mapping[Precision, Bound], where: str
) -> CaseResult:
    check_fields(stored, CASE_FIELDS, f"certificate: {where}")
    # An older certificate lacks fields that have a default.
    values = {field.name: stored[field.name] for field in fields(Case) if field.name in stored}
    case = from_dict(Case, values, f"certificate: {where}")
    if case.precision not in bounds:
        raise ValueError(f"certificate: {where}: no bounds for precision {case.precision}")
    if min(case.devices, case.num_nodes, case.accumulate) < 1 or case.devices % case.num_nodes:
        raise ValueError(
            f"certificate: {where}: devices, num_nodes and accumulate must be at least 1, and the "
            "first a multiple of the second"
        )
    verdict = stored["verdict"]
    if verdict not in get_args(ParityVerdict):
        raise ValueError(f"certificate: {where}: verdict is {verdict!r}")
    curves = _curves(stored, steps, where)
    if (curves is None) != (verdict in ("refused", "failed")):
        count = "no samples" if curves is None else "samples"
        raise ValueError(f"certificate: {where}: verdict is {verdict} with {count}")
    return CaseResult(
        case=case,
        stored_verdict=verdict,
        reason=stored["reason"],
        curves=curves,
        work=_work(stored.get("work"), f"certificate: {where}.work"),
        command=stored["command"],
        stored=stored,
    )


def _work(stored: Any, where: str) -> Work | None:
    if stored is None:
        return None
    check_lists(_group(stored, where), WORK_FIELDS, where)
    return Work(**{name: tuple(stored[name]) for name in WORK_FIELDS})


def _curves(stored: Mapping[str, Any], steps: int, where: str) -> Curves | None:
    """Returns loss and gradient norm of every step; None if there are neither."""
    where = f"certificate: {where}"
    check_lists(stored, {"loss": NUMBER, "gradient_norm": NUMBER}, where)
    loss, norm = stored["loss"], stored["gradient_norm"]
    if not loss and not norm:
        return None
    if not len(loss) == len(norm) == steps:
        raise ValueError(f"{where} has {len(loss)} losses and {len(norm)} norms of {steps} steps")
    if min(*loss, *norm) <= 0:
        raise ValueError(f"{where} holds a loss or gradient norm that is not above 0")
    return Curves(loss=tuple(loss), gradient_norm=tuple(norm))

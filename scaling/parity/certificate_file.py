"""Certificates as files: plain JSON in, checked, and out."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from scaling.parity.cases import Bound, Case, Curves, ParityVerdict
from scaling.parity.certificate import CASE_FIELDS, KIND, SCHEMA, CaseResult, Certificate
from scaling.parity.evidence import Work
from unitransformer.config import Precision, RunConfig, from_dict, hash_values
from unitransformer.files import write_atomically
from unitransformer.record.fields import HOST, NUMBER, Kinds, check_fields, check_lists

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
OF_WORK: dict[str, Kinds] = {
    "graphs": (int, NoneType),
    "graph_breaks": int,
    "late_recompiles": int,
    "recomputed_layers": (int, NoneType),
}


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
    check_fields(content, REQUIRED_FIELDS, "certificate")
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
        "config_hash": hash_values(content["config"]),
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
) -> CaseResult:
    check_fields(told, CASE_FIELDS, f"certificate: {where}")
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
    if told["verdict"] not in get_args(ParityVerdict):
        raise ValueError(f"certificate: {where}: verdict is {told['verdict']!r}")
    curves = _curves(told, steps, where)
    if (curves is None) != (told["verdict"] in ("refused", "failed")):
        count = "no samples" if curves is None else "samples"
        raise ValueError(f"certificate: {where}: verdict is {told['verdict']} with {count}")
    return CaseResult(
        case=case,
        told=told["verdict"],
        reason=told["reason"],
        curves=curves,
        work=_work(told.get("work"), where),
        elapsed_s=told["elapsed_s"],
        command=told["command"],
        stored=told,
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

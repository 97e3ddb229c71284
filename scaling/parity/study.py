"""The parity study: a recipe goes in, its certificate comes out. Every run is a command line.

One plain float32 process is the reference; its record says what all others have to have trained.
"""

import contextlib
import datetime
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling.parity import certificate
from scaling.parity.cases import REFERENCE, Axes, Case, Curves, ParityVerdict, list_cases, refusal
from scaling.parity.certificate import Certificate
from scaling.parity.certificate_file import read_certificate, write_certificate
from scaling.parity.evidence import Work, find_inactive_feature, work_of
from scaling.parity.local_nodes import PORT, run_on_nodes, torchrun_options
from scaling.parity.recipe_arguments import ParityTask
from scaling.recipe_process import (
    ProcessResult,
    Runner,
    can_fork,
    find_error,
    run_alone,
    start_worker,
)
from unitransformer.config import Recipe, RunConfig
from unitransformer.record.schema import Record, config_of, load_record

Say = Callable[[str], None]
Failure = tuple[ParityVerdict, str]


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What is compared, and how."""

    recipes: tuple[Recipe, ...]
    axes: Axes
    is_quick: bool
    steps: int
    global_batch_size: int
    accelerator: str
    limit_s: float  # of a case
    out: Path
    recipe_options: tuple[str, ...]  # what follows `--`, for the recipe
    command: str  # what a person typed


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The plain run, and what follows from it."""

    task: ParityTask
    record: Record
    curves: Curves
    command: str
    elapsed_s: float

    @property
    def config(self) -> RunConfig:
        return config_of(self.record)


def certify(options: ParityOptions, say: Say) -> list[tuple[Path, Certificate]]:
    """Write a certificate for each recipe. All references come first: bad usage shows at once.

    Raises:
        ValueError: options that the recipe refuses.
        RuntimeError: the reference failed, so there is nothing to compare with.
        OSError: a certificate could not be written.
    """
    cases = list_cases(options.axes, is_quick=options.is_quick)
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary, contextlib.ExitStack() as held:
        folder = Path(temporary)
        run: Runner = run_alone
        if can_fork(options.accelerator):
            run = held.enter_context(start_worker(folder / "worker.log"))
        references = [_refer(options, recipe, run, folder, say) for recipe in options.recipes]
        return [_certify(options, each, cases, run, folder, say) for each in references]


# ---------------------------------------------------------------------------------- reference


def _refer(
    options: ParityOptions, recipe: Recipe, run: Runner, folder: Path, say: Say
) -> _Reference:
    task = ParityTask(
        recipe=recipe,
        accelerator=options.accelerator,
        steps=options.steps,
        global_batch_size=options.global_batch_size,
        options=options.recipe_options,
    )
    ended, record, error = _run(task, REFERENCE, run, folder, options.limit_s)
    if record is None:
        if ended.exit_code == 2:
            raise ValueError(error)
        raise RuntimeError(f"the reference of {recipe} failed: {error}")
    curves = _curves(record)
    if not 0 < len(curves.loss) == len(curves.gradient_norm):
        raise ValueError(f"{recipe} told no gradient norms; give optimizer.clip-norm above 0")
    say(f"{recipe}: reference, loss {curves.loss[0]:.4f} to {curves.loss[-1]:.4f}")
    return _Reference(
        task=replace(task, accelerator=config_of(record).parallel.accelerator),
        record=record,
        curves=curves,
        command=_command(task, REFERENCE),
        elapsed_s=ended.elapsed_s,
    )


def _curves(record: Record) -> Curves:
    norms = record.get("gradient_norm")
    return Curves(
        loss=tuple(record["loss"]),
        gradient_norm=tuple(norms if isinstance(norms, list) else ()),
    )


def _command(task: ParityTask, case: Case) -> str:
    recipe = f"-m recipes.{task.recipe} {shlex.join(task.arguments(case))}"
    if case.num_nodes == 1:
        return f"python {recipe}"
    nodes = " ".join(map(str, range(case.num_nodes)))
    torchrun = " ".join(torchrun_options(case.num_nodes, "$node", case.devices_per_node, PORT))
    return f"for node in {nodes}; do torchrun {torchrun} {recipe} & done; wait"


# ---------------------------------------------------------------------------------- cases


def _certify(
    options: ParityOptions,
    reference: _Reference,
    cases: Sequence[Case],
    run: Runner,
    folder: Path,
    say: Say,
) -> tuple[Path, Certificate]:
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    told: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        told.append(_try(case, reference, run, folder, options.limit_s))
        say(f"{reference.task.recipe} {number}/{len(cases)} {case.label}: {_outcome(told[-1])}")
    content = {
        **_describe(reference),
        "device_counts": list(options.axes.devices),
        "command": options.command,
        "started_at": started.isoformat(timespec="seconds"),
        "elapsed_s": time.monotonic() - started_s,
        "cases": told,
    }
    path = write_certificate(content, options.out)
    return path, read_certificate(content, str(path))


def _try(
    case: Case, reference: _Reference, run: Runner, folder: Path, limit_s: float
) -> dict[str, Any]:
    curves: Curves | None = None
    work: Work | None = None
    ended = ProcessResult(exit_code=2, elapsed_s=0.0)
    failure: Failure = ("refused", refusal(case) or "")
    if not failure[1]:
        ended, record, error = _run(reference.task, case, run, folder, limit_s)
        failure = ("refused" if ended.exit_code == 2 else "failed", error)
        if record is not None:
            curves, error = _check(record, case, reference)
            failure = ("failed", error)
            work = None if curves is None else work_of(record)
    num_layers = reference.config.model.num_layers
    return certificate.describe_result(
        case,
        reference=reference.curves,
        curves=curves,
        work=work,
        inactive_feature=None
        if work is None
        else find_inactive_feature(case, work, num_layers=num_layers),
        failure=failure,
        elapsed_s=ended.elapsed_s,
        command=_command(reference.task, case),
    )


def _run(
    task: ParityTask, case: Case, run: Runner, folder: Path, limit_s: float
) -> tuple[ProcessResult, Record | None, str]:
    """How it ended, its record if it ended well, and otherwise the error in one line."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    arguments = [*task.arguments(case), "--out", str(place), "--record", str(place / "record.json")]
    started_s = time.monotonic()
    try:
        if case.num_nodes == 1:
            ended = run(task.recipe, arguments, log=place / "log", limit_s=limit_s)
        else:
            ended = run_on_nodes(
                *(task.recipe, arguments),
                accelerator=task.accelerator,
                devices=case.devices_per_node,
                num_nodes=case.num_nodes,
                log=place / "log",
                limit_s=limit_s,
            )
    except RuntimeError as error:  # the worker itself has ended; the next case starts another
        elapsed_s = time.monotonic() - started_s
        return ProcessResult(exit_code=1, elapsed_s=elapsed_s), None, str(error)
    if ended.exit_code is None:
        return ended, None, f"timeout: more than {limit_s:g} s"
    if ended.exit_code:
        said = (place / "log").read_text(errors="replace").replace(str(place), "…")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return ended, None, find_error(lines, ended.exit_code)
    return ended, load_record(place / "record.json"), ""


def _check(record: Record, case: Case, reference: _Reference) -> tuple[Curves | None, str]:
    """The curves of a run that trained what was asked for, or what else it did."""
    config, curves = config_of(record), _curves(record)
    own = Case(
        strategy=config.parallel.strategy,
        devices=config.parallel.world_size,
        num_nodes=config.parallel.num_nodes,
        precision=config.parallel.precision,
        compile=config.parallel.compile,
        activation_checkpointing=config.parallel.activation_checkpointing,
        accumulate=config.accumulate,
    )
    if own != case:
        return None, f"it trained {own.label}"
    if config.identity() != reference.config.identity():
        return None, "model, optimizer, seed or global batch are not the reference's"
    if record["data"].get("sha256") != reference.record["data"].get("sha256"):
        return None, "the data are not the reference's"
    lengths = (len(curves.loss), len(curves.gradient_norm))
    if lengths != (reference.task.steps,) * 2:
        return None, f"{lengths[0]} losses and {lengths[1]} norms of {reference.task.steps} steps"
    if None in curves.gradient_norm:
        return None, "gradients overflowed in float16 and a step was skipped"
    if min(*curves.loss, *curves.gradient_norm) <= 0:
        return None, "a loss or gradient norm is not above 0"
    return curves, ""


def _outcome(told: dict[str, Any]) -> str:
    if told["reason"] is not None:
        return f"{told['verdict']}: {told['reason']}"
    return (
        f"{told['verdict']}, loss {told['loss_difference']:.1e} at step {told['loss_step']}, "
        f"gradient norm {told['gradient_norm_difference']:.1e} at step "
        f"{told['gradient_norm_step']} ({told['elapsed_s']:.1f} s)"
    )


# ---------------------------------------------------------------------------------- facts


def _describe(reference: _Reference) -> dict[str, Any]:
    """The part of the certificate that does not depend on the cases."""
    record, config = reference.record, reference.config
    return {
        "schema": certificate.SCHEMA,
        "kind": certificate.KIND,
        "recipe": config.recipe,
        "config_hash": config.hash(),
        "identity_hash": config.identity_hash(),
        "accelerator": config.parallel.accelerator,
        "steps": config.max_steps,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "bounds": certificate.describe_bounds(),
        "config": record["config"],
        "versions": record["versions"],
        "code": record["code"],
        "hardware": record["hardware"],
        "data": record["data"],
        "reference": {
            "command": reference.command,
            "elapsed_s": reference.elapsed_s,
            "loss": list(reference.curves.loss),
            "gradient_norm": list(reference.curves.gradient_norm),
        },
    }

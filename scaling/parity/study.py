"""Runs the cases of a parity study as recipe processes, and writes a certificate for each recipe.

The reference is one plain float32 process. Every case must train what its record says.
"""

import contextlib
import datetime
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling.parity import certificate
from scaling.parity.cases import (
    REFERENCE,
    Axes,
    Case,
    Curves,
    ParityVerdict,
    case_of,
    list_cases,
    refusal,
)
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

PrintLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """The checked options of `python -m scaling parity`."""

    recipes: tuple[Recipe, ...]
    axes: Axes
    is_quick: bool
    steps: int
    global_batch_size: int
    accelerator: str
    limit_s: float  # per case
    out: Path
    recipe_options: tuple[str, ...]  # those after `--`
    command: str  # as typed


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The finished reference run of a recipe."""

    task: ParityTask
    record: Record
    curves: Curves
    command: str
    elapsed_s: float

    @property
    def config(self) -> RunConfig:
        return config_of(self.record)


def certify(options: ParityOptions, print_line: PrintLine) -> list[tuple[Path, Certificate]]:
    """Writes a certificate for each recipe.

    All references run first, so that bad usage shows at once.

    Raises:
        ValueError: the recipe refuses the options.
        RuntimeError: a reference failed.
        OSError: a certificate cannot be written.
    """
    with (
        tempfile.TemporaryDirectory(prefix="parity-") as temporary,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(temporary)
        run: Runner = run_alone
        if can_fork(options.accelerator):
            run = stack.enter_context(start_worker(folder / "worker.log"))
        references = [
            _run_reference(options, recipe, run, folder, print_line) for recipe in options.recipes
        ]
        return [_certify(options, each, run, folder, print_line) for each in references]


def _run_reference(
    options: ParityOptions, recipe: Recipe, run: Runner, folder: Path, print_line: PrintLine
) -> _Reference:
    task = ParityTask(
        recipe=recipe,
        accelerator=options.accelerator,
        steps=options.steps,
        global_batch_size=options.global_batch_size,
        options=options.recipe_options,
    )
    result, record, error = _run(task, REFERENCE, run, folder, options.limit_s)
    if record is None:
        if result.exit_code == 2:
            raise ValueError(error)
        raise RuntimeError(f"the reference of {recipe} failed: {error}")
    curves = _curves(record)
    if not 0 < len(curves.loss) == len(curves.gradient_norm):
        raise ValueError(f"{recipe} recorded no gradient norms; give optimizer.clip-norm above 0")
    print_line(f"{recipe}: reference, loss {curves.loss[0]:.4f} to {curves.loss[-1]:.4f}")
    return _Reference(
        task=replace(task, accelerator=config_of(record).parallel.accelerator),
        record=record,
        curves=curves,
        command=_command(task, REFERENCE),
        elapsed_s=result.elapsed_s,
    )


def _curves(record: Record) -> Curves:
    norms = record.get("gradient_norm")
    return Curves(
        loss=tuple(record["loss"]), gradient_norm=tuple(norms) if isinstance(norms, list) else ()
    )


def _command(task: ParityTask, case: Case) -> str:
    recipe = f"-m recipes.{task.recipe} {shlex.join(task.arguments(case))}"
    if case.num_nodes == 1:
        return f"python {recipe}"
    nodes = " ".join(map(str, range(case.num_nodes)))
    torchrun = " ".join(torchrun_options(case.num_nodes, "$node", case.devices_per_node, PORT))
    return f"for node in {nodes}; do torchrun {torchrun} {recipe} & done; wait"


def _certify(
    options: ParityOptions, reference: _Reference, run: Runner, folder: Path, print_line: PrintLine
) -> tuple[Path, Certificate]:
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    cases = list_cases(options.axes, is_quick=options.is_quick)
    results = []
    for number, case in enumerate(cases, 1):
        result = _run_case(case, reference, run, folder, options.limit_s)
        results.append(result)
        progress = f"{reference.task.recipe} {number}/{len(cases)} {case.label}"
        print_line(f"{progress}: {_format_result(result)}")
    content = {
        **_describe(reference),
        "device_counts": list(options.axes.devices),
        "command": options.command,
        "started_at": started.isoformat(timespec="seconds"),
        "elapsed_s": time.monotonic() - started_s,
        "cases": results,
    }
    path = write_certificate(content, options.out)
    return path, read_certificate(content, str(path))


def _run_case(
    case: Case, reference: _Reference, run: Runner, folder: Path, limit_s: float
) -> dict[str, Any]:
    curves: Curves | None = None
    work: Work | None = None
    inactive_feature: str | None = None
    result = ProcessResult(exit_code=2, elapsed_s=0.0)
    error = refusal(case)
    if error is None:
        result, record, error = _run(reference.task, case, run, folder, limit_s)
        if record is not None:
            curves, error = _check(record, case, reference)
        if record is not None and curves is not None:
            work, num_layers = work_of(record), reference.config.model.num_layers
            inactive_feature = find_inactive_feature(case, work, num_layers=num_layers)
    verdict: ParityVerdict = "refused" if result.exit_code == 2 else "failed"
    return certificate.describe_result(
        case,
        reference=reference.curves,
        curves=curves,
        work=work,
        inactive_feature=inactive_feature,
        failure=(verdict, error),
        elapsed_s=result.elapsed_s,
        command=_command(reference.task, case),
    )


def _run(
    task: ParityTask, case: Case, run: Runner, folder: Path, limit_s: float
) -> tuple[ProcessResult, Record | None, str]:
    """Returns the result, the record of a run that succeeded, and the error in one line."""
    run_folder = folder / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    run_folder.mkdir()
    log, record = run_folder / "log", run_folder / "record.json"
    arguments = [*task.arguments(case), "--out", str(run_folder), "--record", str(record)]
    started_s = time.monotonic()
    try:
        if case.num_nodes == 1:
            result = run(task.recipe, arguments, log=log, limit_s=limit_s)
        else:
            result = run_on_nodes(
                task.recipe,
                arguments,
                accelerator=task.accelerator,
                devices=case.devices_per_node,
                num_nodes=case.num_nodes,
                log=log,
                limit_s=limit_s,
            )
    except RuntimeError as error:  # the worker itself exited; the next case starts another
        elapsed_s = time.monotonic() - started_s
        return ProcessResult(exit_code=1, elapsed_s=elapsed_s), None, str(error)
    if result.exit_code is None:
        return result, None, f"timeout: more than {limit_s:g} s"
    if result.exit_code:
        output = log.read_text(errors="replace").replace(str(run_folder), "…")
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        return result, None, find_error(lines, result.exit_code)
    return result, load_record(record), ""


def _check(record: Record, case: Case, reference: _Reference) -> tuple[Curves | None, str]:
    """Returns the curves of a run that trained its case, or how it differs from the case."""
    config, curves = config_of(record), _curves(record)
    trained = case_of(config)
    if trained != case:
        return None, f"it trained {trained.label}"
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


def _format_result(result: dict[str, Any]) -> str:
    if result["reason"] is not None:
        return f"{result['verdict']}: {result['reason']}"
    return (
        f"{result['verdict']}, loss {result['loss_difference']:.1e} at step {result['loss_step']}, "
        f"gradient norm {result['gradient_norm_difference']:.1e} at step "
        f"{result['gradient_norm_step']} ({result['elapsed_s']:.1f} s)"
    )


def _describe(reference: _Reference) -> dict[str, Any]:
    """Returns the part of the certificate that does not depend on the cases."""
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

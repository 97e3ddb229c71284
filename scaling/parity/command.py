"""Runs `python -m scaling parity`: a recipe process per case, and a certificate per recipe.

The reference is one plain float32 process. Every case must train what its record says.
"""

import contextlib
import datetime
import functools
import math
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scaling.parity import certificate
from scaling.parity.cases import REFERENCE, Case, Curves, case_of, list_cases, refusal
from scaling.parity.certificate import Certificate, Work, work_of
from scaling.parity.certificate_file import read_certificate, write_certificate
from scaling.parity.options import ParityOptions
from scaling.parity.recipe_runs import PORT, ParityTask, run_on_nodes, torchrun_options
from scaling.recipe_process import (
    ProcessResult,
    Runner,
    can_fork,
    find_error,
    run_alone,
    start_worker,
)
from unitransformer.cli import only_reports
from unitransformer.config import Recipe, RunConfig
from unitransformer.record.schema import Record, config_of, load_record
from unitransformer.record.units import format_count

CASE_S = 8  # measured: 600 cases of the default size in 77 minutes, over gloo
# What a certificate copies from the record of the reference.
FIELDS_OF_RECORD = ("config", "versions", "code", "hardware", "data")

# Returns the result, the record of a run that succeeded, and the error in one line.
RunCase = Callable[[ParityTask, Case], tuple[ProcessResult, Record | None, str]]


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The finished reference run of a recipe."""

    task: ParityTask
    record: Record
    curves: Curves
    described: Mapping[str, Any]  # as the certificate stores it

    @property
    def config(self) -> RunConfig:
        return config_of(self.record)


def run_parity(options: ParityOptions) -> str | None:
    """Runs the studies, and returns what is not equal; None if everything is.

    Raises ValueError if the recipe refuses the options, RuntimeError if a reference failed.
    """
    only_reports()
    bad = []
    for path, found in certify(options):
        verdicts = Counter(map(found.verdict, found.results))
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
        print(f"{path}: {counts}")
        equal = {r.case.strategy for r in found.results if found.verdict(r) == "equal"}
        unproven = [name for name in options.axes.strategies if name not in equal]
        suffix = f"; not one case of {', '.join(unproven)} is equal" if unproven else ""
        if verdicts["different"] or verdicts["failed"] or unproven:
            bad.append(f"{path.name}: {counts}{suffix}")
    return "; ".join(bad) or None


def certify(options: ParityOptions) -> list[tuple[Path, Certificate]]:
    """Writes a certificate for each recipe; all references run first: bad usage shows at once."""
    number = len(options.recipes) * len(list_cases(options.axes, is_quick=options.is_quick))
    print(
        f"training {format_count(number, 'case')} of {', '.join(options.recipes)}: about "
        f"{math.ceil(number * CASE_S / 60)} minutes on two idle cores",
        flush=True,
    )
    with (
        tempfile.TemporaryDirectory(prefix="parity-") as temporary,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(temporary)
        runner: Runner = run_alone
        if can_fork(options.accelerator):
            runner = stack.enter_context(start_worker(folder / "worker.log"))
        run = functools.partial(_run, runner, folder / "run", options.limit_s)
        references = [_run_reference(options, recipe, run) for recipe in options.recipes]
        return [_certify(options, reference, run) for reference in references]


def _run_reference(options: ParityOptions, recipe: Recipe, run: RunCase) -> _Reference:
    task = ParityTask(
        recipe=recipe,
        accelerator=options.accelerator,
        steps=options.steps,
        global_batch_size=options.global_batch_size,
        options=options.recipe_options,
    )
    result, record, error = run(task, REFERENCE)
    if record is None:
        if result.exit_code == 2:
            raise ValueError(error)
        raise RuntimeError(f"the reference of {recipe} failed: {error}")
    curves = _curves(record)
    if not 0 < len(curves.loss) == len(curves.gradient_norm):
        raise ValueError(f"{recipe} recorded no gradient norms; give optimizer.clip-norm above 0")
    print(f"{recipe}: reference, loss {curves.loss[0]:.4f} to {curves.loss[-1]:.4f}", flush=True)
    return _Reference(
        task=replace(task, accelerator=config_of(record).parallel.accelerator),
        record=record,
        curves=curves,
        described={
            "command": _command(task, REFERENCE),
            "elapsed_s": result.elapsed_s,
            **{name: list(values) for name, values in asdict(curves).items()},
        },
    )


def _curves(record: Record) -> Curves:
    norms = record.get("gradient_norm") or ()
    return Curves(loss=tuple(record["loss"]), gradient_norm=tuple(norms))


def _command(task: ParityTask, case: Case) -> str:
    recipe = f"-m recipes.{task.recipe} {shlex.join(task.arguments(case))}"
    if case.num_nodes == 1:
        return f"python {recipe}"
    nodes = " ".join(map(str, range(case.num_nodes)))
    torchrun = " ".join(torchrun_options(case.num_nodes, "$node", case.devices_per_node, PORT))
    return f"for node in {nodes}; do torchrun {torchrun} {recipe} & done; wait"


def _certify(
    options: ParityOptions, reference: _Reference, run: RunCase
) -> tuple[Path, Certificate]:
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    cases = list_cases(options.axes, is_quick=options.is_quick)
    results = []
    for number, case in enumerate(cases, 1):
        results.append(_run_case(case, reference, run))
        progress = f"{reference.task.recipe} {number}/{len(cases)} {case.label}"
        print(f"{progress}: {_format_result(results[-1])}", flush=True)
    content = {
        "schema": certificate.SCHEMA,
        "kind": certificate.KIND,
        **certificate.describe_config(reference.config),
        "bounds": certificate.describe_bounds(),
        **{name: reference.record[name] for name in FIELDS_OF_RECORD},
        "reference": reference.described,
        "device_counts": list(options.axes.devices),
        "command": options.command,
        "started_at": started.isoformat(timespec="seconds"),
        "elapsed_s": time.monotonic() - started_s,
        "cases": results,
    }
    path = write_certificate(content, options.out)
    return path, read_certificate(content, str(path))


def _run_case(case: Case, reference: _Reference, run: RunCase) -> dict[str, Any]:
    curves: Curves | None = None
    work: Work | None = None
    result = ProcessResult(exit_code=2, elapsed_s=0.0)
    error = refusal(case)
    if error is None:
        result, record, error = run(reference.task, case)
        if record is not None:
            curves, error = _check(record, case, reference)
            work = None if curves is None else work_of(record)
    return certificate.describe_result(
        case,
        reference=reference.curves,
        curves=curves,
        work=work,
        num_layers=reference.config.model.num_layers,
        failure=("refused" if result.exit_code == 2 else "failed", error),
        elapsed_s=result.elapsed_s,
        command=_command(reference.task, case),
    )


def _run(
    runner: Runner, folder: Path, limit_s: float, task: ParityTask, case: Case
) -> tuple[ProcessResult, Record | None, str]:
    """Does what `RunCase` says in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log, record = folder / "log", folder / "record.json"
    arguments = [*task.arguments(case), "--out", str(folder), "--record", str(record)]
    started_s = time.monotonic()
    try:
        if case.num_nodes == 1:
            result = runner(task.recipe, arguments, log=log, limit_s=limit_s)
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
        output = log.read_text(errors="replace").replace(str(folder), "…")
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

"""Compares predictions with published runs that the fit has not seen, target by target.

Every row is predicted by a fit without its model, or without the largest device counts. Beside each
figure stands that of a null predictor, which knows nothing of software and hardware:

constant FLOP/s   the median share of the peak that the other models reach on this GPU
repeat the last   tokens/s per GPU of the next smaller device count
plain memory      states and activations of a GPT, without logits and buffers
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.prediction.fit_file import (
    LEVEL,
    cross_validate,
    half_width,
    model_of,
    published_runs,
)
from scaling.prediction.fitting import Fit, Sample, fit
from scaling.prediction.measured_rows import calibrate, sample_of
from scaling.prediction.published_memory import judge_memory
from scaling.prediction.published_work import PublishedRun
from scaling.published.csv_rows import load_rows
from scaling.store.reader import load_store
from scaling.store.run import Run

FOUNDRY = "llm-foundry"
SCALING = Path(__file__).parents[1]
STORED_SWEEPS = (SCALING / "results" / "sweeps", SCALING / "prediction" / "small_cells")
SMALL_WIDTH = 128  # channels; cells of a sweep that calibrates are narrower


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure of predictions, its target and the figure of a null predictor."""

    name: str
    figure: float  # a share
    low: float  # the target is met from here
    high: float  # to here
    null: float | None  # None: there is no null predictor
    num_rows: int

    @property
    def is_met(self) -> bool:
        return self.low <= self.figure <= self.high


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Predictions of one kind of run: errors of the logarithm of the time, by row."""

    models: Sequence[str]
    errors: Sequence[tuple[float, float]]  # error and predicted deviation
    null_errors: Sequence[float]

    def relative(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        return np.expm1([error for error, _ in self.errors])


def table(path: Path | None = None) -> list[Target]:
    """Returns every target of speed and memory with the figure reached.

    Args:
        path: published runs to judge by; the fit rests on the built-in ones. None: those too, with
            the model that is judged left out.

    Raises:
        ValueError: the file cannot be read or holds no run that can be described.
    """
    if path is None:
        _check_stored_sweeps()
    runs = published_runs()
    whole = fit([run.sample for run in runs])
    judged = runs if path is None else _unseen(published_runs(path), runs)
    memory = list(_memory_targets(path))
    if not judged and memory:
        return memory
    if not judged:
        raise ValueError(f"{path}: no run that divides only data or weights, and is not built in")
    kinds = _judge(judged, runs, whole, is_new=path is not None)
    rows: list[Target] = []
    for kind, bound in (("FSDP, llm-foundry", 0.08), ("FSDP, other sources", 0.08), ("DDP", 0.15)):
        if kind in kinds:
            rows += _speed_targets(f"unseen model, {kind}", kinds[kind], bound)
    rows += [*_interval_targets(list(kinds.values())), *_scaling_targets(judged, runs)]
    rows += memory
    return rows if path is not None else [*rows, *_machine_targets(stored_runs())]


def _check_stored_sweeps() -> None:
    """Raises ValueError in an installed package, which holds no measured records (15 MB)."""
    if missing := [folder for folder in STORED_SWEEPS if not folder.is_dir()]:
        raise ValueError(
            f"validate needs the measured runs in {' and '.join(map(str, missing))}, which an "
            "installed package does not hold: run it in a checkout of the repository, or judge "
            "other published runs with --rows"
        )


def _memory_targets(path: Path | None) -> Iterable[Target]:
    """Judges the estimator of published peaks.

    Its forms were chosen with the built-in rows in view. Only rows of a file are new to it.
    """
    known = load_rows()
    rows = known if path is None else [row for row in load_rows(path) if row not in known]
    judged = judge_memory(rows, known)
    if not judged:
        return
    seen = "forms chosen with these rows in view" if path is None else "new rows"
    name = f"published peak memory, an estimator of its own, {seen}"
    yield Target(
        name=f"{name}: mean error",
        figure=float(np.mean([abs(j.error) for j in judged])),
        low=0.0,
        high=0.12,
        null=float(np.mean([abs(j.null_error) for j in judged])),
        num_rows=len(judged),
    )
    yield Target(
        name=f"{name}: 90 % intervals, share of rows inside",
        figure=float(np.mean([j.is_inside for j in judged])),
        low=0.85,
        high=1.0,
        null=None,
        num_rows=len(judged),
    )


def stored_runs(folders: Sequence[Path] = STORED_SWEEPS) -> list[Run]:
    """Returns the runs of stored sweeps that reached a steady state.

    Single runs may be of any code, so that none is judged.

    Raises:
        ValueError: a folder or a record is missing or damaged.
    """
    store = load_store(folders, relative_to=SCALING)
    for file in store.left_out:
        if file.kind == "damaged":
            raise ValueError(f"{SCALING / file.name} is damaged: {file.reason}; restore it")
    for cell in store.cells:
        if cell.outcome.status == "ok" and cell.run is None:
            raise ValueError(f"{SCALING / cell.name} lacks its record; restore it")
    return [run for run in store.successful_runs if run.metrics and run.record["ceiling"]]


def _machine_targets(runs: Sequence[Run]) -> Iterable[Target]:
    """Predicts the `reference` cells of a CPU from its cells of smaller models on 1 and 2 ranks.

    The time of a cell is the median of its launches.
    """
    large = [run for run in runs if run.config.model.width >= SMALL_WIDTH]
    small = [run for run in runs if run not in large and run.config.parallel.world_size <= 2]
    if not large or not small:
        raise ValueError(
            f"{' and '.join(map(str, STORED_SWEEPS))} hold {len(large)} runs of larger models and "
            f"{len(small)} of small cells; restore them"
        )
    fitted = calibrate(small).fit
    shares = [share_of_peak(sample_of(run)) for run in small]
    share = float(np.median(shares))
    cells: dict[str, list[Sample]] = defaultdict(list)
    for run in large:
        cells[run.config.hash()].append(sample_of(run))
    errors, nulls = [], []
    for samples in cells.values():
        step_s = np.median([sample.step_s for sample in samples])
        predicted = np.median([fitted.estimate(sample).seconds for sample in samples])
        errors.append(float(predicted / step_s) - 1)
        nulls.append(float(np.median([share_of_peak(sample) for sample in samples])) / share - 1)
    for what, pick, low, high in (
        ("median error", np.abs, 0.0, 0.08),
        ("median bias", np.asarray, 0.0, 0.08),
    ):
        yield Target(
            name=f"larger models on the machine that measured small cells: {what}",
            figure=float(np.median(pick(errors))),
            low=low,
            high=high,
            null=float(np.median(pick(nulls))),
            num_rows=len(errors),
        )


def _unseen(found: Sequence[PublishedRun], known: Sequence[PublishedRun]) -> list[PublishedRun]:
    rows = {run.row for run in known}
    return [run for run in found if run.row not in rows]


def _judge(
    judged: Sequence[PublishedRun], runs: Sequence[PublishedRun], whole: Fit, *, is_new: bool
) -> dict[str, Judged]:
    """Predicts every run without its model among the samples."""
    found: dict[str, list[tuple[str, tuple[float, float], float]]] = defaultdict(list)
    names = [model_of(run) for run in runs]
    if is_new:
        errors = []
        partial = {m: _without(m, names, runs, whole) for m in {model_of(run) for run in judged}}
        for run in judged:
            estimate = partial[model_of(run)].estimate(run.sample)
            log_s = float(np.log(run.sample.step_s))
            errors.append((estimate.log_s - log_s, estimate.deviation))
    else:
        errors = cross_validate([run.sample for run in runs], names, whole)
    for run, error in zip(judged, errors, strict=True):
        null = _constant_flops(run, runs)
        if null is not None:
            found[_kind(run)].append((model_of(run), error, null))
    return {
        kind: Judged(
            models=[model for model, _, _ in items],
            errors=[error for _, error, _ in items],
            null_errors=[null for _, _, null in items],
        )
        for kind, items in found.items()
    }


def _without(model: str, names: Sequence[str], runs: Sequence[PublishedRun], whole: Fit) -> Fit:
    if model not in names:
        return whole
    left = [run.sample for run, name in zip(runs, names, strict=True) if name != model]
    return fit(left, start=whole)


def _kind(run: PublishedRun) -> str:
    if run.is_data_parallel:
        return "DDP"
    return f"FSDP, {FOUNDRY if run.row.source == FOUNDRY else 'other sources'}"


def _constant_flops(run: PublishedRun, runs: Sequence[PublishedRun]) -> float | None:
    """Returns the error of the null predictor; None if no other model ran on the GPU."""
    others = [
        share_of_peak(other.sample)
        for other in runs
        if other.sample.gpu == run.sample.gpu
        and _kind(other) == _kind(run)
        and model_of(other) != model_of(run)
    ]
    if not others:
        return None
    return float(np.log(share_of_peak(run.sample) / np.median(others)))


def share_of_peak(sample: Sample) -> float:
    """Returns the seconds of all products at the peak, with repeated ones, over those measured."""
    work = sample.work
    products = 3 * (work.matmul_s + work.attention_s + work.head_s)
    repeated = work.repeated_matmul_s + work.repeated_attention_s
    return float(work.micro_batches * (products + repeated) / sample.step_s)


def _speed_targets(name: str, judged: Judged, bound: float) -> Iterable[Target]:
    errors, null = judged.relative(), np.expm1(judged.null_errors)
    count = len(errors)

    def target(what: str, figure: float, low: float, high: float, null_figure: float) -> Target:
        return Target(
            name=f"{name}: {what}",
            figure=float(figure),
            low=low,
            high=high,
            null=float(null_figure),
            num_rows=count,
        )

    yield target("mean error", np.abs(errors).mean(), 0.0, bound, np.abs(null).mean())
    if bound < 0.15:
        at = [float(np.quantile(np.abs(e), LEVEL)) for e in (errors, null)]
        yield target("9 of 10 errors below", at[0], 0.0, 0.16, at[1])
    yield target("bias", errors.mean(), -0.02, 0.02, null.mean())


def _interval_targets(kinds: Sequence[Judged]) -> Iterable[Target]:
    """Each model's intervals are as wide as the errors of the other models ask for."""
    inside: list[bool] = []
    widths: list[float] = []
    null_widths: list[float] = []
    models = [(k, model) for k in kinds for model in sorted(set(k.models))]
    for kind, model in models:
        others = [
            error for k in kinds for m, error in zip(k.models, k.errors, strict=True) if m != model
        ]
        null_others = [
            abs(null) for m, null in zip(kind.models, kind.null_errors, strict=True) if m != model
        ]
        if not others or not null_others:
            continue
        half = half_width(others)
        null_half = float(np.quantile(null_others, LEVEL))
        for m, (error, deviation) in zip(kind.models, kind.errors, strict=True):
            if m == model:
                inside.append(abs(error) <= half * deviation)
                widths.append(half * deviation)
                null_widths.append(null_half)
    if not inside:
        return
    yield Target(
        name="90 % intervals: share of rows inside",
        figure=float(np.mean(inside)),
        low=0.85,
        high=0.95,
        null=None,
        num_rows=len(inside),
    )
    null_width = float(np.median(null_widths))
    yield Target(
        name="90 % intervals: half the width, narrower than the null's",
        figure=float(np.median(widths)),
        low=0.0,
        high=null_width,
        null=null_width,
        num_rows=len(widths),
    )


def _set_up(run: PublishedRun) -> tuple[object, ...]:
    """Returns what must be equal for runs on more GPUs to be the same configuration."""
    row = run.row
    model = (row.source, row.model, row.num_layers, row.width, row.sequence_length)
    how = (re.sub(r"\d+", "", row.strategy), row.precision, row.activation_checkpointing)
    return (*model, *how, row.is_compiled, row.gpu, row.micro_batch)


def _scaling_targets(
    judged: Sequence[PublishedRun], runs: Sequence[PublishedRun]
) -> Iterable[Target]:
    """Predicts from a measured smaller device count; no larger count is among the samples."""
    groups: dict[tuple[object, ...], dict[int, PublishedRun]] = defaultdict(dict)
    for run in [*judged, *runs]:
        if not run.is_data_parallel:
            groups[_set_up(run)].setdefault(run.row.num_gpus, run)
    sized = [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]
    new = {run.row for run in judged}
    largest = [list(group.values())[-2:] for group in sized if len(group) >= 3]
    largest = [pair for pair in largest if pair[1].row in new]
    yield from _ratio_targets(
        "unseen device count, the largest of three or more", largest, runs, 0.02
    )
    far = [
        [group[128], group[count]]
        for group in sized
        for count in (256, 512)
        if 128 in group and count in group and group[count].sample.gpu == "h100"
    ]
    far = [pair for pair in far if pair[1].row in new]
    yield from _ratio_targets("from 128 to 256 and 512 H100", far, runs, 0.025)


def _ratio_targets(
    name: str,
    pairs: Sequence[Sequence[PublishedRun]],
    runs: Sequence[PublishedRun],
    bound: float,
) -> Iterable[Target]:
    if not pairs:
        return
    held = {_set_up(pair[1]): pair[0].row.num_gpus for pair in pairs}
    partial = fit(
        [run.sample for run in runs if run.row.num_gpus <= held.get(_set_up(run), run.row.num_gpus)]
    )
    errors, nulls = [], []
    for small, large in pairs:
        per_sample = [
            partial.estimate(run.sample).seconds / run.sample.work.micro_batches
            for run in (small, large)
        ]
        measured = [run.sample.step_s / run.sample.work.micro_batches for run in (small, large)]
        errors.append(measured[0] * per_sample[1] / per_sample[0] / measured[1] - 1)
        nulls.append(measured[0] / measured[1] - 1)
    for what, pick, low, high in (
        ("mean error", np.abs, 0.0, bound),
        ("bias", np.asarray, -0.01, 0.01),
    ):
        yield Target(
            name=f"{name}: {what}",
            figure=float(np.mean(pick(errors))),
            low=low,
            high=high,
            null=float(np.mean(pick(nulls))),
            num_rows=len(errors),
        )

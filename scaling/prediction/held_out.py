"""Predicts every measured configuration without its own runs, to show how far predictions are off.

The configurations of a machine are divided into `PARTS` parts, and each part is predicted by a fit
to the others. Its intervals are as wide as the errors of the other parts ask for (split conformal
prediction). Memory is computed and not fitted, so only its intervals come from other parts.
Stale configurations are predicted as well, but take no part in fits and intervals.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.prediction.fit_file import (
    LEVEL,
    default_model,
    half_width,
    published_runs,
    ranges_of,
)
from scaling.prediction.fitting import PRIORS, Priors, Sample, fit
from scaling.prediction.hardware import Hardware, hardware_of_device
from scaling.prediction.measured_rows import (
    CPU_PRIORS,
    FEWEST,
    PARTS,
    cpu_of,
    has_ceiling,
    model_for,
    sample_of,
)
from scaling.prediction.memory import predict_memory
from scaling.prediction.predict import Interval
from scaling.prediction.time import Provenance, TimeModel, what_matters
from scaling.store.run import Run
from unitransformer.config import RunConfig
from unitransformer.costs.gpus import why_unknown

FEWEST_ERRORS = 5  # of other configurations, for an interval of the memory
MOST = 500  # configurations of a machine that a fit uses: more make it slower and no better


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A configuration as it was measured, and as it is predicted without its runs."""

    config: RunConfig  # without what changes no step, such as the seed
    runs: Sequence[Run]  # its launches, the fastest first
    measured_s: float  # of a step: the median of the launches' medians
    step_s: Interval
    measured_bytes: int | None  # of the rank with the highest peak; None: not counted
    memory_bytes: Interval | None  # low and high are the value if too few errors are known
    provenance: Provenance  # of the time: fitted or extrapolated
    is_stale: bool  # whether all launches are

    @property
    def run(self) -> Run:
        """The launch with the middle step time; of two in the middle the faster one."""
        return _middle(self.runs)

    @property
    def speed_error(self) -> float:
        """The predicted speed over the measured one, less 1."""
        return self.measured_s / self.step_s.value - 1

    @property
    def is_speed_inside(self) -> bool:
        return self.step_s.low <= self.measured_s <= self.step_s.high

    @property
    def is_memory_inside(self) -> bool | None:
        """None without an interval."""
        found, measured = self.memory_bytes, self.measured_bytes
        if found is None or measured is None or found.low == found.high:
            return None
        return found.low <= measured <= found.high

    @property
    def memory_error(self) -> float | None:
        if self.memory_bytes is None or self.measured_bytes is None:
            return None
        return self.memory_bytes.value / self.measured_bytes - 1


def predict_held_out(
    runs: Sequence[Run], is_stale: Callable[[Run], bool] = lambda _: False
) -> tuple[list[HeldOut], list[str]]:
    """Returns a prediction for each measured configuration, and why others have none.

    Args:
        is_stale: whether a run was measured with other code than today's. Such launches count only
            where a configuration has no others, and no fit uses them.
    """
    machines: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.is_ok and run.metrics is not None:
            host = run.record["hardware"][0]
            key = (host["device"], host["cpu"], host["cpu_cores"])
            machines.setdefault(key, []).append(run)
    found: list[HeldOut] = []
    reasons: list[str] = []
    for (device, cpu, _), measured in machines.items():
        name = cpu if device == "cpu" else device
        try:
            found += _on_machine(device, measured, is_stale)
        except ValueError as error:
            reasons.append(f"{name}: no prediction, as {error}")
    return found, reasons


def calibration_errors(hardware: Hardware, runs: Sequence[Run]) -> tuple[float, float] | None:
    """Returns median errors of the speed without any of these runs, and by a fit to the others.

    None: there are too few runs.
    """
    found, _ = predict_held_out(runs)
    if len(found) < FEWEST:
        return None
    machine = None if hardware.is_cpu else hardware
    samples = [sample_of(item.run, machine) for item in found]
    before = [
        abs(item.measured_s / float(np.exp(log_s)) - 1)
        for item, (log_s, _) in zip(found, model_for(hardware).fit.log_times(samples), strict=True)
    ]
    return float(np.median(before)), float(np.median([abs(i.speed_error) for i in found]))


def _on_machine(
    device: str, runs: Sequence[Run], is_stale: Callable[[Run], bool]
) -> Iterator[HeldOut]:
    hardware = None if device == "cpu" else hardware_of_device(device)
    if device != "cpu" and hardware is None:
        raise ValueError(f"no hardware file describes it ({why_unknown(device)})")
    if hardware is None:
        runs = [run for run in runs if has_ceiling(run)]
        if not runs:
            raise ValueError("no run measured its ceilings, which calibrate a CPU")
    by_configuration = _by_configuration(runs)
    configs = list(by_configuration)
    current = [[run for run in cell if not is_stale(run)] for cell in by_configuration.values()]
    cells = [new or old for new, old in zip(current, by_configuration.values(), strict=True)]
    used = [i for i, new in enumerate(current) if new]  # the places of those that a fit may use
    samples = [_sample(cell, hardware) for cell in cells]
    if hardware is None and len(used) < FEWEST:
        num_stale = len(cells) - len(used)
        raise ValueError(
            f"a fit that leaves some out needs {FEWEST} configurations with a steady state and a "
            f"ceiling, and there {'is 1' if len(used) == 1 else f'are {len(used)}'}"
            + (f" beside {num_stale} that only stale records measured" if num_stale else "")
        )
    times = _predicted_times(samples, used, hardware)
    machine = replace(cpu_of(_middle(cells[0])), context_bytes=0) if hardware is None else hardware
    memory = _predicted_memory(cells, used, machine)
    found = zip(configs, cells, current, samples, times, memory, strict=True)
    for config, cell, new, sample, (step_s, provenance), (peak, predicted) in found:
        yield HeldOut(
            config=config,
            runs=cell,
            measured_s=sample.step_s,
            step_s=step_s,
            measured_bytes=peak,
            memory_bytes=predicted,
            provenance=provenance,
            is_stale=not new,
        )


def _by_configuration(runs: Sequence[Run]) -> dict[RunConfig, list[Run]]:
    """Returns the launches of each configuration, sorted by step time; the same in any order."""
    cells: dict[RunConfig, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        cells.setdefault(what_matters(run.config), []).append(run)
    return {config: sorted(cell, key=_step_s) for config, cell in cells.items()}


def _step_s(run: Run) -> float:
    assert run.metrics is not None
    return run.metrics.step.median


def _middle(cell: Sequence[Run]) -> Run:
    return cell[(len(cell) - 1) // 2]


def _sample(cell: Sequence[Run], hardware: Hardware | None) -> Sample:
    step_s = statistics.median(_step_s(run) for run in cell)
    return replace(sample_of(_middle(cell), hardware), step_s=step_s)


def _predicted_times(
    samples: Sequence[Sample], used: Sequence[int], hardware: Hardware | None
) -> list[tuple[Interval, Provenance]]:
    """Predicts every sample; fits and intervals rest on those at the places `used`."""
    priors: Priors = CPU_PRIORS if hardware is None else PRIORS
    base = [] if hardware is None else [run.sample for run in published_runs()]
    if len(used) < FEWEST:  # of a GPU, which the published runs describe
        known = default_model()
        estimates = known.fit.log_times(samples)
        return [
            (_interval(log_s, known.deviations * d), known.provenance(sample.work, sample.gpu))
            for sample, (log_s, d) in zip(samples, estimates, strict=True)
        ]
    # A search that started at a fit to all samples would know of those that are left out.
    start = None if hardware is None else default_model().fit
    estimates = [(0.0, 1.0)] * len(samples)
    provenances: list[Provenance] = ["fitted"] * len(samples)
    for part in range(PARTS):
        others = [samples[i] for i in used if i % PARTS != part]
        known_samples, held = [*base, *_some(others)], samples[part::PARTS]
        fitted = fit(known_samples, priors, start=start)
        model = TimeModel(fit=fitted, ranges=ranges_of(known_samples), deviations=1.0)
        estimates[part::PARTS] = fitted.log_times(held)
        provenances[part::PARTS] = [model.provenance(s.work, s.gpu) for s in held]
    errors = [
        (log_s - float(np.log(sample.step_s)), deviation)
        for sample, (log_s, deviation) in zip(samples, estimates, strict=True)
    ]
    widths = [half_width([errors[i] for i in used if i % PARTS != part]) for part in range(PARTS)]
    intervals = [_interval(log_s, widths[i % PARTS] * d) for i, (log_s, d) in enumerate(estimates)]
    return list(zip(intervals, provenances, strict=True))


def _some(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[:: -(-len(samples) // MOST)]


def _interval(logarithm: float, half: float) -> Interval:
    low, value, high = np.exp([logarithm - half, logarithm, logarithm + half])
    return Interval(value=float(value), low=float(low), high=float(high))


def _predicted_memory(
    cells: Sequence[Sequence[Run]], used: Sequence[int], machine: Hardware
) -> list[tuple[int | None, Interval | None]]:
    """Returns the measured peak of each configuration, and the predicted one."""
    peaks = [
        max((b for run in cell for b in run.record["peak_bytes"] if b is not None), default=None)
        for cell in cells
    ]
    predicted = [
        np.log(predict_memory(_middle(cell).config, machine).allocated_bytes) for cell in cells
    ]
    errors = [
        None if peak is None else abs(float(log_bytes - np.log(peak)))
        for peak, log_bytes in zip(peaks, predicted, strict=True)
    ]
    widths = []
    for part in range(PARTS):
        others = [e for i in used if i % PARTS != part and (e := errors[i]) is not None]
        widths.append(float(np.quantile(others, LEVEL)) if len(others) >= FEWEST_ERRORS else None)
    found: list[tuple[int | None, Interval | None]] = []
    for i, (peak, log_bytes) in enumerate(zip(peaks, predicted, strict=True)):
        width = widths[i % PARTS]
        found.append((peak, None if peak is None else _interval(float(log_bytes), width or 0.0)))
    return found

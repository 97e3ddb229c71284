"""Calibrates predictions with measured runs of this suite.

Runs on GPUs join the published ones, as a source of their own. Runs on a CPU have coefficients of
their own: its ranks start every operation themselves, and share its cores and its memory.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling.prediction.fit_file import default_model, half_width, published_runs, ranges_of
from scaling.prediction.fitting import NORMAL, PRIORS, SCATTER, Fit, Prior, Sample, fit
from scaling.prediction.hardware import THIS_MACHINE, Hardware, Link
from scaling.prediction.time import MeasuredStep, TimeModel, software_of, what_matters
from scaling.prediction.work import gpu_family, work_of_config
from scaling.store.run import Run
from unitransformer.config import RunConfig
from unitransformer.costs.gpus import find_gpu
from unitransformer.machine.alpha_beta import Collective
from unitransformer.machine.host import describe_host
from unitransformer.stats.intervals import MedianInterval

SOURCE = "measured"
MAD_OF_NORMAL = 1.4826  # deviations of a normal distribution in its median absolute deviation
PARTS = 5  # of the configurations, each predicted by a fit to the others
FEWEST = 10  # configurations of a CPU whose errors say how wide an interval is
CPU = ("cpu", "cpu_cores")  # what distinguishes one CPU from another
# Of gloo between two processes of one machine: what `scaling calibrate --devices 2 --seconds 20`
# found on two idle cores with AVX-512. `ProcessGroupGloo` gathers into arrays of its own, which it
# copies. To reduce and scatter it sums whole arrays, as an all-reduce, and copies a shard.
GLOO = Link(latency_s=1.5e-4, bytes_per_s=1.5e9)
GLOO_COLLECTIVES: dict[Collective, Link] = {
    "all_gather": Link(latency_s=2.2e-4, bytes_per_s=0.87e9),
    "reduce_scatter": Link(latency_s=4.4e-4, bytes_per_s=0.42e9),
}

CPU_PRIORS = PRIORS | {
    "matmul_share": Prior(value=0.80, spread=0.15, is_share=True),
    "attention_share": Prior(value=0.40, spread=0.3, is_share=True),
    "half_width": Prior(value=16.0, spread=0.3),
    "half_head": Prior(value=16.0, spread=0.3),
    "half_positions": Prior(value=16.0, spread=0.3),
    "matmul_backward": Prior(value=1.1, spread=0.05),
    "attention_backward": Prior(value=1.5, spread=0.15),
    # A CPU zeroes each fresh page of a result before an operation writes to it.
    "element_passes": Prior(value=3.5, spread=0.1, by_software=0.3),
    "element_backward": Prior(value=1.7, spread=0.1),
    "logits_passes": Prior(value=4.0, spread=0.1),
    "layer_s": Prior(value=1e-3, spread=0.5, by_software=1.0),
    "start_s": Prior(value=2e-3, spread=0.5, by_software=1.0),
    "host_sharpness": Prior(value=1.05, spread=0.02),  # host and device are the same
    # Five products of a block, which oneDNN prepares again.
    "block_s": Prior(value=7e-5, spread=0.3, by_software=0.3),
    "copy_passes": Prior(value=1.5, spread=0.1),
    "update_passes": Prior(value=1.5, spread=0.1),
    "step_s": Prior(value=2e-3, spread=0.7, by_software=0.7),
    "contention": Prior(value=1.0, spread=0.1),
    "site": Prior(value=1.0, spread=0.01),
}


def model_for(hardware: Hardware, runs: Sequence[Run] = ()) -> TimeModel:
    """Returns the model for a hardware, calibrated with `runs` measured on it if there are any.

    A CPU without runs has only the priors, so that its intervals are wide and extrapolated.
    """
    if runs:
        return calibrate(runs, None if hardware.is_cpu else hardware)
    if not hardware.is_cpu:
        return default_model()
    priors = Fit(
        priors=CPU_PRIORS,
        keys=tuple((name, "", "") for name in CPU_PRIORS),
        values=np.array([prior.center for prior in CPU_PRIORS.values()]),
        covariance=np.diag([prior.spread**2 for prior in CPU_PRIORS.values()]),
        num_samples=0,
    )
    return TimeModel(fit=priors, ranges={}, deviations=default_model().deviations)


def runs_on(hardware: Hardware, runs: Sequence[Run]) -> list[Run]:
    """Returns the runs that were measured on a hardware; one of an unlisted GPU knows no name."""
    found, this = [], describe_host()
    for run in runs:
        host = run.record["hardware"][0]
        if hardware.is_cpu:
            is_same = host["device"] == "cpu" and all(host[n] == this[n] for n in CPU)
        else:
            gpu = find_gpu(host["device"])
            is_same = (
                host["device"] != "cpu" and (None if gpu is None else gpu.name) == hardware.gpu
            )
        if is_same:
            found.append(run)
    return found


def calibrate(runs: Sequence[Run], hardware: Hardware | None = None) -> TimeModel:
    """Returns a model that has learned from measured runs; those very configs are known exactly.

    Args:
        runs: of one kind of machine; those without a steady state or a ceiling are left out.
        hardware: of the machine; None: a CPU with the ceilings that the runs measured.

    Raises:
        ValueError: no run is left.
    """
    usable = [run for run in runs if run.metrics is not None and has_ceiling(run)]
    if not usable:
        raise ValueError("no run with a steady state and a ceiling; measure longer, with a ceiling")
    samples = [sample_of(run, hardware) for run in usable]
    launches: dict[RunConfig, list[Run]] = {}
    for run in usable:
        launches.setdefault(what_matters(run.config), []).append(run)
    measured = {config: _measured(found) for config, found in launches.items()}
    if samples[0].gpu == THIS_MACHINE:
        places = {config: place for place, config in enumerate(launches)}
        parts = [places[what_matters(run.config)] % PARTS for run in usable]
        fitted = fit(samples, CPU_PRIORS)
        has_errors = len(launches) >= FEWEST
        deviations = _half_width(samples, parts) if has_errors else default_model().deviations
    else:
        everything = [*(run.sample for run in published_runs()), *samples]
        base = default_model()
        fitted, deviations = fit(everything, start=base.fit), base.deviations
        samples = everything
    return TimeModel(
        fit=fitted, ranges=ranges_of(samples), deviations=deviations, measured=measured
    )


def sample_of(run: Run, hardware: Hardware | None = None) -> Sample:
    """Returns a run with a steady state as a sample; by the ceilings it measured, or `hardware`."""
    machine = cpu_of(run) if hardware is None else hardware
    assert run.metrics is not None
    return Sample(
        work=work_of_config(run.config, machine),
        gpu=gpu_family(machine),
        software=software_of(run.config, machine),
        source=SOURCE,
        step_s=run.metrics.step.median,
    )


def cpu_of(run: Run) -> Hardware:
    """Returns the CPU of a run by the ceilings that its ranks measured at the same time."""
    found = _ceilings(run)
    peaks: dict[str, float] = {}
    for ceiling in found:
        dtype, rate = ceiling["dtype"], ceiling["matmul_flops_per_s"]
        peaks[dtype] = max(rate, peaks.get(dtype, 0.0))
    copies = [ceiling["copy_bytes_per_s"] for ceiling in found]
    return Hardware(
        name=THIS_MACHINE,
        gpu=None,
        devices_per_node=run.config.parallel.devices,
        memory_bytes=1,  # a step's time does not depend on it
        context_bytes=0,
        peak_flops=peaks,
        memory_bytes_per_s=statistics.median(copies),
        intra_node=GLOO,
        inter_node=GLOO,
        collectives=GLOO_COLLECTIVES,
        is_measured=True,
    )


def has_ceiling(run: Run) -> bool:
    """Whether a rank measured what its machine reaches at best."""
    return bool(_ceilings(run))


def _ceilings(run: Run) -> list[dict[str, Any]]:
    return [
        ceiling
        for ceiling in run.record["ceiling"] or ()
        if ceiling and ceiling["matmul_flops_per_s"] > 0 and ceiling["copy_bytes_per_s"] > 0
    ]


def _half_width(samples: Sequence[Sample], parts: Sequence[int]) -> float:
    """Returns in how many deviations 90 % of the errors lie of parts that a fit has not seen."""
    errors = []
    for part in range(PARTS):
        known = [s for s, i in zip(samples, parts, strict=True) if i != part]
        held = [s for s, i in zip(samples, parts, strict=True) if i == part]
        estimates = fit(known, CPU_PRIORS).log_times(held)
        for sample, (log_s, deviation) in zip(held, estimates, strict=True):
            errors.append((log_s - float(np.log(sample.step_s)), deviation))
    return half_width(errors)


def _measured(launches: Sequence[Run]) -> MeasuredStep:
    """Returns the median of the launches' medians, and the ends of all their intervals.

    It is no surer than equal runs are alike.
    """
    steps = [run.metrics.step for run in launches if run.metrics is not None]
    ends = [end for step in steps for end in _ends(step)]
    median, factor = statistics.median(step.median for step in steps), math.exp(NORMAL * SCATTER)
    return MeasuredStep(
        seconds=median,
        low_s=min(median / factor, *ends),
        high_s=max(median * factor, *ends),
    )


def _ends(step: MedianInterval) -> tuple[float, float]:
    """Returns the interval of a median; without one, that of nine in ten single steps."""
    if step.low is not None and step.high is not None:
        return step.low, step.high
    factor = math.exp(NORMAL * MAD_OF_NORMAL * step.mad / step.median)
    return step.median / factor, step.median * factor

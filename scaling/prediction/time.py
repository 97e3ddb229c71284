"""Predicts the step time of a run: what it is spent on, a 90 % interval, and where both come from.

measured       this very configuration was measured on this hardware
fitted         the GPU was fitted, in this number format, and size, devices and batch lie within
               four times of its runs
extrapolated   anything else: only the interval is to be shown
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from scaling.analysis.same_work import CHANGES_NO_STEP
from scaling.prediction.fitting import Fit, Sample
from scaling.prediction.hardware import Hardware
from scaling.prediction.step_model import Parts
from scaling.prediction.work import StepWork, gpu_family, work_of_config
from unitransformer.config import DataConfig, OptimizerConfig, RunConfig

Provenance = Literal["measured", "fitted", "extrapolated"]
Limit = Literal["matrix products", "memory bandwidth", "host", "communication", "optimizer"]

RANGE_FACTOR = 4.0  # beyond so many times the fitted range a prediction is extrapolated
# Fields of `StepWork`, and what people call them.
RANGE_FIELDS = {
    "parameters": "parameters",
    "ranks": "devices",
    "positions": "positions of a micro-batch",
    "is_float32": "number format",  # 0 or 1, of which four times 0 is not the other
}


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """The median step of a run, and the 90 % interval of it."""

    seconds: float
    low_s: float
    high_s: float


@dataclass(frozen=True, kw_only=True)
class TimeModel:
    """What predictions rest on."""

    fit: Fit
    # By family of GPU: by field of `StepWork`, its lowest and highest value among the samples.
    ranges: Mapping[str, Mapping[str, tuple[float, float]]]
    deviations: float  # half a 90 % interval in standard deviations, found by cross-validation
    measured: Mapping[RunConfig, MeasuredStep] = field(default_factory=dict)  # by `what_matters`

    def provenance(self, work: StepWork, gpu: str) -> Provenance:
        return "extrapolated" if self.beyond(work, gpu) else "fitted"

    def beyond(self, work: StepWork, gpu: str) -> tuple[str, ...]:
        """Returns in what this work is beyond the runs of the fit; empty if in nothing."""
        ranges = self.ranges.get(gpu)
        if ranges is None:
            return (f"{gpu}, on which no run of the fit was",)
        return tuple(
            _format_beyond(name, work, low, high)
            for name, (low, high) in ranges.items()
            if not low / RANGE_FACTOR <= getattr(work, name) <= high * RANGE_FACTOR
        )


def _format_beyond(name: str, work: StepWork, low: float, high: float) -> str:
    if name == "is_float32":
        number_format = "float32" if work.is_float32 else "16 bits"
        return f"products in {number_format}, in which no run of the fit was"
    ends = f"{high:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    return (
        f"{RANGE_FIELDS[name]} {getattr(work, name):,.0f}, more than {RANGE_FACTOR:g} times beyond "
        f"the {ends} of the fit"
    )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The predicted seconds of an optimizer step. The first three add up to the total."""

    compute_s: float  # forward and backward pass
    exposed_communication_s: float
    optimizer_s: float
    hidden_communication_s: float  # beside the computation: not part of the total
    low_s: float  # of a 90 % interval of the total
    high_s: float
    provenance: Provenance
    limited_by: Limit  # what takes the largest part of the step
    beyond: tuple[str, ...] = ()  # why it is extrapolated

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_communication_s + self.optimizer_s


def predict_time(config: RunConfig, hardware: Hardware, model: TimeModel) -> StepTime:
    """Returns the step time of a config on a hardware.

    Raises:
        ValueError: the hardware states no peak for the number format of the products.
    """
    sample = sample_for(config, hardware)
    work = sample.work
    estimate = model.fit.estimate(sample)
    parts = estimate.parts
    seconds = estimate.seconds
    factor = math.exp(model.deviations * estimate.deviation)
    low_s, high_s = seconds / factor, seconds * factor
    provenance = model.provenance(work, sample.gpu)
    beyond = model.beyond(work, sample.gpu)
    measured = model.measured.get(what_matters(config)) if model.measured else None
    if measured is not None:
        seconds, low_s, high_s = measured.seconds, measured.low_s, measured.high_s
        provenance, beyond = "measured", ()
    scale = seconds / float(parts.total_s)
    return StepTime(
        compute_s=float(parts.compute_s) * scale,
        exposed_communication_s=float(parts.exposed_communication_s) * scale,
        optimizer_s=float(parts.optimizer_s) * scale,
        hidden_communication_s=float(parts.hidden_communication_s) * scale,
        low_s=low_s,
        high_s=high_s,
        provenance=provenance,
        limited_by=_limit(parts),
        beyond=beyond,
    )


def what_matters(config: RunConfig) -> RunConfig:
    """Returns a config with all that changes no step set to fixed values: length, seed, text."""
    data = DataConfig(
        sequence_length=config.data.sequence_length, mask_fraction=config.data.mask_fraction
    )
    return replace(
        config,
        data=data,
        optimizer=OptimizerConfig(),
        init_from=None,
        **CHANGES_NO_STEP,
    )


def sample_for(config: RunConfig, hardware: Hardware) -> Sample:
    """Returns a config as a sample to predict.

    Raises:
        ValueError: the hardware states no peak for the number format of the products.
    """
    return Sample(
        work=work_of_config(config, hardware),
        gpu=gpu_family(hardware),
        software=software_of(config, hardware),
    )


def software_of(config: RunConfig, hardware: Hardware) -> str:
    """Returns the name of the software whose coefficients are fitted together."""
    if hardware.is_cpu:
        parallel = config.parallel  # a CPU casts tensors between formats one by one
        return f"{parallel.strategy}, {parallel.precision}, {parallel.world_size} ranks on a CPU"
    return "torch" if config.parallel.compile == "off" else "torch compiled"


def _limit(parts: Parts) -> Limit:
    shares: dict[Limit, float] = {
        "matrix products": float(parts.products_s),
        "memory bandwidth": float(parts.memory_s),
        "host": float(parts.host_s),
        "communication": float(parts.exposed_communication_s),
        "optimizer": float(parts.optimizer_s),
    }
    return max(shares, key=shares.__getitem__)

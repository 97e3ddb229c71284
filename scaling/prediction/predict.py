"""Predicts a configuration on a hardware: memory, time, speed, and what limits it."""

from collections.abc import Callable
from dataclasses import dataclass

from scaling.prediction.hardware import Hardware
from scaling.prediction.memory import Memory, predict_memory
from scaling.prediction.time import Provenance, StepTime, TimeModel, predict_time
from scaling.prediction.work import matmul_peak
from unitransformer.config import RunConfig
from unitransformer.costs.flops import MAIN_CONVENTION, count_flops

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the 90 % interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one configuration needs and reaches."""

    config: RunConfig
    hardware: Hardware
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def step_s(self) -> Interval:
        time = self.time
        return Interval(value=time.total_s, low=time.low_s, high=time.high_s)

    @property
    def run_s(self) -> Interval:
        """Seconds of all steps, without start-up, validation and checkpoints."""
        step, count = self.step_s, self.config.max_steps
        return Interval(value=count * step.value, low=count * step.low, high=count * step.high)

    @property
    def units_per_s(self) -> Interval:
        """Tokens or images per second of all devices together."""
        units = self.config.global_batch_size * self.config.tokens_per_sample
        step = self.step_s
        return Interval(value=units / step.value, low=units / step.high, high=units / step.low)

    @property
    def mfu(self) -> Interval:
        """Share of the peak of the devices, which a calibrated machine has measured."""
        peak = matmul_peak(self.config.parallel.precision, self.hardware)
        per_unit = count_flops(self.config)[MAIN_CONVENTION]
        share = per_unit / (peak * self.config.parallel.world_size)
        rate = self.units_per_s
        values = (min(1.0, share * rate) for rate in (rate.value, rate.low, rate.high))
        value, low, high = values
        return Interval(value=value, low=low, high=high)

    def hours(self, num_units: float) -> Interval:
        """Returns the hours in which so many tokens or images are trained."""
        rate = self.units_per_s
        hours = [
            num_units / per_s / SECONDS_PER_HOUR for per_s in (rate.value, rate.high, rate.low)
        ]
        return Interval(value=hours[0], low=hours[1], high=hours[2])

    def cost(self, num_units: float, price_per_hour: float) -> Interval:
        """Returns the price of `hours` on all devices, at a price per device."""
        hours, scale = self.hours(num_units), price_per_hour * self.config.parallel.world_size
        return Interval(value=hours.value * scale, low=hours.low * scale, high=hours.high * scale)


def format_interval(
    interval: Interval, provenance: Provenance, form: str | Callable[[float], str]
) -> str:
    """Formats a value with its interval; an extrapolation without the value."""
    values = (interval.value, interval.low, interval.high)
    value, low, high = (f"{v:{form}}" if isinstance(form, str) else form(v) for v in values)
    ends = f"{low} to {high}"
    return ends if provenance == "extrapolated" else f"{value} ({ends})"


def format_rounded(value: float) -> str:
    """Formats with three digits or more: 0.0347, 4.12, 5,050."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_money(value: float) -> str:
    """Formats with cents where they are more than a thousandth."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"


def predict(config: RunConfig, hardware: Hardware, model: TimeModel) -> Prediction:
    """Predicts a config with a strategy other than `auto`.

    Raises:
        ValueError: the hardware has no peak for the number format of the config.
    """
    hardware = hardware.shared_by(config.parallel.devices)
    return Prediction(
        config=config,
        hardware=hardware,
        memory=predict_memory(config, hardware),
        time=predict_time(config, hardware, model),
    )

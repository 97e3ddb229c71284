"""A run: its record, and its recorded figures as typed values."""

import functools
from dataclasses import dataclass
from typing import Literal

from scaling.store.conditions import processors_of
from unitransformer.config import RunConfig
from unitransformer.costs.mfu import MfuRow, read_rows
from unitransformer.record.log_lines import log_lines
from unitransformer.record.metrics import StepMetrics, from_figures, recorded_steady
from unitransformer.record.schema import Record
from unitransformer.stats.comparisons import LaunchMedian, launch_of
from unitransformer.stats.intervals import find_block


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record that was checked when it was read. Its checksummed figures are believed: only lint
    computes them again from the raw samples."""

    name: str  # of its file
    record: Record
    config: RunConfig

    @property
    def is_ok(self) -> bool:
        return bool(self.record["status"] == "ok")

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were done."""
        return len(self.record["loss"])

    @property
    def unit(self) -> Literal["token", "image"]:
        return "image" if self.config.recipe == "vit" else "token"

    @property
    def units_per_step(self) -> int:
        return self.config.global_batch_size * self.config.tokens_per_sample

    @property
    def excluded_steps(self) -> list[int]:
        """Steps that were measured otherwise than the rest, or compiled."""
        return [item["step"] for item in self.record["excluded_steps"]]

    @functools.cached_property
    def processors(self) -> str:
        """The kinds of processors and devices it ran on."""
        return processors_of(self.record)

    @functools.cached_property
    def log(self) -> list[str]:
        """Its lines over all ranks, out of the samples."""
        record = self.record
        return log_lines(
            self.config,
            loss=record["loss"],
            step_s=record["step_s"],
            segment_starts=record["segment_starts"],
            validation=record["validation"]["history"] if self.is_ok else [],
        )

    @functools.cached_property
    def metrics(self) -> StepMetrics | None:
        """The recorded figures of the steady steps; None without a steady state."""
        return from_figures(self.record["metrics"])

    @functools.cached_property
    def launch(self) -> LaunchMedian:
        """The interval of its median beside those of other launches. The record does not hold how
        many blocks the bootstrap had, so only a run that is pooled finds it in its samples.

        Raises:
            ValueError: there is no steady state.
        """
        if self.metrics is None:
            raise ValueError(f"{self.name} has no steady state; measure it for longer")
        has_interval = self.metrics.step.reason is None
        block, _ = find_block(self.steady_s) if has_interval else (None, None)
        return launch_of(self.metrics.step, block)

    @property
    def steady_s(self) -> list[float]:
        """Seconds of each steady step."""
        record = self.record
        return recorded_steady(record).select(record["step_s"][record["segment_starts"][-1] :])

    @property
    def units_per_s(self) -> float | None:
        return None if self.metrics is None else self.metrics.units_per_s

    @functools.cached_property
    def mfu(self) -> tuple[MfuRow, ...]:
        """The recorded MFU report: a row for each way of counting FLOPs."""
        return read_rows(self.record["mfu"], "record: mfu")

    @property
    def metric_value(self) -> float:
        """Of the task's metric on the validation data."""
        return float(self.record["validation"]["value"])

"""A run: its record, and its recorded metrics as typed values."""

import functools
from dataclasses import dataclass, replace
from typing import Literal

from scaling.store.conditions import processors_of
from unitransformer.config import RunConfig
from unitransformer.costs.flops import CONVENTIONS
from unitransformer.costs.mfu import MfuRow, read_rows
from unitransformer.record.log_lines import log_lines
from unitransformer.record.metrics import StepMetrics, read_metrics, recorded_steady_state
from unitransformer.record.schema import Record
from unitransformer.stats.intervals import MedianInterval, find_block


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record that was checked when it was read.

    Its metrics are trusted, since their checksums hold: only lint recomputes them from the samples.
    """

    name: str  # of its file
    record: Record
    config: RunConfig

    @property
    def is_ok(self) -> bool:
        return bool(self.record["status"] == "ok")

    @property
    def num_steps(self) -> int:
        """Optimizer steps that ran."""
        return len(self.record["loss"])

    @property
    def unit(self) -> Literal["token", "image"]:
        return "image" if self.config.recipe == "vit" else "token"

    @property
    def units_per_step(self) -> int:
        return self.config.global_batch_size * self.config.tokens_per_sample

    @property
    def excluded_steps(self) -> list[int]:
        """Steps that are not comparable to the rest, such as those that compiled."""
        return [item["step"] for item in self.record["excluded_steps"]]

    @functools.cached_property
    def processors(self) -> str:
        return processors_of(self.record)

    @functools.cached_property
    def log(self) -> list[str]:
        """Its log lines over all ranks, from the samples."""
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
        """The recorded metrics of the steady steps; None without a steady state."""
        return read_metrics(self.record["metrics"])

    @functools.cached_property
    def launch(self) -> MedianInterval:
        """Its median step for pooling with other launches; raises ValueError if never steady.

        The record lacks the bootstrap's block length, so it is found in the samples on demand.
        """
        if self.metrics is None:
            raise ValueError(f"{self.name} has no steady state; measure it for longer")
        has_interval = self.metrics.step.reason is None
        block, _ = find_block(self.steady_s) if has_interval else (None, None)
        return replace(self.metrics.step, block_length=block)

    @property
    def steady_s(self) -> list[float]:
        record = self.record
        return recorded_steady_state(record).select(
            record["step_s"][record["segment_starts"][-1] :]
        )

    @property
    def units_per_s(self) -> float | None:
        return None if self.metrics is None else self.metrics.units_per_s

    @functools.cached_property
    def mfu(self) -> tuple[MfuRow, ...]:
        """The recorded MFU report: a row per FLOP convention.

        Raises ValueError for rows that contradict themselves or have no place in a report.
        """
        rows = read_rows(self.record["mfu"], "record: mfu")
        for index, row in enumerate(rows):
            where = f"record: mfu.{index}"
            if row.convention not in CONVENTIONS:
                known = ", ".join(CONVENTIONS)
                raise ValueError(f"{where}.convention is {row.convention!r}; known: {known}")
            kind = "HFU" if row.convention == "hardware" else "MFU"
            if row.kind != kind:
                raise ValueError(f"{where}.kind is {row.kind!r}; {row.convention} has {kind}")
        if len({row.convention for row in rows}) < len(rows):
            raise ValueError("record: mfu holds two rows of one convention")
        return rows

    @property
    def metric_value(self) -> float:
        return float(self.record["validation"]["value"])

"""A run: its record, and what its raw samples say, whatever its derived fields do."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.store.metrics_cache import Found
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.costs.mfu import MfuRow
from unitransformer.measure.nvml import Energy, energy_between_samples
from unitransformer.record.fields import NUMBER, RELATIVE_ERROR, fits, look_up
from unitransformer.record.log_lines import log_lines
from unitransformer.record.metrics import Readout, passport_of, read_out, recorded_steady, steady_of
from unitransformer.record.schema import Record
from unitransformer.record.units import perplexity
from unitransformer.stats.comparisons import LaunchMedian, describe_launch
from unitransformer.stats.steady_state import SteadyState


@dataclass(frozen=True, kw_only=True)
class Run:
    """A record, and what its raw samples say; derived fields of the record are not believed."""

    name: str  # of its file
    record: Record
    config: RunConfig
    found: Found | None = dataclasses.field(
        default=None, compare=False, repr=False
    )  # in it, earlier

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
    def unsteady(self) -> list[int]:
        """Steps that were measured otherwise than the rest, or compiled."""
        return [item["step"] for item in self.record["unsteady"]]

    @functools.cached_property
    def log(self) -> list[str]:
        """Its lines over all ranks, out of the samples."""
        record = self.record
        return log_lines(
            self.config,
            loss=record["loss"],
            step_s=record["step_s"],
            launches=record["launches"],
            validation=record["validation"]["history"] if self.is_ok else [],
        )

    @functools.cached_property
    def readout(self) -> Readout | None:
        """Figures of the steady steps, out of the samples; None without a steady state."""
        if self.found is not None:
            return self.found.readout
        record = self.record
        return read_out(
            record["step_s"],
            record["samples"],
            recorded_steady(record),
            launches=record["launches"],
            units_per_step=self.units_per_step,
        )

    @functools.cached_property
    def steady_today(self) -> SteadyState:
        """The steady state of the last launch as this version of the code finds it."""
        if self.found is not None:
            return self.found.steady_today
        record = self.record
        return steady_of(record["step_s"], launches=record["launches"], unsteady=self.unsteady)

    @functools.cached_property
    def launch(self) -> LaunchMedian:
        """Its steady steps beside those of other launches."""
        if self.found is not None and self.found.launch is not None:
            return self.found.launch
        return describe_launch(self.steady_s)

    @property
    def steady_s(self) -> list[float]:
        """Seconds of each steady step."""
        record = self.record
        return recorded_steady(record).select(record["step_s"][record["launches"][-1] :])

    @functools.cached_property
    def energy(self) -> tuple[Energy | None, ...]:
        """Joules of the steady steps, out of the looks at each device; None: nobody looked."""
        record = self.record
        first = record["launches"][-1]
        steps = {first + s for s in recorded_steady(record).steps(len(record["step_s"][first:]))}
        return tuple(
            None if gpu is None else energy_between_samples(gpu["samples"], steps) for gpu in record["gpu"]
        )

    @property
    def units_per_s(self) -> float | None:
        return None if self.readout is None else self.readout.units_per_s

    @functools.cached_property
    def passport(self) -> tuple[MfuRow, ...]:
        """What each way of counting FLOPs says of the run, out of the samples."""
        record = self.record
        return passport_of(self.config, self.units_per_s, record["hardware"], record["ceiling"])

    @property
    def metric_value(self) -> float:
        """Perplexity out of the validation loss; an accuracy is itself a raw count."""
        validation = self.record["validation"]
        if validation["metric"] == "perplexity":
            return perplexity(validation["loss"])
        return float(validation["value"])


def find(run: Run) -> Found:
    return Found(
        readout=run.readout,
        launch=None if run.readout is None else run.launch,
        steady_today=run.steady_today,
        contradictions=tuple(find_contradictions(run)),
        recounts=tuple(find_recounts(run)),
    )


def find_contradictions(run: Run) -> list[str]:
    """Derived fields of a run that ended well that its own samples and config contradict."""
    if run.found is not None:
        return list(run.found.contradictions)
    rate, record = f"{run.unit}s_per_s", run.record
    figures = {} if run.readout is None else run.readout.as_dict()
    return _differences(
        {
            rate: (record.get(rate), run.units_per_s),
            **{
                f"figures.{name}": (record["figures"].get(name), figures.get(name))
                for name in sorted(record["figures"].keys() | figures.keys())
            },
            **dict(_joules(run)),
            "num_parameters": (record["num_parameters"], count_parameters(run.config.model)),
            "validation.value": (record["validation"]["value"], run.metric_value),
        }
    )


def _joules(run: Run) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What the record says of the energy of each device, and what its looks say."""
    for rank, (gpu, energy) in enumerate(zip(run.record["gpu"], run.energy, strict=True)):
        if gpu is not None and energy is not None:
            for name, figure in energy.as_dict().items():
                yield f"gpu.{rank}.{name}", (gpu.get(name), figure)


def find_recounts(run: Run) -> list[str]:
    """FLOPs, and the begin of the steady state, that this version of the code finds otherwise than
    the one that wrote the record."""
    if run.found is not None:
        return list(run.found.recounts)
    flops, record = f"flops_per_{run.unit}", run.record
    start = run.steady_today.start
    start = None if start is None else record["launches"][-1] + start
    return _differences(
        {
            "steady_from": (record["steady_from"], start),
            **{
                f"{flops}.{name}": (look_up(record, f"{flops}.{name}"), count)
                for name, count in count_flops(run.config).items()
            },
        }
    )


def _differences(fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{field} is {_said(stored)} in the record, {_said(derived)} by its samples and config"
        for field, (stored, derived) in fields.items()
        if not _agree(stored, derived)
    ]


def _agree(stored: Any, derived: Any) -> bool:
    if derived is None or isinstance(derived, str):
        return bool(stored == derived)
    return fits(stored, NUMBER) and math.isclose(stored, derived, rel_tol=RELATIVE_ERROR)


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)

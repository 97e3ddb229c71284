"""`python -m scaling calibrate`: options in; what this machine's ranks reach out, a table.

The work is done by a process of its own, for it needs torch.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
from tabulate import tabulate

from unitransformer.config import Accelerator
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import DATA_FOLDER
from unitransformer.machine.calibration import Calibration, WorkSamples
from unitransformer.machine.calibration_store import read_calibration
from unitransformer.record.units import count

LEAST_SECONDS, DEFAULT_SECONDS, MOST_SECONDS = 1.0, 5.0, 600.0
PATIENCE_S = 300.0  # beyond the work itself: imports, and a machine busy with other things
HEADER = ("figure", "best", "median", "unit", "samples", "spread", "remark")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What was asked for, checked."""

    accelerator: Accelerator = "auto"
    devices: int | None = None  # None: all GPUs, or one CPU worker
    seconds: float = DEFAULT_SECONDS
    out: Path | None = None  # None: the store

    def __post_init__(self) -> None:
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices is {self.devices}; it must be at least 1")
        if not LEAST_SECONDS <= self.seconds <= MOST_SECONDS:
            raise ValueError(
                f"seconds is {self.seconds:g}; it must be between {LEAST_SECONDS:g} and "
                f"{MOST_SECONDS:g}"
            )

    def words(self) -> list[str]:
        """For the process that does the work."""
        words = ["--accelerator", self.accelerator, "--seconds", str(self.seconds)]
        words += [] if self.devices is None else ["--devices", str(self.devices)]
        return words + ([] if self.out is None else ["--out", str(self.out)])


def build_calibrate_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Measure what the ranks of a job reach here at best: matrix products by dtype, "
        "copying, and each collective. Kept by the machine's fingerprint, with all samples.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--accelerator", type=Accelerator, default="auto", help="auto takes GPUs if there are some"
    )
    parser.add_argument(
        "--devices", type=int | None, default=None, help="ranks; by default all GPUs or one CPU"
    )
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help="what measuring may take, about"
    )
    parser.add_argument(
        "--out",
        type=Path | None,
        default=None,
        metavar="FILE",
        help=f"by default below ${DATA_FOLDER} or the user's folder for data",
    )
    return parser


def read_calibrate_options(given: Any) -> CalibrateOptions:
    """What was asked for; raises ValueError for a number out of range."""
    return CalibrateOptions(
        accelerator=given.accelerator,
        devices=given.devices,
        seconds=given.seconds if math.isfinite(given.seconds) else math.inf,
        out=given.out,
    )


def calibrate(options: CalibrateOptions) -> str:
    """Measure, keep, and say what was found.

    Raises:
        ValueError: hardware that is not there.
        RuntimeError: a rank failed.
    """
    limit_s = PATIENCE_S + 20 * options.seconds
    printed = run_module("unitransformer.calibrate", options.words(), limit_s=limit_s)
    path = Path(printed.strip().splitlines()[-1])
    return f"{render(read_calibration(path))}\n{path}"


def render(calibration: Calibration) -> str:
    """Every figure with its unit, the count of its samples and their spread."""
    machine = calibration.machine
    where = [
        *dict.fromkeys(c.device for rank in calibration.ranks for c in rank if c.threads is None)
    ]
    told = [
        f"machine     {machine.fingerprint}: {machine.cpu or 'processor not told'}, "
        f"{count(machine.cpu_cores, 'core')}{''.join(f', {name}' for name in where)}",
        f"software    {', '.join(f'{name} {v}' for name, v in machine.software.items())}",
        f"ranks       {calibration.num_ranks} at once, {_threads(calibration)}"
        f"{calibration.elapsed_s:.1f} s, {calibration.made_at}",
        "",
        tabulate(list(_rows(calibration)), headers=HEADER, disable_numparse=True),
        "",
        *(f"not measured: {name}: {why}" for name, why in calibration.left_out.items()),
    ]
    if not calibration.collectives:
        told.append("not measured: collectives: one rank sends nothing; ask for --devices 2")
    return "\n".join(told)


def _threads(calibration: Calibration) -> str:
    threads = calibration.ranks[0][0].threads
    return "" if threads is None else f"{count(threads, 'thread')} each, "


def _rows(calibration: Calibration) -> Iterator[tuple[str, ...]]:
    for dtype in calibration.dtypes:
        products = [ceiling.best_product for ceiling in calibration.ceilings(dtype)]
        remark = f"each rank; {max(products, key=lambda p: p.best_per_s).name}"
        yield (f"matmul {dtype}", *_cells(products, 1e9, "GFLOP/s"), remark)
    copies = [max((c.copy for c in rank), key=lambda s: s.best_per_s) for rank in calibration.ranks]
    yield ("copy", *_cells(copies, 1e9, "GB/s"), "each rank; bytes read and written")
    for collective, points in calibration.collectives.items():
        num_samples = sum(len(point.seconds) for point in points)
        try:
            fitted = calibration.fit(collective)
        except ValueError as error:
            yield (collective, "", "", "", str(num_samples), "", str(error))
            continue
        within = f"median {fitted.median_error:.0%}, largest {fitted.largest_error:.0%}"
        remark = f"error of the sizes held out: {within}"
        alpha_us, gb_per_s = fitted.model.alpha_s * 1e6, fitted.model.bytes_per_s / 1e9
        yield (f"{collective} alpha", "", f"{alpha_us:.3g}", "us", str(num_samples), "", remark)
        yield (f"{collective} B", "", f"{gb_per_s:.3g}", "GB/s", str(num_samples), "", "")


def _cells(ranks: Sequence[WorkSamples], scale: float, unit: str) -> tuple[str, ...]:
    """Best of all ranks, mean of their medians; count and range of all samples."""
    best = max(samples.best_per_s for samples in ranks) / scale
    median = statistics.fmean(samples.median_per_s for samples in ranks) / scale
    rates = [samples.work / second / scale for samples in ranks for second in samples.seconds]
    spread = f"{min(rates):.3g} to {max(rates):.3g}"
    return f"{best:.3g}", f"{median:.3g}", unit, str(len(rates)), spread

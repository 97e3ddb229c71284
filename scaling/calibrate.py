"""`python -m scaling calibrate`: measures what this machine's ranks reach, and prints a table.

A subprocess does the work, since it needs torch.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from unitransformer.cli import Parser, only_reports
from unitransformer.config import Accelerator
from unitransformer.files import check_writable
from unitransformer.launch.subprocess_module import run_module
from unitransformer.launch.variables import DATA_FOLDER
from unitransformer.machine.calibration import Calibration, WorkSamples
from unitransformer.machine.calibration_store import read_calibration
from unitransformer.record.units import format_count

MIN_SECONDS, DEFAULT_SECONDS, MAX_SECONDS = 1.0, 5.0, 600.0
START_UP_S = 300.0  # for imports, and for a busy machine
HEADER = ("quantity", "best", "median", "unit", "samples", "range", "note")


def build_calibrate_parser() -> Parser:
    parser = Parser(
        description="Measure the best rates that the ranks of a job reach on this machine: matrix "
        "products by dtype, copying, and each collective. Stores them with all samples.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for name, kind, default, text in (
        ("accelerator", Accelerator, "auto", "auto uses GPUs if there are any"),
        ("devices", int | None, None, "ranks; default: all GPUs, or one CPU"),
        ("seconds", float, DEFAULT_SECONDS, "approximate time to measure"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    place = f"default: a file below ${DATA_FOLDER} or the user's data folder"
    parser.add_argument("--out", type=Path | None, default=None, metavar="FILE", help=place)
    return parser


def run_calibrate(given: Any) -> int:
    """Measures, stores a calibration, prints its table and path, and returns the exit code.

    Raises:
        ValueError: a number out of range, a path that cannot be written, or missing hardware.
        RuntimeError: a rank failed.
    """
    if given.devices is not None and given.devices < 1:
        raise ValueError(f"devices is {given.devices}; it must be at least 1")
    if not MIN_SECONDS <= given.seconds <= MAX_SECONDS:
        limits = f"between {MIN_SECONDS:g} and {MAX_SECONDS:g}"
        raise ValueError(f"seconds is {given.seconds:g}; it must be {limits}")
    arguments = ["--accelerator", given.accelerator, "--seconds", str(given.seconds)]
    arguments += [] if given.devices is None else ["--devices", str(given.devices)]
    if given.out is not None:
        check_writable("out", given.out, is_folder=False)
        arguments += ["--out", str(given.out.absolute())]
    only_reports()
    limit_s = START_UP_S + 20 * given.seconds
    printed = run_module("unitransformer.calibrate", arguments, limit_s=limit_s)
    path = Path(printed.strip().splitlines()[-1])
    print(f"{render(read_calibration(path))}\n{path}")
    return 0


def render(calibration: Calibration) -> str:
    """Returns every rate with its unit, number of samples and range, as text."""
    machine = calibration.machine
    parts = [machine.cpu or "unknown processor", format_count(machine.cpu_cores, "core")]
    parts += dict.fromkeys(c.device for r in calibration.ranks for c in r if c.threads is None)
    threads = calibration.ranks[0][0].threads
    per_rank = "" if threads is None else f"{format_count(threads, 'thread')} each, "
    lines = [
        f"machine     {machine.fingerprint}: {', '.join(parts)}",
        f"software    {', '.join(f'{name} {v}' for name, v in machine.software.items())}",
        f"ranks       {calibration.num_ranks} at once, {per_rank}"
        f"{calibration.elapsed_s:.1f} s, {calibration.made_at}",
        "",
        tabulate(list(_rows(calibration)), headers=HEADER, disable_numparse=True),
        "",
        *(f"not measured: {name}: {why}" for name, why in calibration.left_out.items()),
    ]
    if not calibration.collectives:
        lines.append("not measured: collectives: one rank sends nothing; use --devices 2")
    return "\n".join(lines)


def _rows(calibration: Calibration) -> Iterator[tuple[str, ...]]:
    for dtype in calibration.dtypes:
        products = [ceiling.best_product for ceiling in calibration.ceilings(dtype)]
        note = f"per rank; {max(products, key=lambda p: p.best_per_s).name}"
        yield (f"matmul {dtype}", *_cells(products, 1e9, "GFLOP/s"), note)
    copies = [max((c.copy for c in rank), key=lambda s: s.best_per_s) for rank in calibration.ranks]
    yield ("copy", *_cells(copies, 1e9, "GB/s"), "per rank; bytes read and written")
    for collective, timings in calibration.collectives.items():
        num_samples = str(sum(len(timing.seconds) for timing in timings))
        try:
            fitted = calibration.fit(collective)
        except ValueError as error:
            yield (collective, "", "", "", num_samples, "", str(error))
            continue
        errors = f"median {fitted.median_error:.0%}, largest {fitted.largest_error:.0%}"
        note = f"error at held-out sizes: {errors}"
        alpha_us, gb_per_s = fitted.alpha_s * 1e6, fitted.bytes_per_s / 1e9
        yield (f"{collective} alpha", "", f"{alpha_us:.3g}", "us", num_samples, "", note)
        yield (f"{collective} B", "", f"{gb_per_s:.3g}", "GB/s", num_samples, "", "")


def _cells(ranks: Sequence[WorkSamples], scale: float, unit: str) -> tuple[str, ...]:
    """Returns the best of all ranks, mean of their medians, unit, count and range of samples."""
    best = max(samples.best_per_s for samples in ranks) / scale
    median = statistics.fmean(samples.median_per_s for samples in ranks) / scale
    rates = [samples.work / second / scale for samples in ranks for second in samples.seconds]
    limits = f"{min(rates):.3g} to {max(rates):.3g}"
    return f"{best:.3g}", f"{median:.3g}", unit, str(len(rates)), limits

"""Measures what this machine's ranks reach; a file out.

`python -m unitransformer.calibrate`:

0 done | 1 a rank failed | 2 bad usage. The path of the file is the last line it prints; an error is
one line. Under `torchrun` or `srun` it is one of their ranks.
"""

import argparse
import datetime
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
import torch.distributed as dist

from unitransformer.cli import fail
from unitransformer.config import Accelerator, ParallelConfig
from unitransformer.launch import devices as process
from unitransformer.launch import environment
from unitransformer.launch.failures import RankFailure, report_failure
from unitransformer.launch.launcher import is_launched_rank, launch
from unitransformer.machine import ceilings
from unitransformer.machine.calibration import Calibration, Ceiling
from unitransformer.machine.calibration_store import default_path, write_calibration
from unitransformer.machine.collectives import measure_collectives
from unitransformer.machine.host import Machine, describe_machine

DEFAULT_SECONDS = 5.0
COLLECTIVES_SHARE = 0.5  # of the time, where there are several ranks
TIMEOUT = datetime.timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What was asked for."""

    accelerator: Accelerator = "auto"
    devices: int | None = None  # None: all GPUs, one CPU worker, or what a launcher has started
    seconds: float = DEFAULT_SECONDS
    out: Path | None = None  # None: the store

    def __post_init__(self) -> None:
        if not 1 <= self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; it must be at least 1")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices is {self.devices}; it must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write, say where; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return calibrate(_parse(words), words)
    except ValueError as error:
        report_failure(error, is_bad_usage=True)
        return _fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        report_failure(error)
        return _fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _fail("stopped before the end; nothing is written", 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(words: Sequence[str]) -> CalibrationOptions:
    parser = _Parser(prog="python -m unitransformer.calibrate", allow_abbrev=False)
    parser.add_argument("--accelerator", choices=get_args(Accelerator), default="auto")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS)
    parser.add_argument("--out", type=Path)
    return CalibrationOptions(**vars(parser.parse_args(words)))


def calibrate(options: CalibrationOptions, words: Sequence[str]) -> int:
    """Measure here, or in ranks to be started; returns the exit code.

    Raises:
        ValueError: hardware that is not there.
        RuntimeError: a rank failed.
    """
    environment.adopt_launcher()
    parallel, device = _resolve(options)
    if parallel.world_size == 1 or environment.launched_shape() is not None:
        return _measure_and_write(options, parallel, device, words)
    ended = launch(
        parallel.devices,
        lambda: _be_rank(options, parallel, device, words),
        command=[sys.executable, "-m", "unitransformer.calibrate", *words],
        fork=device == "cpu",
    )
    if isinstance(ended, RankFailure):
        if ended.is_bad_usage:
            raise ValueError(ended.message)
        told = f"rank {ended.rank} of {parallel.world_size}: {ended.type}: {ended.message}"
        return _fail(told, 1)
    if ended:
        return _fail(f"stopped by {signal.Signals(ended).name}; nothing is written", 128 + ended)
    return 0


def _resolve(options: CalibrationOptions) -> tuple[ParallelConfig, str]:
    num_gpus = process.count_gpus() if options.accelerator != "cpu" else 0
    devices, num_nodes = environment.launched_shape() or (max(1, num_gpus), 1)
    parallel = ParallelConfig(
        accelerator=options.accelerator,
        devices=options.devices or devices,
        num_nodes=num_nodes,
    )
    device = process.choose_device(parallel)
    return replace(parallel, accelerator=device), device


def _measure_and_write(
    options: CalibrationOptions, parallel: ParallelConfig, device: str, words: Sequence[str]
) -> int:
    calibration = measure(parallel, device, options.seconds, command=_command(words))
    if calibration is not None:
        path = options.out or default_path(calibration)
        write_calibration(calibration, path)
        print(path, flush=True)
    return 0


def _be_rank(
    options: CalibrationOptions, parallel: ParallelConfig, device: str, words: Sequence[str]
) -> int:
    try:
        return _measure_and_write(options, parallel, device, words)
    except KeyboardInterrupt:  # whoever started the ranks says so, once
        return 1


def _command(words: Sequence[str]) -> str:
    return f"python -m scaling calibrate {shlex.join(words)}".strip()


def measure(
    parallel: ParallelConfig, device: str, seconds: float, *, command: str
) -> Calibration | None:
    """What all ranks reach, on the first; None on the others. All of them call this.

    Raises:
        RuntimeError: ranks stand on unlike machines, which no fingerprint covers.
    """
    process.set_up_process(parallel, device)
    place = _place(device)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    started_s = time.monotonic()
    if parallel.world_size > 1:
        _join_others(place)
    share = 1 - COLLECTIVES_SHARE * (parallel.world_size > 1)
    left_out = {str(name): why for name, why in ceilings.why_not_measured(place).items() if why}
    own = _measure_all(place, seconds * share)
    collectives = (
        measure_collectives(place, budget_s=seconds * COLLECTIVES_SHARE)
        if parallel.world_size > 1
        else {}
    )
    ranks = _gather((describe_this_machine(), own))
    if parallel.world_size > 1:
        dist.destroy_process_group()
    if environment.process_rank() != 0:
        return None
    _check_alike([machine for machine, _ in ranks])
    return Calibration(
        machine=ranks[0][0],
        made_at=started,
        command=command,
        device=device,
        num_ranks=parallel.world_size,
        left_out=left_out,
        ranks=tuple(ceilings for _, ceilings in ranks),
        collectives=collectives,
        elapsed_s=time.monotonic() - started_s,
    )


def _place(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _join_others(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)


def _measure_all(place: torch.device, budget_s: float) -> tuple[Ceiling, ...]:
    dtypes = [dtype for dtype, why in ceilings.why_not_measured(place).items() if why is None]
    share_s = budget_s / len(dtypes)
    return tuple(ceilings.measure_dtype(place, dtype, budget_s=share_s) for dtype in dtypes)


def _gather(own: Any) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _check_alike(machines: Sequence[Machine]) -> None:
    unlike = {machine.fingerprint: machine for machine in machines}
    if len(unlike) > 1:
        told = " and ".join(map(str, unlike.values()))
        raise RuntimeError(f"ranks stand on unlike machines, {told}; calibrate each alone")


def describe_this_machine() -> Machine:
    """This machine with the GPUs torch sees, and versions of what runs and connects them."""
    software = {"torch": torch.__version__, "gloo": f"of torch {torch.__version__}"}
    gpus = [torch.cuda.get_device_name(index) for index in range(process.count_gpus())]
    return describe_machine(gpus, software | process.gpu_software())


def _fail(message: str, code: int) -> int:
    """Print the error unless whoever started this rank reports it; returns the exit code."""
    if not is_launched_rank():
        fail(message, code)
    return code


if __name__ == "__main__":
    sys.exit(main())

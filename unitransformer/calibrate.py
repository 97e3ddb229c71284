"""Measures the matmul, copy and collective speeds that this machine's ranks reach.

`python -m unitransformer.calibrate` writes a calibration file and prints its path as the last line.
Under `torchrun` or `srun`, the process is one of their ranks. Exit codes: 0 done, 1 a rank failed,
2 bad usage.
"""

import datetime
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import torch.distributed as dist

from unitransformer.cli import Parser, explain_parse_error, fail, run_main
from unitransformer.config import Accelerator, ParallelConfig
from unitransformer.launch import devices, environment
from unitransformer.launch.failures import RankFailure, is_launched_rank, report_failure
from unitransformer.launch.launcher import launch
from unitransformer.machine import ceilings
from unitransformer.machine.calibration import Calibration, Ceiling
from unitransformer.machine.calibration_store import default_path, write_calibration
from unitransformer.machine.collectives import measure_collectives
from unitransformer.machine.host import Machine, describe_machine

DEFAULT_SECONDS = 5.0
COLLECTIVES_SHARE = 0.5  # of the time, with several ranks
TIMEOUT = datetime.timedelta(minutes=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the file, prints its path and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return calibrate(_parse(arguments), arguments)
    except ValueError as error:
        report_failure(error, is_bad_usage=True)
        return _fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        report_failure(error)
        return _fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 1)


def _parse(arguments: Sequence[str]) -> jsonargparse.Namespace:
    parser = Parser(prog="python -m unitransformer.calibrate")
    parser.add_argument("--accelerator", type=Accelerator, default="auto")
    # Without --devices: all GPUs, one CPU rank, or the launcher's ranks.
    parser.add_argument("--devices", type=int | None, default=None)
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS)
    parser.add_argument("--out", type=Path | None, default=None)  # or the folder of calibrations
    try:
        options = parser.parse_args(list(arguments))
    except jsonargparse.ArgumentError as error:
        raise ValueError(explain_parse_error(str(error), parser)) from error
    if not 1 <= options.seconds < math.inf:
        raise ValueError(f"seconds is {options.seconds}; it must be at least 1")
    if options.devices is not None and options.devices < 1:
        raise ValueError(f"devices is {options.devices}; it must be at least 1")
    return options


def calibrate(options: jsonargparse.Namespace, arguments: Sequence[str]) -> int:
    """Measures in this process or in ranks that it starts; returns the exit code.

    Raises:
        ValueError: the requested hardware is missing.
        RuntimeError: a rank failed.
    """
    environment.adopt_launcher()
    num_gpus = devices.count_gpus() if options.accelerator != "cpu" else 0
    num_devices, num_nodes = environment.launched_shape() or (max(1, num_gpus), 1)
    parallel = ParallelConfig(
        accelerator=options.accelerator,
        devices=options.devices or num_devices,
        num_nodes=num_nodes,
    )
    parallel = replace(parallel, accelerator=devices.choose_device(parallel))
    command = f"python -m scaling calibrate {shlex.join(arguments)}".strip()
    if parallel.world_size == 1 or environment.launched_shape() is not None:
        return _measure_and_write(options, parallel, command)

    def measure_as_rank() -> int:
        try:
            return _measure_and_write(options, parallel, command)
        except KeyboardInterrupt:  # the process that started the ranks prints the error
            return 1

    result = launch(
        parallel.devices,
        measure_as_rank,
        command=[sys.executable, "-m", "unitransformer.calibrate", *arguments],
        fork=parallel.accelerator == "cpu",
    )
    if isinstance(result, RankFailure):
        if result.is_bad_usage:
            raise ValueError(result.message)
        rank = f"rank {result.rank} of {parallel.world_size}"
        return _fail(f"{rank}: {result.type}: {result.message}", 1)
    if result > 128:
        return _fail(f"stopped by {signal.Signals(result - 128).name}; nothing was written", result)
    return result


def _measure_and_write(
    options: jsonargparse.Namespace, parallel: ParallelConfig, command: str
) -> int:
    calibration = measure(parallel, options.seconds, command=command)
    if calibration is not None:
        path = options.out or default_path(calibration)
        write_calibration(calibration, path)
        print(path, flush=True)
    return 0


def measure(parallel: ParallelConfig, seconds: float, *, command: str) -> Calibration | None:
    """Returns the calibration on rank 0 and None on the others; all ranks call this.

    Raises:
        RuntimeError: the ranks run on different machines, which one fingerprint cannot describe.
    """
    devices.set_up_process(parallel, parallel.accelerator)
    on_gpu = parallel.accelerator == "cuda"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    started_s = time.monotonic()
    collectives: dict[Any, Any] = {}
    reasons = ceilings.why_not_measured(device)
    if parallel.world_size == 1:
        ranks = [(describe_this_machine(), _measure_ceilings(device, seconds))]
    else:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        ceilings_here = _measure_ceilings(device, seconds * (1 - COLLECTIVES_SHARE))
        collectives = measure_collectives(device, budget_s=seconds * COLLECTIVES_SHARE)
        ranks = [None] * parallel.world_size  # type: ignore[list-item]
        dist.all_gather_object(ranks, (describe_this_machine(), ceilings_here))
        dist.destroy_process_group()
    if environment.process_rank() != 0:
        return None
    check_same_machine([machine for machine, _ in ranks])
    return Calibration(
        machine=ranks[0][0],
        made_at=started_at,
        command=command,
        device=parallel.accelerator,
        num_ranks=parallel.world_size,
        left_out={str(name): why for name, why in reasons.items() if why},
        ranks=tuple(reached for _, reached in ranks),
        collectives=collectives,
        elapsed_s=time.monotonic() - started_s,
    )


def _measure_ceilings(device: torch.device, budget_s: float) -> tuple[Ceiling, ...]:
    dtypes = [dtype for dtype, why in ceilings.why_not_measured(device).items() if why is None]
    share_s = budget_s / len(dtypes)
    return tuple(ceilings.measure_ceiling(device, dtype, budget_s=share_s) for dtype in dtypes)


def check_same_machine(machines: Sequence[Machine]) -> None:
    different = {machine.fingerprint: machine for machine in machines}
    if len(different) > 1:
        names = " and ".join(map(str, different.values()))
        raise RuntimeError(f"ranks run on different machines, {names}; calibrate each separately")


def describe_this_machine() -> Machine:
    """Returns this machine, its GPUs, and the versions of torch, gloo and the GPU software."""
    software = {"torch": torch.__version__, "gloo": f"of torch {torch.__version__}"}
    gpus = [torch.cuda.get_device_name(index) for index in range(devices.count_gpus())]
    return describe_machine(gpus, software | devices.gpu_software())


def _fail(message: str, code: int) -> int:
    """Prints the error unless the launcher of this rank reports it; returns the exit code."""
    if not is_launched_rank():
        fail(message, code)
    return code


if __name__ == "__main__":
    sys.exit(run_main(main))

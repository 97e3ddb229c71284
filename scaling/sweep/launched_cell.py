"""Runs one cell on several nodes without SLURM: every rank of torchrun runs this command.

The first rank claims the cell, waits for the training process that it starts, and writes the
outcome. The others start a training process each, and report how it failed in a folder that all
nodes see. The first rank alone decides whether the cell runs: others may see files of the sweep
later. If it does not train, it says why in that folder, and the others end too.
"""

import contextlib
import hashlib
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from scaling.recipe_process import ProcessResult, Runner, RunnerOptions, run_alone
from scaling.store.outcome import CELLS, FILE, STUDY, load_outcome
from scaling.sweep.claims import find_holders
from scaling.sweep.engine import Sweep, Unobserved, open_folder
from scaling.sweep.options import SweepOptions
from scaling.sweep.plan import CellTask, distinct_cells, open_planner
from scaling.sweep.run_cell import CACHE, CACHE_VARIABLE, now
from unitransformer.config import Recipe
from unitransformer.files import read_if_there, write_atomically
from unitransformer.launch.failures import (
    BAD_USAGE,
    ERROR_FILE,
    amend_record,
    first_failure,
    read_failures,
    unreported_failure,
    write_failure,
)
from unitransformer.launch.process_tree import die_with_parent, end_process
from unitransformer.launch.signals import STOP_SIGNALS, STOPPED_EXIT_CODE, StopRequested
from unitransformer.launch.signals import handle_signals as handling
from unitransformer.launch.variables import MASTER_VARIABLES, RUN_FOLDER

RANKS = "ranks"  # folder in that of the sweep, with a folder per launch of a cell under torchrun
PORT = 29_500  # torch's default
WAIT_S = 3.0  # from the first failure until the other ranks have reported theirs
NOT_RUN = "not-run"  # in the folder of a cell: why its first rank does not train
POLL_S = 0.5
# A note of an earlier launch stays until its first rank has started again, at about the same time.
STALE_S = 10.0


def launch_lines(
    tasks: Sequence[CellTask], arguments: Sequence[str], *, is_search: bool = False
) -> list[str]:
    """Returns lines that say how to run the cells of several nodes; empty if there are none.

    Args:
        tasks: the unfinished ones.
        arguments: the command line of the sweep.
        is_search: each cell is the first of a search, whose others depend on its result.
    """
    several = [task for task in tasks if task.num_nodes > 1]
    if not several:
        return []
    if is_search:
        searches = "1 search needs" if len(several) == 1 else f"{len(several)} searches need"
        return [f"{searches} several nodes, and so SLURM: python -m slurm.submit sweep\n"]
    cells = "1 cell needs" if len(several) == 1 else f"{len(several)} cells need"
    lines = [
        f"{cells} several nodes. SLURM: python -m slurm.submit sweep. Without it, run each line on "
        "every node, from a folder that all nodes share, with RANK 0 on this node, 1 on the next:\n"
    ]
    for task in several:
        assert task.config is not None
        torchrun = (
            f"torchrun --nnodes {task.num_nodes} --node-rank RANK --nproc-per-node "
            f"{task.config.parallel.devices} --master-addr {socket.gethostname()} "
            f"--master-port {PORT} -m scaling sweep "
        )
        lines.append(f"  {torchrun}{shlex.join([*arguments, '--run-cell', task.name])}\n")
    return lines


def run_launched(options: SweepOptions, launcher: Mapping[str, str]) -> tuple[int, str]:
    """Runs the cell `options.run_cell` as one rank; returns the exit code and how it ended.

    Args:
        launcher: the variables by which torchrun numbers the ranks.

    Raises ValueError without torchrun, for another number of ranks than the cell has, and for a
    cell that is not in the study or that another process runs.
    """
    name = options.run_cell or ""
    task = _find_task(options, name)
    if not {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= launcher.keys():
        raise ValueError(
            f"run-cell is {name}, and no torchrun has started this process; the sweep without "
            "--run-cell prints the command for every node"
        )
    rank, errors = int(launcher["RANK"]), options.out / RANKS / f"{name}-{_id_of(launcher)}"
    if not (options.out / STUDY).exists():
        open_folder(options.out, options.study, options.limits)
    errors.mkdir(parents=True, exist_ok=True)
    report = errors / f"{rank}.failure"
    report.unlink(missing_ok=True)
    variables = {**launcher, ERROR_FILE: str(report.absolute())}
    if rank != 0:
        folder = (options.out / CELLS / name).absolute()
        cache = {} if CACHE_VARIABLE in os.environ else {CACHE_VARIABLE: str(folder / CACHE)}
        variables |= {RUN_FOLDER: str(folder), **cache}
        return _follow(task, variables, report, rank)
    note, begun = errors / NOT_RUN, threading.Event()
    note.unlink(missing_ok=True)
    try:
        with handling(STOP_SIGNALS, _stop):
            code, text = _lead(options, task, variables, errors, begun)
    except BaseException as error:
        # A signal reaches the other ranks as well, which stop and save together.
        if not begun.is_set() or not isinstance(error, KeyboardInterrupt):
            _write_note(note, BAD_USAGE, str(error) or type(error).__name__)
        raise
    if not begun.is_set():
        _write_note(note, code, text)
    return code, text


def _id_of(launcher: Mapping[str, str]) -> str:
    """Returns a name in which two launches differ that run at once, perhaps for the same cell."""
    variables = [launcher.get(name, "") for name in (*MASTER_VARIABLES, "TORCHELASTIC_RUN_ID")]
    return hashlib.sha256("\n".join(variables).encode()).hexdigest()[:8]


def _write_note(path: Path, code: int, text: str) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{code} {text}".encode())


def _find_task(options: SweepOptions, name: str) -> CellTask:
    for cell in distinct_cells(options.study):
        for repeat in range(1, options.study.repeats + 1):
            task = CellTask(cell=cell, repeat=repeat, config=None)
            if task.name == name:
                return task
    raise ValueError(
        f"run-cell is {name}, and the study has no such cell; the sweep without --run-cell prints "
        "the names of cells on several nodes"
    )


def _outcome(options: SweepOptions, task: CellTask) -> str | None:
    """Returns the status of a finished cell; None if it has to run."""
    with contextlib.suppress(OSError, ValueError):
        status = load_outcome(options.out / CELLS / task.name / FILE).status
        return None if status in options.retry else status
    return None


def _follow(
    task: CellTask, variables: Mapping[str, str], report: Path, rank: int
) -> tuple[int, str]:
    """Trains as a rank that is not the first; returns its exit code.

    If the first rank does not train, returns what it says, or raises ValueError if it has failed.
    """
    parent = os.getpid()
    child = subprocess.Popen(
        [sys.executable, "-m", f"recipes.{task.cell.recipe}", *task.cell.arguments],
        env={**os.environ, **variables},
        preexec_fn=lambda: die_with_parent(parent),
    )
    note, is_over_s = report.with_name(NOT_RUN), math.inf
    with handling(STOP_SIGNALS, lambda number, _: child.send_signal(number)):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(POLL_S)
                break
            text = read_if_there(note)
            is_over_s = min(is_over_s, time.monotonic() + STALE_S) if text else math.inf
            if time.monotonic() >= is_over_s:
                end_process(child)
                said, _, reason = text.partition(" ")
                if said == "0":
                    return 0, reason
                raise ValueError(f"the first rank has not run {task.name}: {reason}")
    if code not in (0, STOPPED_EXIT_CODE) and not report.exists():
        write_failure(unreported_failure(rank, code, node=socket.gethostname()), report)
    return (code if code >= 0 else 128 - code), ""


def _lead(
    options: SweepOptions,
    task: CellTask,
    variables: Mapping[str, str],
    errors: Path,
    begun: threading.Event,
) -> tuple[int, str]:
    """Claims the cell, trains as the first rank, and writes the outcome.

    Returns the exit code, and how the cell ended. Sets `begun` when it starts to train.
    """
    if (outcome := _outcome(options, task)) is not None:
        return 0, f"{task.name}: {outcome} already; --retry {outcome} runs it again"
    with open_planner() as planner:
        task = planner.task(task.cell, task.repeat)
        _, host = planner.machine()
    if task.config is not None:
        _check_shape(task, variables)
    open_folder(options.out, options.study, options.limits)
    sweep = Sweep(
        folder=options.out,
        agenda=lambda _: [task],
        limits=options.limits,
        runner=lambda _: _first_rank(variables, errors, begun),
        host=host,
        num_nodes=None,
        retry=options.retry,
        retry_before=options.retry_before or now(),
    )
    summary = sweep.work(Unobserved(), max_cells=1)
    if not summary.statuses_here and not summary.statuses:
        holder = find_holders(options.out).get(task.name)
        where = f" on {holder.host}" if holder else ""
        raise ValueError(f"run-cell is {task.name}, which another process runs{where}; wait for it")
    shutil.rmtree(errors, ignore_errors=True)
    code = 0 if set(summary.statuses) == {"ok"} else 1
    return code, f"{task.cell.command}: {summary.format()}"


def _stop(number: int, _: object) -> None:
    raise StopRequested(f"stopped by {signal.Signals(number).name}")


def _check_shape(task: CellTask, launcher: Mapping[str, str]) -> None:
    assert task.config is not None
    parallel = task.config.parallel
    devices = int(launcher["LOCAL_WORLD_SIZE"])
    nodes = int(launcher["WORLD_SIZE"]) // devices
    if (nodes, devices) != (parallel.num_nodes, parallel.devices):
        raise ValueError(
            f"run-cell is {task.name}, which runs {parallel.devices} ranks on each of "
            f"{parallel.num_nodes} nodes, and torchrun has started {devices} on each of {nodes}; "
            f"give --nnodes {parallel.num_nodes} --nproc-per-node {parallel.devices}"
        )


def _first_rank(launcher: Mapping[str, str], errors: Path, begun: threading.Event) -> Runner:
    """Returns a `Runner` of rank 0, which writes into the record which rank failed first."""

    def run(
        recipe: Recipe, arguments: Sequence[str], **options: Unpack[RunnerOptions]
    ) -> ProcessResult:
        started_s, begin_s = time.time() - 1, time.monotonic()
        given: dict[str, Any] = {**options}
        given["variables"] = {**launcher, **(options.get("variables") or {})}
        begun.set()
        try:
            ended = run_alone(recipe, arguments, **given)
        except StopRequested:  # torchrun ends the other ranks of a node after a failure
            if not _wait_for_failures(errors):
                raise
            ended = ProcessResult(exit_code=1, elapsed_s=time.monotonic() - begin_s)
        if ended.exit_code not in (0, STOPPED_EXIT_CODE, None) and _wait_for_failures(errors):
            first = first_failure(read_failures(errors))
            for path in options["log"].parent.glob("*.json"):
                amend_record(path, first, since_s=started_s)
            if not any(options["log"].parent.glob("*.json")):
                with options["log"].open("a") as log:
                    log.write(f"error: rank {first.rank}: {first.message}\n")
        return ended

    return run


def _wait_for_failures(errors: Path) -> bool:
    """Waits until the ranks have reported their failures; returns whether any has."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and len(read_failures(errors)) < 2:
        time.sleep(0.1)
    return bool(read_failures(errors))

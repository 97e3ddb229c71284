"""Builds sweeps that run on a fake machine instead of starting recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaling.recipe_process import ProcessResult
from scaling.store.outcome import CellOutcome, write_outcome
from scaling.sweep.engine import Sweep, SweepSummary
from scaling.sweep.plan import CellTask, sort_tasks
from scaling.sweep.run_cell import Limits
from scaling.sweep.study import Cell, Study, read_study
from tests.builders.records import make_config, make_crashed, make_record, with_metrics
from unitransformer.config import ParallelConfig, RunConfig, to_dict
from unitransformer.record.schema import Record, write_record

LIMITS = Limits(limit_s=60, memory_limit_bytes=2**30, recheck=0)


CAPACITY = 24  # samples per device that fit in memory in 32-true; bf16-true fits twice as many


@dataclass
class FakeMachine:
    """Pretends to run tasks: a batch above `capacity` is out of memory, others end well.

    Args:
        runs: names of the tasks that ran, in order.
        crashes, late: names of tasks that crash, or exceed their time limit.
        out_of_memory: exit code of a run that is out of memory; None: it exceeds its limit.
    """

    tasks: Mapping[str, CellTask]
    runs: list[str] = field(default_factory=list)
    crashes: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    out_of_memory: int | None = None
    capacity: int = CAPACITY

    def __call__(self, task: CellTask) -> "FakeMachine":
        self.task = task
        return self

    def run(self, log: Path) -> ProcessResult:
        config = self.task.config
        assert config is not None
        self.runs.append(self.task.name)
        log.write_text("it began\n")
        factor = 2 if config.parallel.precision == "bf16-true" else 1
        if config.batch_size > factor * self.capacity:
            if self.out_of_memory is None:
                return ProcessResult(exit_code=None, elapsed_s=1.0, ending="oom")
            oom_record = make_crashed() | {"status": "oom"}
            write_record(make_record_of(config, oom_record), log.parent / "x-1.json")
            return ProcessResult(exit_code=self.out_of_memory, elapsed_s=1.0)
        if self.task.name in self.late:
            return ProcessResult(exit_code=None, elapsed_s=1.0, ending="timeout")
        if self.task.name in self.crashes:
            log.write_text(f"it began\nerror: broke in {log.parent}\n")
            write_record(make_record_of(config, make_crashed()), log.parent / "x-1.json")
            return ProcessResult(exit_code=1, elapsed_s=1.0)
        write_record(make_record_of(config), log.parent / "x-1.json")
        return ProcessResult(exit_code=0, elapsed_s=1.0)


def make_record_of(config: RunConfig, record: Record | None = None) -> Record:
    """A record of a run of `config`."""
    changed = (record or make_record()) | {
        "config": to_dict(config),
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
    }
    return with_metrics(changed) if changed["status"] == "ok" else changed


def write_hung_cell(record: Record, sweep: Path) -> None:
    """A cell whose run wrote its record and then hung, so that it ended as a timeout."""
    outcome = CellOutcome(
        cell="0123456789ab",
        repeat=1,
        recipe="gpt",
        options={},
        command="",
        status="timeout",
        record="x-1.json",
    )
    folder = sweep / "cells" / outcome.name
    write_record(record, folder / "x-1.json")
    write_outcome(outcome, folder)


class Silent:
    """Shows no progress."""

    def cell_started(self, task: CellTask) -> None: ...
    def cell_finished(self, task: CellTask, outcome: CellOutcome) -> None: ...


def make_study(**changes: Any) -> Study:
    axes = {"precision": ["32-true", "bf16-true"], "batch-size": ["8", "16", "32", "64", "128"]}
    return read_study({"recipe": "gpt", "axes": axes} | changes)


def make_tasks(study: Study) -> list[CellTask]:
    """The tasks of a study in order, without asking the recipes for their configs."""
    repeats = range(1, study.repeats + 1)
    return sort_tasks([make_task(cell, repeat) for repeat in repeats for cell in study.cells()])


def make_task(cell: Cell, repeat: int) -> CellTask:
    parallel = ParallelConfig(
        accelerator="cpu", strategy="single", precision=cell.options["precision"]
    )
    size = int(cell.options.get("batch-size", "8"))
    config = replace(make_config(), batch_size=size, parallel=parallel)
    return CellTask(cell=cell, repeat=repeat, config=config)


def make_sweep(
    folder: Path, tasks: Sequence[CellTask], machine: FakeMachine | None = None, **changes: Any
) -> tuple[Sweep, FakeMachine]:
    """A sweep of `tasks` in `folder`, and the machine that it runs on."""
    machine = machine or FakeMachine({task.name: task for task in tasks})
    folder.mkdir(exist_ok=True)

    def runner(task: CellTask) -> Any:
        machine(task)
        return lambda recipe, arguments, *, log, **limits: machine.run(log)

    options = {"agenda": lambda _: tasks, "limits": LIMITS} | changes
    return Sweep(folder=folder, runner=runner, **options), machine


def work(
    folder: Path, tasks: Sequence[CellTask], **changes: Any
) -> tuple[SweepSummary, FakeMachine]:
    """Runs a sweep to its end."""
    sweep, machine = make_sweep(folder, tasks, **changes)
    return sweep.work(Silent()), machine

"""The sweep on a machine of straw: what runs, what is settled, what is kept."""

import errno
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from test_store import make_config, make_crashed, make_record, with_figures

from scaling.exit_status import judge
from scaling.recipe_process import Ended
from scaling.store.outcome import Outcome
from scaling.sweep import engine, run_cell
from scaling.sweep.claims import CLAIMS
from scaling.sweep.command import _stops_by_signals
from scaling.sweep.engine import CELLS, Summary, Sweep, open_folder
from scaling.sweep.job_status import ToldToJob, tell_summary
from scaling.sweep.plan import Task, in_order
from scaling.sweep.run_cell import Limits
from scaling.sweep.study import Cell, Study, read_study
from unitransformer.config import ParallelConfig, RunConfig, to_dict
from unitransformer.launch.failures import errno_of
from unitransformer.launch.signals import EXIT_CODE, StopAsked
from unitransformer.launch.variables import SWEEP_FILE
from unitransformer.record.schema import Record, write_record
from unitransformer.record.seals import seal

LIMITS = Limits(limit_s=60, memory_limit_bytes=2**30, recheck=0)
CAPACITY = 24  # samples a device takes at once, in 32-true; twice that in bf16-true


@dataclass
class Straw:
    """A machine that runs a batch that fits."""

    tasks: Mapping[str, Task]
    runs: list[str] = field(default_factory=list)
    crashes: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    out_of_memory: int | None = None  # exit code of what does not fit; None: it passes a limit
    capacity: int = CAPACITY

    def __call__(self, task: Task) -> "Straw":
        self.task = task
        return self

    def run(self, log: Path) -> Ended:
        config = self.task.config
        assert config is not None
        self.runs.append(self.task.name)
        log.write_text("it began\n")
        factor = 2 if config.parallel.precision == "bf16-true" else 1
        if config.batch_size > factor * self.capacity:
            if self.out_of_memory is None:
                return Ended(exit_code=None, elapsed_s=1.0, ending="oom")
            lacking = make_crashed() | {"status": "oom"}
            write_record(make_record_of(config, lacking), log.parent / "x-1.json")
            return Ended(exit_code=self.out_of_memory, elapsed_s=1.0)
        if self.task.name in self.late:
            return Ended(exit_code=None, elapsed_s=1.0, ending="timeout")
        if self.task.name in self.crashes:
            log.write_text(f"it began\nerror: broke in {log.parent}\n")
            write_record(make_record_of(config, make_crashed()), log.parent / "x-1.json")
            return Ended(exit_code=1, elapsed_s=1.0)
        write_record(make_record_of(config), log.parent / "x-1.json")
        return Ended(exit_code=0, elapsed_s=1.0)


def make_record_of(config: RunConfig, record: Record | None = None) -> Record:
    """A record of a run of `config`."""
    changed = (record or make_record()) | {
        "config": to_dict(config),
        "world_size": config.parallel.world_size,
        "global_batch_size": config.global_batch_size,
    }
    return with_figures(changed) if changed["status"] == "ok" else changed


class Silent:
    def begins(self, task: Task) -> None: ...
    def ended(self, task: Task, outcome: Outcome) -> None: ...


def make_study(**changes: Any) -> Study:
    axes = {"precision": ["32-true", "bf16-true"], "batch-size": ["8", "16", "32", "64", "128"]}
    return read_study({"recipe": "gpt", "axes": axes} | changes)


def make_tasks(study: Study) -> list[Task]:
    """What the recipes would answer, without asking them."""
    repeats = range(1, study.repeats + 1)
    return in_order([make_task(cell, repeat) for repeat in repeats for cell in study.cells()])


def make_task(cell: Cell, repeat: int) -> Task:
    parallel = ParallelConfig(
        accelerator="cpu", strategy="single", precision=cell.options["precision"]
    )
    size = int(cell.options.get("batch-size", "8"))
    config = replace(make_config(), batch_size=size, parallel=parallel)
    return Task(cell=cell, repeat=repeat, config=config)


def make_sweep(
    folder: Path, tasks: Sequence[Task], straw: Straw | None = None, **changes: Any
) -> tuple[Sweep, Straw]:
    straw = straw or Straw({task.name: task for task in tasks})
    folder.mkdir(exist_ok=True)

    def runner(task: Task) -> Any:
        straw(task)
        return lambda recipe, arguments, *, log, **limits: straw.run(log)

    told = {"agenda": lambda _: tasks, "limits": LIMITS} | changes
    return Sweep(folder=folder, runner=runner, **told), straw


def work(folder: Path, tasks: Sequence[Task], **changes: Any) -> tuple[Summary, Straw]:
    one, straw = make_sweep(folder, tasks, **changes)
    return one.work(Silent()), straw


# ---------------------------------------------------------------------------------- whole


def test_a_lack_of_memory_settles_all_that_needs_more(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    summary, straw = work(tmp_path / "s", tasks)
    # 32-true fits up to 16, bf16-true up to 32.
    assert summary.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}
    assert summary.left == 0
    sizes = {task.name: task.config.batch_size for task in tasks if task.config}
    assert sorted(sizes[name] for name in straw.runs) == [8, 8, 16, 16, 32, 32, 64]


def test_an_inferred_cell_names_its_cause_and_ran_nothing(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    one, _ = make_sweep(tmp_path / "s", tasks)
    one.work(Silent())
    _, done = one.look()
    inferred = [outcome for outcome in done.values() if outcome.status == "oom-inferred"]
    real = {outcome.cell for outcome in done.values() if outcome.status == "oom"}
    assert {outcome.inferred_from for outcome in inferred} <= real
    assert all(outcome.started_at is None and outcome.record is None for outcome in inferred)
    assert all(outcome.reason for outcome in inferred)


def test_all_inferred_cells_are_run_when_asked_to(tmp_path: Path) -> None:
    limits = replace(LIMITS, recheck=1)
    summary, straw = work(tmp_path / "s", make_tasks(make_study()), limits=limits)
    assert summary.statuses == {"ok": 5, "oom": 5}
    assert len(straw.runs) == 10


def test_a_cell_that_fits_after_all_takes_inferences_back(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    # The largest is run after all, and there is room for it: what did not fit settles nothing now.
    largest = {"precision": "32-true", "batch-size": "128"}
    again = next(task for task in tasks if task.cell.options == largest)
    shutil.rmtree(tmp_path / "s" / CELLS / again.name)
    work(tmp_path / "s", [again], straw=Straw({}, capacity=1000))
    summary, straw = work(tmp_path / "s", tasks, straw=Straw({}, capacity=1000))
    assert summary.statuses == {"ok": 8, "oom": 2}  # these two were seen
    others = [("32-true", "64"), ("bf16-true", "128")]
    options = {task.name: tuple(task.cell.options.values()) for task in tasks}
    assert sorted(options[name] for name in straw.runs) == others


def test_finished_cells_are_kept_and_failed_ones_tried_again_only_if_asked(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(repeats="1"))
    broken = frozenset(task.name for task in tasks[:2])
    folder = tmp_path / "s"
    summary, straw = work(folder, tasks, straw=Straw({}, crashes=broken))
    assert summary.statuses["crashed"] == 2
    again, straw = work(folder, tasks)
    assert straw.runs == []
    assert again.statuses == summary.statuses
    mended, straw = work(folder, tasks, retry=frozenset({"crashed"}))
    assert set(straw.runs) == broken
    assert "crashed" not in mended.statuses


RETRIED = ("oom", "oom-inferred", "timeout", "crashed")


@pytest.mark.parametrize("status", RETRIED)
def test_cells_of_a_status_that_is_tried_again_are_run(status: str, tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    broken, late = (t.name for t in tasks if t.cell.options["batch-size"] == "16")
    folder = tmp_path / "s"
    work(folder, tasks, straw=Straw({}, crashes=frozenset({broken}), late=frozenset({late})))
    _, done = make_sweep(folder, tasks)[0].look()
    before = {name for name, outcome in done.items() if outcome.status == status}
    assert before
    # Without --retry nothing runs, with it those do, and what they settled if it fits after all.
    assert work(folder, tasks)[1].runs == []
    _, straw = work(folder, tasks, straw=Straw({}, capacity=1000), retry=frozenset({status}))
    assert set(straw.runs) >= before
    assert Counter(straw.runs).most_common(1)[0][1] == 1


def test_what_lacks_memory_again_settles_again(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    folder = tmp_path / "s"
    first, straw = work(folder, tasks)
    lacking = straw.runs.copy()
    again, straw = work(folder, tasks, retry=frozenset({"oom"}))
    assert again.statuses == first.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}
    assert len(straw.runs) == 2
    assert set(straw.runs) < set(lacking)


# ---------------------------------------------------------------------------------- machines

SMALL = {"cpu": "x", "memory_gib": 16.0, "gpus": []}
LARGE = {"cpu": "x", "memory_gib": 64.0, "gpus": []}


def test_what_lacks_the_memory_of_one_machine_settles_nothing_on_another(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    folder = tmp_path / "s"
    straw = Straw({}, out_of_memory=1)
    one, _ = make_sweep(folder, tasks, straw=straw, host=SMALL)
    one.work(Silent(), max_cells=1)
    summary, straw = work(folder, tasks, straw=Straw({}, capacity=1000), host=LARGE)
    assert straw.runs == [tasks[1].name]
    assert summary.statuses == {"ok": 1, "oom": 1}
    # On the small machine the larger cell has not run, and what did not fit is not refuted.
    shutil.rmtree(folder / CELLS / tasks[1].name)
    summary, straw = work(folder, tasks, host=SMALL)
    assert straw.runs == []
    assert summary.statuses == {"oom": 1, "oom-inferred": 1}
    # What was settled there is finished for all.
    assert work(folder, tasks, host=LARGE)[1].runs == []


def test_what_passed_the_limit_of_a_sweep_settles_on_any_machine(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    one, _ = make_sweep(tmp_path / "s", tasks, host=SMALL)
    one.work(Silent(), max_cells=1)
    summary, straw = work(tmp_path / "s", tasks, host=LARGE)
    assert straw.runs == []
    assert summary.statuses == {"oom": 1, "oom-inferred": 1}


def test_outcomes_of_before_machines_were_told_are_read_and_kept(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    for path in (tmp_path / "s" / CELLS).glob("*/outcome.json"):
        told = json.loads(path.read_text())
        old = {name: told[name] for name in told if name not in ("host", "checks", "seals")}
        path.write_text(json.dumps(seal(old), indent=1))
    summary, straw = work(tmp_path / "s", tasks, host=LARGE)
    assert straw.runs == []
    assert summary.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}


# ---------------------------------------------------------------------------------- checks


def test_of_all_that_one_cell_settles_at_least_one_is_run_and_told(tmp_path: Path) -> None:
    sizes = ["16", "32", "48", "64", "80", "96", "128"]
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": sizes}))
    limits = replace(LIMITS, recheck=1e-9)  # too little for a share of them
    summary, straw = work(tmp_path / "s", tasks, limits=limits)
    # 16 fits, 32 does not and settles five, one of which runs.
    assert summary.statuses == {"ok": 1, "oom": 2, "oom-inferred": 4}
    assert len(straw.runs) == 3
    assert (summary.checked, summary.refuted) == (1, 0)
    assert "; 1 inferred lack of memory checked by a run, 0 refuted" in summary.in_words()


def test_a_check_that_fits_is_told_as_refuted(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    one, _ = make_sweep(tmp_path / "s", tasks)
    one.work(Silent(), max_cells=1)
    limits = replace(LIMITS, recheck=0.1)
    summary, _ = work(tmp_path / "s", tasks, limits=limits, straw=Straw({}, capacity=1000))
    assert (summary.checked, summary.refuted) == (1, 1)
    assert summary.statuses == {"ok": 1, "oom": 1}


def test_tasks_of_an_array_try_each_cell_again_once(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())[:3]
    broken = Straw({}, crashes=frozenset(task.name for task in tasks))
    work(tmp_path / "s", tasks, straw=broken)
    since = run_cell.now()
    tried = []
    for _ in range(4):  # one after another, each for one cell; they fail again
        told = {"retry": frozenset({"crashed"}), "retry_before": since}
        straw = Straw({}, crashes=broken.crashes)
        one, _ = make_sweep(tmp_path / "s", tasks, straw=straw, **told)
        one.work(Silent(), max_cells=1)
        tried += straw.runs
    assert sorted(tried) == sorted(task.name for task in tasks)


def test_a_damaged_outcome_is_measured_again(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    path = tmp_path / "s" / CELLS / tasks[0].name / "outcome.json"
    path.write_text(path.read_text().replace('"elapsed_s": 1.0', '"elapsed_s": 2.0'))
    _, straw = work(tmp_path / "s", tasks)
    assert straw.runs == [tasks[0].name]


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    claims = tmp_path / "s" / CLAIMS
    claims.mkdir(parents=True)
    with FileLock(claims / f"{tasks[0].name}.lock"):
        summary, straw = work(tmp_path / "s", tasks)
    assert tasks[0].name not in straw.runs
    assert summary.left == 1
    assert "1 left to other processes" in summary.in_words()


def test_what_a_recipe_refuses_is_told_and_not_run(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    tasks[0] = replace(tasks[0], config=None, refusal="precision bf16-mixed: Tesla T4 has none")
    one, straw = make_sweep(tmp_path / "s", tasks)
    one.work(Silent())
    outcome = one.look()[1][tasks[0].name]
    assert (outcome.status, outcome.reason) == ("refused", tasks[0].refusal)
    assert tasks[0].name not in straw.runs


def test_a_crashed_cell_tells_the_rank_and_no_place_of_the_machine(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    straw = Straw({}, crashes=frozenset({tasks[0].name}))
    one, _ = make_sweep(tmp_path / "s", tasks, straw=straw)
    one.work(Silent())
    outcome = one.look()[1][tasks[0].name]
    assert outcome.reason == "rank 0: RuntimeError: it broke"
    assert outcome.last_lines[-1] == f"error: broke in {CELLS}/{tasks[0].name}"
    assert str(tmp_path) not in str(outcome)


def test_the_job_that_started_it_is_told_which_cell_runs_and_how_all_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "told"
    monkeypatch.setenv(SWEEP_FILE, str(file))
    seen = []

    class Looking(Silent):
        def begins(self, task: Task) -> None:
            seen.append(json.loads(file.read_text()))

    tasks = make_tasks(make_study())
    one, _ = make_sweep(tmp_path / "s", tasks)
    tell_summary(one.work(ToldToJob(Looking(), tmp_path / "s"), max_cells=1))
    assert seen == [{"cell": str(tmp_path / "s" / CELLS / tasks[0].name)}]
    told = json.loads(file.read_text())
    assert (told["statuses"], told["own"], told["left"]) == ({"ok": 1}, {"ok": 1}, 9)


def test_a_full_disk_stops_the_sweep_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(make_study())
    real, written = engine.write_outcome, []

    def write(outcome: Outcome, folder: Path) -> Path:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(outcome)
        return real(outcome, folder)

    monkeypatch.setattr(engine, "write_outcome", write)
    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "s", tasks)
    monkeypatch.undo()
    summary, straw = work(tmp_path / "s", tasks)
    assert len(straw.runs) == 5  # of seven that run, two were kept
    assert summary.statuses["ok"] == 5


def test_a_run_that_met_a_full_disk_says_so_by_number_whatever_is_free_now(tmp_path: Path) -> None:
    crashed = make_crashed()
    full = crashed | {"error": {**crashed["error"], "type": "OSError", "errno": errno.ENOSPC}}
    run_cell.check_disk(tmp_path, crashed)
    with pytest.raises(OSError, match="No space left on device") as raised:
        run_cell.check_disk(tmp_path, full)
    assert raised.value.errno == errno.ENOSPC


def test_what_follows_from_a_full_disk_carries_its_number() -> None:
    follows, full = RuntimeError("the checkpoint is not whole"), OSError(errno.ENOSPC, "No space")
    follows.__cause__ = full
    assert errno_of(follows) == errno_of(full) == errno.ENOSPC
    assert errno_of(KeyError("no number")) is None


def test_a_failure_on_a_full_disk_is_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(make_study())
    straw = Straw({}, crashes=frozenset(task.name for task in tasks))

    def full(place: Path, record: Record | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_cell, "check_disk", full)
    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "s", tasks, straw=straw)
    assert make_sweep(tmp_path / "s", tasks)[0].look()[1] == {}


@pytest.mark.parametrize("exit_code", [-signal.SIGTERM, EXIT_CODE, 1])
def test_a_cell_that_a_signal_to_all_processes_ended_first_is_given_back(
    exit_code: int, tmp_path: Path
) -> None:
    tasks = make_tasks(make_study())[:1]
    late = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))

    def runner(task: Task) -> Any:
        def run(*_: Any, log: Path, **limits: Any) -> Ended:
            log.touch()
            if exit_code == 1:  # of its ranks one alone was ended
                record = make_crashed()
                record["error"] |= {"type": "SIGTERM"}
                assert task.config is not None
                write_record(make_record_of(task.config, record), log.parent / "x-1.json")
            late.start()
            return Ended(exit_code=exit_code, elapsed_s=1.0)

        return run

    one, _ = make_sweep(tmp_path / "s", tasks)
    with _stops_by_signals(), pytest.raises(StopAsked):
        replace(one, runner=runner).work(Silent())
    assert one.look()[1] == {}


@pytest.mark.alone
def test_a_look_at_settled_cells_costs_in_proportion_to_them(tmp_path: Path) -> None:
    def look_s(count: int) -> float:
        sizes = [str(size) for size in range(8, 8 + count)]
        tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": sizes}))
        work(tmp_path / str(count), tasks)
        one, _ = make_sweep(tmp_path / str(count), tasks)
        _, done = one.look()
        assert Counter(o.status for o in done.values())["oom-inferred"] == count - 18
        times_s = []
        for _ in range(9):
            before_s = time.process_time()
            one.look()
            times_s.append(time.process_time() - before_s)
        return statistics.median(times_s)

    # Four times the cells: four times the time, where comparing each with each would take sixteen.
    assert look_s(200) / look_s(50) < 9


# ---------------------------------------------------------------------------------- folder


def test_two_sweeps_with_different_definitions_do_not_share_a_folder(tmp_path: Path) -> None:
    limits = Limits(limit_s=60)
    open_folder(tmp_path / "s", make_study(), limits)
    open_folder(tmp_path / "s", make_study(), limits)
    other = {"precision": ["32-true", "bf16-true"], "batch-size": ["9"]}
    with pytest.raises(ValueError, match=r'batch-size is \["8", .* there and \["9"\] here'):
        open_folder(tmp_path / "s", make_study(axes=other), limits)
    with pytest.raises(ValueError, match="memory_limit_bytes is null there and 1024 here"):
        open_folder(tmp_path / "s", make_study(), replace(limits, memory_limit_bytes=1024))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else"):
        open_folder(tmp_path, make_study(), Limits(limit_s=60))
    assert not (tmp_path / "study.json").exists()


def test_a_folder_whose_sweep_was_killed_at_its_start_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / ".study.json.0123abcd").write_text("{")
    open_folder(tmp_path, make_study(), Limits(limit_s=60))
    assert (tmp_path / "study.json").exists()


# ---------------------------------------------------------------------------------- order


def test_every_value_of_every_axis_is_seen_before_the_rest_and_cheap_ones_first() -> None:
    tasks = make_tasks(make_study(repeats="2"))
    assert [task.repeat for task in tasks] == [1] * 10 + [2] * 10
    first = tasks[:6]
    shown = {value for task in first for value in task.cell.options.values()}
    assert shown == {"8", "16", "32", "64", "128", "32-true", "bf16-true"}
    assert first[0].cell.options["batch-size"] == "8"


# ---------------------------------------------------------------------------------- status


@pytest.mark.parametrize(
    ("ended", "status", "kernel", "judged"),
    [
        (Ended(exit_code=0, elapsed_s=1), "ok", False, "ok"),
        (Ended(exit_code=0, elapsed_s=1), None, False, "crashed"),
        (Ended(exit_code=1, elapsed_s=1), "crashed", False, "crashed"),
        (Ended(exit_code=1, elapsed_s=1), "crashed", True, "crashed"),
        (Ended(exit_code=1, elapsed_s=1), "SIGKILL", True, "oom"),
        (Ended(exit_code=1, elapsed_s=1), "SIGKILL", False, "crashed"),
        (Ended(exit_code=2, elapsed_s=1), None, True, "refused"),
        (Ended(exit_code=-15, elapsed_s=1), None, True, "preempted"),
        (Ended(exit_code=1, elapsed_s=1), "oom", False, "oom"),
        (Ended(exit_code=-9, elapsed_s=1), None, True, "oom"),
        (Ended(exit_code=-9, elapsed_s=1), None, False, "crashed"),
        (Ended(exit_code=2, elapsed_s=1), None, False, "refused"),
        (Ended(exit_code=75, elapsed_s=1), None, False, "preempted"),
        (Ended(exit_code=143, elapsed_s=1), None, False, "preempted"),
        (Ended(exit_code=1, elapsed_s=1), "preempted", False, "preempted"),
        (Ended(exit_code=None, elapsed_s=1, ending="timeout"), "ok", False, "timeout"),
        (Ended(exit_code=None, elapsed_s=1, ending="oom"), None, False, "oom"),
    ],
)
def test_the_status_follows_from_exit_code_limit_and_record(
    ended: Ended, status: str | None, kernel: bool, judged: str
) -> None:
    error = {"type": "SIGKILL"} if status == "SIGKILL" else None
    told = "crashed" if error else status
    record = None if status is None else {"status": told, "error": error}
    assert judge(ended, record, killed_by_kernel=kernel) == judged

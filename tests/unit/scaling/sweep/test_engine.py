"""Tests sweeps on a fake machine: cells that run, cells that are inferred, stored outcomes."""

import errno
import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling import exit_status
from scaling.exit_status import decide_status
from scaling.recipe_process import ProcessResult
from scaling.store.outcome import CellOutcome
from scaling.store.reader import load_store
from scaling.sweep import engine, run_cell
from scaling.sweep.claims import CLAIMS, claim
from scaling.sweep.command import _stop_signals_raise
from scaling.sweep.engine import CELLS, open_folder
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import Limits
from tests.builders.records import make_crashed
from tests.builders.sweeps import (
    LIMITS,
    FakeMachine,
    Silent,
    make_record_of,
    make_study,
    make_sweep,
    make_tasks,
    work,
)
from unitransformer.launch.failures import failure_of
from unitransformer.launch.signals import STOPPED_EXIT_CODE, StopRequested
from unitransformer.launch.variables import SWEEP_FILE
from unitransformer.record.checksums import add_checksums
from unitransformer.record.schema import Record, write_record

# ---------------------------------------------------------------------------------- whole


def test_an_out_of_memory_cell_implies_that_larger_cells_are_too(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    summary, machine = work(tmp_path / "s", tasks)
    # 32-true fits up to 16, bf16-true up to 32.
    assert summary.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}
    assert summary.left == 0
    sizes = {task.name: task.config.batch_size for task in tasks if task.config}
    assert sorted(sizes[name] for name in machine.runs) == [8, 8, 16, 16, 32, 32, 64]


def test_an_inferred_cell_names_its_cause_and_ran_nothing(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    one, _ = make_sweep(tmp_path / "s", tasks)
    one.work(Silent())
    _, done = one.scan()
    inferred = [outcome for outcome in done.values() if outcome.status == "oom-inferred"]
    real = {outcome.cell for outcome in done.values() if outcome.status == "oom"}
    assert {outcome.inferred_from for outcome in inferred} <= real
    assert all(outcome.started_at is None and outcome.record is None for outcome in inferred)
    assert all(outcome.reason for outcome in inferred)


def test_all_inferred_cells_are_run_with_recheck_1(tmp_path: Path) -> None:
    limits = replace(LIMITS, recheck=1)
    summary, machine = work(tmp_path / "s", make_tasks(make_study()), limits=limits)
    assert summary.statuses == {"ok": 5, "oom": 5}
    assert len(machine.runs) == 10


def test_a_cell_that_fits_after_all_revokes_inferences(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    # The largest cell runs and fits, so earlier out-of-memory cells imply nothing now.
    largest = {"precision": "32-true", "batch-size": "128"}
    again = next(task for task in tasks if task.cell.options == largest)
    shutil.rmtree(tmp_path / "s" / CELLS / again.name)
    work(tmp_path / "s", [again], machine=FakeMachine({}, capacity=1000))
    summary, machine = work(tmp_path / "s", tasks, machine=FakeMachine({}, capacity=1000))
    assert summary.statuses == {"ok": 8, "oom": 2}  # these two really ran
    others = [("32-true", "64"), ("bf16-true", "128")]
    options = {task.name: tuple(task.cell.options.values()) for task in tasks}
    assert sorted(options[name] for name in machine.runs) == others


def test_finished_cells_are_kept_and_failed_cells_are_retried_only_on_request(
    tmp_path: Path,
) -> None:
    tasks = make_tasks(make_study(repeats="1"))
    broken = frozenset(task.name for task in tasks[:2])
    folder = tmp_path / "s"
    summary, machine = work(folder, tasks, machine=FakeMachine({}, crashes=broken))
    assert summary.statuses["crashed"] == 2
    again, machine = work(folder, tasks)
    assert machine.runs == []
    assert again.statuses == summary.statuses
    mended, machine = work(folder, tasks, retry=frozenset({"crashed"}))
    assert set(machine.runs) == broken
    assert "crashed" not in mended.statuses


def test_the_outcome_of_a_cell_names_its_record_among_other_files(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())[:1]

    class Untidy(FakeMachine):
        def run(self, log: Path) -> ProcessResult:
            result = super().run(log)
            for number in range(20):
                (log.parent / f"{number}.txt").touch()
            return result

    work(tmp_path / "s", tasks, machine=Untidy({}))
    (outcome,) = load_store([tmp_path / "s"], relative_to=tmp_path).cells
    assert outcome.outcome.record == "x-1.json"
    assert outcome.run is not None


RETRIED = ("oom", "oom-inferred", "timeout", "crashed")


@pytest.mark.parametrize("status", RETRIED)
def test_cells_of_a_retried_status_are_run(status: str, tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    broken, late = (t.name for t in tasks if t.cell.options["batch-size"] == "16")
    folder = tmp_path / "s"
    work(
        folder, tasks, machine=FakeMachine({}, crashes=frozenset({broken}), late=frozenset({late}))
    )
    _, done = make_sweep(folder, tasks)[0].scan()
    before = {name for name, outcome in done.items() if outcome.status == status}
    assert before
    # Without --retry nothing runs; with it those cells do, and cells inferred from them.
    assert work(folder, tasks)[1].runs == []
    _, machine = work(
        folder, tasks, machine=FakeMachine({}, capacity=1000), retry=frozenset({status})
    )
    assert set(machine.runs) >= before
    assert Counter(machine.runs).most_common(1)[0][1] == 1


def test_a_cell_out_of_memory_again_implies_larger_cells_again(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    folder = tmp_path / "s"
    first, machine = work(folder, tasks)
    lacking = machine.runs.copy()
    again, machine = work(folder, tasks, retry=frozenset({"oom"}))
    assert again.statuses == first.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}
    assert len(machine.runs) == 2
    assert set(machine.runs) < set(lacking)


# ---------------------------------------------------------------------------------- machines

SMALL = {"cpu": "x", "memory_gib": 16.0, "gpus": []}
LARGE = {"cpu": "x", "memory_gib": 64.0, "gpus": []}


def test_out_of_memory_on_one_machine_implies_nothing_on_another(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    folder = tmp_path / "s"
    machine = FakeMachine({}, out_of_memory=1)
    one, _ = make_sweep(folder, tasks, machine=machine, host=SMALL)
    one.work(Silent(), max_cells=1)
    summary, machine = work(folder, tasks, machine=FakeMachine({}, capacity=1000), host=LARGE)
    assert machine.runs == [tasks[1].name]
    assert summary.statuses == {"ok": 1, "oom": 1}
    # The larger cell has not run on the small machine, so the inference is not refuted there.
    shutil.rmtree(folder / CELLS / tasks[1].name)
    summary, machine = work(folder, tasks, host=SMALL)
    assert machine.runs == []
    assert summary.statuses == {"oom": 1, "oom-inferred": 1}
    # Cells inferred there are finished on all machines.
    assert work(folder, tasks, host=LARGE)[1].runs == []


def test_exceeding_the_memory_limit_of_a_sweep_implies_larger_cells_on_any_machine(
    tmp_path: Path,
) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    one, _ = make_sweep(tmp_path / "s", tasks, host=SMALL)
    one.work(Silent(), max_cells=1)
    summary, machine = work(tmp_path / "s", tasks, host=LARGE)
    assert machine.runs == []
    assert summary.statuses == {"oom": 1, "oom-inferred": 1}


def test_outcomes_without_a_recorded_machine_are_read_and_kept(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    for path in (tmp_path / "s" / CELLS).glob("*/outcome.json"):
        actual = json.loads(path.read_text())
        old = {name: actual[name] for name in actual if name not in ("host", "checks", "checksums")}
        path.write_text(json.dumps(add_checksums(old), indent=1))
    summary, machine = work(tmp_path / "s", tasks, host=LARGE)
    assert machine.runs == []
    assert summary.statuses == {"ok": 5, "oom": 2, "oom-inferred": 3}


# ---------------------------------------------------------------------------------- checks


def test_at_least_one_cell_inferred_from_a_cause_is_run_and_reported(tmp_path: Path) -> None:
    sizes = ["16", "32", "48", "64", "80", "96", "128"]
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": sizes}))
    limits = replace(LIMITS, recheck=1e-9)  # less than one cell
    summary, machine = work(tmp_path / "s", tasks, limits=limits)
    # 16 fits; 32 does not and implies five cells, one of which runs.
    assert summary.statuses == {"ok": 1, "oom": 2, "oom-inferred": 4}
    assert len(machine.runs) == 3
    assert (summary.checked, summary.refuted) == (1, 0)
    assert "; ran 1 cell inferred to be out of memory, 0 fitted" in summary.format()


def test_a_checked_inference_that_fits_is_reported_as_refuted(tmp_path: Path) -> None:
    tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": ["32", "64"]}))
    one, _ = make_sweep(tmp_path / "s", tasks)
    one.work(Silent(), max_cells=1)
    limits = replace(LIMITS, recheck=0.1)
    summary, _ = work(tmp_path / "s", tasks, limits=limits, machine=FakeMachine({}, capacity=1000))
    assert (summary.checked, summary.refuted) == (1, 1)
    assert summary.statuses == {"ok": 1, "oom": 1}


class Interrupted(FakeMachine):
    """Its run is stopped after it has written something."""

    def run(self, log: Path) -> ProcessResult:
        super().run(log)
        raise StopRequested("stopped by SIGTERM")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_retry_that_is_stopped_restores_the_finished_cell(tmp_path: Path) -> None:
    folder, tasks = tmp_path / "s", make_tasks(make_study())[:1]
    work(folder, tasks)
    before = files_of(folder / CELLS)
    again = frozenset({"ok"})
    with pytest.raises(StopRequested):
        work(folder, tasks, machine=Interrupted({}), retry=again)
    assert files_of(folder / CELLS) == before
    _, machine = work(folder, tasks, retry=again)
    assert machine.runs == [tasks[0].name]
    assert files_of(folder / CELLS) != before
    assert [path.name for path in (folder / CELLS).iterdir()] == [tasks[0].name]


def test_a_retry_that_is_killed_is_undone_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tasks = tmp_path / "s", make_tasks(make_study())[:1]
    work(folder, tasks)
    before = files_of(folder / CELLS)
    monkeypatch.setattr(run_cell, "settle_attempts", lambda folder: None)  # as after SIGKILL
    with pytest.raises(StopRequested):
        work(folder, tasks, machine=Interrupted({}), retry=frozenset({"ok"}))
    monkeypatch.undo()
    assert not load_store([folder], relative_to=folder).cells
    summary, machine = work(folder, tasks)
    assert (summary.statuses, machine.runs) == ({"ok": 1}, [])
    assert files_of(folder / CELLS) == before


def test_a_retry_killed_after_its_outcome_replaces_the_finished_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tasks = tmp_path / "s", make_tasks(make_study())[:1]
    work(folder, tasks)
    with monkeypatch.context() as patched:
        patched.setattr(run_cell, "settle_attempts", lambda folder: None)
        work(folder, tasks, retry=frozenset({"ok"}))
    after = files_of(folder / CELLS / tasks[0].name)
    run_cell.settle_attempts(folder / CELLS / tasks[0].name)
    assert files_of(folder / CELLS / tasks[0].name) == after
    assert [path.name for path in (folder / CELLS).iterdir()] == [tasks[0].name]


def test_a_cell_that_another_process_has_just_inferred_is_not_claimed_again(
    tmp_path: Path,
) -> None:
    folder, tasks = tmp_path / "s", make_tasks(make_study())
    ours, _ = make_sweep(folder, tasks)
    before = ours.scan()
    work(folder, tasks)
    scans = iter([before])  # what it saw before the other process finished all
    scan = ours.scan
    ours.scan = lambda: next(scans, None) or scan()  # type: ignore[method-assign]
    assert ours._claim() is None


def test_array_tasks_retry_each_cell_once(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())[:3]
    broken = FakeMachine({}, crashes=frozenset(task.name for task in tasks))
    work(tmp_path / "s", tasks, machine=broken)
    since = run_cell.now()
    tried = []
    for _ in range(4):  # one task after another, each for one cell; all fail again
        actual = {"retry": frozenset({"crashed"}), "retry_before": since}
        machine = FakeMachine({}, crashes=broken.crashes)
        one, _ = make_sweep(tmp_path / "s", tasks, machine=machine, **actual)
        one.work(Silent(), max_cells=1)
        tried += machine.runs
    assert sorted(tried) == sorted(task.name for task in tasks)


def test_a_damaged_outcome_is_measured_again(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    work(tmp_path / "s", tasks)
    path = tmp_path / "s" / CELLS / tasks[0].name / "outcome.json"
    path.write_text(path.read_text().replace('"elapsed_s": 1.0', '"elapsed_s": 2.0'))
    _, machine = work(tmp_path / "s", tasks)
    assert machine.runs == [tasks[0].name]


def test_a_cell_claimed_by_another_process_is_left_alone(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    claims = tmp_path / "s" / CLAIMS
    claims.mkdir(parents=True)
    claimed = claim(tmp_path / "s", tasks[0].name)
    assert claimed is not None
    with claimed:
        summary, machine = work(tmp_path / "s", tasks)
    assert tasks[0].name not in machine.runs
    assert (summary.left, summary.claimed) == (1, 1)
    assert "), 1 claimed by other processes" in summary.format()


def test_cells_that_nobody_runs_are_not_called_claimed(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    sweep, _ = make_sweep(tmp_path / "s", tasks)
    (tmp_path / "s").mkdir(exist_ok=True)
    assert sweep.work(Silent(), max_cells=0).format() == "no cell finished, 10 not run"
    assert sweep.work(Silent(), max_cells=1).format() == "1 cell finished (1 ok), 9 not run"


def test_a_refused_cell_is_reported_and_not_run(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    tasks[0] = replace(tasks[0], config=None, refusal="precision bf16-mixed: Tesla T4 has none")
    one, machine = make_sweep(tmp_path / "s", tasks)
    one.work(Silent())
    outcome = one.scan()[1][tasks[0].name]
    assert (outcome.status, outcome.reason) == ("refused", tasks[0].refusal)
    assert tasks[0].name not in machine.runs


def test_a_crashed_cell_names_the_rank_and_no_absolute_path(tmp_path: Path) -> None:
    tasks = make_tasks(make_study())
    machine = FakeMachine({}, crashes=frozenset({tasks[0].name}))
    one, _ = make_sweep(tmp_path / "s", tasks, machine=machine)
    one.work(Silent())
    outcome = one.scan()[1][tasks[0].name]
    assert outcome.reason == "rank 0: RuntimeError: it broke"
    assert outcome.last_lines[-1] == f"error: broke in {CELLS}/{tasks[0].name}"
    assert str(tmp_path) not in str(outcome)


def test_a_sweep_reports_the_running_cell_and_its_summary_to_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "status.json"
    monkeypatch.setenv(SWEEP_FILE, str(file))
    seen = []

    class Looking(Silent):
        def cell_started(self, task: CellTask) -> None:
            seen.append(json.loads(file.read_text()))

    tasks = make_tasks(make_study())
    one, _ = make_sweep(tmp_path / "s", tasks)
    one.work(Looking(), max_cells=1)
    assert seen == [{"cell": str(tmp_path / "s" / CELLS / tasks[0].name), "finished": 0}]
    actual = json.loads(file.read_text())
    assert (actual["statuses"], actual["own"], actual["left"]) == ({"ok": 1}, {"ok": 1}, 9)


def test_a_full_disk_stops_the_sweep_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(make_study())
    real, written = engine.write_outcome, []

    def write(outcome: CellOutcome, folder: Path) -> Path:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(outcome)
        return real(outcome, folder)

    monkeypatch.setattr(engine, "write_outcome", write)
    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "s", tasks)
    monkeypatch.undo()
    summary, machine = work(tmp_path / "s", tasks)
    assert len(machine.runs) == 5  # of seven that run, two were kept
    assert summary.statuses["ok"] == 5


def test_a_run_that_failed_on_a_full_disk_is_recognised_by_its_errno(tmp_path: Path) -> None:
    crashed = make_crashed()
    full = crashed | {"error": {**crashed["error"], "type": "OSError", "errno": errno.ENOSPC}}
    exit_status.check_disk(tmp_path, crashed)
    with pytest.raises(OSError, match="No space left on device") as raised:
        exit_status.check_disk(tmp_path, full)
    assert raised.value.errno == errno.ENOSPC


def test_an_error_caused_by_a_full_disk_carries_its_errno() -> None:
    follows, full = RuntimeError("the checkpoint is not whole"), OSError(errno.ENOSPC, "No space")
    follows.__cause__ = full
    assert failure_of(follows).errno == failure_of(full).errno == errno.ENOSPC
    assert failure_of(KeyError("no number")).errno is None


def test_a_failure_on_a_full_disk_is_not_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks(make_study())
    machine = FakeMachine({}, crashes=frozenset(task.name for task in tasks))

    def full(place: Path, record: Record | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exit_status, "check_disk", full)
    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "s", tasks, machine=machine)
    assert make_sweep(tmp_path / "s", tasks)[0].scan()[1] == {}


@pytest.mark.parametrize("exit_code", [-signal.SIGTERM, STOPPED_EXIT_CODE, 1])
def test_a_cell_ended_by_a_signal_to_the_whole_job_is_released(
    exit_code: int, tmp_path: Path
) -> None:
    tasks = make_tasks(make_study())[:1]
    late = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))

    def runner(task: CellTask) -> Any:
        def run(*_: Any, log: Path, **limits: Any) -> ProcessResult:
            log.touch()
            if exit_code == 1:  # only one of its ranks was ended
                record = make_crashed()
                record["error"] |= {"type": "SIGTERM"}
                assert task.config is not None
                write_record(make_record_of(task.config, record), log.parent / "x-1.json")
            late.start()
            return ProcessResult(exit_code=exit_code, elapsed_s=1.0)

        return run

    one, _ = make_sweep(tmp_path / "s", tasks)
    with _stop_signals_raise(), pytest.raises(StopRequested):
        replace(one, runner=runner).work(Silent())
    assert one.scan()[1] == {}


@pytest.mark.alone
def test_reading_outcomes_takes_time_proportional_to_their_number(tmp_path: Path) -> None:
    def look_s(count: int) -> float:
        sizes = [str(size) for size in range(8, 8 + count)]
        tasks = make_tasks(make_study(axes={"precision": "32-true", "batch-size": sizes}))
        work(tmp_path / str(count), tasks)
        one, _ = make_sweep(tmp_path / str(count), tasks)
        _, done = one.scan()
        assert Counter(o.status for o in done.values())["oom-inferred"] == count - 18
        times_s = []
        for _ in range(9):
            before_s = time.process_time()
            one.scan()
            times_s.append(time.process_time() - before_s)
        return statistics.median(times_s)

    # Four times the cells take four times as long; comparing all pairs would take sixteen.
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


def test_launches_are_added_to_a_sweep_but_not_taken_away(tmp_path: Path) -> None:
    limits = Limits(limit_s=60)
    open_folder(tmp_path, make_study(), limits)
    open_folder(tmp_path, make_study(repeats="3"), limits)
    assert json.loads((tmp_path / "study.json").read_text())["study"]["repeats"] == 3
    with pytest.raises(ValueError, match="repeats is 3 there and 1 here"):
        open_folder(tmp_path, make_study(), limits)
    other = {"precision": ["32-true", "bf16-true"], "batch-size": ["9"]}
    with pytest.raises(ValueError, match=r'batch-size is \["8", .* there and \["9"\] here'):
        open_folder(tmp_path, make_study(repeats="4", axes=other), limits)


def test_a_folder_that_is_not_a_sweep_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds something else"):
        open_folder(tmp_path, make_study(), Limits(limit_s=60))
    assert not (tmp_path / "study.json").exists()


def test_a_sweep_killed_at_its_start_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".study.json.0123abcd").write_text("{")
    open_folder(tmp_path, make_study(), Limits(limit_s=60))
    assert (tmp_path / "study.json").exists()


# ---------------------------------------------------------------------------------- order


def test_the_first_cells_cover_every_value_of_every_axis_and_are_cheap() -> None:
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
        (ProcessResult(exit_code=0, elapsed_s=1), "ok", False, "ok"),
        (ProcessResult(exit_code=0, elapsed_s=1), None, False, "crashed"),
        (ProcessResult(exit_code=1, elapsed_s=1), "crashed", False, "crashed"),
        (ProcessResult(exit_code=1, elapsed_s=1), "crashed", True, "crashed"),
        (ProcessResult(exit_code=1, elapsed_s=1), "SIGKILL", True, "oom"),
        (ProcessResult(exit_code=1, elapsed_s=1), "SIGKILL", False, "crashed"),
        (ProcessResult(exit_code=2, elapsed_s=1), None, True, "refused"),
        (ProcessResult(exit_code=-15, elapsed_s=1), None, True, "preempted"),
        (ProcessResult(exit_code=1, elapsed_s=1), "oom", False, "oom"),
        (ProcessResult(exit_code=1, elapsed_s=1), "diverged", False, "diverged"),
        (ProcessResult(exit_code=-9, elapsed_s=1), None, True, "oom"),
        (ProcessResult(exit_code=-9, elapsed_s=1), None, False, "crashed"),
        (ProcessResult(exit_code=2, elapsed_s=1), None, False, "refused"),
        (ProcessResult(exit_code=75, elapsed_s=1), None, False, "preempted"),
        (ProcessResult(exit_code=143, elapsed_s=1), None, False, "preempted"),
        (ProcessResult(exit_code=1, elapsed_s=1), "preempted", False, "preempted"),
        (ProcessResult(exit_code=None, elapsed_s=1, ending="timeout"), "ok", False, "timeout"),
        (ProcessResult(exit_code=None, elapsed_s=1, ending="oom"), None, False, "oom"),
    ],
)
def test_the_status_follows_from_exit_code_limit_and_record(
    ended: ProcessResult, status: str | None, kernel: bool, judged: str
) -> None:
    error = {"type": "SIGKILL"} if status == "SIGKILL" else None
    actual = "crashed" if error else status
    record = None if status is None else {"status": actual, "error": error}
    assert decide_status(ended, record, killed_by_kernel=kernel) == judged

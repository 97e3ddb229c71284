"""What a job makes of its shape and its end, and what is told of it; SLURM itself is elsewhere."""

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import allocation, job, settling, status, submit
from slurm.allocation import (
    check_alone,
    check_shape,
    confirmed,
    errors_of,
    option_of,
    read_allocation,
    read_words,
)
from slurm.markers import Attempt, began_at, errors_folder, last_attempt, write_attempt
from slurm.nodes import Probes, dead_nodes
from slurm.queue import Queued
from slurm.running import command_of, variables_of
from slurm.settling import Ended, settle
from unitransformer.records import PROGRESS, SWEEP_FILE

VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "node[1-2]",
}
ATTEMPT = Attempt(
    job="7", array=None, restart=0, nodes="node[1-2]", started_at="2026-01-01T00:00:00+00:00"
)
WELL = Ended(exit_code=0, is_done=True)
STOPPED = Ended(exit_code=75, reason="stopped by SIGUSR1 after step 3")


# ------------------------------------------------------------------------------------- shapes


def words_of(line: str, variables: Mapping[str, str] = VARIABLES) -> allocation.Words:
    return read_words(line.split(), read_allocation(variables))


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8", (8,)), ("8(x2)", (8, 8)), ("8(x2),4", (8, 8, 4)), ("2,1", (2, 1))],
)
def test_tasks_are_read_node_by_node(text: str, counts: tuple[int, ...]) -> None:
    given = read_allocation({**VARIABLES, "SLURM_TASKS_PER_NODE": text})
    assert given.tasks_per_node == counts
    assert given.tasks == sum(counts)


@pytest.mark.parametrize(
    ("changed", "line", "told"),
    [
        ({}, "recipes.gpt", None),
        ({}, "recipes.gpt -- --devices 8 --num-nodes=2", None),
        ({}, "recipes.gpt -- --devices 4", "--devices is 4 and the job has 8 tasks on a node"),
        ({}, "recipes.gpt -- --num-nodes=4", "--num-nodes is 4 and the job has 2 nodes"),
        ({"SLURM_TASKS_PER_NODE": "8,4"}, "recipes.gpt", "the nodes have 8, 4 tasks"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "recipes.gpt", None),
        ({"SLURM_GPUS_ON_NODE": "4"}, "recipes.gpt", "has 8 tasks and 4 GPUs on a node"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "recipes.gpt -- --accelerator cpu", None),
        ({}, "sweep -- quick", "a sweep's cells run on one node and the job has 2"),
    ],
)
def test_shapes_that_disagree_are_refused_with_the_numbers(
    changed: dict[str, str], line: str, told: str | None
) -> None:
    given = read_allocation({**VARIABLES, **changed})
    words = read_words(line.split(), given)
    if told is None:
        check_shape(given, words)
        return
    with pytest.raises(ValueError, match=re.escape(told)):
        check_shape(given, words)


def test_outside_a_job_and_inside_srun_it_says_where_it_belongs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert job.main(["recipes.gpt"]) == 2
    assert "slurm.job is run by a batch job: sbatch slurm/gpt.sbatch" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"slurm\.job starts srun itself"):
        read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"})
    # Submitted from within a task of srun: its step is not this job's.
    read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})


def test_one_of_several_tasks_of_srun_is_refused_unless_they_are_another_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = "StepId=7.batch UserId=0 State=RUNNING\n"
    told = [f"{batch}StepId=7.0 UserId=0 State=RUNNING\n"]
    monkeypatch.setattr(
        "slurm.queue.call", lambda *words: subprocess.CompletedProcess(words, 0, told[0], "")
    )
    variables = {**VARIABLES, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    given = read_allocation(variables)
    with pytest.raises(ValueError, match=r"srun has started slurm\.job 2 times"):
        check_alone(given, variables)
    check_alone(given, {**variables, "SLURM_STEP_NUM_TASKS": "1"})
    told[0] = batch
    check_alone(given, variables)


def test_the_number_of_another_jobs_array_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = read_allocation(
        {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    )
    rows = [{"JobId": "7", "ArrayJobId": "5", "ArrayTaskId": "3"}]
    monkeypatch.setattr("slurm.queue.show", lambda job: rows)
    assert confirmed(given) == given
    assert given.name == "5_3"
    rows[0] = {"JobId": "7"}
    assert confirmed(given).name == "7"
    rows.clear()  # the controller does not say
    assert confirmed(given) == given


def test_a_task_of_an_array_has_its_own_folder_and_number() -> None:
    task = {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    words = words_of("recipes.gpt -- --seed %a", task)
    assert words.folder == Path("runs/slurm/gpt-5/task-3").absolute()
    assert words.arguments == ["--seed", "3"]
    assert words_of("recipes.gpt").folder == Path("runs/slurm/gpt-7").absolute()


def started(line: str) -> list[str]:
    return command_of(words_of(line), "2026-01-01T00:00:00+00:00")


def test_ranks_go_on_where_there_is_something_to_go_on_from() -> None:
    assert started("recipes.gpt -- --seed 1")[-4:] == [
        *("--seed", "1"),
        *("--resume", "auto"),
    ]
    assert started("recipes.gpt -- --resume")[-1] == "--resume"
    sweep = started("sweep -- quick")
    assert sweep[-5:] == ["scaling", "sweep", "quick", "--max-cells", "1"]
    assert "--ntasks=1" in sweep
    assert "1" not in started("sweep -- quick --find-max-batch 64")
    assert started("sweep -- quick --max-cells 3")[-2:] == ["--max-cells", "3"]


def test_what_is_tried_again_ended_before_the_first_task_began(tmp_path: Path) -> None:
    for task, second in ((0, 9), (1, 5), (2, 7)):
        attempt = replace(ATTEMPT, started_at=f"2026-01-01T00:00:0{second}+00:00")
        write_attempt(tmp_path / f"task-{task}", attempt)
    first = began_at(tmp_path)
    assert first == "2026-01-01T00:00:05+00:00"
    words = words_of("sweep -- quick --retry oom")
    assert command_of(words, first)[-2:] == ["--retry-before", first]
    assert "--retry-before" not in started("sweep -- quick")
    assert started("sweep -- quick --retry oom --retry-before=x").count("--retry-before") == 0


def test_the_last_of_an_option_wins() -> None:
    assert option_of(["--out", "a", "--out=b"], "--out") == "b"
    assert option_of(["--output", "a"], "--out") is None


# ---------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("ended", "outcome", "code", "requeue"),
    [
        (WELL, "done", 0, False),
        (replace(WELL, exit_code=1), "done", 0, False),  # its record says so, whatever came after
        (replace(WELL, is_done=False), "failed", 1, False),
        (STOPPED, "stopped", 75, True),
        (replace(STOPPED, is_taken_back=True), "stopped", 75, False),
        (Ended(exit_code=2, is_refused=True), "refused", 2, False),
        (Ended(exit_code=1), "failed", 1, False),
        (Ended(exit_code=137, dead_nodes=["node2"]), "failed", 1, True),
    ],
)
def test_what_comes_after_an_end(ended: Ended, outcome: str, code: int, requeue: bool) -> None:
    verdict = settle(ATTEMPT, ended)
    assert (verdict.attempt.outcome, verdict.exit_code, verdict.requeue) == (outcome, code, requeue)
    assert verdict.attempt.is_requeued == requeue
    assert verdict.exclude == ended.dead_nodes


def test_exit_code_zero_without_a_record_is_no_success() -> None:
    reason = settle(ATTEMPT, replace(WELL, is_done=False)).attempt.reason
    assert reason == "it ended with exit code 0, and no record says that it is done"


@pytest.mark.parametrize(
    ("told", "code", "outcome", "reason"),
    [
        (None, 0, "failed", "it ended with exit code 0, and no record says that it is done"),
        ({"cell": "/x"}, 0, "failed", "it ended with exit code 0, and no record says that it"),
        ({"statuses": {"ok": 3}, "own": {"ok": 1}, "left": 2}, 0, "done", "of its cells 1 ok, 2"),
        ({"statuses": {"ok": 3}, "own": {}, "left": 2}, 0, "done", "nothing was left to run: 3 ok"),
        ({"statuses": {}, "own": {}, "left": 2}, 0, "done", "none finished, 2 left to other tasks"),
        ({"statuses": {"refused": 4}, "own": {}, "left": 0}, 0, "refused", "4 refused: its recip"),
        (
            {"statuses": {"ok": 3, "crashed": 1}, "own": {"crashed": 1}, "left": 0},
            1,
            "failed",
            "of its cells 1 crashed; the report of the sweep says why",
        ),
    ],
)
def test_a_sweep_is_done_when_it_says_so_itself(
    told: dict[str, object] | None, code: int, outcome: str, reason: str, tmp_path: Path
) -> None:
    given = read_allocation({**VARIABLES, "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1"})
    words = replace(words_of("sweep -- quick"), folder=tmp_path)
    errors = errors_of(given, words)
    errors.mkdir()
    if told is not None:
        Path(variables_of(given, words)[SWEEP_FILE]).write_text(json.dumps(told))
    watched = settling.Watched(exit_code=code, probes=Probes(), dead={})
    ended = settling.judge(given, words, ATTEMPT, watched, was_asked=False)
    attempt = settle(ATTEMPT, ended).attempt
    assert attempt.outcome == outcome
    assert attempt.reason.find(reason) != -1, attempt.reason


def again(ended: Ended, count: int) -> list[bool]:
    """Whether a job that ends like this every time is queued again every time."""
    before: list[Attempt] = []
    queued_again = []
    for restart in range(count):
        verdict = settle(replace(ATTEMPT, restart=restart), ended, before=before)
        before.append(verdict.attempt)
        queued_again.append(verdict.requeue)
    return queued_again


def test_nodes_may_fail_so_often_and_no_more() -> None:
    assert again(Ended(exit_code=137, dead_nodes=["node2"]), 7) == [True] * 5 + [False] * 2
    stops = [replace(ATTEMPT, outcome="stopped", is_requeued=True)] * 9
    killed = [replace(ATTEMPT, outcome="failed", is_requeued=True)] * 9  # by SLURM itself
    for before in (stops, killed):
        assert settle(ATTEMPT, Ended(exit_code=137, dead_nodes=["node2"]), before=before).requeue


@pytest.mark.parametrize(
    ("down", "reason"),
    [(["node2"], "node2 does not answer any more"), ([], "killed without a word")],
)
def test_a_start_that_could_not_settle_itself_is_settled_by_the_next(
    down: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.queue.names_of", lambda node_list: ["node1", "node2"])
    monkeypatch.setattr("slurm.queue.down", lambda names: down)
    given, words = read_allocation(VARIABLES), replace(words_of("recipes.gpt"), folder=tmp_path)
    write_attempt(tmp_path, ATTEMPT)
    lost = job._settle_lost(ATTEMPT, given, words)
    assert (lost.outcome, lost.reason) == ("failed", reason)
    assert (lost.is_requeued, lost.is_node_failure) == (True, bool(down))
    assert last_attempt(tmp_path) == lost
    # What is settled stays, and what is another job's is not for this one to settle.
    for other in (replace(ATTEMPT, outcome="stopped"), replace(ATTEMPT, job="8")):
        assert job._settle_lost(other, given, words) == other


@pytest.mark.parametrize("reason", [settling.NOT_BEGUN, settling.GIVEN_BACK])
def test_what_is_stopped_with_nothing_saved_does_not_go_round_for_ever(reason: str) -> None:
    assert again(Ended(exit_code=75, reason=reason), 5) == [True] * 4 + [False]
    # One that gets further each time does.
    assert all(again(STOPPED, 30))


def test_a_node_is_dead_only_if_none_of_its_ranks_left_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read_allocation({**VARIABLES, "SLURM_TASKS_PER_NODE": "2(x2)"})
    monkeypatch.setattr("slurm.queue.names_of", lambda node_list: ["node1", "node2"])
    (tmp_path / "0.failure").touch()
    assert dead_nodes(given, tmp_path, ["node2"]) == {"node2": [2, 3]}
    (tmp_path / "3.stopped").touch()
    assert dead_nodes(given, tmp_path, ["node2"]) == {}
    assert dead_nodes(given, tmp_path, ["node1"]) == {}


# -------------------------------------------------------------------------------------- status


def queued(state: str, *, number: str = "7", task: str = "N/A") -> Queued:
    return Queued(job=number, array=number, task=task, state=state, why="Priority", left="1:00:00")


@pytest.mark.parametrize(
    ("outcome", "row", "state", "told"),
    [
        ("running", queued("RUNNING"), "running", "1:00:00 until its time limit"),
        ("stopped", queued("PENDING"), "queued", "Priority; before: so it was"),
        ("stopped", None, "stopped", "so it was"),
        ("failed", None, "failed", "so it was"),
        ("done", None, "done", "so it was"),
        ("running", None, "lost", "killed, or a node failed (node[1-2])"),
        ("running", queued("COMPLETING"), "ending", "so it was"),
    ],
)
def test_a_job_is_told_by_the_queue_and_by_what_it_left(
    outcome: str,
    row: Queued | None,
    state: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "gpt"
    write_attempt(folder, replace(ATTEMPT, outcome=outcome, reason="so it was"))  # type: ignore[arg-type]
    (folder / "run-1").mkdir()
    progress = {"step": 3, "max_steps": 9, "pace": "5.0 ms/step", "left_s": 3700, "at_s": 100.0}
    (folder / "run-1" / PROGRESS).write_text(json.dumps(progress))
    monkeypatch.setattr("slurm.queue.list_queue", lambda: [] if row is None else [row])
    line = status.report(tmp_path, now_s=101.0).splitlines()[-1]
    assert re.search(rf"\b7 +gpt +{state} ", line), line
    assert told in line
    assert ("3/9" if state != "done" else "9/9") in line
    assert ("1:01:40" in line) == (state == "running")


def test_an_array_tells_its_cells_the_one_that_runs_and_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "job": "5", "name": "s", "target": "sweep", "arguments": ["quick", "--out", "out"],
        "array": "0-8%2", "cells": 9, "directory": str(tmp_path),
    }  # fmt: skip
    folder = tmp_path / "job"
    attempt = replace(ATTEMPT, array="5")
    write_attempt(folder / "task-0", attempt)
    (folder / "submitted").write_text(json.dumps(told))
    cells = tmp_path / "out/cells"
    for name in ("done", "runs"):
        (cells / name).mkdir(parents=True)
    (cells / "done/outcome.json").write_text('{"status": "ok"}')
    progress = {"step": 3, "max_steps": 9, "pace": "5.0 ms/step", "left_s": 70, "at_s": 100.0}
    (cells / "runs" / PROGRESS).write_text(json.dumps(progress))
    errors = errors_folder(folder / "task-0", attempt.job, attempt.restart)
    errors.mkdir()
    (errors / "sweep").write_text(json.dumps({"cell": str(cells / "runs")}))
    rows = [queued("RUNNING", task="0"), queued("PENDING", number="5", task="1-8")]
    rows = [replace(row, array="5") for row in rows]
    monkeypatch.setattr("slurm.queue.list_queue", lambda: rows)
    array, task = status.report(folder, now_s=101.0).splitlines()[2:]
    assert re.search(r"running +1/9 cells \(1 ok\) ", array)
    assert array.endswith("tasks 0-8%2: 1 running; waits: Priority")
    assert re.search(r"5_0 +s +running +3/9 +5.0 ms/step +1:10 ", task)


def test_a_running_job_that_says_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attempt(tmp_path, ATTEMPT)
    (tmp_path / "run-1").mkdir()
    progress = {"step": 3, "max_steps": 9, "pace": "", "left_s": 1, "at_s": 0.0}
    (tmp_path / "run-1" / PROGRESS).write_text(json.dumps(progress))
    monkeypatch.setattr("slurm.queue.list_queue", lambda: [queued("RUNNING")])
    assert "nothing said for 1:00:00" in status.report(tmp_path, now_s=3600.0)


def test_without_a_queue_what_was_written_last_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> list[Queued]:
        raise RuntimeError("squeue has not answered for 30 s")

    write_attempt(tmp_path, ATTEMPT)
    monkeypatch.setattr("slurm.queue.list_queue", silent)
    told = status.report(tmp_path)
    assert "the queue is not known (squeue has not answered for 30 s)" in told
    assert "running" in told


def test_a_damaged_marker_is_as_good_as_none(tmp_path: Path) -> None:
    write_attempt(tmp_path, ATTEMPT)
    (tmp_path / "attempt-7-1").write_text("{")
    assert last_attempt(tmp_path) == ATTEMPT


@pytest.mark.parametrize(("words", "told"), [(["/nowhere"], "not a folder"), ([], "no folder")])
def test_status_refuses_what_is_no_job(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status.main(words) == 2
    assert told in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 2
    assert "holds no jobs" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- submit


@pytest.fixture
def place(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to submit from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "no target given; choose one of recipes.gpt"),
        ("recipes.gtp", "target is recipes.gtp; did you mean recipes.gpt?"),
        ("recipes.gpt --nodez 2", "--nodez is not an option; did you mean --nodes?"),
        ("recipes.gpt --nodes two", "nodes is 'two'"),
        ("recipes.gpt --nodes 0", "nodes is 0; it must be at least 1"),
        ("recipes.gpt --devices -8", "devices is -8; it must be at least 1"),
        ("recipes.gpt --time yesterday", "time is 'yesterday'; give a time as SLURM takes it"),
        ("recipes.gpt --cluster nowhere", "cluster is nowhere and"),
        ("recipes.gpt --clusters /nowhere --cluster dgx", "clusters /nowhere cannot be read"),
        ("recipes.gpt --time 2", "time is 2 and the signal to save comes 120 s ahead"),
        ("recipes.gpt --clusters x.toml", "clusters is x.toml and no --cluster says which"),
        ("recipes.gpt -- --repeats 3", "--repeats after --: a job is one launch"),
        ("recipes.gpt --folder a\\b", "which cannot stand in a batch script"),
        ("recipes.gpt quick", "quick comes before --; options of the recipe come after it"),
        ("recipes.gpt -- --devices 4", "--devices after --: give it before --"),
        ("recipes.gpt -- --size 124n", "recipe gpt: size"),
        ("recipes.gpt -- --max-stepz 4", "recipe gpt: --max-stepz is not an option"),
        ("recipes.gpt -- --strategy single", "recipe gpt: strategy"),
        ("recipes.gpt --folder /proc/x", "folder /proc/x: /proc cannot be written"),
        ("sweep qiuck", "qiuck"),
        ("sweep quick --nodes 2", "nodes is 2; a sweep's cells run on one node each"),
        ("sweep quick --array 0-3", "array is 0-3; a sweep has a task for every cell"),
        ("sweep quick --max-parallel 0", "max-parallel is 0; it must be at least 1"),
        ("sweep quick -- --batch-sizee 8,16", "batch-sizee"),
        ("sweep quick --time 4", "time is 4, and 120 s for a task's start and 120 s for its end"),
        ("sweep quick -- --watch", "--watch after --: it runs nothing, so type it here: python -m"),
        ("sweep quick -- --dry-run", "type it here: python -m scaling sweep quick --dry-run"),
        ("sweep -- --recipe gpt --list", "--list after --: it runs nothing"),
        (
            "sweep single-gpu -- --devices 2 --num-nodes 1,2 --strategy ddp",
            "90 such cells, and a task of a sweep has one node; run them by slurm.submit recipes.",
        ),
        (
            "sweep node-8 --devices 4 -- --recipe gpt",
            "and a task of a sweep has 4 devices; submit with --devices 8, or leave them out",
        ),
    ],
)
def test_bad_requests_are_one_line_and_submit_nothing(
    line: str, told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*line.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert told in said.err
    assert said.err.count("\n") == 1
    assert list(place.iterdir()) == []


def test_a_dry_run_prints_a_script_and_needs_no_slurm(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "2", "--devices", "4", "--cluster", "academic", "--dry-run"]
    assert submit.main(["recipes.gpt", *options, "--", "--seed", "3"]) == 0
    script = capsys.readouterr().out
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=a100:4", "--time=12:00:00"),
        *("--partition=gpu-preempt", "--account=ml-group", f"--chdir={place}"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load python/3.11\n" in script
    assert script.endswith("  recipes.gpt -- \\\n  --seed 3\n")
    assert submit.main(["sweep", "node-8", "--dry-run", "--max-parallel", "3"]) == 0
    sweep = capsys.readouterr().out
    assert re.search(r"#SBATCH --array=0-\d+%3\n", sweep)
    assert "#SBATCH --ntasks-per-node=1\n" in sweep
    assert list(place.iterdir()) == []


def test_caches_lie_on_the_nodes_own_disk_job_by_job(tmp_path: Path) -> None:
    given = read_allocation(VARIABLES)
    words = words_of(f"--local-disk {tmp_path} recipes.gpt")
    found = [variables_of(replace(given, job=number), words) for number in ("7", "8")]
    caches = [each["TORCHINDUCTOR_CACHE_DIR"] for each in found]
    assert caches == [f"{tmp_path}/unitransformer-{number}/inductor" for number in (7, 8)]
    assert "TORCHINDUCTOR_CACHE_DIR" not in variables_of(given, words_of("sweep"))


@pytest.mark.parametrize(("seeds", "told"), [(3, "0-2%8"), (1001, "0-999%8")])
def test_more_cells_than_an_array_takes_are_several_a_task(
    seeds: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = "\n".join(["python -m recipes.gpt"] * seeds)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.planning.run_module", lambda *arguments, **options: cells)
    monkeypatch.setattr("slurm.planning._check_cells", lambda *arguments: None)
    found = submit.read_request(["sweep", "quick"]).job
    assert found.array == told
    assert found.arguments == ["quick", *(["--max-cells", "2"] if seeds > 1000 else [])]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", []),
        ("--time 2:00:00", []),
        ("--time 1:00:00", ["--time-limit", "3360"]),
        ("--time 2:00:00 -- --time-limit 7000", ["--time-limit", "7000", "--time-limit", "6960"]),
        ("--time 1:00:00 -- --time-limit=60", ["--time-limit=60"]),
    ],
)
def test_a_cell_may_take_what_the_time_of_its_job_leaves_it(
    options: str, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = "python -m recipes.gpt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.planning.run_module", lambda *arguments, **options: cells)
    monkeypatch.setattr("slurm.planning._check_cells", lambda *arguments: None)
    found = submit.read_request(["sweep", "quick", *options.split()]).job
    assert found.arguments == ["quick", *told]


def test_a_folder_is_that_of_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_attempt(tmp_path / "it's", ATTEMPT)
    assert submit.main(["recipes.gpt", "--folder", str(tmp_path / "it's")]) == 2
    assert "is that of another job; go on with it by sbatch" in capsys.readouterr().err
    assert submit._free_folder("gpt") != submit._free_folder("gpt")


def test_what_a_job_has_set_does_not_reach_the_one_it_submits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "sbatch"
    stub.write_text("#!/bin/sh\nenv\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    kept = {"SLURM_CONF": "/etc/slurm/slurm.conf", "HOME": "/home/x"}
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "RANK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "3")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    seen = dict(line.split("=", 1) for line in submit._sbatch([], "").stdout.splitlines())
    assert {name: seen.get(name) for name in kept} == kept
    assert not {"SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "RANK", "SBATCH_PARTITION"} & seen.keys()

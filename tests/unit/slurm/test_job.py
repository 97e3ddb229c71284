"""Tests how a job checks its allocation and settles its end, without a real SLURM."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import job
from slurm.batch_script import Job, render
from slurm.clusters import Cluster
from slurm.job_files import (
    JOB_END,
    SIGNAL,
    STEP,
    Attempt,
    first_started_at,
    last_attempt,
    write_attempt,
)
from slurm.runtime import outcome
from slurm.runtime.allocation import (
    check_shape,
    check_single_process,
    drop_inherited_array,
    option_of,
    read_allocation,
    read_args,
)
from slurm.runtime.node_health import Probes, find_dead_nodes
from slurm.runtime.outcome import CELL_RELEASED, EXIT_CODES, NOT_STARTED, JobEnd, decide, find_end
from slurm.runtime.srun import WatchResult, rank_variables, srun_command, sweep_command
from tests.builders.records import make_crashed
from tests.builders.slurm import ATTEMPT, REFUSES_STEPS, VARIABLES, PutStub, args_of
from unitransformer.launch.failures import RankFailure, write_failure
from unitransformer.launch.variables import SWEEP_FILE
from unitransformer.record.schema import load_record, write_record

STOPPED = JobEnd(outcome="stopped", reason="stopped by SIGUSR1 after step 3")
NODE_DIED = JobEnd(outcome="failed", dead_nodes=["node2"])
SUBMITTED_AT, ENDED_AT, REQUEUED_AT = (f"2026-01-01T0{hour}:00:00+00:00" for hour in (0, 1, 2))


# ------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8", (8,)), ("8(x2)", (8, 8)), ("8(x2),4", (8, 8, 4)), ("2,1", (2, 1))],
)
def test_tasks_are_read_node_by_node(text: str, counts: tuple[int, ...]) -> None:
    allocation = read_allocation({**VARIABLES, "SLURM_TASKS_PER_NODE": text})
    assert allocation.tasks_per_node == counts
    assert allocation.tasks == sum(counts)


@pytest.mark.parametrize(
    ("changed", "line", "error"),
    [
        ({}, "recipes.gpt", None),
        ({}, "recipes.gpt -- --devices 8 --num-nodes=2", None),
        ({}, "recipes.gpt -- --devices 4", "--devices is 4, but --ntasks-per-node of the job is 8"),
        ({}, "recipes.gpt -- --num-nodes=4", "--num-nodes is 4, but --nodes of the job is 2"),
        ({"SLURM_TASKS_PER_NODE": "8,4"}, "recipes.gpt", "the nodes have 8, 4 tasks"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "recipes.gpt", None),
        # Whole nodes of 16 GPUs.
        ({"SLURM_GPUS_ON_NODE": "16"}, "recipes.gpt", None),
        *(
            ({"SLURM_GPUS_ON_NODE": "16", "SLURM_GPUS_PER_NODE": requested}, "recipes.gpt", error)
            for requested, error in (
                ("8", None),
                ("h200:8", None),
                ("a100:4,h200:4", None),
                ("16", "has 8 tasks per node but 16 GPUs per node, and each task uses one GPU"),
                ("8g:9", "has 8 tasks per node but 9 GPUs per node"),
            )
        ),
        (
            {"SLURM_GPUS_ON_NODE": "4"},
            "recipes.gpt",
            "has 8 tasks per node but 4 GPUs per node, and each task uses one GPU; submit with "
            "--ntasks-per-node=4, or request 8 GPUs per node",
        ),
        ({"SLURM_GPUS_ON_NODE": "4"}, "recipes.gpt -- --accelerator cpu", None),
        ({}, "sweep -- quick", "the job has 2 nodes, but it runs the cells on 1"),
        ({}, "sweep -- quick --only-nodes 2", None),
    ],
)
def test_shapes_that_disagree_are_refused_with_the_numbers(
    changed: dict[str, str], line: str, error: str | None
) -> None:
    allocation = read_allocation({**VARIABLES, **changed})
    args = read_args(line.split(), allocation)
    if error is None:
        check_shape(allocation, args)
        return
    with pytest.raises(ValueError, match=re.escape(error)):
        check_shape(allocation, args)


def test_slurm_job_outside_a_job_or_inside_srun_explains_its_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert job.main(["recipes.gpt"]) == 2
    error = capsys.readouterr().err
    assert "slurm.job runs inside a batch job; submit one: sbatch slurm/gpt.sbatch" in error
    with pytest.raises(ValueError, match=r"slurm\.job starts srun itself"):
        read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"})
    # Submitted inside an srun task, whose step belongs to another job.
    read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})


def test_slurm_job_started_by_several_srun_tasks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = "StepId=7.batch UserId=0 State=RUNNING\n"
    steps = [f"{batch}StepId=7.0 UserId=0 State=RUNNING\n"]
    monkeypatch.setattr(
        "slurm.scheduler.call", lambda *line: subprocess.CompletedProcess(line, 0, steps[0], "")
    )
    variables = {**VARIABLES, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    allocation = read_allocation(variables)
    with pytest.raises(ValueError, match=r"srun has started slurm\.job 2 times"):
        check_single_process(allocation, variables)
    check_single_process(allocation, {**variables, "SLURM_STEP_NUM_TASKS": "1"})
    steps[0] = batch
    check_single_process(allocation, variables)


def test_an_inherited_array_number_of_another_job_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocation = read_allocation(
        {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    )
    rows = [{"JobId": "7", "ArrayJobId": "5", "ArrayTaskId": "3"}]
    monkeypatch.setattr("slurm.scheduler.show_job", lambda job: rows)
    assert drop_inherited_array(allocation) == allocation
    assert allocation.name == "5_3"
    rows[0] = {"JobId": "7"}
    assert drop_inherited_array(allocation).name == "7"
    rows.clear()  # the controller does not know the job
    assert drop_inherited_array(allocation) == allocation


def test_an_array_task_has_a_separate_folder_and_its_number() -> None:
    task = {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    args = args_of("recipes.gpt -- --seed %a", task)
    assert args.folder == Path("runs/slurm/gpt-5/task-3").absolute()
    assert args.arguments == ["--seed", "3"]
    assert args_of("recipes.gpt").folder == Path("runs/slurm/gpt-7").absolute()


def started(line: str, nodes: int = 1) -> list[str]:
    args, first = args_of(line), "2026-01-01T00:00:00+00:00"
    if args.target == "sweep":
        return sweep_command(args, nodes=nodes, first_started_at=first)
    return srun_command(args)


def test_ranks_resume_if_there_is_a_checkpoint() -> None:
    assert started("recipes.gpt -- --seed 1")[-4:] == ["--seed", "1", "--resume", "auto"]
    assert started("recipes.gpt -- --resume")[-1] == "--resume"
    assert started("recipes.gpt -- --no-checkpoint")[-1] == "--no-checkpoint"


def test_srun_gets_the_options_of_a_container_before_the_command_of_the_ranks(
    put_stub: PutStub, tmp_path: Path
) -> None:
    """As Pyxis needs them: srun takes what follows the command for the command's arguments."""
    put_stub("srun", f'for word in "$@"; do echo "$word"; done > {tmp_path}/asked\n')
    job = Job(
        target="recipes.gpt",
        arguments=["--seed", "1"],
        name="gpt",
        folder=f"{tmp_path}/job",
        directory=str(tmp_path),
        python="python3",
        cluster=Cluster(container="image.sqsh", container_mounts=("/data:/data",), python="py"),
    )
    script = render(job).replace("exec python3 -m slurm.job", f"echo > {tmp_path}/words")
    script = script.replace("echo >", "printf '%s\\n' >", 1)
    subprocess.run(["bash", "-c", script], check=True)
    words = (tmp_path / "words").read_text().splitlines()
    args = read_args(words, read_allocation(VARIABLES))
    subprocess.run(srun_command(args), check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[2:6] == [
        "--container-image=image.sqsh",
        f"--container-mounts=/data:/data,{tmp_path}:{tmp_path},{tmp_path}/job:{tmp_path}/job",
        f"--container-workdir={tmp_path}",
        "py",
    ]
    assert asked[6:12] == ["-m", "slurm.runtime.rank", "py", "-m", "recipes.gpt", "--seed"]


def test_one_process_runs_a_sweep_inside_a_step_or_in_the_script_of_several_nodes() -> None:
    sweep = started("sweep -- quick")
    assert sweep[-5:] == ["scaling", "sweep", "quick", "--max-cells", "1"]
    assert "--ntasks=1" in sweep
    assert "1" not in started("sweep -- quick --find-max-batch 64")
    assert started("sweep -- quick --max-cells 3")[-2:] == ["--max-cells", "3"]
    several = started("sweep -- quick --only-nodes 2 --max-cells 3", nodes=2)
    assert several[0] == sys.executable
    assert "slurm.runtime.rank" not in several


def test_only_cells_that_ended_before_the_first_task_are_retried(tmp_path: Path) -> None:
    for task, second in ((0, 9), (1, 5), (2, 7)):
        attempt = replace(ATTEMPT, started_at=f"2026-01-01T00:00:0{second}+00:00")
        write_attempt(tmp_path / f"task-{task}", attempt)
    first = first_started_at(tmp_path)
    assert first == "2026-01-01T00:00:05+00:00"
    args = args_of("sweep -- quick --retry oom")
    command = sweep_command(args, nodes=1, first_started_at=first)
    assert command[-2:] == ["--retry-before", first]
    assert "--retry-before" not in started("sweep -- quick")
    assert started("sweep -- quick --retry oom --retry-before=x").count("--retry-before") == 0


def test_the_last_of_an_option_wins() -> None:
    assert option_of(["--out", "a", "--out=b"], "--out") == "b"
    assert option_of(["--output", "a"], "--out") is None


# ---------------------------------------------------------------------------------------- ends


def watched(code: int, *, dead: Mapping[str, Sequence[int]] | None = None) -> WatchResult:
    return WatchResult(exit_code=code, probes=Probes(), dead=dead or {})


def write_run(folder: Path, record: Mapping[str, object] | None, *, age_s: float = 0) -> None:
    """Writes the record of a run, and the empty folder of its errors."""
    (folder / "run-1").mkdir()
    (folder / "errors-7-0").mkdir()
    if record is not None:
        path = folder / "run-1/gpt-1.json"
        path.write_text(json.dumps(record))
        os.utime(path, (ATTEMPT.since_s - age_s + 1, ATTEMPT.since_s - age_s + 1))


@pytest.mark.parametrize(
    ("code", "record", "age_s", "result", "reason"),
    [
        (0, {"status": "ok"}, 0, "done", ""),
        (0, {"status": "ok"}, 9, "done", ""),  # the run found its earlier record
        (1, {"status": "ok"}, 0, "done", ""),  # the record decides
        (1, {"status": "ok"}, 9, "failed", "srun exited with code 1"),
        (0, {"status": "crashed"}, 0, "failed", "exit code 0, but no record says that it is done"),
        (0, None, 0, "failed", "exit code 0, but no record says that it is done"),
        (75, {"error": {"message": "stopped at 3"}}, 0, "stopped", "stopped at 3"),
        (75, {"error": {"message": "stopped at 3"}}, 9, "stopped", NOT_STARTED),
        (75, None, 0, "stopped", NOT_STARTED),
        (143, None, 0, "stopped", NOT_STARTED),  # preempted while a rank was still starting
        (138, None, 0, "stopped", NOT_STARTED),
        (137, None, 0, "failed", "srun exited with code 137"),
        (2, None, 0, "refused", "see the error above"),
    ],
)
def test_the_record_of_a_run_decides_how_its_job_ended(
    code: int,
    record: Mapping[str, object] | None,
    age_s: float,
    result: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run(tmp_path, record, age_s=age_s)
    allocation, args = read_allocation(VARIABLES), args_of(f"--folder {tmp_path} recipes.gpt")
    for is_cancelled in (False, True):
        answers = {allocation.name: is_cancelled}
        monkeypatch.setattr("slurm.scheduler.is_cancelled_or_requeued", answers.__getitem__)
        end = find_end(allocation, args, watched(code), since_s=ATTEMPT.since_s, signaled=False)
        if is_cancelled and code != 0 and result != "done":
            assert (end.outcome, end.is_cancelled) == ("stopped", True)
            assert end.reason == f"cancelled, or already requeued by SLURM; {reason}"
        else:
            assert (end.outcome, end.is_cancelled, end.reason) == (result, False, reason)


@pytest.mark.parametrize(
    ("target", "at", "outcome", "reason"),
    [
        ("recipes.gpt", "2026-11-30T17:34:10", "stopped", NOT_STARTED),
        ("sweep", "2026-11-30T17:34:10", "stopped", CELL_RELEASED),
        ("recipes.gpt", "None", "failed", "srun exited with code 1"),
    ],
)
def test_a_job_that_slurm_preempts_before_its_ranks_start_is_stopped_and_not_failed(
    target: str, at: str, outcome: str, reason: str, tmp_path: Path, put_stub: PutStub
) -> None:
    write_run(tmp_path, None)
    put_stub("scontrol", f"echo JobId=7 JobState=RUNNING Reason=None PreemptTime={at}\n")
    allocation, args = read_allocation(VARIABLES), args_of(f"--folder {tmp_path} {target}")
    end = find_end(allocation, args, watched(1), since_s=ATTEMPT.since_s, signaled=False)
    assert (end.outcome, end.reason, end.is_cancelled) == (outcome, reason, False)
    assert decide(ATTEMPT, end).is_requeued == (outcome == "stopped")


@pytest.mark.parametrize("target", ["recipes.gpt", "sweep"])
def test_a_job_in_which_slurm_starts_no_step_is_requeued_a_limited_number_of_times(
    target: str, tmp_path: Path, put_stub: PutStub
) -> None:
    write_run(tmp_path, None)
    put_stub("scontrol", "echo JobId=7 JobState=RUNNING PreemptTime=None\n")
    put_stub("srun", REFUSES_STEPS)
    allocation, args = read_allocation(VARIABLES), args_of(f"--folder {tmp_path} {target}")
    end = find_end(allocation, args, watched(1), since_s=ATTEMPT.since_s, signaled=False)
    reason = "Invalid generic resource (gres) specification"
    assert end.reason == f"SLURM starts no step in job 7 on node[1-2]: {reason}"
    assert (end.outcome, end.dead_nodes) == ("failed", [])
    assert again(end, 6) == [True] * 3 + [False] * 3
    before = [*[replace(ATTEMPT, reason=end.reason)] * 3, replace(ATTEMPT, reason="another")]
    assert decide(ATTEMPT, end, before=before).is_requeued
    if target == "recipes.gpt":  # a rank has been started
        (args.errors / STEP).touch()
        end = find_end(allocation, args, watched(1), since_s=ATTEMPT.since_s, signaled=False)
        assert end.reason == "srun exited with code 1"
        (args.errors / STEP).unlink()
    put_stub("scontrol", "echo JobId=7 JobState=CANCELLED PreemptTime=None\n")
    end = find_end(allocation, args, watched(1), since_s=ATTEMPT.since_s, signaled=False)
    assert not decide(ATTEMPT, end).is_requeued


def test_failures_of_ranks_and_nodes_decide_how_a_job_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, None)
    monkeypatch.setattr("slurm.scheduler.is_cancelled_or_requeued", lambda _: False)
    allocation, args = read_allocation(VARIABLES), args_of(f"--folder {tmp_path} recipes.gpt")
    died = watched(137, dead={"node2": [8]})
    end = find_end(allocation, args, died, since_s=ATTEMPT.since_s, signaled=True)
    assert (end.outcome, end.dead_nodes, end.has_record) == ("failed", ["node2"], False)
    assert end.reason == "rank 8 of 16: node2 stopped responding"
    refused = RankFailure(rank=3, type="X", message="no", lines=[], is_bad_usage=True, at_s=-1.0)
    write_failure(refused, args.errors / "3.failure")
    end = find_end(allocation, args, watched(1), since_s=ATTEMPT.since_s, signaled=False)
    assert (end.outcome, end.reason) == ("refused", "no")


def test_an_interrupted_start_without_a_record_does_not_take_the_reason_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each start seems to have saved, and the job is requeued without end."""
    write_run(tmp_path, {"error": {"message": "stopped by SIGUSR1 after step 500"}}, age_s=9)
    monkeypatch.setattr("slurm.scheduler.is_cancelled_or_requeued", lambda _: False)
    args = args_of(f"--folder {tmp_path} recipes.gpt")
    lost = RankFailure(rank=0, type="DistNetworkError", message="connection closed", lines=[])
    write_failure(lost, args.errors / "0.failure")
    (args.errors / f"{SIGNAL}1").touch()
    os.utime(args.errors / f"{SIGNAL}1", (0, 0))
    allocation, since_s = read_allocation(VARIABLES), ATTEMPT.since_s
    end = find_end(allocation, args, watched(143), since_s=since_s, signaled=False)
    assert (end.outcome, end.reason) == ("stopped", NOT_STARTED)


@pytest.mark.parametrize("is_signal_first", [True, False])
def test_a_job_whose_ranks_a_signal_interrupts_before_training_is_stopped_and_not_crashed(
    is_signal_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-1").mkdir()
    write_record(make_crashed(), tmp_path / "run-1/gpt-1.json")
    monkeypatch.setattr("slurm.scheduler.is_cancelled_or_requeued", lambda _: False)
    args = args_of(f"--folder {tmp_path} recipes.gpt")
    args.errors.mkdir()
    lost = RankFailure(rank=0, type="DistNetworkError", message="connection closed", lines=[])
    write_failure(lost, args.errors / "0.failure")
    (args.errors / f"{SIGNAL}1").touch()
    at_s = time.time() - 1 if is_signal_first else time.time() + 1
    os.utime(args.errors / f"{SIGNAL}1", (at_s, at_s))
    since_s = time.time() - 60
    end = find_end(read_allocation(VARIABLES), args, watched(143), since_s=since_s, signaled=False)
    record = load_record(tmp_path / "run-1/gpt-1.json")
    if is_signal_first:
        assert (end.outcome, end.reason) == ("stopped", NOT_STARTED)
        assert (record["status"], record["error"]["message"]) == ("preempted", NOT_STARTED)
    else:
        assert (end.outcome, end.reason) == ("failed", "rank 0 of 16: connection closed")
        assert record["status"] == "crashed"


@pytest.mark.parametrize(
    ("end", "code", "is_requeued"),
    [
        (JobEnd(outcome="done"), 0, False),
        (STOPPED, 75, True),
        (replace(STOPPED, is_cancelled=True), 75, False),
        (JobEnd(outcome="refused"), 2, False),
        (JobEnd(outcome="failed"), 1, False),
        (NODE_DIED, 1, True),
    ],
)
def test_the_end_of_an_attempt_decides_whether_it_is_requeued(
    end: JobEnd, code: int, is_requeued: bool
) -> None:
    attempt = decide(ATTEMPT, end)
    assert (attempt.outcome, attempt.reason) == (end.outcome, end.reason)
    assert (EXIT_CODES[attempt.outcome], attempt.is_requeued) == (code, is_requeued)
    assert attempt.is_node_failure == bool(end.dead_nodes)


@pytest.mark.parametrize(
    ("state", "code", "result", "reason"),
    [
        (None, 0, "failed", "exit code 0, but no record says that it is done"),
        ({"cell": "/x"}, 0, "failed", "exit code 0, but no record says that it is done"),
        (
            {"statuses": {"ok": 3}, "own": {"ok": 1}, "left": 2},
            0,
            "done",
            "cells of this task: 1 ok; 2 left",
        ),
        (
            {"statuses": {"ok": 3}, "own": {}, "left": 2},
            0,
            "done",
            "no cells left to run: 3 ok; 2 left",
        ),
        (
            {"statuses": {}, "own": {}, "left": 2},
            0,
            "done",
            "no cells left to run: none finished; 2 left",
        ),
        (
            {"statuses": {"refused": 4}, "own": {}, "left": 0},
            0,
            "refused",
            "4 refused: the recipes refuse every cell of this sweep",
        ),
        (
            {"statuses": {"refused": 4}, "own": {}, "left": 0},
            1,
            "refused",
            "4 refused: the recipes refuse every cell of this sweep",
        ),
        ({"cell": "x", "finished": 0}, 143, "stopped", CELL_RELEASED),
        (
            {"statuses": {"ok": 3, "crashed": 1}, "own": {"crashed": 1}, "left": 0},
            1,
            "failed",
            "cells of this task: 1 crashed; see the report of the sweep",
        ),
    ],
)
def test_a_sweep_is_done_when_its_summary_says_so(
    state: dict[str, object] | None, code: int, result: str, reason: str, tmp_path: Path
) -> None:
    one = {**VARIABLES, "SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1"}
    args = args_of(f"--folder {tmp_path} sweep -- quick", one)
    args.errors.mkdir()
    if state is not None:
        Path(rank_variables(args, "7")[SWEEP_FILE]).write_text(json.dumps(state))
    end = find_end(read_allocation(one), args, watched(code), since_s=0.0, signaled=False)
    assert (end.outcome, end.reason) == (result, reason)


def test_a_dead_node_ends_a_sweep_over_nodes_and_an_unshared_folder_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_requeued = False
    monkeypatch.setattr("slurm.scheduler.is_cancelled_or_requeued", lambda _: is_requeued)
    args = args_of(f"--folder {tmp_path} sweep -- quick --only-nodes 2")
    args.errors.mkdir()
    for dead, expected in ((["node2"], "failed"), ([], "refused")):
        content = {"outcome": expected, "reason": "why", "dead_nodes": dead}
        (args.errors / JOB_END).write_text(json.dumps(content))
        end = find_end(read_allocation(VARIABLES), args, watched(75), since_s=0.0, signaled=False)
        assert (end.outcome, end.dead_nodes, end.reason) == (expected, dead, content["reason"])
        assert decide(ATTEMPT, end).is_requeued == bool(dead)
    content = {"outcome": "failed", "reason": "why", "dead_nodes": ["node2"]}
    (args.errors / JOB_END).write_text(json.dumps(content))
    end = find_end(read_allocation(VARIABLES), args, watched(0), since_s=0.0, signaled=False)
    assert not end.dead_nodes  # of a sweep that had no further cell
    is_requeued = True  # by SLURM, which has declared the node down
    end = find_end(read_allocation(VARIABLES), args, watched(75), since_s=0.0, signaled=False)
    assert not decide(ATTEMPT, end).is_requeued


def test_releasing_a_cell_counts_as_progress_after_others_have_finished(
    tmp_path: Path, put_stub: PutStub
) -> None:
    put_stub("scontrol", "exit 1\n")
    args = args_of(f"--folder {tmp_path} sweep -- quick --only-nodes 2")
    args.errors.mkdir()
    for finished, reason, requeued in (
        (0, CELL_RELEASED, [True] * 4 + [False]),
        (3, "stopped after 3 cells, and the current cell was released", [True] * 5),
    ):
        state = {"cell": "x", "finished": finished}
        Path(rank_variables(args, "7")[SWEEP_FILE]).write_text(json.dumps(state))
        end = find_end(read_allocation(VARIABLES), args, watched(75), since_s=0.0, signaled=True)
        assert (end.outcome, end.reason) == ("stopped", reason)
        assert again(end, 5) == requeued


def again(end: JobEnd, count: int) -> list[bool]:
    """Whether a job that always ends like this is requeued every time."""
    attempts: list[Attempt] = []
    for restart in range(count):
        attempts.append(decide(replace(ATTEMPT, restart=restart), end, before=[*attempts]))
    return [attempt.is_requeued for attempt in attempts]


def test_node_failures_requeue_a_job_a_limited_number_of_times() -> None:
    assert again(NODE_DIED, 7) == [True] * 5 + [False] * 2
    stops = [replace(ATTEMPT, outcome="stopped", is_requeued=True)] * 9
    killed = [replace(ATTEMPT, outcome="failed", is_requeued=True)] * 9  # by SLURM itself
    for before in (stops, killed):
        assert decide(ATTEMPT, NODE_DIED, before=before).is_requeued


@pytest.mark.parametrize(
    ("down", "reason"),
    [(["node2"], "node2 stopped responding"), ([], "killed before it could report")],
)
def test_an_attempt_without_an_outcome_is_completed_by_the_next(
    down: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.scheduler.expand_nodes", lambda node_list: ["node1", "node2"])
    monkeypatch.setattr("slurm.scheduler.down_nodes", lambda nodes: down)
    allocation, args = read_allocation(VARIABLES), args_of(f"--folder {tmp_path} recipes.gpt")
    write_attempt(tmp_path, ATTEMPT)
    lost = job._close_if_lost(ATTEMPT, allocation, args)
    assert (lost.outcome, lost.reason) == ("failed", reason)
    assert (lost.is_requeued, lost.is_node_failure) == (True, bool(down))
    assert last_attempt(tmp_path) == lost
    # A finished attempt stays, and attempts of other jobs are left alone.
    for other in (replace(ATTEMPT, outcome="stopped"), replace(ATTEMPT, job="8")):
        assert job._close_if_lost(other, allocation, args) == other


@pytest.mark.parametrize(
    ("queued_at", "expected"),
    [(SUBMITTED_AT, ENDED_AT), (REQUEUED_AT, REQUEUED_AT), (None, None)],
)
def test_a_start_waits_no_earlier_than_the_last_one_has_ended(
    queued_at: str | None, expected: str | None
) -> None:
    """SLURM may keep the time of the submission."""
    before = [replace(ATTEMPT, ended_at=ENDED_AT), replace(ATTEMPT, job="8", ended_at=REQUEUED_AT)]
    again = replace(ATTEMPT, restart=1, queued_at=queued_at)
    assert job._queued_after(before, again).queued_at == expected
    assert job._queued_after([], again) == again


@pytest.mark.parametrize("reason", [NOT_STARTED, CELL_RELEASED])
def test_a_job_stopped_without_a_checkpoint_is_not_requeued_forever(reason: str) -> None:
    assert again(replace(STOPPED, reason=reason), 5) == [True] * 4 + [False]
    # A job that makes progress each time is requeued.
    assert all(again(STOPPED, 30))


def test_a_node_is_dead_only_if_none_of_its_ranks_reported_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = read_allocation({**VARIABLES, "SLURM_TASKS_PER_NODE": "2(x2)"})
    monkeypatch.setattr("slurm.scheduler.expand_nodes", lambda node_list: ["node1", "node2"])
    (tmp_path / "0.failure").touch()
    assert find_dead_nodes(allocation, tmp_path, ["node2"]) == {"node2": [2, 3]}
    (tmp_path / "3.stopped").touch()
    assert find_dead_nodes(allocation, tmp_path, ["node2"]) == {}
    assert find_dead_nodes(allocation, tmp_path, ["node1"]) == {}


@pytest.mark.parametrize(
    ("fails", "printed"),
    [
        ("nothing", "requeueing this job without node2\n"),
        ("update", "requeued, but possibly on node2 again: Access/permission denied\n"),
        ("requeue", "not requeued (Access/permission denied); continue with: env"),
    ],
)
def test_an_error_of_scontrol_is_reported(
    fails: str,
    printed: str,
    put_stub: PutStub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_stub(
        "scontrol",
        f'if [ "$1" = {fails} ]; then echo "error: Access/permission denied" >&2; exit 1; fi\n'
        f'echo "$@" >> {tmp_path}/asked\n'
        "echo JobId=7 JobState=RUNNING Restarts=0 ExcNodeList=node9\n",
    )
    monkeypatch.setattr("signal.signal", lambda *_: None)
    args = args_of(f"--folder {tmp_path} recipes.gpt")
    attempt = decide(ATTEMPT, NODE_DIED)
    outcome.requeue(read_allocation(VARIABLES), args, attempt, NODE_DIED.dead_nodes)
    assert printed in capsys.readouterr().out
    asked = (tmp_path / "asked").read_text()
    assert ("update JobId=7 ExcNodeList=node9,node2\n" in asked) == (fails == "nothing")


@pytest.mark.parametrize(
    ("dead", "asked"),
    [([], "--nodes=2 --ntasks=2"), (["node2"], "--nodes=1 --ntasks=1 --ntasks-per-node=1 --exc")],
)
def test_node_local_files_are_deleted_before_the_job_is_requeued(
    dead: list[str],
    asked: str,
    put_stub: PutStub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_stub("srun", f'echo "$@" > {tmp_path}/asked\nwhile [ "$1" != rm ]; do shift; done\n"$@"\n')
    this, other = (tmp_path / f"unitransformer-{number}" for number in (7, 8))
    for folder in (this, other):
        (folder / "inductor").mkdir(parents=True)
    args = args_of(f"--folder {tmp_path}/job --local-disk {tmp_path} recipes.gpt")
    is_left: list[bool] = []
    end = replace(NODE_DIED, dead_nodes=dead) if dead else STOPPED
    monkeypatch.setattr(job, "_run_ranks", lambda *_: end)
    monkeypatch.setattr(job, "requeue", lambda *_: is_left.append(this.exists()))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    job.run_job(read_allocation(VARIABLES), args)
    assert is_left == [False]
    assert other.exists()
    assert asked in (tmp_path / "asked").read_text()

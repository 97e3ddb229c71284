"""Tests how a job checks its allocation and settles its end, without a real SLURM."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import job
from slurm.job_files import Attempt, began_at, last_attempt, write_attempt
from slurm.runtime import outcome as settling
from slurm.runtime.allocation import (
    check_alone,
    check_shape,
    confirmed,
    errors_of,
    option_of,
    read_allocation,
    read_words,
)
from slurm.runtime.node_probes import Probes, dead_nodes
from slurm.runtime.outcome import Ended, settle
from slurm.runtime.srun import command_of, variables_of
from tests.builders.slurm import ATTEMPT, VARIABLES, PutStub, words_of
from unitransformer.launch.variables import SWEEP_FILE

WELL = Ended(exit_code=0, is_done=True)
STOPPED = Ended(exit_code=75, reason="stopped by SIGUSR1 after step 3")


# ------------------------------------------------------------------------------------- shapes


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


def test_slurm_job_outside_a_job_or_inside_srun_explains_its_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert job.main(["recipes.gpt"]) == 2
    assert "slurm.job is run by a batch job: sbatch slurm/gpt.sbatch" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"slurm\.job starts srun itself"):
        read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"})
    # Submitted inside of an srun task, whose step is not of this job.
    read_allocation({**VARIABLES, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})


def test_slurm_job_started_by_several_srun_tasks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = "StepId=7.batch UserId=0 State=RUNNING\n"
    told = [f"{batch}StepId=7.0 UserId=0 State=RUNNING\n"]
    monkeypatch.setattr(
        "slurm.scheduler.call", lambda *words: subprocess.CompletedProcess(words, 0, told[0], "")
    )
    variables = {**VARIABLES, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    given = read_allocation(variables)
    with pytest.raises(ValueError, match=r"srun has started slurm\.job 2 times"):
        check_alone(given, variables)
    check_alone(given, {**variables, "SLURM_STEP_NUM_TASKS": "1"})
    told[0] = batch
    check_alone(given, variables)


def test_an_inherited_array_number_of_another_job_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = read_allocation(
        {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}
    )
    rows = [{"JobId": "7", "ArrayJobId": "5", "ArrayTaskId": "3"}]
    monkeypatch.setattr("slurm.scheduler.show", lambda job: rows)
    assert confirmed(given) == given
    assert given.name == "5_3"
    rows[0] = {"JobId": "7"}
    assert confirmed(given).name == "7"
    rows.clear()  # the controller does not know the job
    assert confirmed(given) == given


def test_an_array_task_has_a_separate_folder_and_its_number() -> None:
    task = {**VARIABLES, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    words = words_of("recipes.gpt -- --seed %a", task)
    assert words.folder == Path("runs/slurm/gpt-5/task-3").absolute()
    assert words.arguments == ["--seed", "3"]
    assert words_of("recipes.gpt").folder == Path("runs/slurm/gpt-7").absolute()


def started(line: str) -> list[str]:
    return command_of(words_of(line), "2026-01-01T00:00:00+00:00")


def test_ranks_resume_if_there_is_a_checkpoint() -> None:
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


def test_only_cells_that_ended_before_the_first_task_are_retried(tmp_path: Path) -> None:
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
        (replace(WELL, exit_code=1), "done", 0, False),  # its record decides
        (replace(WELL, is_done=False), "failed", 1, False),
        (STOPPED, "stopped", 75, True),
        (replace(STOPPED, is_taken_back=True), "stopped", 75, False),
        (Ended(exit_code=2, is_refused=True), "refused", 2, False),
        (Ended(exit_code=1), "failed", 1, False),
        (Ended(exit_code=137, dead_nodes=["node2"]), "failed", 1, True),
    ],
)
def test_the_end_of_an_attempt_decides_whether_it_is_requeued(
    ended: Ended, outcome: str, code: int, requeue: bool
) -> None:
    verdict = settle(ATTEMPT, ended)
    assert (verdict.attempt.outcome, verdict.exit_code, verdict.requeue) == (outcome, code, requeue)
    assert verdict.attempt.is_requeued == requeue
    assert verdict.exclude == ended.dead_nodes


def test_exit_code_zero_without_a_record_is_a_failure() -> None:
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
def test_a_sweep_is_done_when_its_summary_says_so(
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
    """Whether a job that always ends like this is requeued every time."""
    before: list[Attempt] = []
    queued_again = []
    for restart in range(count):
        verdict = settle(replace(ATTEMPT, restart=restart), ended, before=before)
        before.append(verdict.attempt)
        queued_again.append(verdict.requeue)
    return queued_again


def test_node_failures_requeue_a_job_a_limited_number_of_times() -> None:
    assert again(Ended(exit_code=137, dead_nodes=["node2"]), 7) == [True] * 5 + [False] * 2
    stops = [replace(ATTEMPT, outcome="stopped", is_requeued=True)] * 9
    killed = [replace(ATTEMPT, outcome="failed", is_requeued=True)] * 9  # by SLURM itself
    for before in (stops, killed):
        assert settle(ATTEMPT, Ended(exit_code=137, dead_nodes=["node2"]), before=before).requeue


@pytest.mark.parametrize(
    ("down", "reason"),
    [(["node2"], "node2 does not answer any more"), ([], "killed without a word")],
)
def test_an_attempt_without_an_outcome_is_completed_by_the_next(
    down: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.scheduler.names_of", lambda node_list: ["node1", "node2"])
    monkeypatch.setattr("slurm.scheduler.down", lambda names: down)
    given, words = read_allocation(VARIABLES), replace(words_of("recipes.gpt"), folder=tmp_path)
    write_attempt(tmp_path, ATTEMPT)
    lost = job._settle_lost(ATTEMPT, given, words)
    assert (lost.outcome, lost.reason) == ("failed", reason)
    assert (lost.is_requeued, lost.is_node_failure) == (True, bool(down))
    assert last_attempt(tmp_path) == lost
    # A settled attempt stays, and attempts of other jobs are left alone.
    for other in (replace(ATTEMPT, outcome="stopped"), replace(ATTEMPT, job="8")):
        assert job._settle_lost(other, given, words) == other


@pytest.mark.parametrize("reason", [settling.NOT_BEGUN, settling.GIVEN_BACK])
def test_a_job_stopped_without_a_checkpoint_is_not_requeued_forever(reason: str) -> None:
    assert again(Ended(exit_code=75, reason=reason), 5) == [True] * 4 + [False]
    # A job that makes progress each time is requeued.
    assert all(again(STOPPED, 30))


def test_a_node_is_dead_only_if_none_of_its_ranks_reported_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read_allocation({**VARIABLES, "SLURM_TASKS_PER_NODE": "2(x2)"})
    monkeypatch.setattr("slurm.scheduler.names_of", lambda node_list: ["node1", "node2"])
    (tmp_path / "0.failure").touch()
    assert dead_nodes(given, tmp_path, ["node2"]) == {"node2": [2, 3]}
    (tmp_path / "3.stopped").touch()
    assert dead_nodes(given, tmp_path, ["node2"]) == {}
    assert dead_nodes(given, tmp_path, ["node1"]) == {}


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("nothing", "asks to be queued again, without node2\n"),
        ("update", "queued again, and may start on node2: Access/permission denied\n"),
        ("requeue", "not queued again (Access/permission denied); go on with: env"),
    ],
)
def test_an_error_of_scontrol_is_reported(
    fails: str,
    told: str,
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
    words = replace(words_of("recipes.gpt"), folder=tmp_path)
    verdict = settle(ATTEMPT, Ended(exit_code=137, dead_nodes=["node2"]))
    settling.requeue(read_allocation(VARIABLES), words, verdict)
    assert told in capsys.readouterr().out
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
    own, other = (tmp_path / f"unitransformer-{number}" for number in (7, 8))
    for folder in (own, other):
        (folder / "inductor").mkdir(parents=True)
    given = read_allocation(VARIABLES)
    words = replace(words_of("recipes.gpt"), folder=tmp_path / "job", local_disk=tmp_path)
    there: list[bool] = []
    ended = Ended(exit_code=137, dead_nodes=dead) if dead else STOPPED
    monkeypatch.setattr(job, "_run_ranks", lambda *_: ended)
    monkeypatch.setattr(job, "requeue", lambda *_: there.append(own.exists()))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    job.run_job(given, words)
    assert there == [False]
    assert other.exists()
    assert asked in (tmp_path / "asked").read_text()

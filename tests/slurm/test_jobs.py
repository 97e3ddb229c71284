"""Tests jobs on a real SLURM: submitted, stopped, requeued, killed, and their status."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from scaling import __main__ as scaling
from slurm import status, submit
from slurm.job_files import last_attempt, list_attempts
from slurm.runtime.srun import NO_STEPS
from tests.distributed.launching import train
from tests.slurm.cluster import NODES, Cluster, until
from tests.slurm.waiting import (
    STEPS,
    log_of,
    slow_down_first_start,
    tiny,
    wait_for_outcome,
    wait_for_status,
)
from unitransformer.checkpoint.names import checkpoint_name
from unitransformer.checkpoint.reader import list_checkpoints

LONG = ("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--log-every", "5")
ONE_NODE = ("--nodes", "1", "--devices", "1", "--time", "10")  # if one suffices
TWO_NODES = ("--nodes", "2", *ONE_NODE[2:])

pytestmark = pytest.mark.timeout(1800)  # of several waits


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The record of one process that trains the model of the jobs here."""
    return train("gpt", tmp_path_factory.mktemp("one") / "run", "--batch-size", "8", *LONG)


@pytest.fixture
def _slow(work: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down_first_start(work, repository, monkeypatch)


def send(
    work: Path, *options: str, recipe: tuple[str, ...] = (), name: str = "job"
) -> tuple[str, Path]:
    """Submits a job; returns its id and folder."""
    folder = work / name
    argv = ["recipes.gpt", "--folder", str(folder), *options, "--", *tiny(work / "x", *recipe)]
    assert submit.main(argv) == 0
    submitted: dict[str, Any] = json.loads((folder / "submitted").read_text())
    return str(submitted["job"]), folder


def record_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "run-1").glob("*-1.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def wait_for_step(folder: Path, step: int, ending: str = "") -> None:
    def reached() -> bool:
        steps = re.findall(r"^step +(\d+)/", log_of(folder, ending), flags=re.MULTILINE)
        return any(int(number) >= step for number in steps)

    until(reached, f"step {step} is reached")


def wait_for_checkpoint(folder: Path, step: int) -> None:
    place = folder / "run-1" / "checkpoints"

    def is_written() -> bool:
        return any(path.name >= checkpoint_name(step) for path in list_checkpoints(place))

    until(is_written, f"a checkpoint of step {step} is written")


def preempt(cluster: Cluster, *, nodes: int, seconds: int = 0) -> str:
    """Submits a job of the owner, which preempts the others."""
    return cluster.run(
        "sbatch", "--parsable", "--partition=high", f"--nodes={nodes}", "--exclusive",
        "--output=/dev/null", f"--wrap=sleep {seconds}",
    ).strip()  # fmt: skip


@pytest.mark.usefixtures("_slow")
def test_two_nodes_train_the_model_of_one_process_and_a_stop_changes_nothing(
    cluster: Cluster,
    work: Path,
    uninterrupted: Mapping[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Submits a job, stops it by the signal before its time limit, and lets it resume."""
    job, folder = send(work, *TWO_NODES, recipe=LONG)
    printed = capsys.readouterr().out
    assert f"job     {job}" in printed
    assert f"tail -F {folder}/gpt-{job}.log" in printed
    wait_for_step(folder, 5)
    assert "running" in status.report(folder)
    cluster.run("scancel", "--signal=USR1", job)  # to the steps, as --signal does
    wait_for_outcome(folder, "stopped")
    wait_for_status(folder, "queued .*BeginTime; before: stopped by SIGUSR1")
    (checkpoint,) = list_checkpoints(folder / "run-1/checkpoints")
    cluster.hurry(job)
    wait_for_outcome(folder, "done")
    record = record_of(folder)
    assert record["status"] == "ok"
    assert record["config"]["parallel"]["num_nodes"] == 2
    assert record["segment_starts"] == [0, int(checkpoint.name.removeprefix("step-"))]
    assert record["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-5)
    # Waited, ran, and was requeued once: in the queue's table and in a report, without sacct.
    time = r"\d+:\d\d"
    wait_for_status(folder, rf"gpt +done +{STEPS}/{STEPS} .* {time} +{time} +1$")
    assert scaling.main(["report", str(folder), "--out", str(work / "RESULTS.md")]) == 0
    seconds = r"[\d.]+ (s|min)"
    jobs = rf"1 SLURM job waited {seconds}, ran {seconds} and was requeued once"
    assert re.search(jobs, " ".join((work / "RESULTS.md").read_text().split()))
    assert (folder / f"attempt-{job}-1").exists()
    # The same script again finds the finished record.
    subprocess.run(["sbatch", folder / "job.sbatch"], check=True)
    until(lambda: "done already" in log_of(folder), "it says so")


@pytest.mark.usefixtures("_slow")
def test_a_preempted_job_saves_within_its_grace_time_and_resumes_when_allowed(
    cluster: Cluster, work: Path
) -> None:
    """SIGTERM without warning, as SLURM preempts by default; the job of an owner takes over."""
    loads = ("--num-workers", "1")  # a process that gets SIGTERM too
    job, folder = send(work, *ONE_NODE, "--partition", "low", recipe=(*LONG, *loads))
    wait_for_step(folder, 5)
    owner = preempt(cluster, nodes=len(NODES), seconds=4)
    wait_for_outcome(folder, "stopped")
    attempt = last_attempt(folder)
    assert attempt is not None
    assert attempt.reason.startswith("stopped by SIGTERM after step")
    cluster.wait_for(owner, "COMPLETED")
    cluster.hurry(job)
    wait_for_outcome(folder, "done")
    assert record_of(folder)["segment_starts"][1] > 0


# A thread holds the interpreter: the step does not end, and no signal handler runs. It blocks
# signals, one of which would end its sleep.
STALL = """
import ctypes, os, signal, sys, threading, time

def stall():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not os.path.exists("stall"):
        time.sleep(0.05)
    open("stalled", "w").close()
    ctypes.PyDLL(None).sleep(600)

is_rank = os.environ.get("SLURM_NODEID") == "1" and "slurm.runtime.rank" not in sys.orig_argv
if is_rank and "SLURM_RESTART_COUNT" not in os.environ:
    threading.Thread(target=stall, daemon=True).start()
"""


def test_a_job_killed_after_too_short_a_grace_time_resumes_from_its_newest_checkpoint(
    cluster: Cluster,
    work: Path,
    uninterrupted: Mapping[str, Any],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM, then SIGKILL while the step is still running."""
    slow_down_first_start(work, repository, monkeypatch, more=STALL)
    options = (*TWO_NODES, "--partition", "brief")
    job, folder = send(work, *options, recipe=(*LONG, "--checkpoint-every", "5"))
    wait_for_checkpoint(folder, 10)
    (work / "stall").touch()
    until((work / "stalled").exists, "the step does not end any more")
    with cluster.configured(KillWait="1"):
        preempt(cluster, nodes=2)
        until(lambda: cluster.state(job)["Restarts"] == "1", "it is queued again")
    newest = list_checkpoints(folder / "run-1/checkpoints")[-1]
    cluster.hurry(job)
    wait_for_outcome(folder, "done")
    killed, _ = list_attempts(folder)
    assert (killed.outcome, killed.reason) == ("failed", "killed before it could report")
    assert killed.is_requeued
    record = record_of(folder)
    assert record["segment_starts"] == [0, int(newest.name.removeprefix("step-"))]
    assert record["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-5)


def test_a_killed_rank_ends_the_job_and_is_named_in_its_record(
    cluster: Cluster, work: Path
) -> None:
    _, folder = send(work, *TWO_NODES, recipe=(*LONG, "--max-steps", "100000"))
    wait_for_step(folder, 5)
    rank = find_rank(cluster, "node2")
    os.kill(rank, 9)
    wait_for_outcome(folder, "failed")
    error = record_of(folder)["error"]
    assert (error["rank"], error["type"]) == (1, "SIGKILL")
    assert "rank 1 on node2 was killed by SIGKILL" in error["message"]
    wait_for_status(folder, "failed .*rank 1 of 2: rank 1 on node2 was killed by SIGKILL")


def find_rank(cluster: Cluster, node: str) -> int:
    """The process of the recipe on a node; other clusters may have one of the same name."""
    place = {"SLURMD_NODENAME": node, "SLURM_CONF": cluster.variables["SLURM_CONF"]}
    (rank,) = [
        process.pid
        for process in psutil.process_iter()
        if process.name().startswith("python")
        and "slurm.runtime.rank" in (process.parent() or process).cmdline()
        and place.items() <= process.environ().items()
    ]
    return rank


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize(
    ("dies", "is_over"), [(Cluster.kill_node, True), (Cluster.freeze_node, False)]
)
def test_a_dead_node_ends_the_job_which_resumes_on_other_nodes(
    dies: Callable[[Cluster, str], None],
    is_over: bool,
    cluster: Cluster,
    work: Path,
    uninterrupted: Mapping[str, Any],
) -> None:
    # With GPUs, which SLURM 22.05 forgets when the job is requeued while its node is dead.
    (work / "clusters.toml").write_text("[counted]\nextra = ['--gres=gpu:1']\n")
    table = ("--clusters", str(work / "clusters.toml"), "--cluster", "counted")
    job, folder = send(work, *TWO_NODES, *table, recipe=(*LONG, "--checkpoint-every", "5"))
    wait_for_checkpoint(folder, 5)
    dies(cluster, "node2")
    wait_for_outcome(folder, "failed")
    attempt = last_attempt(folder)
    assert attempt is not None
    assert attempt.is_requeued
    assert attempt.reason == "rank 1 of 2: node2 stopped responding"
    until(lambda: cluster.state(job)["ExcNodeList"] == "node2", "the node is excluded")
    assert record_of(folder)["error"]["type"] == "NodeFailure"
    if is_over:
        cluster.run("scancel", job)
        return
    cluster.declare_dead("node2")
    cluster.hurry(job)
    until(lambda: len(list_attempts(folder)) > 1, "it starts again")
    until(lambda: list_attempts(folder)[1].outcome != "running", "its second start ends")
    if list_attempts(folder)[1].outcome == "failed":
        cluster.hurry(job, restart=2)
    wait_for_outcome(folder, "done")
    _, *refused, _ = list_attempts(folder)
    assert all(a.reason.startswith(f"{NO_STEPS} in job {job} on node") for a in refused)
    record = record_of(folder)
    assert record["segment_starts"][1] >= 5
    assert record["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-5)


@pytest.mark.usefixtures("_slow")
def test_slurm_requeues_a_job_whose_batch_node_died(
    cluster: Cluster, work: Path, uninterrupted: Mapping[str, Any]
) -> None:
    job, folder = send(work, *TWO_NODES, recipe=(*LONG, "--checkpoint-every", "5"))
    wait_for_checkpoint(folder, 5)
    cluster.declare_dead("node1")
    cluster.hurry(job)
    wait_for_outcome(folder, "done")
    died, _ = list_attempts(folder)
    assert (died.outcome, died.reason) == ("failed", "node1 stopped responding")
    assert died.is_requeued
    assert died.is_node_failure
    record = record_of(folder)
    assert record["segment_starts"][1] >= 5
    assert record["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-5)


@pytest.mark.usefixtures("_slow")
def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, work: Path) -> None:
    job, folder = send(work, *ONE_NODE, recipe=LONG)
    wait_for_step(folder, 5)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    wait_for_outcome(folder, "stopped")
    until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty")
    assert record_of(folder)["status"] == "preempted"
    wait_for_status(folder, "stopped .*cancelled, or already requeued by SLURM; stopped by SIGTERM")
    assert list_checkpoints(folder / "run-1/checkpoints")


@pytest.mark.usefixtures("_slow")
def test_a_job_that_cannot_be_requeued_prints_how_to_resume(cluster: Cluster, work: Path) -> None:
    job, folder = send(work, *ONE_NODE, "--no-requeue", recipe=LONG)
    wait_for_step(folder, 5)
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # only to the batch process
    cluster.wait_for(job, "FAILED")
    assert cluster.state(job)["ExitCode"] == "75:0"
    assert f"continue with: sbatch {folder}/job.sbatch" in log_of(folder)
    (work / "sitecustomize.py").unlink()  # the next job is another one, and need not be slow
    subprocess.run(["sbatch", folder / "job.sbatch"], check=True)
    wait_for_outcome(folder, "done")
    assert len(record_of(folder)["segment_starts"]) == 2


def test_array_tasks_have_separate_folders_and_a_stopped_one_is_requeued(
    cluster: Cluster, work: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down_first_start(work, repository, monkeypatch, tasks="4")
    array, folder = send(work, *ONE_NODE, "--array", "3-4", recipe=("--seed", "%a", *LONG))
    # The last task has the id of the array; a signal to it reaches no other task.
    wait_for_step(folder, 5, "_4")
    cluster.run("scancel", "--signal=USR1", f"{array}_4")
    wait_for_outcome(folder / "task-4", "stopped")
    cluster.hurry(f"{array}_4")
    for task in (3, 4):
        wait_for_outcome(folder / f"task-{task}", "done")
        assert record_of(folder / f"task-{task}")["config"]["seed"] == task
    launches = [len(record_of(folder / f"task-{task}")["segment_starts"]) for task in (3, 4)]
    assert launches == [1, 2]
    wait_for_status(folder, "2 done")


def test_the_signal_before_the_time_limit_saves_and_requeues(cluster: Cluster, work: Path) -> None:
    clusters = work / "clusters.toml"
    clusters.write_text(
        "[short]\ntime = '15:00'\nsignal = 'USR2'\nsignal_ahead_s = 300\n"
        f"local_disk = '{work}/disk'\n"
    )
    options = ("--nodes", "1", "--devices", "1", "--clusters", str(clusters), "--cluster", "short")
    job, folder = send(work, *options, recipe=(*LONG, "--max-steps", "100000"))
    wait_for_step(folder, 5)
    # The signal is due at once; SLURM looks every 30 s.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    wait_for_outcome(folder, "stopped")
    attempt = last_attempt(folder)
    assert attempt is not None
    assert re.match(r"stopped by SIGUSR2 after step \d+$", attempt.reason)
    assert attempt.is_requeued
    wait_for_status(folder, "queued")
    until(lambda: cluster.state(job)["Restarts"] == "1", "SLURM has requeued the job")
    cluster.run("scancel", job)
    assert list((work / "disk").iterdir()) == []  # the checkpoint skipped it


def test_the_ready_script_trains_on_the_devices_of_its_job(
    cluster: Cluster, work: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(repository)
    monkeypatch.setenv("UNITRANSFORMER_JOB_FOLDER", str(work / "job"))
    shape = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
    cluster.run("sbatch", *shape, f"--output={work}/log", "slurm/gpt.sbatch", *tiny(work / "x"))
    wait_for_outcome(work / "job", "done")
    parallel = record_of(work / "job")["config"]["parallel"]
    assert (parallel["num_nodes"], parallel["devices"]) == (2, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--partition", "nowhere"), "invalid partition specified: nowhere"),
        (("--gpu-type", "b200"), "Requested node configuration is not available"),
        (("--nodes", "4"), "Node count specification invalid"),
        (("--time", "3-0"), "[Tt]ime limit"),
        (("--devices", "64"), "More processors requested than permitted"),
    ],
)
def test_a_request_that_no_node_can_satisfy_is_refused_before_queueing(
    options: tuple[str, ...],
    expected: str,
    cluster: Cluster,
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["recipes.gpt", "--folder", str(work / "job"), *options, "--", "--size", "124m"]
    assert submit.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SLURM refuses this job: ")
    assert re.search(expected, error), error
    assert not (work / "job").exists()
    assert cluster.run("squeue", "--noheader") == ""


@pytest.mark.parametrize(
    ("options", "wrap", "expected"),
    [
        (("--ntasks=3", "--nodes=2"), "recipes.gpt", "the nodes have 2, 1 tasks"),
        (
            ("--ntasks-per-node=2", "--nodes=2"),
            "recipes.gpt -- --devices 4 --accelerator cpu",
            "--devices is 4, but --ntasks-per-node of the job is 2",
        ),
        (
            ("--ntasks-per-node=2",),
            "recipes.gpt -- --num-nodes 2 --accelerator cpu",
            "--num-nodes is 2, but --nodes of the job is 1",
        ),
        (
            ("--ntasks-per-node=2", "--gpus-per-node=8"),
            "recipes.gpt",
            "the job has 2 tasks per node but 8 GPUs per node",
        ),
        (
            ("--nodes=2",),
            "sweep -- quick",
            "the job has 2 nodes, but it runs the cells on 1: submit with --nodes=1",
        ),
        (("--ntasks-per-node=2",), "srun recipes.gpt", "srun has started slurm.job 2 times"),
    ],
)
def test_a_shape_that_disagrees_is_refused_with_the_numbers(
    options: tuple[str, ...], wrap: str, expected: str, cluster: Cluster, work: Path
) -> None:
    srun, argv = ("srun ", wrap[5:]) if wrap.startswith("srun ") else ("", wrap)
    command = f"{srun}{sys.executable} -m slurm.job {argv}"
    job = cluster.run(
        "sbatch", "--parsable", *options, f"--output={work}/log", f"--wrap={command}"
    ).strip()
    cluster.wait_for(job, "FAILED")
    assert cluster.state(job)["ExitCode"] == "2:0"
    assert expected in (work / "log").read_text()


def test_a_recipe_in_a_job_of_several_nodes_asks_for_srun(cluster: Cluster, work: Path) -> None:
    command = f"{sys.executable} -m recipes.gpt --accelerator cpu"
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={work}/log", f"--wrap={command}"
    ).strip()
    cluster.wait_for(job, "FAILED")
    assert "2 nodes and this is one process on one of" in (work / "log").read_text()


def test_hostile_names_and_arguments_are_quoted_literally(
    cluster: Cluster, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = work / "a b;c %j"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = work / "it's 100 %j $(touch smuggled); #x"
    script_only = ["recipes.gpt", "--folder", str(folder), "--nodes", "1", "--devices", "1"]
    assert submit.main([*script_only, "--", "--accelerator", "cpu", "--devices-of", "x"]) == 2
    record = "'b' $(id)\n#SBATCH --partition=nowhere"
    assert submit.main([*script_only, "--", *tiny(work / "x", "--record", record)]) == 0
    wait_for_outcome(folder, "done")
    assert (here / record).exists()
    beside = {path.name for path in here.iterdir() if not path.match("slurm_*.json")}
    assert beside == {record}
    assert len(list(folder.glob("gpt-*.log"))) == 1
    assert not (work / "smuggled").exists()

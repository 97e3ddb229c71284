"""What a real SLURM makes of the options in a script, and what its states are called."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm import sbatch, status, submit
from slurm.batch_script import Job, render, seconds_of
from slurm.clusters import Cluster as ClusterTable
from slurm.job_files import read_json
from slurm.runtime.allocation import check_shape, read_allocation, read_args
from tests.slurm.cluster import Cluster, until

JOB = Job(
    target="recipes.gpt", arguments=[], name="gpt", folder="/nowhere", directory="/",
    python=sys.executable, devices=1, on_gpus=False,
)  # fmt: skip


def hold(job: Job) -> str:
    """Submits a job that does not start."""
    return sbatch.run_sbatch(["--parsable", "--hold", "--output=/dev/null"], render(job)).strip()


@pytest.mark.parametrize(
    "value",
    ["abc@v100", "a b", "it's", r"a\b \\c", 'a "b"', "a#b #c", "a`b`$(id) $5", "a%j", "\u00e9;&*"],
)
def test_slurm_reads_the_value_of_an_option_as_it_was_given(value: str, cluster: Cluster) -> None:
    job = replace(JOB, account=value, cluster=ClusterTable(extra=(f"--comment={value}",)))
    shown = cluster.run("scontrol", "show", "job", hold(job))
    assert f" Account={value} " in shown
    assert f" Comment={value} " in shown


@pytest.mark.parametrize(
    ("constraint", "nodes"),
    [
        ("rack1", 1),
        ("rack1|rack3", 1),
        ("[rack1|rack3]", 1),
        ("[rack1*1&rack2*1]", 2),
        ("rack1&h200", 1),
    ],
)
def test_slurm_takes_constraints_of_every_form(
    constraint: str, nodes: int, cluster: Cluster
) -> None:
    number = hold(replace(JOB, constraint=constraint, nodes=nodes, partition="test,endless"))
    shown = cluster.state(number)
    assert (shown["Features"], shown["Partition"]) == (constraint, "test,endless")


@pytest.mark.parametrize(
    "time",
    ["0", "0:00", "-1", "INFINITE", "unlimited", "2:90", "90", "1-0", "1-1:2:3", "100:00:00"],
)
def test_slurm_reads_times_as_the_suite_does(time: str, cluster: Cluster) -> None:
    limit = cluster.state(hold(replace(JOB, time=time, partition="endless")))["TimeLimit"]
    seconds = seconds_of(time)
    if seconds is None:
        assert limit == "UNLIMITED"
    else:  # SLURM counts minutes
        assert seconds <= (seconds_of(limit) or 0) < seconds + 60


@pytest.mark.parametrize(
    ("gpu_request", "exclusive", "gpus"),
    [
        ("gpus-per-node", None, 2),
        ("gpus-per-node", True, 8),
        ("gpus-per-task", None, 2),
        ("gres", None, 2),
        ("gres", True, 8),
        ("none", None, 8),  # takes whole nodes
    ],
)
def test_a_job_has_its_gpus_and_variables_of_the_node(
    gpu_request: Any, exclusive: bool | None, gpus: int, cluster: Cluster, work: Path
) -> None:
    """Starts a program that reports what it got, in place of `slurm.job`."""
    stub = work / "stub"
    stub.write_text(
        f"#!{sys.executable}\nimport json, os, subprocess, sys\n"
        "result = {'variables': {**os.environ}, 'arguments': sys.argv}\n"
        "ranks = ['srun', 'sh', '-c', 'echo $CUDA_VISIBLE_DEVICES']\n"
        "result['ranks'] = subprocess.check_output(ranks, text=True).split()\n"
        "open('result.part', 'w').write(json.dumps(result))\n"
        "os.rename('result.part', 'result')\n"
    )
    stub.chmod(0o755)
    # What newer versions of SLURM do by themselves.
    bind = ("--gpu-bind=per_task:1",) if gpu_request == "gpus-per-task" else ()
    table = ClusterTable(
        gpu_request=gpu_request, exclusive=exclusive,
        local_disk=r"/scratch/$SLURM_JOB_ID/$PLACE \$(id)",
        extra=bind,
    )  # fmt: skip
    table = replace(table, environment=(("PLACE", "~/x"),))
    job = replace(
        JOB, directory=str(work), folder=str(work), python=str(stub), devices=2, on_gpus=True,
        cluster=table,
    )  # fmt: skip
    number = sbatch.run_sbatch(["--parsable"], render(job)).strip()
    until((work / "result").exists, "the job has run")
    result = read_json(work / "result")
    allocation = read_allocation(result["variables"])
    assert allocation.gpus_per_node == gpus
    check_shape(allocation, read_args(result["arguments"][3:], allocation))
    if gpu_request != "none":
        assert result["ranks"] == ["0,1", "0,1"]
    disk = f"/scratch/{number}/{os.environ['HOME']}/x $(id)"
    assert result["arguments"][result["arguments"].index("--local-disk") + 1] == disk


def test_states_that_wait_for_a_person_are_shown_with_the_way_to_go_on(
    cluster: Cluster, work: Path
) -> None:
    def state_becomes(expected: str) -> None:
        until(lambda: re.search(expected, status.report(work)) is not None, expected)

    arguments = ("--parsable", "--hold", "--output=/dev/null", "--requeue", "--wrap=sleep 1000")
    job = cluster.run("sbatch", *arguments).strip()
    (work / "submitted").write_text(json.dumps({"job": job, "name": "x"}))
    state_becomes(rf" held .*JobHeldUser; to continue: scontrol release {job}")
    cluster.run("scontrol", "hold", job)
    state_becomes(" held .*JobHeldAdmin; an administrator has to release it")
    cluster.run("scontrol", "release", job)
    state_becomes("running ")
    cluster.run("scontrol", "suspend", job)
    state_becomes("suspended .*SLURM or an administrator resumes it")
    cluster.run("scontrol", "resume", job)
    cluster.run("scontrol", "requeuehold", "State=SpecialExit", job)
    state_becomes(f"special-exit .*job requeued in .*; to continue: scontrol release {job}")
    cluster.run("scontrol", "release", job)
    cluster.hurry(job)
    state_becomes("running ")
    cluster.run("scontrol", "requeuehold", job)
    state_becomes(f"requeue-hold .*job requeued in held state; .* scontrol release {job}")


def test_a_partition_that_is_down_is_mentioned(
    cluster: Cluster, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run("scontrol", "update", "PartitionName=endless", "State=DOWN")
    try:
        argv = ["recipes.gpt", "--partition", "endless", "--devices", "1", "--time", "10"]
        assert submit.main([*argv, "--test-only"]) == 0
    finally:
        cluster.run("scontrol", "update", "PartitionName=endless", "State=UP")
    assert "it would wait: partition endless is down; nothing was" in capsys.readouterr().out


SIGNALED_OR_REFUSED = """
trap 'echo signaled >> events' TERM CONT
touch begun
while [ ! -e end ]; do
    srun true >> events 2>&1 && echo stepped >> events
    sleep 0.1
done
"""


@pytest.mark.parametrize(
    ("partition", "is_over", "expected"),
    [("low", False, "stepped\nstepped"), ("brief", True, "step already completing or completed")],
)
def test_a_preempted_job_may_start_steps_until_its_grace_time_is_over_and_gets_no_signal(
    partition: str, is_over: bool, expected: str, cluster: Cluster, work: Path
) -> None:
    (work / "script").write_text(f"#!/bin/bash\n{SIGNALED_OR_REFUSED}")
    shape = ("--parsable", "--nodes=2", "--exclusive", "--time=10", f"--chdir={work}")
    for _ in range(3):  # SLURM may end the job in the very moment in which its grace time is over
        for name in ("begun", "end"):
            (work / name).unlink(missing_ok=True)
        options = (f"--partition={partition}", "--output=/dev/null", "--no-requeue")
        job = cluster.run("sbatch", *shape, *options, str(work / "script")).strip()
        until((work / "begun").exists, "the job runs")
        owner = cluster.run(
            "sbatch", *shape[:1], "--partition=high", "--nodes=3", "--exclusive",
            "--output=/dev/null", "--wrap=true",
        ).strip()  # fmt: skip
        until(lambda job=job: "None" != cluster.state(job)["PreemptTime"], "it is preempted")
        (work / "events").write_text("")

        def has_event(*texts: str) -> bool:
            return any(text in (work / "events").read_text() for text in texts)

        until(lambda: has_event(expected, "signaled"), expected)
        was_signaled = has_event("signaled")
        cluster.run("scancel", owner)
        (work / "end").touch()
        until(lambda job=job: cluster.state(job)["JobState"] != "RUNNING", "its script has ended")
        if not (is_over and was_signaled):
            break
    assert not was_signaled

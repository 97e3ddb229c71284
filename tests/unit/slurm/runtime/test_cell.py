"""Tests how a cell on several nodes ends: its exit code, and what it leaves for its job."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.job_files import JOB_END, SIGNAL, STEP, write_attempt
from slurm.runtime import allocation as allocations
from slurm.runtime import cell, rank
from slurm.runtime.node_health import Probes, beat, is_blind
from slurm.runtime.srun import WatchResult
from tests.builders.records import make_crashed, make_record
from tests.builders.slurm import ATTEMPT, REFUSES_STEPS, VARIABLES, PutStub
from tests.processes import PATIENCE_S
from unitransformer.launch.failures import RankFailure, read_failures, write_failure
from unitransformer.launch.variables import ERRORS_FOLDER, PROGRESS_FILE, RUN_FOLDER, SHARED_FILE
from unitransformer.record.schema import load_record, write_record

BROKE = RankFailure(rank=3, type="OutOfMemoryError", message="no memory", lines=[], at_s=5.0)


@pytest.fixture
def errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_stub: PutStub) -> Path:
    """The folder for the failures of the ranks of a cell on two nodes with two ranks each."""
    put_stub("scontrol", "echo node1; echo node2\n")
    run = tmp_path / "cells/0123-1"
    run.mkdir(parents=True)
    variables = {**VARIABLES, RUN_FOLDER: str(run), ERRORS_FOLDER: str(tmp_path / "errors")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "errors/ranks-0123-1"
    path.mkdir(parents=True)
    return path


def end(
    code: int,
    *,
    failures: Sequence[RankFailure] = (),
    dead: Sequence[str] = (),
    is_stopped: bool = False,
) -> int:
    argv = ["gpt", "--job", "5_3", "--devices", "2", "--", "--seed", "1"]
    allocation, args = cell._read(argv)
    assert (allocation.tasks, allocation.name) == (4, "5_3")
    for failure in failures:
        write_failure(failure, args.errors / f"{failure.rank}.failure")
    ranks = {node: [2, 3] for node in dead}
    watched = WatchResult(exit_code=code, probes=Probes(), dead=ranks)
    run, since_s = Path(os.environ[RUN_FOLDER]), time.time() - 60
    return cell._end(allocation, args, watched, run, since_s=since_s, is_stopped=is_stopped)


def job_end(errors: Path) -> object:
    path = errors.parent / JOB_END
    return json.loads(path.read_text()) if path.exists() else None


def test_a_node_that_sees_no_folder_of_the_job_ends_the_job_as_refused(
    errors: Path, put_stub: PutStub
) -> None:
    """It cannot report either, so that srun only says that some rank failed."""
    beat(errors, "node1", "3")
    put_stub("srun", "echo no\n")
    assert end(137) == 75
    assert isinstance(ended := job_end(errors), dict)
    assert ended["dead_nodes"] == []
    assert ended["reason"].startswith(f"node2 does not see {errors}; put the folder of ")
    (errors.parent / JOB_END).unlink()
    beat(errors, "node2", "3")
    assert end(137) == 1
    assert job_end(errors) is None


# Runs what srun is to run: on a node that sees the folder, and on one that has made it itself.
RUN_HERE = """while [ "$1" != sh ]; do echo "$1" >> asked; shift; done
"""
SEES, MADE = 'exec "$@"\n', 'rm errors/*/heartbeat-node1\nexec "$@"\n'


@pytest.mark.parametrize("srun", ["echo error >&2; exit 1\n", RUN_HERE + SEES])
def test_a_node_on_which_srun_starts_nothing_is_not_said_to_be_blind(
    srun: str,
    errors: Path,
    put_stub: PutStub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its prolog may have failed, or its heartbeat may be hidden by a cache of the file system."""
    monkeypatch.chdir(tmp_path)
    beat(errors, "node1", "3")
    put_stub("srun", srun)
    assert end(137) == 1
    assert job_end(errors) is None
    message = "srun exited with code 137; no heartbeat has arrived from node2\n"
    assert message in capsys.readouterr().err
    if SEES in srun:
        assert "--nodelist=node2" in Path("asked").read_text().split()
        put_stub("srun", RUN_HERE + MADE)
        assert is_blind("node2", errors)


@pytest.mark.parametrize("failures", [[], [BROKE]])
def test_a_cell_fails_with_its_reason_if_slurm_does_not_name_the_nodes(
    failures: Sequence[RankFailure],
    errors: Path,
    put_stub: PutStub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not failures:
        monkeypatch.setattr(Probes, "silent", lambda self: ["node2"])
    beat(errors, "node1", "3")
    write_record(make_crashed(), Path(os.environ[RUN_FOLDER], "a-1.json"))
    put_stub("scontrol", "exit 1\n")
    assert end(137, failures=failures) == 1
    expected = "rank 3 of 4: no memory" if failures else "srun exited with code 137"
    assert f"error: {expected}\n" in capsys.readouterr().err


def test_the_rank_that_failed_first_is_recorded_with_its_node(errors: Path) -> None:
    path = Path(os.environ[RUN_FOLDER], "a-1.json")
    write_record(make_crashed(), path)
    assert end(1, failures=[BROKE]) == 1
    record = load_record(path)
    assert (record["status"], record["error"]["rank"]) == ("oom", 3)
    assert record["error"]["message"] == "on node2: no memory"
    assert job_end(errors) is None


def test_a_dead_node_ends_the_job_unless_the_cell_was_done(
    errors: Path, put_stub: PutStub, tmp_path: Path
) -> None:
    assert end(137, dead=["node2"]) == 75
    reason = "rank 2 of 4: node2 stopped responding"
    assert job_end(errors) == {"outcome": "failed", "reason": reason, "dead_nodes": ["node2"]}
    assert {failure.rank for failure in read_failures(errors)} == {2, 3}
    (errors.parent / JOB_END).unlink()
    write_record(make_record(), Path(os.environ[RUN_FOLDER], "a-1.json"))
    assert end(137, dead=["node2"]) == 0
    put_stub("srun", f"touch {tmp_path}/started\n")  # by the next cell, which leaves the dead node
    assert cell.main(["gpt", "--job", "5_3", "--devices", "2", "--", "--seed", "1"]) == 75
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("code", "is_stopped", "has_mark", "expected"),
    [
        (0, False, False, 0),
        (0, False, True, 75),
        (137, True, False, 75),
        (143, False, False, 75),  # a rank that was still starting
        (137, False, False, 1),
        (1, False, False, 1),
    ],
)
def test_a_signal_releases_a_cell(
    code: int, is_stopped: bool, has_mark: bool, expected: int, errors: Path
) -> None:
    if has_mark:
        (errors / "1.stopped").touch()
    assert end(code, is_stopped=is_stopped) == expected


@pytest.mark.parametrize(
    ("state", "preempted_at", "expected"),
    [
        ("RUNNING", "2026-11-30T17:34:10", 75),
        ("CANCELLED", "None", 75),
        ("COMPLETING", "None", 75),
        ("RUNNING", "None", 1),
    ],
)
def test_a_cell_whose_ranks_slurm_no_longer_starts_runs_again(
    state: str, preempted_at: str, expected: int, errors: Path, put_stub: PutStub
) -> None:
    put_stub("scontrol", f"echo JobId=7 JobState={state} PreemptTime={preempted_at}\n")
    assert end(1) == expected
    assert job_end(errors) is None


@pytest.mark.parametrize("srun", [REFUSES_STEPS, "exit 1\n", "exit 0\n"])
def test_a_cell_whose_step_slurm_refuses_is_given_back_a_limited_number_of_times(
    srun: str,
    errors: Path,
    put_stub: PutStub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_stub("scontrol", "echo JobId=7 JobState=RUNNING PreemptTime=None\n")
    put_stub("srun", srun)
    if srun != REFUSES_STEPS:  # the job can start steps, or has another fault
        assert end(1) == 1
        assert job_end(errors) is None
        return
    reason = "SLURM starts no step in job 5_3 on node[1-2]: Invalid generic resource (gres) spec"
    for restart, expected in enumerate([75, 75, 75, 1]):
        attempt = replace(ATTEMPT, restart=restart)
        write_attempt(tmp_path, attempt)
        assert end(1) == expected
        ended = job_end(errors)
        assert isinstance(ended, dict)
        assert ended["reason"].startswith(reason)
        assert (ended["outcome"], ended["dead_nodes"]) == ("failed", [])
        error = capsys.readouterr().err
        assert f"error: {reason}" in error
        assert error.endswith(", 4 times in a row\n") == (expected == 1)
        write_attempt(tmp_path, replace(attempt, outcome="failed", reason=ended["reason"]))
    (errors / STEP).touch()  # a rank has been started, so that the fault is another one
    (errors.parent / JOB_END).unlink()
    assert end(1) == 1
    assert job_end(errors) is None


def note_order(errors: Path, *, first: str, failure: RankFailure) -> None:
    """Writes a failure and the mark of a signal with the times at which they came."""
    write_failure(failure, errors / f"{failure.rank}.failure")
    (errors / f"{SIGNAL}0").touch()
    for pattern in ("*.failure", f"{SIGNAL}*"):
        (path,) = errors.glob(pattern)
        at_s = time.time() - (20 if first in path.name else 10)
        os.utime(path, (at_s, at_s))


LOST = RankFailure(rank=3, type="DistNetworkError", message="connection closed", lines=[])


@pytest.mark.parametrize(
    ("first", "failure", "has_trained", "expected"),
    [
        (SIGNAL, LOST, False, 75),
        (SIGNAL, LOST, True, 1),  # all ranks stop together after a step, so it is another fault
        (SIGNAL, replace(LOST, is_bad_usage=True), False, 2),
        ("failure", LOST, False, 1),  # srun signals the other ranks
    ],
)
def test_failures_after_a_signal_release_a_cell_that_has_not_begun_to_train(
    first: str,
    failure: RankFailure,
    has_trained: bool,
    expected: int,
    errors: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    note_order(errors, first=first, failure=failure)
    written: list[Path] = []  # writing takes an interpreter with torch, and other tests do it
    monkeypatch.setattr(cell, "write_record", lambda *arguments: written.append(arguments[2]))
    if has_trained:
        Path(os.environ[RUN_FOLDER], PROGRESS_FILE).touch()
    # A rank without handlers ends by the signal, in either order.
    assert end(143) == expected
    assert written == [Path(os.environ[RUN_FOLDER])] * (expected == 1)


def test_failures_after_a_signal_end_the_job_if_a_node_has_died(
    errors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_order(errors, first=SIGNAL, failure=replace(LOST, rank=0))
    monkeypatch.setattr(Probes, "silent", lambda self: ["node2"])
    assert end(143) == 75
    assert isinstance(ended := job_end(errors), dict)
    assert ended["dead_nodes"] == ["node2"]


@pytest.mark.parametrize("is_signaled", [True, False])
def test_a_signal_that_reaches_the_child_first_stops_the_rank(
    is_signaled: bool, tmp_path: Path
) -> None:
    variables = {
        **os.environ,
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        ERRORS_FOLDER: str(tmp_path),
    }
    variables |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0"}
    command = [sys.executable, "-m", "slurm.runtime.rank", "sh", "-c", "touch ready; kill -TERM $$"]
    rank = subprocess.Popen(command, env=variables, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_signaled:
        rank.send_signal(signal.SIGTERM)
    assert rank.wait(PATIENCE_S) == (0 if is_signaled else 143)
    assert (tmp_path / "1.stopped").exists() == is_signaled
    assert (tmp_path / f"{SIGNAL}1").exists() == is_signaled
    assert [failure.type for failure in read_failures(tmp_path)] == ["SIGTERM"] * (not is_signaled)
    assert not (tmp_path / STEP).exists(), "the first rank writes it"


def test_a_node_that_does_not_see_the_folder_ends_the_job_as_refused(
    errors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(allocations, "SHARED_S", 0.0)
    shared = tmp_path / "cells/0123-1/log.txt"
    of_rank = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "node2"}
    for name, value in {**of_rank, ERRORS_FOLDER: str(errors), SHARED_FILE: str(shared)}.items():
        monkeypatch.setenv(name, value)
    assert rank.main(["false"]) == 2
    message = f"node2 does not see {shared}, which another node has written"
    assert message in capsys.readouterr().err
    monkeypatch.setenv(ERRORS_FOLDER, str(errors.parent))
    monkeypatch.delenv("SLURM_PROCID")
    assert end(2) == 75
    ended = job_end(errors)
    assert isinstance(ended, dict)
    assert ended["dead_nodes"] == []
    assert message in ended["reason"]

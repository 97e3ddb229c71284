"""A failing rank ends all ranks soon, names its error, and leaves no process behind."""

import itertools
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.distributed.faults import inject, raise_error
from tests.distributed.launching import (
    begin,
    load,
    recipe_arguments,
    torchrun_two_ranks,
    wait_for_ranks,
    wait_for_text,
)
from tests.processes import PATIENCE_S, wait_until_ended
from unitransformer.checkpoint.names import checkpoint_name
from unitransformer.checkpoint.writer import CheckpointWriter
from unitransformer.launch.failures import ERROR_FILE, RankFailure, first_failure, report_failure

MANY = ("--max-steps", "100000", "--validate-every", "100000", "--log-every", "1")
LIMIT_S = 30.0  # a rank that nobody ends would wait half an hour for the others

pytestmark = pytest.mark.usefixtures("_no_orphans")


def run_out_of_memory() -> None:
    raise torch.distributed.DistBackendError("injected\nCuda failure 2 'out of memory'")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


RAISES = (raise_error, "ArithmeticError", "crashed", "injected in rank 1")


@pytest.mark.parametrize(
    ("strategy", "what", "kind", "status", "said"),
    [
        *((strategy, *RAISES) for strategy in ("ddp", "fsdp", "fsdp1", "zero2", "zero3")),
        ("ddp", run_out_of_memory, "OutOfMemoryError", "oom", "Cuda failure 2 'out of memory'"),
        ("fsdp", kill_itself, "SIGKILL", "crashed", "rank 1 was killed by SIGKILL"),
        ("ddp", leave, "ExitCode", "crashed", "rank 1 ended with exit code 3 and no error message"),
    ],
)
def test_a_failing_rank_ends_all_ranks_and_is_named(
    strategy: str, what: Callable[[], None], kind: str, status: str, said: str, tmp_path: Path
) -> None:
    options = ("--devices", "2", "--batch-size", "4", "--strategy", strategy, *MANY)
    process = begin("gpt", tmp_path / "run", *options, fault=inject(5, what))
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    record = load(tmp_path / "run")
    assert record["status"] == status
    assert (record["error"]["type"], record["error"]["rank"]) == (kind, 1)
    assert said in record["error"]["message"]
    log = (tmp_path / "run" / "output.log").read_text()
    assert f"error: rank 1 of 2: {record['error']['message']} (record: " in log
    assert "Connection closed" not in log  # the error of the other rank is a consequence


def seconds_since_the_fault(folder: Path) -> float:
    return time.monotonic() - float((folder / "fault-at").read_text())


@pytest.mark.alone
@pytest.mark.parametrize("what", [raise_error, run_out_of_memory])
def test_a_failing_rank_ends_all_ranks_soon(what: Callable[[], None], tmp_path: Path) -> None:
    options = ("--devices", "2", "--batch-size", "4", "--strategy", "fsdp", *MANY)
    begin("gpt", tmp_path / "run", *options, fault=inject(5, what)).join(PATIENCE_S)
    assert seconds_since_the_fault(tmp_path) < LIMIT_S


@pytest.mark.alone
def test_a_failing_rank_does_not_wait_for_a_checkpoint_under_way(tmp_path: Path) -> None:
    def fault() -> None:
        inject(7, raise_error)()
        write = CheckpointWriter._write_into

        def write_late(self: CheckpointWriter, *arguments: object) -> object:
            if self.final.name == checkpoint_name(6):
                time.sleep(3 * LIMIT_S)
            return write(self, *arguments)  # type: ignore[arg-type]

        CheckpointWriter._write_into = write_late  # type: ignore[method-assign]

    options = ("--devices", "2", "--batch-size", "4", "--checkpoint-every", "3", *MANY)
    process = begin("gpt", tmp_path / "run", *options, fault=fault)
    process.join(PATIENCE_S)
    assert seconds_since_the_fault(tmp_path) < LIMIT_S
    assert process.exitcode == 1
    assert load(tmp_path / "run")["error"]["type"] == "ArithmeticError"
    (kept,) = (tmp_path / "run").rglob("step-*")
    assert kept.name == checkpoint_name(3)


@pytest.mark.alone
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment_s", [0.2, 1.0])
def test_killing_one_rank_ends_all_ranks_soon(victim: int, moment_s: float, tmp_path: Path) -> None:
    process = begin("gpt", tmp_path / "run", "--devices", "2", "--batch-size", "4", *MANY)
    ranks = wait_for_ranks(process, 2)
    time.sleep(moment_s)  # during set-up, and during training
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    process.join(PATIENCE_S)
    assert time.monotonic() - killed_at < LIMIT_S
    assert process.exitcode == 1
    error = load(tmp_path / "run")["error"]
    assert (error["type"], error["rank"]) == ("SIGKILL", victim)


@pytest.mark.alone
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process = begin("gpt", tmp_path / "run", "--devices", "2", "--batch-size", "4", *MANY)
    ranks = wait_for_ranks(process, 2)
    process.kill()
    process.join()
    wait_until_ended(ranks, timeout_s=LIMIT_S)


@pytest.mark.alone
def test_ctrl_c_ends_the_ranks_at_once(tmp_path: Path) -> None:
    process = begin("gpt", tmp_path / "run", "--devices", "2", "--batch-size", "4", *MANY)
    wait_for_ranks(process, 2)
    wait_for_text(tmp_path / "run" / "output.log", "step ")
    os.kill(process.pid or 0, signal.SIGINT)
    sent_at = time.monotonic()
    process.join(PATIENCE_S)
    assert time.monotonic() - sent_at < LIMIT_S
    assert process.exitcode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in (tmp_path / "run" / "output.log").read_text()


def press_ctrl_c_within_a_line_of_the_log() -> None:
    """Interrupts between a put into TensorBoard's queue and its notification."""
    put, lines = queue.Queue._put, itertools.count()  # type: ignore[attr-defined]

    def put_and_press(self: queue.Queue[object], item: object) -> None:
        put(self, item)
        if type(item) is bytes and next(lines) == 5:
            signal.raise_signal(signal.SIGINT)

    queue.Queue._put = put_and_press  # type: ignore[attr-defined]


def test_ctrl_c_during_a_log_line_ends_the_run(tmp_path: Path) -> None:
    fault = press_ctrl_c_within_a_line_of_the_log
    process = begin("gpt", tmp_path / "run", *MANY, fault=fault)
    process.join(PATIENCE_S)
    assert process.exitcode == 1
    record = load(tmp_path / "run")
    assert record["status"] == "preempted"
    assert 0 < len(record["loss"]) < 10


def test_two_runs_at_once_do_not_collide(tmp_path: Path) -> None:
    options = ("--devices", "2", "--batch-size", "4", "--strategy", "fsdp")
    both = [
        begin("gpt", tmp_path / "same", *options, "--record", str(tmp_path / name)) for name in "ab"
    ]
    for process in both:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in both] == [0, 0]
    folders = [path for path in (tmp_path / "same").iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()


@pytest.mark.alone
def test_a_port_in_use_is_avoided_and_none_stays_open(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 29500))  # torch's default
        taken.listen()
        before = listening()
        options = ("--devices", "2", "--batch-size", "4")
        process = begin("gpt", tmp_path / "run", *options)
        process.join(PATIENCE_S)
        assert process.exitcode == 0
        process = begin("gpt", tmp_path / "failed", *options, *MANY, fault=inject(3, raise_error))
        process.join(PATIENCE_S)
        assert process.exitcode == 1
        assert listening() <= before


def listening() -> set[int]:
    """Ports on which a process listens."""
    sockets = psutil.net_connections("tcp")
    return {socket.laddr.port for socket in sockets if socket.status == psutil.CONN_LISTEN}


# torchrun starts this as a command: for functions it asks only which rank ended first.
FAILING_RECIPE = """
import sys
from recipes import gpt
from recipes.command_line import run_recipe
from tests.distributed.faults import inject, raise_error

inject(3, raise_error)()
sys.exit(run_recipe(gpt.PRESET, gpt.show, sys.argv[1:]))
"""


@pytest.mark.parametrize("num_nodes", [pytest.param(1, marks=pytest.mark.proof), 2])
def test_torchrun_names_the_rank_that_failed_first(num_nodes: int, tmp_path: Path) -> None:
    arguments = recipe_arguments("gpt", tmp_path / "run", "--batch-size", "4", *MANY)
    codes, logs = torchrun_two_ranks(
        *(tmp_path, sys.executable, "-c", FAILING_RECIPE, *arguments),
        num_nodes=num_nodes,
        max_restarts=0,
    )
    assert codes == [1] * num_nodes
    root_cause = logs[-1].read_text().partition("Root Cause")[2]
    assert "rank      : 1" in root_cause
    assert "ArithmeticError: injected in rank 1" in root_cause
    assert load(tmp_path / "run")["status"] == "crashed"


def test_failures_in_the_same_second_get_increasing_times_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / str(rank) / "error.json" for rank in range(3)]
    monkeypatch.setattr(time, "time", lambda: 1000.25)
    for path in (files[1], files[0], files[2]):
        path.parent.mkdir()
        monkeypatch.setenv(ERROR_FILE, str(path))
        report_failure(RuntimeError("injected"))
    failures = [ProcessFailure(rank, 7, 1, str(path)) for rank, path in enumerate(files)]
    assert [failure.timestamp for failure in failures] == [1001, 1000, 1002]


@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        ([("RuntimeError", 5.0), ("ValueError", 4.0)], "ValueError"),  # the earlier failure
        ([("RuntimeError", 5.0), ("SIGKILL", 0.0)], "SIGKILL"),  # has no time
        ([("SIGABRT", 0.0), ("RuntimeError", 5.0)], "RuntimeError"),  # waited in vain
    ],
)
def test_the_first_failure_is_the_cause_of_the_others(
    kinds: list[tuple[str, float]], first: str
) -> None:
    failures = [
        RankFailure(rank=rank, type=kind, message="", lines=[], at_s=at_s)
        for rank, (kind, at_s) in enumerate(kinds)
    ]
    assert first_failure(failures).type == first

"""Tests claims on cells: who may take a cell whose lock is held."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from scaling.sweep import claims
from scaling.sweep.claims import CLAIMS, JOB_ID, RESTARTS, Holder, claim, find_holders


def be_start(monkeypatch: pytest.MonkeyPatch, job: str | None, restart: int = 0) -> None:
    """Gives this process the variables of a start of a SLURM job."""
    monkeypatch.delenv(JOB_ID, raising=False)
    monkeypatch.delenv(RESTARTS, raising=False)
    if job is not None:
        monkeypatch.setenv(JOB_ID, job)
    if restart:
        monkeypatch.setenv(RESTARTS, str(restart))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"TAKEOVER_S": 0.3, "GATE_S": 0.1}.items():
        monkeypatch.setattr(claims, name, seconds, raising=False)


@pytest.mark.parametrize(
    ("job", "restart", "is_taken"),
    [("7", 1, True), ("7", 2, True), ("7", 0, False), ("8", 1, False), (None, 1, False)],
)
def test_only_a_later_start_of_the_same_job_takes_a_cell_whose_lock_outlives_its_node(
    job: str | None,
    restart: int,
    is_taken: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file server may hold locks of a dead node for minutes; here another process holds them."""
    be_start(monkeypatch, "7")
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        be_start(monkeypatch, job, restart)
        claimed = claim(tmp_path, "cell")
        assert (claimed is not None) == is_taken
        if claimed is None:
            return
        with claimed:
            assert find_holders(tmp_path)["cell"].restart == restart
            assert claim(tmp_path, "cell") is None, "the new lock holds"
        assert find_holders(tmp_path) == {}


FIRST_START = """
import sys
from pathlib import Path
from scaling.sweep import claims
claims.BEAT_S = 0.01
with claims.claim(Path(sys.argv[1]), "cell"):
    print("claimed", flush=True)
    sys.stdin.readline()
"""


def test_a_start_that_lives_out_of_reach_of_slurm_keeps_its_cell_until_it_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM starts the job again, since it has declared the node of the first start down."""
    command = [sys.executable, "-c", FIRST_START, str(tmp_path)]
    variables = {**os.environ, JOB_ID: "7", RESTARTS: "0"}
    with subprocess.Popen(
        command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "claimed\n"
        be_start(monkeypatch, "7", 1)
        assert claim(tmp_path, "cell") is None
        first.send_signal(signal.SIGSTOP)  # as a dead node: it does nothing, and its locks stay
        with claim(tmp_path, "cell") or pytest.fail("not claimed"):
            first.send_signal(signal.SIGCONT)
            assert first.communicate("\n")[0] == ""
            assert find_holders(tmp_path)["cell"].restart == 1, "the first deletes its own note"
            be_start(monkeypatch, "8")
            assert claim(tmp_path, "cell") is None


def test_a_cell_that_another_process_claims_now_is_not_taken_by_an_old_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has the lock and not yet replaced the note of a start that was killed."""
    folder = tmp_path / CLAIMS
    folder.mkdir()
    killed = Holder(host="node1", process=1, since_s=0.0, job="7")
    (folder / "cell.runs").write_text(json.dumps(asdict(killed)))
    be_start(monkeypatch, "7", 1)
    with FileLock(folder / "cell.gate"), FileLock(folder / "cell.lock"):
        assert claim(tmp_path, "cell") is None
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        assert find_holders(tmp_path)["cell"].restart == 1


def test_a_cell_that_a_living_process_has_just_taken_from_a_dead_one_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_start(monkeypatch, "7")
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        note = tmp_path / CLAIMS / "cell.runs"
        holder = Holder(host="node2", process=1, since_s=0.0, job="8")
        note.write_text(json.dumps(asdict(holder)))
        be_start(monkeypatch, "7", 1)
        assert claim(tmp_path, "cell") is None
        with note.open() as held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)


OLD = {"host": "node1", "process": 3, "since_s": 1.0}  # a note of an older version
DAMAGED = ["", "{", "[]", "3", '"host"', '{"host": "node1"}', json.dumps(OLD | {"since_s": "x"})]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_note_of_a_held_cell_gives_nobody_the_cell(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_start(monkeypatch, "7")
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        (tmp_path / CLAIMS / "cell.runs").write_text(text)
        assert find_holders(tmp_path) == {}
        be_start(monkeypatch, "7", 1)
        assert claim(tmp_path, "cell") is None


@pytest.mark.parametrize("added", [{}, {"later": 1}])
def test_a_note_of_another_version_names_its_holder(
    added: dict[str, object], tmp_path: Path
) -> None:
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        (tmp_path / CLAIMS / "cell.runs").write_text(json.dumps(OLD | added))
        assert find_holders(tmp_path)["cell"].host == "node1"

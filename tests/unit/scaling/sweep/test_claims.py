"""Tests claims on cells: who may take a cell whose lock is held."""

import fcntl
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scaling.sweep.claims import CLAIMS, JOB_ID, RESTARTS, Holder, claim, find_holders


def be_start(monkeypatch: pytest.MonkeyPatch, job: str | None, restart: int = 0) -> None:
    """Gives this process the variables of a start of a SLURM job."""
    monkeypatch.delenv(JOB_ID, raising=False)
    monkeypatch.delenv(RESTARTS, raising=False)
    if job is not None:
        monkeypatch.setenv(JOB_ID, job)
    if restart:
        monkeypatch.setenv(RESTARTS, str(restart))


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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "node1"}', '{"unknown": 1}'])
def test_a_damaged_note_of_a_held_cell_gives_nobody_the_cell(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_start(monkeypatch, "7")
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        (tmp_path / CLAIMS / "cell.runs").write_text(text)
        be_start(monkeypatch, "7", 1)
        assert claim(tmp_path, "cell") is None


def test_a_note_of_an_older_version_names_its_holder(tmp_path: Path) -> None:
    with claim(tmp_path, "cell") or pytest.fail("not claimed"):
        old = {"host": "node1", "process": 3, "since_s": 1.0}
        (tmp_path / CLAIMS / "cell.runs").write_text(json.dumps(old))
        assert find_holders(tmp_path)["cell"].host == "node1"

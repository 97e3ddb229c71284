"""Tests the compile cache of a sweep: cells share compiled code only when it is complete."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.recipe_process import ProcessResult
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import CACHE, CACHE_VARIABLE, run_cell, share_code
from tests.builders.sweeps import LIMITS, make_record_of, make_study, make_tasks
from unitransformer.record.schema import write_record

CODE = "ab/kernel.so"


def compile_in(
    task: CellTask, folder: Path, work: Callable[[Path], None], *, is_killed: bool
) -> str:
    """Runs a cell that does `work` in its cache folder; returns the code that it found there."""
    found: list[str] = []

    def run(*_: Any, log: Path, variables: Mapping[str, str], **limits: Any) -> ProcessResult:
        cache = Path(variables[CACHE_VARIABLE])
        found.append((cache / CODE).read_text() if (cache / CODE).exists() else "")
        (cache / CODE).parent.mkdir(exist_ok=True)
        work(cache)
        log.touch()
        if is_killed:
            return ProcessResult(exit_code=None, elapsed_s=1.0, ending="timeout")
        assert task.config is not None
        write_record(make_record_of(task.config), log.parent / "x-1.json")
        return ProcessResult(exit_code=0, elapsed_s=1.0)

    outcome = run_cell(task, run, folder, LIMITS)
    assert outcome.status == ("timeout" if is_killed else "ok")
    return found[0]


@pytest.fixture(autouse=True)
def _no_cache_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)


def test_a_killed_compile_leaves_nothing_in_the_shared_cache(
    tmp_path: Path,
) -> None:
    killed, ended, third = make_tasks(make_study())[:3]

    def write_half(cache: Path) -> None:
        (cache / CODE).write_text("hal")
        # Another cell begins while this one writes, and succeeds.
        assert compile_in(ended, tmp_path, write_whole, is_killed=False) == ""

    def write_whole(cache: Path) -> None:
        assert not (cache / CODE).exists()
        (cache / CODE).write_text("whole")
        (cache / "ab" / ".1.tmp").touch()
        (cache / "kernel.lock").touch()

    assert compile_in(killed, tmp_path, write_half, is_killed=True) == ""
    assert compile_in(third, tmp_path, lambda cache: None, is_killed=False) == "whole"
    shared = [path for path in (tmp_path / CACHE).rglob("*") if path.is_file()]
    assert [path.relative_to(tmp_path / CACHE) for path in shared] == [Path(CODE)]
    assert not list(tmp_path.glob(f"cells/*/{CACHE}"))


def test_a_killed_compiler_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    first, second = make_tasks(make_study())[:2]

    def write_half(cache: Path) -> None:
        (cache / CODE).write_text("hal")

    compile_in(first, tmp_path, write_half, is_killed=True)
    assert compile_in(second, tmp_path, lambda cache: None, is_killed=False) == ""


def test_compiled_code_is_copied_on_a_disk_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "cell" / "ab").mkdir(parents=True)
    (tmp_path / "cell" / CODE).write_text("whole")
    share_code(tmp_path / "cell", tmp_path / "shared")
    share_code(tmp_path / "shared", tmp_path / "next")
    assert (tmp_path / "next" / CODE).read_text() == "whole"
    assert [path.name for path in (tmp_path / "shared" / "ab").iterdir()] == ["kernel.so"]


def test_a_cache_that_the_user_has_set_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/mine")
    seen: list[Mapping[str, str]] = []

    def run(*_: Any, log: Path, variables: Mapping[str, str], **limits: Any) -> ProcessResult:
        seen.append(variables)
        log.touch()
        return ProcessResult(exit_code=1, elapsed_s=1.0)

    run_cell(make_tasks(make_study())[0], run, tmp_path, replace(LIMITS, limit_s=5))
    assert CACHE_VARIABLE not in seen[0]
    assert not (tmp_path / CACHE).exists()

"""A run ends as its training does, whatever becomes of its output."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes import gpt
from recipes.command_line import run_recipe
from tests.distributed.forking import fork_command
from tests.distributed.launching import environment, load, recipe_arguments
from tests.processes import PATIENCE_S
from unitransformer.cli import run_main

pytestmark = pytest.mark.usefixtures("_no_orphans")


def exit_code(folder: Path, prepare: Callable[[], None], *options: str) -> int | None:
    """Runs GPT as its command does, with the streams that `prepare` leaves."""
    folder.mkdir()
    arguments = recipe_arguments("gpt", folder, "--log-every", "1", *options)

    def command() -> int:
        prepare()
        return run_main(lambda: run_recipe(gpt.PRESET, gpt.show, arguments))

    variables = environment(folder.parent)
    process = fork_command(command, log=folder / "output.log", variables=variables, is_whole=True)
    process.join(PATIENCE_S)
    return process.exitcode


@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_run_goes_on_when_the_reader_of_its_output_has_gone(devices: str, tmp_path: Path) -> None:
    def leave() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(writer)
        os.close(reader)

    assert exit_code(tmp_path / "run", leave, "--devices", devices) == 0
    assert load(tmp_path / "run")["status"] == "ok"
    assert "Traceback" not in (tmp_path / "run" / "output.log").read_text()


def test_a_run_prints_its_summary_on_a_terminal_that_lacks_letters(tmp_path: Path) -> None:
    text = tmp_path / "letters.txt"
    text.write_text("éàùçïôâ êîëüñøå\n" * 400, encoding="utf-8")

    def to_ascii() -> None:
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(encoding="ascii", errors="strict")

    assert exit_code(tmp_path / "run", to_ascii, "--data", str(text)) == 0
    output = (tmp_path / "run" / "output.log").read_text(encoding="ascii")
    assert f"record      {tmp_path / 'run' / 'record.json'}\n" in output
    assert "???" in output

"""Tests what all commands share: how values are read, and what happens to their output."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pytest

from tests.processes import PATIENCE_S
from unitransformer.cli import (
    Parser,
    explain_parse_error,
    read_integer,
    read_path,
    read_yaml,
)

# Each is something else than text by the rules of YAML 1.1 or 1.2.
NAMES = ["off", "null", "~", "yes", "62117e96", "0012", "1_000", "0x10", "2024-01-01", ".inf"]
NAMES += ["1e3", "1:30", "=", "<<", "<"]
NAMES += ["", " ", "#1", "a: b", "[a]", "{a: b}", "&a", "!a", "- a", "---", "%a", "@", "a\nb"]


@pytest.mark.parametrize("name", ["off", "yes", "62117e96", "0012", "1_000", "1e3", "2024-01-01"])
def test_a_plain_value_of_yaml_is_text(name: str) -> None:
    assert read_yaml(f"a: {name}\nb: [{name}]") == {"a": name, "b": [name]}


def test_null_and_nothing_are_no_text_unless_quoted() -> None:
    assert read_yaml("a: null\nb: ~\nc:\nd: 'null'\ne: '~'\nf: ''") == {
        **{"a": None, "b": None, "c": None},
        **{"d": "null", "e": "~", "f": ""},
    }


def test_a_name_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3 gives seed again; give it once"):
        read_yaml("seed: 1\nsize: a\nseed: 2")
    assert read_yaml("a: &a {b: 1}\nc: {<<: *a, b: 2}") == {"a": {"b": "1"}, "c": {"b": "2"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1000", 1000), ("1e3", 1000), ("1_000", 1000), ("1.5e3", 1500), ("0x10", 16), ("010", 10)],
)
def test_an_integer_may_be_written_in_several_forms(text: str, value: int) -> None:
    assert read_integer(text) == value
    assert type(read_integer(text)) is int


@pytest.mark.parametrize("value", ["1.5", "1:30", "", "many", "nan", "inf", "1e400", "1e300", True])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{value!r}; it must be an integer")):
        read_integer(value)


def test_the_home_of_a_user_is_found_and_of_nobody_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert read_path("~/runs") == Path("/somewhere/runs")
    assert read_path("runs/~") == Path("runs/~")
    assert read_path("./~name") == Path("~name")
    with pytest.raises(
        ValueError,
        match="does not exist; check the path: there is no such user",
    ):
        read_path("~no-such-user/runs")


def build_parser() -> Parser:
    parser = Parser(prog="test")
    parser.add_argument("--config", action="config")
    parser.add_argument("--text", type=str, default="")
    parser.add_argument("--path", type=Path, default=Path("here"))
    parser.add_argument("--maybe-path", type=Path | None, default=None)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--maybe-count", type=int | None, default=None)
    parser.add_argument("--choice", type=Literal["red", "blue"] | None, default=None)
    parser.add_argument("--switch", action="store_true")
    return parser


def print_config(parser: Parser, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--print_config"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*NAMES, "./null", "./~x", "é", "\udcff"])
def test_a_printed_config_means_the_same_as_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    arguments = [f"--{option}={name}" for option in ("text", "path", "maybe-path")]
    expected = parser.parse_args(arguments)
    file = tmp_path / "config.yaml"
    file.write_text(print_config(parser, arguments, capsys), encoding="ascii")
    actual = parser.parse_args([f"--config={file}"])
    assert actual.pop("config")
    assert actual.as_dict() | {"config": None} == expected.as_dict()
    assert actual.text == name


def test_a_switch_in_a_file_is_true_or_false(tmp_path: Path) -> None:
    parser, file = build_parser(), tmp_path / "config.yaml"
    for text, value in (("true", True), ("false", False), ("off", False), ("'yes'", True)):
        file.write_text(f"switch: {text}")
        assert parser.parse_args([f"--config={file}"]).switch is value
    file.write_text("switch: maybe")
    with pytest.raises(jsonargparse.ArgumentError, match="'maybe'; it must be true or false"):
        parser.parse_args([f"--config={file}"])
    assert parser.parse_args(["--switch"]).switch is True
    assert parser.parse_args([]).switch is False


def test_a_file_of_options_is_utf8_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_bytes("\ufefftext: é\r\ncount: 1e3\r\n".encode())
    given = build_parser().parse_args(["--config=~/config.yaml"])
    assert (given.text, given.count) == ("é", 1000)
    file.write_bytes("text: é".encode("latin-1"))
    fault = re.escape(f"config {file} is not UTF-8 (unexpected end of data at offset 6)")
    with pytest.raises(ValueError, match=fault):
        build_parser().parse_args([f"--config={file}"])


def test_a_value_that_looks_like_a_file_of_options_stays_text() -> None:
    assert build_parser().parse_args(["--maybe-path=#1"]).maybe_path == Path("#1")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--count=many", "count is 'many'; it must be an integer"),
        ("--maybe-count=1.5", "maybe-count is '1.5'; it must be an integer"),
        (
            "--maybe-path=~nobody-here/a",
            "maybe-path ~nobody-here/a does not exist; check the path: there is no such user",
        ),
        ("--choice=reed", "choice is 'reed'; did you mean red?"),
        ("--switch=no", "--switch takes no value; leave =no out"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_the_fix(argument: str, message: str) -> None:
    parser = build_parser()
    with pytest.raises(jsonargparse.ArgumentError) as refused:
        parser.parse_args([argument])
    assert explain_parse_error(str(refused.value), parser).startswith(message)


# ---- output

PROGRAM = """
import sys
from unitransformer.cli import is_output_read, only_reports, run_main

def main():
    if sys.argv[1:]:
        only_reports()
    print("caf\\u00e9", "\\u65e5", "\\udcff", flush=True)
    for number in range(20_000):
        print(number)
    print("done", is_output_read(), file=sys.stderr)
    return {code}

sys.exit(run_main(main))
"""


def run_program(code: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    variables = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **options.pop("env", {}),
    }
    arguments: list[str] = options.pop("args", [])
    command = [sys.executable, "-c", PROGRAM.format(code=code), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, env=variables, timeout=PATIENCE_S, **streams | options)


@pytest.mark.parametrize("code", [0, 75])
def test_a_command_ends_as_its_work_does_when_nobody_reads_its_output(code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_program(code, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, b"done False\n")
    closed = run_program(code, stdout=None, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (code, b"done True\n")


def test_output_that_python_does_not_buffer_appears_at_once() -> None:
    program = (
        "import os, unitransformer.cli as c; c.run_main(lambda: print(end='.') or os._exit(0))"
    )
    command = [sys.executable, "-c", program]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for value, shown in (("1", b"."), ("", b"")):
        done = subprocess.run(
            command, env=variables | {"PYTHONUNBUFFERED": value}, stdout=subprocess.PIPE
        )
        assert done.stdout == shown


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    file = tmp_path / "file"
    program = (
        "import os, sys, unitransformer.cli as c\n"
        "c.run_main(lambda: open(sys.argv[1], 'w').write('ab') and os.write(2, b'x') * 0)"
    )
    command = [sys.executable, "-c", program, str(file)]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=variables, preexec_fn=lambda: os.closerange(0, 3), check=True)
    assert file.read_text() == "ab"


def test_errors_that_nobody_reads_change_no_exit_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_program(2, stderr=writer)
    os.close(writer)
    assert done.returncode == 2
    assert done.stdout.endswith(b"\n19999\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("code", "expected"), [(0, 1), (2, 2)])
def test_output_that_a_full_disk_loses_is_one_line_and_the_work_goes_on(
    code: int, expected: int
) -> None:
    with open("/dev/full", "wb") as full:
        done = run_program(code, stdout=full)
    assert done.returncode == expected
    error, *rest = done.stderr.splitlines()
    reason = b"No space left on device; the rest follows here"
    assert error == b"error: standard output is lost: " + reason
    assert b"19999" in rest  # a block of the output may come after "done"
    assert b"done False" in rest


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_command_whose_result_is_not_its_output_succeeds_without_it() -> None:
    with open("/dev/full", "wb") as full:
        done = run_program(stdout=full, args=["saved"])
    assert done.returncode == 0
    assert done.stderr.startswith(b"error: standard output is lost")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"caf? ? \xff"),
        ({"PYTHONIOENCODING": "cp1252"}, b"caf\xe9 ? \xff"),
        ({"PYTHONIOENCODING": "utf-8"}, "café 日 ".encode() + b"\xff"),
        ({"LC_ALL": "C"}, "café 日 ".encode() + b"\xff"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"caf? ? \xff"),
    ],
)
def test_a_letter_that_the_terminal_cannot_show_is_replaced(
    variables: dict[str, str], line: bytes
) -> None:
    done = run_program(env=variables)
    assert (done.returncode, done.stderr) == (0, b"done True\n")
    assert done.stdout.splitlines()[0] == line
    assert done.stdout.endswith(b"\n19999\n")

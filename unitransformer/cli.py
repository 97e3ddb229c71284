"""Shared by all commands: how they read options, print errors and write their output."""

import argparse
import atexit
import codecs
import difflib
import errno
import io
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from unitransformer.files import expand_home

SEE_HELP = "--help lists them all"
MODE = "unitransformer"  # by this name jsonargparse knows how files are read and written
EXACT = 2**53  # up to here a float holds every integer


def suggest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Suggests the most similar known name; if none is similar, `otherwise` or all known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or f"known: {', '.join(names)}"


def fail(message: str, code: int) -> int:
    """Prints an error in one line and returns the exit code."""
    sys.stderr.write(f"error: {_one_line(message)}\n")
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def explain_parse_error(
    message: str,
    parser: argparse.ArgumentParser | None,
    *,
    see_help: str = SEE_HELP,
    expected: Callable[[str], str] | None = None,
) -> str:
    """Turns an error message of jsonargparse into one line that says how to fix the command line.

    Args:
        parser: its options are suggested for an unknown one; None: `see_help` is printed instead.
        expected: describes what the value of an option, named by its dotted name, must be.
    """
    actions = [] if parser is None else parser._actions
    if unknown := re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", message):
        flags = [flag for action in actions for flag in action.option_strings]
        return f"{unknown[1]} is not an option; {suggest(unknown[1], flags, otherwise=see_help)}"
    if unknown := re.search(r"Option '(\S+)' is not accepted", message):
        names = [action.dest for action in actions]
        hint = suggest(unknown[1], names, otherwise=see_help)
        return f"config.{unknown[1]} is not an option; {hint}"
    if given := re.search(r"argument (\S+): ignored explicit argument '(.*)'", message):
        return f"{given[1]} takes no value; leave ={given[2]} out"
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    if key and (reason := re.search(r"Not of type Integer: (.*)", message)):
        return f"{key[1].replace('_', '-')} is {reason[1]}"
    if key and (reason := re.search(r"Not of type LocalPath: (.*)", message)):
        # Without quotes jsonargparse would leave out a path that the message repeats.
        return f"{key[1]} ".replace("_", "-") + reason[1].replace("'", "")
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected is not None and key and value:
        return f"{key[1].replace('_', '-')} is {value[1].strip()!r}; {expected(key[1])}"
    if key and value and (choices := re.search(r"Expected a typing.Literal\[(.*?)\]", message)):
        names = re.findall(r"'(.*?)'", choices[1])
        given_value = value[1].strip()
        option = key[1].replace("_", "-")
        return f"{option} is {given_value!r}; {suggest(given_value, names)}"
    if key and value and "Expected a <class 'float'>" in message:
        return f"{key[1]} is {value[1].strip()!r}; it must be a number".replace("_", "-")
    return re.sub('^Parser key "(.+?)":', r"\1:", _one_line(message))


def name_config_files(message: str, arguments: Sequence[str]) -> str:
    """Puts the files of `--config` into an error about them: the parser does not say which."""
    files = [
        option.partition("=")[2] or following
        for option, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if option.partition("=")[0] == "--config"
    ]
    named = f"config {' and '.join(files)}"
    return re.sub("^(Problems parsing )?config(?=:| holds)", lambda _: named, message)


def read_yaml(text: str) -> Any:
    """Reads YAML in which every value is text, as on a command line: the option decides its type.

    By YAML's own rules 62117e96 is a number and `off` is false. Here only `null`, `~` and nothing
    are not text, and leave an option out; in quotes they are text too.

    Raises ValueError, in one line, for text that is not YAML, or a name that is given twice.
    """
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(str(error))) from error


class _TextLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, form) for tag, form in forms if tag.endswith((":null", ":merge"))]
        for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if (name := str(key.value)) in names:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line} gives {name} again; give it once")
            names.add(name)
        return super().construct_mapping(node, deep)


def _read_options(text: str) -> Any:
    """Reads a file of options; a value on a command line stays as it was typed."""
    values = read_yaml(text)
    return values if isinstance(values, dict) else text


def _write_options(values: Any) -> str:
    # Escapes other letters than ASCII, so that no encoding of a terminal or a file changes a name.
    return str(yaml.safe_dump(values, sort_keys=False))


def read_integer(value: Any) -> int:
    """Reads an integer such as 1000, 1_000 or 1e3; raises ValueError for anything else."""
    if not isinstance(value, bool):
        with suppress(ValueError, TypeError):
            return int(value, 0)
        with suppress(ValueError, TypeError, OverflowError):
            if abs(number := float(value)) <= EXACT and number.is_integer():
                return int(number)
    raise ValueError(f"{value!r}; it must be an integer")


def read_path(value: Any) -> Path:
    """Reads a path, with `~` and `~user` expanded; raises ValueError for an unknown user."""
    if not isinstance(value, str):
        raise ValueError(f"is {value!r}; it must be a path")
    return Path(expand_home(value))


def _write_path(path: Path) -> str:
    # Without ./ these would mean no path, and a home.
    return f"./{path}" if str(path) == "null" or str(path).startswith("~") else str(path)


class Integer(int):
    """Makes jsonargparse call `read_integer`."""


class LocalPath(str):
    """Makes jsonargparse call `read_path`."""


register_type(Integer, int, read_integer, type_check=lambda value, _: type(value) is int)
register_type(
    LocalPath, _write_path, read_path, type_check=lambda value, _: isinstance(value, Path)
)
jsonargparse.set_loader(MODE, _read_options, (ValueError,))
jsonargparse.set_dumper(MODE, _write_options)


class Parser(jsonargparse.ArgumentParser):
    """The parser of every command: integers, paths and files of options mean the same in each."""

    def __init__(self, **settings: Any) -> None:
        # No abbreviations: one may become ambiguous when an option is added.
        super().__init__(exit_on_error=False, allow_abbrev=False, parser_mode=MODE, **settings)

    def add_argument(self, *args: Any, **settings: Any) -> Any:
        if "type" in settings:
            settings["type"] = _reader(settings["type"])
        action = super().add_argument(*args, **settings)
        if settings.get("action") == "store_true":
            action.type = _read_switch  # of a file; on a command line it takes no value
        return action

    def parse_path(self, path: Any, *args: Any, **settings: Any) -> Any:
        """Reads a file of options as UTF-8, whatever the locale; `-` is standard input."""
        try:
            is_typed = str(path) == "-"
            file = Path(os.path.expanduser(path))
            text = (sys.stdin.buffer.read() if is_typed else file.read_bytes()).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"config {path} is not UTF-8 ({error.reason} at offset {error.start}); convert it"
            ) from error
        return self.parse_string(text, *args, **settings)


def _read_switch(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(f"it is {value!r}; it must be true or false")
    return text in ("true", "yes", "on")


def _reader(kind: Any) -> Any:
    """Returns a type, or a union of types, with the two above instead of `int` and `Path`."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return typing.Union[tuple(map(_reader, typing.get_args(kind)))]  # noqa: UP007
    return {int: Integer, Path: LocalPath}.get(kind, kind)


class _Output(io.FileIO):
    """Standard output or standard error, of which the reader may leave at any time.

    What is written afterwards is dropped, so that the work goes on and its exit code holds. Output
    for which a disk has no room goes on in standard error.
    """

    is_read = True
    is_lost = False  # though somebody may have read it
    is_result = True  # of the command; False: the result is elsewhere
    replaced: Any = None  # the stream that it replaces, which may close the file when it is deleted

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            self.is_read = False
            # The reader has gone, or the terminal was closed.
            self.is_lost = not isinstance(error, ConnectionError) and error.errno != errno.EIO
            if self.is_lost and self.fileno() == 1:
                fail(f"standard output is lost: {error.strerror}; the rest follows here", 1)
                with suppress(OSError):  # standard error is closed
                    os.dup2(2, 1)
                return self.write(data)
            return len(data)


def run_main(main: Callable[[], int], *, is_whole_process: bool = False) -> int:
    """Runs a command in a process of its own; returns the exit code of its work.

    It ends as well as its work does when nobody reads its output. Letters that the terminal cannot
    show are replaced. Output that a full disk has lost is an error if it is the result.

    Args:
        is_whole_process: the process exits next, with this code. It then leaves its memory to the
            system: with torch, taking thousands of modules apart takes a quarter of a second.
    """
    codes: list[int] = []
    if is_whole_process:  # registered first, and so called after what libraries register
        atexit.register(lambda: _end_process(codes[0]) if codes else None)
    # A file that gets the number of a closed standard stream would receive what libraries print.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    codecs.register_error(MODE, _replace)
    output = _open_output("stdout")
    _open_output("stderr")
    try:
        code = main()
    except SystemExit as stop:  # after --help
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    sys.stdout.flush()
    codes.append(code or int(output is not None and output.is_lost and output.is_result))
    return codes[0]


def _end_process(code: int) -> None:
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_output_read() -> bool:
    """Returns False once the reader of standard output has gone: a command may only print."""
    output = _output()
    return output is None or output.is_read


def only_reports() -> None:
    """Says that the result of this command is on disk or in a queue, and its output a report.

    Output that is lost then changes no exit code: who sees a failure would do the work again.
    """
    if (output := _output()) is not None:
        output.is_result = False


def _output() -> _Output | None:
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Output) else None


def _open_output(name: str) -> _Output | None:
    stream = getattr(sys, name)
    if stream is None:  # closed by who started this command
        setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
        return None
    try:
        output = _Output(stream.fileno(), "wb", closefd=False)
    except OSError:  # no file, as in a notebook
        return None
    stream.flush()
    output.replaced = stream
    is_unbuffered = stream.write_through  # by PYTHONUNBUFFERED
    wrapper = io.TextIOWrapper(
        output if is_unbuffered else io.BufferedWriter(output),
        encoding=stream.encoding,
        errors=MODE,
        line_buffering=stream.line_buffering,
        write_through=is_unbuffered,
    )
    setattr(sys, name, wrapper)
    return output


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Writes the bytes of a file's name as they are, and ? for a letter without an encoding."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)

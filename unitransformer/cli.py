"""Shared by the command lines: one-line errors that suggest the option probably meant."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable

SEE_HELP = "--help lists them all"


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
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected is not None and key and value:
        return f"{key[1]} is {value[1].strip()!r}; {expected(key[1])}"
    return re.sub('^Parser key "(.+?)":', r"\1:", _one_line(message))

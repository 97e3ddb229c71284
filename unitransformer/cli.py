"""What the command lines share: errors in one line, and the option that was probably meant."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable

SEE_HELP = "--help lists them all"


def suggest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The name that was probably meant; if none is near, `otherwise` or all that are known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or f"known: {', '.join(names)}"


def fail(message: str, code: int) -> int:
    """Print an error in one line; returns the exit code."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    return code


def one_line(text: str) -> str:
    return " ".join(text.split())


def explain_parse_error(
    message: str,
    parser: argparse.ArgumentParser | None,
    *,
    see_help: str = SEE_HELP,
    expected: Callable[[str], str] | None = None,
) -> str:
    """An error message of jsonargparse in one line that says how to mend the command line.

    Args:
        parser: its options are proposed in place of an unknown one; None: `see_help` is.
        expected: what the value of an option, given by its dotted name, must be.
    """
    actions = [] if parser is None else parser._actions
    if unknown := re.search(r"[Uu]nrecognized arguments: ([^\s=]+)", message):
        flags = [flag for action in actions for flag in action.option_strings]
        cure = suggest(unknown[1], flags, otherwise=see_help)
        return f"{unknown[1]} is not an option; {cure}"
    if unknown := re.search(r"Option '(\S+)' is not accepted", message):
        cure = suggest(unknown[1], [action.dest for action in actions], otherwise=see_help)
        return f"config.{unknown[1]} is not an option; {cure}"
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected is not None and key and value:
        return f"{key[1]} is {value[1].strip()!r}; {expected(key[1])}"
    return re.sub('^Parser key "(.+?)":', r"\1:", one_line(message))

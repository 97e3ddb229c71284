"""The command of a measurement, as its record keeps it."""

import re
import shlex
from collections.abc import Sequence

USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")


def stored_command(arguments: Sequence[str]) -> str:
    """Returns `python -m scaling` with these arguments, as everybody may read it.

    It leaves out where the record is written (`--out`), which changes no result, and the user and
    password in an address, such as that of `--index-url`.
    """
    shown = [USER_INFO.sub("", argument) for argument in without_out(arguments)]
    return f"python -m scaling {shlex.join(shown)}"


def without_out(arguments: Sequence[str]) -> list[str]:
    """Returns arguments without `--out` and its value; what follows `--` is of another program."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    kept, own = list[str](), iter(arguments[:end])
    for argument in own:
        if argument == "--out":
            next(own, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return [*kept, *arguments[end:]]

"""Pieces of Markdown, and numbers as people read them."""

import html
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from urllib.parse import quote

from tabulate import tabulate


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(list(rows), headers=headers, tablefmt="github", disable_numparse=True)


@lru_cache(maxsize=4096)  # many rows say the same
def escaped(text: str) -> str:
    """`text` as it is, in a cell or a line: no markup, no formula, no end of the cell."""
    plain = html.escape(text.strip(), quote=False)
    escaped = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)
    return "<br>".join(escaped.splitlines())


def code_block(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def link(target: str, words: str = "") -> str:
    return f"[{escaped(words or target)}]({quote(target)})"

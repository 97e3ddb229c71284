"""Pieces of Markdown, and numbers as people read them."""

import html
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from urllib.parse import quote

from tabulate import tabulate


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def is_small(num_bytes: int) -> bool:
    """Whether MiB say more than GiB."""
    return num_bytes < 2**30 / 10


def gib(num_bytes: int) -> str:
    if is_small(num_bytes):
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


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

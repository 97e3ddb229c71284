"""Pieces of Markdown, and numbers as people read them."""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from urllib.parse import quote

WIDTH = 100  # letters of a line of a paragraph

NOT_WRAPPED = ("|", "`", "#", "<", "!", "†")  # how tables, code, HTML and the like begin

BEGIN = re.compile(r"(?:> ?)?(?:- )?")  # of a line of a quote or a list

LIKE_A_LIST = re.compile(r"^[-+*#>](?=\s|$)")

BACKSLASH = r"\\\g<0>"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Without padding: a wide cell would fill every other row with blanks."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def details(title: str, *blocks: str) -> str:
    """Blocks that are folded under their title."""
    inside = page_of(blocks).strip()
    return f"<details>\n<summary>{title}</summary>\n\n{inside}\n\n</details>"


def page_of(blocks: Iterable[str]) -> str:
    """Blocks as one text, paragraphs and lists with lines of at most `WIDTH` letters."""
    return "\n\n".join(map(wrapped, filter(None, blocks))) + "\n"


def shortened(text: str, letters: int) -> str:
    """Cut at a space: what is cut stands in the record."""
    if len(text) <= letters:
        return text
    return f"{text[:letters].rpartition(' ')[0] or text[:letters]} …"


def wrapped(block: str) -> str:
    """A paragraph, list or quote with shorter lines; tables, code and HTML as they are."""
    if block.startswith(NOT_WRAPPED):
        return block
    return "\n".join(map(_wrapped_line, block.split("\n")))


def _wrapped_line(line: str) -> str:
    begin = BEGIN.match(line)
    assert begin is not None
    if len(line) <= WIDTH:
        return line
    indent = begin[0].replace("- ", "  ")
    first, *others = textwrap.wrap(
        line, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    )
    # A dash at the beginning of a line would make a list of it.
    return "\n".join([first, *(f"{indent}{LIKE_A_LIST.sub(BACKSLASH, other)}" for other in others)])


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


def command_lines(command: str) -> str:
    """A shell command, a long one over several lines: it can still be copied and run."""
    lines = textwrap.wrap(
        command, WIDTH - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    is_plain = "'" not in command and '"' not in command and "\\" not in command
    return " \\\n".join(lines) if is_plain else command

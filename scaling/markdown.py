"""Writes Markdown: tables, links, folded blocks, code and wrapped paragraphs."""

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from urllib.parse import quote

WIDTH = 100  # characters of a line of a paragraph
NOT_WRAPPED = ("|", "`", "#", "<", "!", "†")  # first characters of tables, code, HTML and the like


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table without padding, as one wide cell would widen every row."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def details(title: str, *blocks: str) -> str:
    """Returns blocks that are folded under their title."""
    return f"<details>\n<summary>{title}</summary>\n\n{page_of(blocks).strip()}\n\n</details>"


def note(head: str, lines: Sequence[str]) -> list[str]:
    """Returns a box with a list below a sentence; nothing for an empty list."""
    if not lines:
        return []
    return ["\n".join(["> [!NOTE]", f"> {head}", ">", *(f"> - {line}" for line in lines)])]


def page_of(blocks: Iterable[str]) -> str:
    """Joins blocks to one text and wraps paragraphs and lists."""
    return "\n\n".join(map(wrapped, filter(None, blocks))) + "\n"


def shortened(text: str, letters: int) -> str:
    """Cuts a text at a space; callers shorten only what the record holds in full."""
    if len(text) <= letters:
        return text
    return f"{text[:letters].rpartition(' ')[0] or text[:letters]} …"


def wrapped(block: str) -> str:
    """Wraps a paragraph, a list or a quote to lines of `WIDTH`; keeps tables, code and HTML."""
    if block.startswith(NOT_WRAPPED):
        return block
    return "\n".join(map(_wrap_line, block.split("\n")))


def _wrap_line(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    begin = re.match(r"(?:> ?)?(?:- )?", line)
    assert begin is not None
    indent = begin[0].replace("- ", "  ")
    first, *others = textwrap.wrap(
        line, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    )
    # A dash at the beginning of a line would make a list of it.
    escapes = (re.sub(r"^[-+*#>](?=\s|$)", r"\\\g<0>", other) for other in others)
    return "\n".join([first, *(f"{indent}{other}" for other in escapes)])


@lru_cache(maxsize=4096)  # many rows hold the same text
def escaped(text: str) -> str:
    """Returns text for a cell or a line that holds no markup, formula or end of the cell."""
    plain = html.escape(text.strip(), quote=False)
    escaped = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)
    return "<br>".join(escaped.splitlines())


def code_block(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def link(target: str, text: str = "") -> str:
    return f"[{escaped(text or target)}]({quoted(target)})"


def quoted(path: str) -> str:
    """Returns a path as the target of a link; the bytes of its name may be no UTF-8."""
    return quote(path, errors="surrogateescape")


def command_lines(command: str) -> str:
    """Breaks a long shell command into lines; it can still be copied and run."""
    is_plain = "'" not in command and '"' not in command and "\\" not in command
    if len(command) <= WIDTH - 2 or not is_plain:
        return command
    lines = textwrap.wrap(
        command, WIDTH - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(lines)


def command_block(command: str) -> str:
    return code_block(command_lines(command), "sh")


def folded_commands(title: str, commands: Iterable[tuple[str, str]]) -> str:
    """Returns folded shell commands, each below a comment."""
    lines = [f"# {comment}\n{command_lines(command)}" for comment, command in commands]
    return details(title, code_block("\n".join(lines), "sh"))

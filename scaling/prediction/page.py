"""Tables of `predict`, as text and in an HTML page that loads nothing."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

LEFT = ("limited by", "from", "at")  # columns of words


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells that are formatted already."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        align = ["left" if name in LEFT else "right" for name in self.header]
        return tabulate(self.rows, headers=self.header, disable_numparse=True, colalign=align)

    def html(self) -> str:
        sides = [" class=left" if name in LEFT else "" for name in self.header]
        lines = ["<table>"]
        for tag, row in (("th", self.header), *(("td", row) for row in self.rows)):
            cells = zip(sides, row, strict=True)
            shown = "".join(f"<{tag}{side}>{_cell(cell)}</{tag}>" for side, cell in cells)
            lines.append(f"<tr>{shown}</tr>")
        return "\n".join([*lines, "</table>"])


def _cell(text: str) -> str:
    return html.escape(text).replace(" (", "<br>(")  # an interval is below its value


Block = Sequence[str | Table]  # lines of text and tables that belong together


def text_of(block: Block) -> str:
    return "\n".join(part if isinstance(part, str) else part.text() for part in block)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 92em; margin: 1em auto; padding: 0 1em }}
h1 {{ font-size: 22px; margin: 0 0 .5em }}
p {{ margin: .2em 0 }}
section {{ margin: 0 0 1.2em; overflow-x: auto }}
p:has(+ table) {{ font-weight: 600 }}
svg {{ width: 100%; max-width: 75em; height: auto }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .2em .45em; border-bottom: 1px solid #8886 }}
td {{ white-space: nowrap }}
.left {{ text-align: left }}
</style>
</head>
<body>
<h1>{title}</h1>
{before}
{figure}
{after}
</body>
</html>
"""


def render_page(title: str, svg: bytes | None, blocks: Sequence[Block], *, before: int) -> bytes:
    """Returns a page with the blocks, and after so many of them the figure, if there is one."""
    figure = "" if svg is None else svg.decode()[svg.decode().index("<svg") :]
    shown = [f"<section>\n{_html_of(block)}\n</section>" for block in blocks]
    return PAGE.format(
        title=html.escape(title),
        figure=figure,
        before="\n".join(shown[:before]),
        after="\n".join(shown[before:]),
    ).encode()


def _html_of(block: Block) -> str:
    """Returns tables, and a paragraph for every line of text."""
    parts = []
    for part in block:
        if isinstance(part, Table):
            parts.append(part.html())
        else:
            parts += [f"<p>{html.escape(line)}</p>" for line in part.splitlines() if line]
    return "\n".join(parts)

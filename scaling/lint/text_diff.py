"""Two texts in; where they first differ, in words for people, out."""

from collections.abc import Sequence

LONGEST_DIFF = 3  # lines of either side
WINDOW = 100  # letters of a line around the first that differs


def first_difference(text: str, again: str) -> tuple[int, str]:
    """The first line that differs, from 1, and the lines there of both sides, as a short diff."""
    own, right = text.split("\n"), again.split("\n")
    shorter = min(len(own), len(right))
    first = next((line for line in range(shorter) if own[line] != right[line]), shorter)
    same_end = 0
    while same_end < shorter - first and own[-1 - same_end] == right[-1 - same_end]:
        same_end += 1
    column = _first_column(own[first : first + 1], right[first : first + 1])
    sides = (("-", own), ("+", right))
    shown = [
        f"\n  {sign} {_window(line, column)}"
        for sign, lines in sides
        for line in lines[first : len(lines) - same_end][:LONGEST_DIFF]
    ]
    told = "the text is not what its records give (-: the file, +: the records)"
    return first + 1, "".join([told, *shown])


def _first_column(own: Sequence[str], right: Sequence[str]) -> int:
    pairs = zip("".join(own), "".join(right), strict=False)
    return next((column for column, (a, b) in enumerate(pairs) if a != b), 0)


def _window(line: str, column: int) -> str:
    begin = max(0, column - WINDOW // 2)
    cut = line[begin : begin + WINDOW]
    return f"{'…' * (begin > 0)}{cut}{'…' * (begin + WINDOW < len(line))}"

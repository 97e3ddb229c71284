"""The options of `python -m scaling trend`."""

from pathlib import Path

from unitransformer.cli import Parser


def build_trend_parser() -> Parser:
    parser = Parser(
        description="Show how the step time of each cell changed over time, with change points. "
        "Only records of the same config, machine and clocks form a history. For looking, never a "
        "gate: the exit code does not depend on what is found."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="folders that hold run records"
    )
    parser.add_argument(
        "--cell", type=str | None, default=None, help="only cells whose hash or title has this text"
    )
    parser.add_argument(
        "--plot", type=Path | None, default=None, help="draw the histories: a .png or .svg file"
    )
    return parser

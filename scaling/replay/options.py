"""The options of `python -m scaling replay`."""

from pathlib import Path

from unitransformer.cli import Parser


def build_replay_parser() -> Parser:
    parser = Parser(
        description="Measure the same cell again. Exit code 0: reproduced, 1: not reproduced, "
        "3: inconclusive, such as too wide an interval.",
    )
    parser.add_argument(
        "cell", type=Path, metavar="CELL", help="a record, an outcome.json, or a cell's folder"
    )
    parser.add_argument("--repeats", type=int, default=1, help="launches")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share of a step that counts as the same"
    )
    parser.add_argument("--out", type=Path | None, default=None, help="folder that keeps the runs")
    return parser

"""The options of `python -m scaling lint`."""

from pathlib import Path

from unitransformer.cli import Parser


def build_lint_parser() -> Parser:
    parser = Parser(
        description="Check that a RESULTS.md follows from its records, that its numbers agree, and "
        "whether code, torch or schema have changed since.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a RESULTS.md of `report`")
    return parser

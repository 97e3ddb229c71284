"""Scaling/lint/command.py."""

from pathlib import Path

import jsonargparse


def _lint_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Check a RESULTS.md: written again from its records, its arithmetic, and "
        "whether code, torch or schema have changed since.",
        exit_on_error=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a RESULTS.md of `report`")
    return parser

"""The command line of the studies: `python -m scaling STUDY`; exit code out.

0 done | 1 failed, a record that contradicts itself, strategies that differ, not reproduced | 2 bad
usage | 3 a replay that shows neither | 75 a sweep that a signal stopped: the same command goes on.
An error is one line.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse

from scaling.calibrate import build_calibrate_parser, calibrate, read_calibrate_options
from scaling.lint.check import lint, render
from scaling.lint.command import _lint_parser
from scaling.parity.command import run_parity
from scaling.parity.options import build_parity_parser, read_parity_options
from scaling.published import build_published_parser, load_rows, render_replay, replay
from scaling.replay.command import build_replay_parser, run_replay
from scaling.report.command import run_report
from scaling.report.options import build_report_parser, read_report_options
from scaling.sweep.command import run_sweep
from scaling.sweep.options import build_sweep_parser, read_sweep_options, split_axes
from unitransformer.cli import explain_parse_error, fail
from unitransformer.files import check_writable
from unitransformer.launch.signals import STOPPED_EXIT_CODE, StopRequested


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """A command line: the study's own words, those after `--`, and all as they were typed."""

    own: Sequence[str]
    beyond: Sequence[str]
    all: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, say what was done; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    own, beyond = words[:end], words[end + 1 :]
    try:
        study = SUBCOMMANDS.get(own[0]) if own else None
        if study is None:  # --help, or an error that names the studies
            build_parser().parse_args(own)
            return 0
        if beyond and own[0] != "parity":
            raise ValueError(f"{beyond[0]} comes after --, and {own[0]} hands nothing on")
        return study.do(CommandLine(own=own[1:], beyond=beyond, all=words))
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error), own), 2)
    except (ValueError, PermissionError, NotADirectoryError) as error:
        return fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        return fail(str(error), 1)
    except KeyboardInterrupt as stop:
        code = STOPPED_EXIT_CODE if isinstance(stop, StopRequested) else 1
        by = f" by {stop}" if str(stop) else ""
        return fail(f"stopped{by} before the end; what was under way is not written", code)


def build_parser() -> jsonargparse.ArgumentParser:
    """Every study as a subcommand with its own options."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m scaling", description="Studies over run records.", exit_on_error=False
    )
    studies = parser.add_subcommands(dest="study", metavar="STUDY")
    for name, study in SUBCOMMANDS.items():
        studies.add_subcommand(name, study.build_parser(), help=study.help)
    return parser


# ---------------------------------------------------------------------------------- studies


def _report(words: CommandLine) -> int:
    run_report(read_report_options(_parsed("report", words)))
    return 0


def _sweep(words: CommandLine) -> int:
    own, axes = split_axes(words.own, build_sweep_parser())
    return run_sweep(read_sweep_options(_parse("sweep", own), axes))


def _parity(words: CommandLine) -> int:
    options = read_parity_options(_parsed("parity", words), words.beyond, words.all)
    check_writable("out", options.out, is_folder=True)
    bad = run_parity(options)
    return fail(bad, 1) if bad else 0


def _lint(words: CommandLine) -> int:
    findings = lint(_parsed("lint", words).file)
    print(render(findings))
    return findings.exit_code


def _replay(words: CommandLine) -> int:
    return run_replay(_parsed("replay", words))


def _calibrate(words: CommandLine) -> int:
    options = read_calibrate_options(_parsed("calibrate", words))
    if options.out is not None:
        check_writable("out", options.out, is_folder=False)
    print(calibrate(options))
    return 0


def _published(words: CommandLine) -> int:
    print(render_replay(replay(load_rows(_parsed("published", words).rows))))
    return 0


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """What a subcommand reads and does."""

    help: str
    build_parser: Callable[[], jsonargparse.ArgumentParser]
    do: Callable[[CommandLine], int]


SUBCOMMANDS = {
    "report": Subcommand(
        help="write RESULTS.md from records", build_parser=build_report_parser, do=_report
    ),
    "sweep": Subcommand(
        help="run every combination of some options of the recipes",
        build_parser=build_sweep_parser,
        do=_sweep,
    ),
    "parity": Subcommand(
        help="does every strategy train the same model?",
        build_parser=build_parity_parser,
        do=_parity,
    ),
    "lint": Subcommand(help="does a RESULTS.md still hold?", build_parser=_lint_parser, do=_lint),
    "replay": Subcommand(
        help="measure a cell again: is it the same?", build_parser=build_replay_parser, do=_replay
    ),
    "calibrate": Subcommand(
        help="what can this machine do at best?",
        build_parser=build_calibrate_parser,
        do=_calibrate,
    ),
    "published": Subcommand(
        help="do published figures follow from their rows?",
        build_parser=build_published_parser,
        do=_published,
    ),
}


def _parsed(study: str, words: CommandLine) -> Any:
    return _parse(study, words.own)


def _parse(study: str, own: Sequence[str]) -> Any:
    return build_parser().parse_args([study, *own])[study]


# ---------------------------------------------------------------------------------- errors


def _explain(message: str, words: Sequence[str]) -> str:
    missing = re.search(r"required: (?:\w+\.)?(folders|file|cell)\b", message)
    if missing:
        what = {
            "folders": "report needs a folder that holds run records: python -m scaling report DIR",
            "file": "lint needs a report: python -m scaling lint RESULTS.md",
            "cell": "replay needs a record or the folder of a cell: python -m scaling replay CELL",
        }
        return what[missing[1]]
    missing = re.search(r'expected "study" to be one of \{([^}]+)\}', message)
    if missing:
        return f"no study given; choose one of: {missing[1]}"
    study = words[0] if words and words[0] in SUBCOMMANDS else "report"
    return explain_parse_error(
        message, None, see_help=f"python -m scaling {study} --help lists them"
    )


if __name__ == "__main__":
    sys.exit(main())

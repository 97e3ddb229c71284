"""`python -m scaling COMMAND`: sweeps, compares and reports runs of the recipes.

Exit codes: 0 done | 1 failed, a record contradicts itself, strategies differ, or a cell is not
reproduced | 2 bad usage | 3 an inconclusive replay | 75 a signal stopped the sweep, and the same
command continues it. An error is one line.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse

from scaling.calibrate import build_calibrate_parser, calibrate
from scaling.flop_counters import build_counters_parser, count_flops
from scaling.lint.check import build_lint_parser, lint, render
from scaling.parity.command import run_parity
from scaling.parity.options import build_parity_parser, read_parity_options
from scaling.published.csv_rows import load_rows
from scaling.published.recompute import recompute_rows
from scaling.published.table import build_published_parser, render_rows
from scaling.replay.command import build_replay_parser, run_replay
from scaling.report.command import run_report
from scaling.report.options import build_report_parser, read_report_options
from scaling.sweep.command import run_sweep
from scaling.sweep.options import build_sweep_parser, read_sweep_options, split_axes
from unitransformer.cli import explain_parse_error, fail, suggest
from unitransformer.files import check_writable
from unitransformer.launch.signals import STOPPED_EXIT_CODE, StopRequested


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    end = typed.index("--") if "--" in typed else len(typed)
    arguments, passed_on = typed[:end], typed[end + 1 :]
    try:
        subcommand = SUBCOMMANDS.get(arguments[0]) if arguments else None
        if subcommand is None:
            if arguments and not arguments[0].startswith("-"):
                raise ValueError(
                    f"{arguments[0]} is not a command; {suggest(arguments[0], SUBCOMMANDS)}"
                )
            build_parser().parse_args(arguments)  # --help, or an error that names the commands
            return 0
        if passed_on and arguments[0] != "parity":
            raise ValueError(
                f"{passed_on[0]} comes after --, but {arguments[0]} passes nothing on to recipes"
            )
        return subcommand.run(arguments, typed)
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error), arguments), 2)
    except (ValueError, PermissionError, NotADirectoryError) as error:
        return fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        return fail(str(error), 1)
    except KeyboardInterrupt as stop:
        code = STOPPED_EXIT_CODE if isinstance(stop, StopRequested) else 1
        by = f" by {stop}" if str(stop) else ""
        return fail(f"stopped{by} before the end; unfinished results are not written", code)


def build_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m scaling",
        description="Sweep, compare and report runs of the recipes.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        subcommands.add_subcommand(name, subcommand.build_parser(), help=subcommand.help)
    return parser


def _parse(arguments: Sequence[str]) -> Any:
    return build_parser().parse_args(arguments)[arguments[0]]


def _sweep(arguments: Sequence[str], _: Sequence[str]) -> int:
    rest, axes = split_axes(arguments[1:], build_sweep_parser())
    return run_sweep(read_sweep_options(_parse(["sweep", *rest]), axes))


def _parity(arguments: Sequence[str], typed: Sequence[str]) -> int:
    options = read_parity_options(_parse(arguments), typed[len(arguments) + 1 :], typed)
    check_writable("out", options.out, is_folder=True)
    differences = run_parity(options)
    return fail(differences, 1) if differences else 0


def _lint(arguments: Sequence[str], _: Sequence[str]) -> int:
    findings = lint(_parse(arguments).file)
    print(render(findings))
    return findings.exit_code


def _calibrate(arguments: Sequence[str], _: Sequence[str]) -> int:
    print(calibrate(_parse(arguments)))
    return 0


def _counters(arguments: Sequence[str], _: Sequence[str]) -> int:
    print(count_flops(_parse(arguments)))
    return 0


def _published(arguments: Sequence[str], _: Sequence[str]) -> int:
    print(render_rows(recompute_rows(load_rows(_parse(arguments).rows))))
    return 0


@dataclass(frozen=True)
class Subcommand:
    help: str
    build_parser: Callable[[], jsonargparse.ArgumentParser]
    run: Callable[[Sequence[str], Sequence[str]], int]  # of the arguments before `--`, and of all


SUBCOMMANDS = {
    "report": Subcommand(
        "write RESULTS.md from run records",
        build_report_parser,
        lambda arguments, _: run_report(read_report_options(_parse(arguments))),
    ),
    "sweep": Subcommand("run every combination of some recipe options", build_sweep_parser, _sweep),
    "parity": Subcommand(
        "check that every strategy trains the same model", build_parity_parser, _parity
    ),
    "lint": Subcommand("check that a RESULTS.md still holds", build_lint_parser, _lint),
    "replay": Subcommand(
        "measure a cell again and compare",
        build_replay_parser,
        lambda arguments, _: run_replay(_parse(arguments)),
    ),
    "calibrate": Subcommand(
        "measure what this machine reaches at best", build_calibrate_parser, _calibrate
    ),
    "counters": Subcommand(
        "show what FLOP counters of other packages print",
        build_counters_parser,
        _counters,
    ),
    "published": Subcommand(
        "recompute published numbers from their rows", build_published_parser, _published
    ),
}

MISSING = {
    "folders": "report needs a folder that holds run records: python -m scaling report DIR",
    "file": "lint needs a report: python -m scaling lint RESULTS.md",
    "cell": "replay needs a record or the folder of a cell: python -m scaling replay CELL",
}


def _explain(message: str, arguments: Sequence[str]) -> str:
    if missing := re.search(r"required: (?:\w+\.)?(folders|file|cell)\b", message):
        return MISSING[missing[1]]
    if 'expected "command" to be one of' in message:
        return f"no command given; choose one of: {', '.join(SUBCOMMANDS)}"
    name = f"{arguments[0]} " if arguments and arguments[0] in SUBCOMMANDS else ""
    see_help = f"python -m scaling {name}--help lists them"
    return explain_parse_error(message, None, see_help=see_help)


if __name__ == "__main__":
    sys.exit(main())

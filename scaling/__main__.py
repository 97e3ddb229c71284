"""`python -m scaling COMMAND`: sweeps, compares and reports runs of the recipes.

Exit codes: 0 done | 1 failed, a record contradicts itself, strategies differ, or a cell is not
reproduced | 2 bad usage | 3 an inconclusive replay or comparison | 4 the candidate of a comparison
is slower | 5 it is so much faster that the base is stale | 75 a signal stopped the command:
the same one continues a sweep or a bisection, and begins a comparison again. An error is one line.
"""

import contextlib
import importlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse

from unitransformer.cli import (
    Parser,
    explain_parse_error,
    fail,
    name_config_files,
    run_main,
    suggest,
)
from unitransformer.cli_help import HelpFormatter
from unitransformer.files import check_writable
from unitransformer.launch.signals import (
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    StopRequested,
    handle_signals,
)


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
        if passed_on and arguments[0] not in PASS_ON:
            raise ValueError(
                f"{passed_on[0]} comes after --, but {arguments[0]} passes nothing on to recipes"
            )
        if isinstance(subcommand.run, str):
            given = _parse(arguments)  # first, as the import takes longer
            return int(_load(subcommand.run)(given))
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


def build_parser(chosen: str | None = None) -> Parser:
    """Returns the parser of all subcommands, with the options of the chosen one alone.

    The options of all would take as long to import as all that the subcommands do.
    """
    parser = Parser(
        prog="python -m scaling",
        description="Sweep, compare and report runs of the recipes.",
        formatter_class=HelpFormatter,
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        options = _load(subcommand.parser)() if name == chosen else Parser()
        subcommands.add_subcommand(name, options, help=subcommand.help)
    return parser


def _load(name: str) -> Any:
    """Imports a function, such as `scaling.calibrate:calibrate`."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _parse(arguments: Sequence[str]) -> Any:
    return build_parser(arguments[0]).parse_args(arguments)[arguments[0]]


def _sweep(arguments: Sequence[str], _: Sequence[str]) -> int:
    from scaling.sweep.options import build_sweep_parser, read_sweep_options, split_axes

    rest, axes = split_axes(arguments[1:], build_sweep_parser())
    options = read_sweep_options(_parse(["sweep", *rest]), axes)
    from scaling.sweep.command import run_sweep

    return run_sweep(options, arguments[1:])


def _parity(arguments: Sequence[str], typed: Sequence[str]) -> int:
    from scaling.parity.options import read_parity_options

    options = read_parity_options(_parse(arguments), typed[len(arguments) + 1 :], typed)
    check_writable("out", options.out, is_folder=True)
    from scaling.parity.command import run_parity

    differences = run_parity(options)
    return fail(differences, 1) if differences else 0


def _peers(arguments: Sequence[str], typed: Sequence[str]) -> int:
    from scaling.peers.options import read_peers_options

    options = read_peers_options(_parse(arguments), typed[len(arguments) + 1 :], typed)
    from scaling.peers.command import run_peers

    return run_peers(options)


def _compare(arguments: Sequence[str], typed: Sequence[str]) -> int:
    from scaling.comparison.options import check_unused_options, read_compare_options

    given, recipe_options = _parse(arguments), typed[len(arguments) + 1 :]
    if given.self_test or given.reread is not None:
        check_unused_options(given, recipe_options)
        from scaling.comparison.command import run_reread, run_self_test
        from scaling.stored_command import stored_command

        with _stopped_by_signals():
            if given.self_test:
                return run_self_test(given.trials, given.out, stored_command(typed))
            return run_reread(given.reread, given.plot)
    options = read_compare_options(given, recipe_options, typed)
    from scaling.comparison.command import run_compare

    with _stopped_by_signals():
        return run_compare(options)


def _predict(arguments: Sequence[str], typed: Sequence[str]) -> int:
    from scaling.prediction.options import (
        build_predict_parser,
        check_validate,
        read_predict_options,
    )
    from scaling.stored_command import stored_command
    from scaling.sweep.options import split_axes

    rest, axes = split_axes(arguments[1:], build_predict_parser())
    given = _parse(["predict", *rest])
    if given.validate:
        check_validate(given, axes)
        from scaling.prediction.command import run_validate

        return run_validate(given.rows)
    options = read_predict_options(given, axes, stored_command(typed))
    from scaling.prediction.command import run_predict

    return run_predict(options)


def _bisect(arguments: Sequence[str], typed: Sequence[str]) -> int:
    from scaling.comparison.bisect_options import read_bisect_options

    options = read_bisect_options(_parse(arguments), typed[len(arguments) + 1 :], typed)
    from scaling.comparison.bisect_command import run_bisect

    with _stopped_by_signals():
        return run_bisect(options)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Lets a command remove its temporary folders and end its processes before a signal ends it."""

    def stop(number: int, _: object) -> None:
        raise StopRequested(signal.Signals(number).name)

    with handle_signals(STOP_SIGNALS, stop):
        yield


Run = Callable[[Sequence[str], Sequence[str]], int]  # of the arguments before `--`, and of all


@dataclass(frozen=True)
class Subcommand:
    """A subcommand; functions are named by module, which is imported only when it is needed."""

    help: str
    parser: str  # builds the parser
    run: str | Run  # the name of a function of the parsed options, or what reads them itself


SUBCOMMANDS = {
    "report": Subcommand(
        "write RESULTS.md from run records",
        "scaling.report.options:build_report_parser",
        "scaling.report.command:run_report",
    ),
    "sweep": Subcommand(
        "run every combination of some recipe options",
        "scaling.sweep.options:build_sweep_parser",
        _sweep,
    ),
    "parity": Subcommand(
        "check that every strategy trains the same model",
        "scaling.parity.options:build_parity_parser",
        _parity,
    ),
    "peers": Subcommand(
        "compare speed and memory with other implementations",
        "scaling.peers.options:build_peers_parser",
        _peers,
    ),
    "compare": Subcommand(
        "say whether a change makes training slower",
        "scaling.comparison.options:build_compare_parser",
        _compare,
    ),
    "lint": Subcommand(
        "check that a RESULTS.md still holds",
        "scaling.lint.options:build_lint_parser",
        "scaling.lint.check:run_lint",
    ),
    "replay": Subcommand(
        "measure a cell again and compare",
        "scaling.replay.options:build_replay_parser",
        "scaling.replay.command:run_replay",
    ),
    "bisect": Subcommand(
        "find the commit that made a step slower",
        "scaling.comparison.bisect_options:build_bisect_parser",
        _bisect,
    ),
    "trend": Subcommand(
        "show how cells changed over time, for looking",
        "scaling.comparison.trend_options:build_trend_parser",
        "scaling.comparison.trend_command:run_trend",
    ),
    "calibrate": Subcommand(
        "measure what this machine reaches at best",
        "scaling.calibrate:build_calibrate_parser",
        "scaling.calibrate:run_calibrate",
    ),
    "counters": Subcommand(
        "show what FLOP counters of other packages print",
        "scaling.flop_counters:build_counters_parser",
        "scaling.flop_counters:run_counters",
    ),
    "predict": Subcommand(
        "predict memory, time and cost on hardware that is not here",
        "scaling.prediction.options:build_predict_parser",
        _predict,
    ),
    "published": Subcommand(
        "recompute published numbers from their rows",
        "scaling.published.table:build_published_parser",
        "scaling.published.table:run_published",
    ),
}

PASS_ON = ("bisect", "compare", "parity", "peers")  # give the options after `--` to recipes

MISSING = {
    "folders": "{command} needs a folder that holds run records: python -m scaling {command} DIR",
    "file": "lint needs a report: python -m scaling lint RESULTS.md",
    "cell": "replay needs a record or the folder of a cell: python -m scaling replay CELL",
}


def _explain(message: str, arguments: Sequence[str]) -> str:
    if missing := re.search(r"required: (?:\w+\.)?(folders|file|cell)\b", message):
        return MISSING[missing[1]].format(command=arguments[0])
    if 'expected "command" to be one of' in message:
        return f"no command given; choose one of: {', '.join(SUBCOMMANDS)}"
    name = f"{arguments[0]} " if arguments and arguments[0] in SUBCOMMANDS else ""
    see_help = f"python -m scaling {name}--help lists them"
    explained = _as_typed(explain_parse_error(message, None, see_help=see_help), arguments)
    return name_config_files(explained, arguments)


def _as_typed(message: str, arguments: Sequence[str]) -> str:
    """Names a refused value as it was typed: the parser reads `yes` as True."""
    if (refused := re.match(r"([\w.-]+) is '(True|False)';", message)) is None:
        return message
    flag = f"--{refused[1]}"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, has_value, value = argument.partition("=")
        if name == flag:
            typed = value if has_value else following
            return f"{refused[1]} is {typed!r};{message[refused.end() :]}"
    return message


if __name__ == "__main__":
    sys.exit(run_main(main))

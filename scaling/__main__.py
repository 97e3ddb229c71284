"""The command line of the studies: `python -m scaling report DIR...`; exit code out.

0 done | 1 failed, a record that contradicts itself, strategies that differ | 2 bad usage. An error
is one line.
"""

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse

from scaling import certificates
from scaling.calibrate import build_calibrate_parser, calibrate, read_calibrate_options
from scaling.certify import ParityOptions, certify
from scaling.markdown import count
from scaling.parity_options import build_parity_parser, read_parity_options
from scaling.published import build_published_parser, load_rows, render_replay, replay
from scaling.report import draw_plots, render_report
from scaling.store import Store, find_contradictions, load_store, relative_name
from unitransformer.records import write_atomically

DEFAULT_OUT = "RESULTS.md"
DEFAULT_PLOTS = "plots"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, say what was done; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, beyond = _split(words)
    try:
        given = build_parser().parse_args(own)
        if given["study"] == "parity":
            return parity(read_parity_options(given["parity"], beyond, words))
        if beyond:
            raise ValueError(f"{beyond[0]} comes after --, and {given['study']} runs no recipe")
        if given["study"] == "published":
            print(render_replay(replay(load_rows(given["published"].rows))))
            return 0
        if given["study"] == "calibrate":
            options = read_calibrate_options(given["calibrate"])
            if options.out is not None:
                _check_writable("out", options.out, is_folder=False)
            print(calibrate(options))
            return 0
        return report(_report_options(given["report"]))
    except jsonargparse.ArgumentError as error:
        return _fail(_in_one_line(str(error), own), 2)
    except (ValueError, PermissionError, NotADirectoryError) as error:
        return _fail(str(error), 2)
    except (OSError, RuntimeError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped before the end; the file it was working on is not written", 1)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What comes before `--`, and what follows it, which is for a recipe."""
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def build_parser() -> jsonargparse.ArgumentParser:
    """Every study as a subcommand with its own options."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m scaling", description="Studies over run records.", exit_on_error=False
    )
    studies = parser.add_subcommands(dest="study", metavar="STUDY")
    studies.add_subcommand("report", _report_parser(), help="write RESULTS.md from records")
    studies.add_subcommand(
        "parity", build_parity_parser(), help="does every strategy train the same model?"
    )
    studies.add_subcommand(
        "published", build_published_parser(), help="do published figures follow from their rows?"
    )
    studies.add_subcommand(
        "calibrate", build_calibrate_parser(), help="what can this machine do at best?"
    )
    return parser


def _report_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="Write RESULTS.md and its plots from the run records below folders.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders that hold run records"
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help="file to write")
    parser.add_argument(
        "--plots",
        type=Path | None,
        default=None,
        metavar="DIR",
        help="folder of the plots; by default plots beside the file",
    )
    return parser


def _report_options(given: Any) -> "ReportOptions":
    plots = given.out.parent / DEFAULT_PLOTS if given.plots is None else given.plots
    return ReportOptions(folders=tuple(given.folders), out=given.out, plots=plots)


# ---------------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Places, as a person wrote them."""

    folders: tuple[Path, ...]
    out: Path
    plots: Path


def report(options: ReportOptions) -> int:
    """Write RESULTS.md and its plots, say how many records they stand on.

    Raises:
        ValueError: folders without records, or places that cannot be written.
        OSError: a file could not be written after all.
    """
    out, plots = options.out, options.plots
    _check_writable("out", out, is_folder=False)
    _check_writable("plots", plots, is_folder=True)
    store = load_store(options.folders, relative_to=out.parent)
    if not (store.runs or store.certificates):
        folders = " and ".join(map(str, options.folders))
        raise ValueError(f"{folders}: no run record below; {_left_out(store)}")
    drawn = draw_plots(store)
    text = render_report(store, command=_command(options), plots=relative_name(plots, out.parent))
    # The text comes last: it never names a plot that is not there.
    files = {plots / name: content for name, content in drawn.items()} | {out: text.encode()}
    for path, content in files.items():
        write_atomically(path, content)
        print(path)
    print(f"{_used(store)}; {_left_out(store)}")
    return _verdict(store, out)


def _verdict(store: Store, out: Path) -> int:
    names = [run.name for run in store.runs if run.is_ok and find_contradictions(run)]
    names += [c.name for c in store.certificates if certificates.find_contradictions(c)]
    if not names:
        return 0
    return _fail(f"{', '.join(names)}: at odds with its own samples; {out} says where", 1)


def _command(options: ReportOptions) -> str:
    """What writes the same file again from inside its folder, whoever and wherever one is."""
    out, plots = options.out, relative_name(options.plots, options.out.parent)
    folders = [relative_name(folder, out.parent) for folder in options.folders]
    words = ["report", *folders]
    if out.name != DEFAULT_OUT:
        words += ["--out", out.name]
    if plots != DEFAULT_PLOTS:
        words += ["--plots", plots]
    return f"python -m scaling {shlex.join(words)}"


def _check_writable(option: str, path: Path, *, is_folder: bool) -> None:
    """Raises ValueError for a path that is of the other kind or below something closed."""
    if path.exists() and path.is_dir() != is_folder:
        kind = "file" if is_folder else "folder"
        raise ValueError(f"{option} {path} is a {kind}; choose another with --{option}")
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    beyond = path.absolute().relative_to(parent).parts
    if len(beyond) > 1 and (parent / beyond[0]).exists():
        raise ValueError(f"{option} {path}: {parent / beyond[0]} is a file; choose another place")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{option} {path}: {parent} cannot be written; choose another place")


def _used(store: Store) -> str:
    statuses = Counter(str(run.record["status"]) for run in store.runs)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    records = f"{len(store.runs)} record{'s' * (len(store.runs) > 1)} used ({counts})"
    proofs = len(store.certificates)
    return f"{records}, {count(proofs, 'certificate')}" if proofs else records


def _left_out(store: Store) -> str:
    """How many files were left out and why; the reason itself where it is a single one."""
    kinds = Counter(file.kind for file in store.left_out)
    if not kinds:
        return "no file left out"
    total = len(store.left_out)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    damaged = [f"{file.name}: {file.reason}" for file in store.left_out if file.kind == "damaged"]
    first = " ".join(damaged[0].split()) if damaged else ""
    return f"{total} file{'s' * (total > 1)} left out ({counts}{first and '; ' + first})"


# ---------------------------------------------------------------------------------- parity


def parity(options: ParityOptions) -> int:
    """Compare, write the certificates, say what came of it.

    Raises:
        ValueError: options that the recipe refuses.
        RuntimeError: a reference failed.
        OSError: a certificate could not be written.
    """
    _check_writable("out", options.out, is_folder=True)
    written = certify(options, lambda line: print(line, flush=True))
    bad = []
    for path, certificate in written:
        verdicts = Counter(map(certificate.verdict, certificate.results))
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        print(f"{path}: {counts}")
        if verdicts["different"] or verdicts["failed"] or not verdicts["equal"]:
            bad.append(f"{path.name}: {counts}")
    return _fail("; ".join(bad), 1) if bad else 0


# ---------------------------------------------------------------------------------- errors


def _in_one_line(message: str, words: Sequence[str]) -> str:
    if "required: report.folders" in message:
        return "report needs a folder that holds run records: python -m scaling report DIR"
    missing = re.search(r'expected "study" to be one of \{([^}]+)\}', message)
    if missing:
        return f"no study given; choose one of: {missing[1]}"
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        studies = ("calibrate", "parity", "published")
        study = words[0] if words and words[0] in studies else "report"
        return f"{unknown[1]} is not an option; python -m scaling {study} --help lists them"
    return " ".join(message.split())


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

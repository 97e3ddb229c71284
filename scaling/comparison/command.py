"""Runs `python -m scaling compare`: says whether the candidate is slower, and shows why."""

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from scaling.comparison import record
from scaling.comparison.interleave import (
    SIDES,
    Start,
    compare_sides,
    describe_builds,
    judge_starts,
)
from scaling.comparison.options import CompareOptions
from scaling.comparison.paired_calls import Clock
from scaling.comparison.records import CellJudgement, compare_records, worst
from scaling.comparison.sides import check_kinds, find_commit, has_changes, open_sides
from scaling.comparison.verdict import Judgement, format_judgement, format_ratio
from scaling.store.self_test import read_self_test
from unitransformer.cli import only_reports
from unitransformer.machine.host import describe_machine
from unitransformer.record.units import format_bytes, format_count


def run_compare(options: CompareOptions) -> int:
    """Measures or reads both sides, prints the verdict and returns its exit code.

    Raises:
        ValueError: something that cannot be compared.
        RuntimeError: a side does not start or does not train.
        OSError: a file cannot be written.
    """
    if options.package is None and check_kinds(options) == "records":
        return _compare_folders(options)
    only_reports()
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    clock = None if options.clock == "auto" else options.clock
    with open_sides(options) as sides:
        starts, judgement = compare_sides(
            sides,
            options.looks,
            threshold=options.threshold,
            stop_faster=options.stop_faster,
            seed=options.seed,
            clock=clock,
            print_line=lambda line: print(line, flush=True),
        )
    clock = clock or starts[0].deciding_clock
    content = record.describe(
        sides,
        starts,
        judgement,
        clock=clock,
        threshold=options.threshold,
        stop_faster=options.stop_faster,
        about={
            "command": options.command,
            "started_at": started.isoformat(timespec="seconds"),
            "elapsed_s": time.monotonic() - started_s,
        },
    )
    print("\n".join(render(content["sides"], starts, judgement, clock)), flush=True)
    if options.out is not None:
        record.write(content, options.out)
    if options.plot is not None:
        from scaling.comparison.plot import write_plot

        write_plot(options.plot, starts, judgement, clock=clock)
    return judgement.verdict.exit_code


def run_reread(path: Path, plot: Path | None) -> int:
    """Judges the times of a record again; raises ValueError if they contradict it."""
    from scaling.comparison import self_test

    if (test := self_test.read(path)) is not None:
        if plot is not None:
            raise ValueError(f"{path} is the record of a self-test; leave --plot out")
        print("\n".join(self_test.render(test)))
        return 1 if test.broken_promises else 0
    read = record.read(path)
    clock: Clock = read.content["clock"]
    print("\n".join(render(read.content["sides"], read.starts, read.judgement, clock)))
    if plot is not None:
        from scaling.comparison.plot import write_plot

        write_plot(plot, read.starts, read.judgement, clock=clock)
    return read.judgement.verdict.exit_code


def run_self_test(trials: int, out: Path | None, command: str) -> int:
    """Checks the verdicts under load; returns 0 if every promise holds, otherwise 1.

    Raises:
        ValueError: too few trials.
        RuntimeError: the measured process fails.
        OSError: the record cannot be written.
    """
    from scaling.comparison import self_test

    self_test.check_trials(trials)
    print(
        f"measuring {trials} trials, beside {self_test.BUSY} busy processes: about "
        f"{math.ceil(trials / 40)} to {math.ceil(trials / 20)} minutes",
        flush=True,
    )
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    times = self_test.measure(trials, print_line=lambda line: print(line, flush=True))
    about = {
        "command": command,
        "started_at": started.isoformat(timespec="seconds"),
        "elapsed_s": time.monotonic() - started_s,
        "machine": asdict(describe_machine()),
        "code": _describe_code(),
    }
    content = self_test.describe(times, about)
    done = read_self_test(content, "self-test", checksums_hold=True)
    print("\n".join(self_test.render(done)), flush=True)
    if out is not None:
        self_test.write(content, out)
    return 1 if done.broken_promises else 0


def _describe_code() -> dict[str, Any]:
    """Returns the commit of this code and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parents[2]
    try:
        return {"commit": find_commit("HEAD", here), "is_dirty": has_changes(here)}
    except ValueError:
        return {"commit": None, "is_dirty": None}


def _compare_folders(options: CompareOptions) -> int:
    if options.out is not None or options.plot is not None:
        raise ValueError("folders of records hold no pairs; leave --out and --plot out")
    if options.recipe_options or options.clock != "auto":
        raise ValueError(
            "folders of records are not measured again; leave --clock and the options after -- out"
        )
    cells = compare_records(
        Path(options.base),
        Path(options.candidate),
        threshold=options.threshold,
        stop_faster=options.stop_faster,
    )
    verdict = worst(cell.judgement.verdict for cell in cells)
    print(f"{verdict.value}: the worst of {format_count(len(cells), 'cell')}")
    for cell in sorted(cells, key=lambda cell: cell.label):
        print(_cell_line(cell))
    return verdict.exit_code


def _cell_line(cell: CellJudgement) -> str:
    launches = f"{cell.launches[0]} and {format_count(cell.launches[1], 'launch', 'launches')}"
    return f"{cell.label}: {format_judgement(cell.judgement, cell.clock, measured=launches)}"


def render(
    sides: Mapping[str, Mapping[str, Any]],
    starts: Sequence[Start],
    judgement: Judgement,
    clock: Clock,
) -> list[str]:
    """Returns the lines of a comparison: the answer first."""
    lines = [format_judgement(judgement, clock)]
    if judgement.pairs_needed is not None:
        lines.append(
            f"more        about {judgement.pairs_needed:,} pairs would decide: --pairs "
            f"{judgement.pairs_needed}"
        )
    lines += [f"{name:12}{_side(sides[name])}" for name in SIDES]
    if (builds := describe_builds(starts[0])) is not None:
        lines.append(f"builds      {builds}")
    if judgement.detectable is not None:
        lines.append(
            f"finds       slowdowns from {judgement.detectable:.1%} on, 95 % of the time, with as "
            "many pairs"
        )
    lines += _other_clocks(starts, clock)
    lines.append(f"memory      {_memory(starts)}")
    lines.append(f"losses      {compare_losses(starts)}")
    lines += _conditions(starts)
    return lines


def _side(side: Mapping[str, Any]) -> str:
    commit = side["commit"]
    code = "" if commit is None else f" (commit {commit[:10]}"
    changed = " with uncommitted changes" if side["is_dirty"] else ""
    return f"{side['label'] or 'no options'}{code}{changed}{')' if code else ''}"


def _other_clocks(starts: Sequence[Start], decides: Clock) -> list[str]:
    lines = []
    for clock in get_args(Clock):
        if clock != decides and starts[0].base.seconds(clock):
            lines.append(f"{clock:12}{format_ratio(judge_starts(starts, clock))}, {clock} time")
    return lines


def _memory(starts: Sequence[Start]) -> str:
    base, candidate = (max(getattr(start, side).peak_bytes for start in starts) for side in SIDES)
    on_gpu = starts[0].deciding_clock == "gpu"
    of = "the tensors on the GPU" if on_gpu else "the process, imports included"
    sizes = f"{format_bytes(base)}, then {format_bytes(candidate)}"
    return f"{candidate / base:.3f}x: {sizes}; peak of {of}"


def compare_losses(starts: Sequence[Start]) -> str:
    """Says from which step on the losses of both sides differ, and by how much."""
    base, candidate = starts[0].base.losses, starts[0].candidate.losses
    if len(base) != len(candidate):
        return f"not comparable: {len(base)} and {len(candidate)} micro-batches"
    different = [
        index
        for index, (a, b) in enumerate(zip(base, candidate, strict=True))
        if a != b and not (math.isnan(a) and math.isnan(b))
    ]
    if not different:
        return (
            f"equal to the last digit in {format_count(len(base), 'micro-batch', 'micro-batches')}"
        )
    first = different[0]
    largest = max(abs(candidate[i] - base[i]) / max(abs(base[i]), 1e-12) for i in different)
    return (
        f"differ from micro-batch {first + 1} on, there by "
        f"{abs(candidate[first] - base[first]):.1e}; at most by {largest:.1e} of the loss"
    )


def _conditions(starts: Sequence[Start]) -> list[str]:
    about = starts[0].about
    before, after = (dict(about[side]["versions"]) for side in SIDES)
    versions = [
        f"{name} {before[name]}"
        if before[name] == after.get(name)
        else f"{name} {before[name]} and {after.get(name)}"
        for name in before
    ]
    blocks = format_count(starts[0].steps_per_block, "step")
    count = format_count(len(starts), "start")
    device = about["base"]["device"]
    return [f"measured    blocks of {blocks}, {count} of both; {device}; {', '.join(versions)}"]

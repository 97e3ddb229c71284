"""Runs `python -m scaling bisect`: measures candidates, stores the pairs, prints the culprit."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling.comparison.bisect_options import BisectOptions
from scaling.comparison.bisection import (
    CannotMeasure,
    Culprit,
    bisect_by_counters,
    bisect_by_time,
)
from scaling.comparison.counters import Counters, changed_work, count_side, sum_counters
from scaling.comparison.environments import pip_settings
from scaling.comparison.history import SHORT, History, list_versions, read_history
from scaling.comparison.interleave import (
    Side,
    compare_sides,
    describe_builds,
    from_json,
    judge_starts,
    to_json,
)
from scaling.comparison.sides import find_repository, git, open_revisions, open_versions
from scaling.comparison.verdict import Judgement, Verdict, format_judgement
from unitransformer.files import write_atomically
from unitransformer.machine.host import describe_machine
from unitransformer.record.units import format_count

SCHEMA = 3  # 1: pairs of two or three starts, too few for a verdict; 2: threads that wait are busy
FAST = 10.0  # a slowdown that no candidate is faster than: GOOD and BAD may differ by any factor
KEY_PACKAGES = ("torch", "lightning", "numpy")


def run_bisect(options: BisectOptions) -> int:
    """Bisects, prints the culprit and returns the exit code of the verdict on BAD.

    Raises:
        ValueError: a bad revision, options that the recipe of GOOD or BAD refuses.
        RuntimeError: GOOD or BAD does not train.
    """
    repository = find_repository()
    history = (
        list_versions(options.package, options.versions)
        if options.package is not None
        else read_history(options.good, options.bad, repository)
    )
    measured = Measured(options=options, history=history, repository=repository)
    try:
        if options.criterion == "counters":
            return _by_counters(history, measured)
        return _by_time(history, measured)
    except KeyboardInterrupt:
        print(f"\nMeasured pairs are in {options.out}; the same command continues.")
        raise
    except CannotMeasure as error:
        raise RuntimeError(f"GOOD or BAD cannot be measured: {error}") from error


def _by_time(history: History, measured: "Measured") -> int:
    options = measured.options
    _print_whole_counters(history, measured)
    culprit = bisect_by_time(
        history, measured.judge, threshold=options.threshold, print_line=_print_line
    )
    print()
    print("\n".join(render(culprit, history, measured)))
    return culprit.whole.verdict.exit_code


def _print_whole_counters(history: History, measured: "Measured") -> None:
    try:
        lines = measured.compare_counters(history.good, history.bad)
    except CannotMeasure as error:
        print(f"counters are not compared: {error}")
        return
    if lines:
        heading = "Counters of a step differ; --by counters finds where, without timing:"
        print("\n".join([heading, *(f"  {line}" for line in lines)]), flush=True)
    else:
        print("Counters of a step are equal: only timing can tell GOOD and BAD apart.", flush=True)


def render(culprit: Culprit, history: History, measured: "Measured") -> list[str]:
    """Returns what was found, in lines."""
    whole = culprit.whole
    if whole.verdict is Verdict.INCONCLUSIVE:
        return ["Nothing was bisected: it is open whether BAD is slower than GOOD. More --pairs."]
    if whole.verdict is not Verdict.SLOWER:
        return [f"Nothing to bisect: BAD is not slower than GOOD; {format_judgement(whole)}."]
    assert culprit.parent is not None
    titles = history.titles
    if len(culprit.suspects) == 1:
        lines = [f"Culprit: {titles[culprit.suspects[0]]}"]
    else:
        lines = [f"The culprit is one of {len(culprit.suspects)}; the others could not be judged:"]
        lines += [f"  {titles[name]}" for name in culprit.suspects]
    last = titles[culprit.suspects[-1]].split(" ")[0]
    before = titles[culprit.parent].split(" ")[0]
    if culprit.judgement is None:
        lines.append(f"  {last} against {before} cannot be measured: {culprit.not_judged}")
    else:
        lines.append(f"  {last} against {before}: {format_judgement(culprit.judgement)}")
        if builds := measured.builds.get((culprit.parent, culprit.suspects[-1])):
            lines.append(f"  {builds}")
    if culprit.judgement is not None and not culprit.is_confirmed:
        lines.append(
            "  This step alone is not certainly slower: the slowdown may be spread over several."
        )
    lines += _counter_lines(culprit.parent, culprit.suspects[-1], measured)
    lines += _skipped_lines(culprit.skipped, history)
    lines.append(
        f"Measured pairs are in {measured.options.out}; the same command reads them again."
    )
    return lines


def _counter_lines(parent: str, name: str, measured: "Measured") -> list[str]:
    try:
        changed = measured.compare_counters(parent, name)
    except CannotMeasure as error:
        return [f"  counters are unknown: {error}"]
    if not changed:
        return ["  no counter changed: the same operators on the same shapes take longer"]
    return ["  counters of one step that changed with it:", *(f"    {line}" for line in changed)]


def _skipped_lines(skipped: Mapping[str, str], history: History) -> list[str]:
    if not skipped:
        return []
    heading = f"{format_count(len(skipped), 'candidate was', 'candidates were')} skipped:"
    return [heading, *(f"  {history.titles[name]}: {why}" for name, why in skipped.items())]


def _by_counters(history: History, measured: "Measured") -> int:
    changes, skipped = bisect_by_counters(history, measured.totals, print_line=_print_line)
    print()
    if not changes:
        print("Nothing to bisect: the counters of one step of GOOD and BAD are equal.")
        return Verdict.NOT_SLOWER.exit_code
    for change in changes:
        if len(change.suspects) == 1:
            print(f"Counters changed with {history.titles[change.suspects[0]]}:")
        else:
            names = ", ".join(history.titles[name].split(" ")[0] for name in change.suspects)
            print(f"Counters changed with one of {names}, of which only the last can be counted:")
        for line in measured.compare_counters(change.parent, change.suspects[-1]):
            print(f"  {line}")
    print("\n".join(_skipped_lines(skipped, history)), end="\n" if skipped else "")
    return Verdict.SLOWER.exit_code


def _print_line(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measures candidates, and keeps each result in a file, so that a later run reads it."""

    options: BisectOptions
    history: History
    repository: Path
    builds: dict[tuple[str, str], str] = field(default_factory=dict)  # of pairs where they differ

    def judge(self, base: str, candidate: str, threshold: float) -> Judgement:
        """Judges pairs of two candidates; measures them if no file has them.

        Raises:
            CannotMeasure: one of them does not train.
            ValueError: the first or last candidate refuses the options.
        """
        options = self.options
        path = self._path("pairs", base, candidate, threshold=threshold)
        kept = _load(path)
        if kept is None:
            try:
                with self._open([base, candidate]) as (one, other):
                    starts, _ = compare_sides(
                        {"base": one, "candidate": other},
                        options.looks,
                        threshold=threshold,
                        stop_faster=FAST,
                        seed=options.seed,
                        clock=None if options.clock == "auto" else options.clock,
                        print_line=lambda line: _print_line(f"    {line}"),
                    )
            except (ValueError, RuntimeError) as error:
                self._raise(candidate, error)
            kept = {"starts": [to_json(start) for start in starts]}
            _store(path, kept | {"base": base, "candidate": candidate, "command": options.command})
        starts = [from_json(start) for start in kept["starts"]]
        if builds := describe_builds(starts[0]):
            self.builds[base, candidate] = builds
        return judge_starts(
            starts,
            None if options.clock == "auto" else options.clock,
            threshold=threshold,
            stop_faster=FAST,
        )

    def count(self, name: str) -> Counters:
        """Returns the counters of a candidate; raises CannotMeasure."""
        path = self._path("counters", name)
        kept = _load(path)
        if kept is None:
            try:
                with self._open([name]) as (side,):
                    kept = {"counters": count_side(side)}
            except (ValueError, RuntimeError) as error:
                raise CannotMeasure(str(error)) from error
            _store(path, kept | {"candidate": name})
        counters: Counters = kept["counters"]
        return counters

    def totals(self, name: str) -> dict[str, object]:
        return sum_counters(self.count(name))

    def compare_counters(self, before: str, now: str) -> list[str]:
        return changed_work(self.count(before), self.count(now))

    def _raise(self, candidate: str, error: Exception) -> None:
        is_bad_usage = isinstance(error, ValueError) and candidate == self.history.bad
        raise error if is_bad_usage else CannotMeasure(str(error)) from error

    def _open(self, names: list[str]) -> AbstractContextManager[list[Side]]:
        options = self.options
        arguments = ("--devices", "1", *options.recipe_options)
        if options.package is not None:
            return open_versions(
                options.package, names, options.recipe, arguments, options.pip_options
            )
        return open_revisions(names, options.recipe, arguments, options.pip_options)

    def _path(self, kind: str, *names: str, threshold: float | None = None) -> Path:
        options = self.options
        key: dict[str, Any] = {
            "schema": SCHEMA,
            "names": names,
            "package": options.package,
            "files": "" if options.package is None else _digest_files(self.repository),
            "recipe": options.recipe,
            "arguments": options.recipe_options,
            "pip": pip_settings(options.pip_options),
            "machine": describe_machine().fingerprint,
            "threads": os.environ.get("OMP_NUM_THREADS"),  # change operators and time
            "wait": os.environ.get("OMP_WAIT_POLICY"),
            "python": platform.python_version(),
            "versions": [importlib.metadata.version(package) for package in KEY_PACKAGES],
        }
        if threshold is not None:
            key |= {"looks": options.looks, "clock": options.clock, "seed": options.seed}
            key["threshold"] = round(threshold, 6)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        label = "-".join(name[:SHORT] for name in names)
        return options.out / f"{kind}-{label}-{digest}.json"


def _digest_files(repository: Path) -> str:
    """Returns a digest of the files as they are now, with which versions of a package train."""
    listed = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.split("\0"))):
        path = repository / name
        if path.suffix in (".py", ".toml", ".txt") and path.is_file():
            digest.update(name.encode(errors="surrogateescape") + path.read_bytes())
    return digest.hexdigest()


def _load(path: Path) -> dict[str, Any] | None:
    """Returns what `_store` wrote; None if there is no such file, or a damaged one."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _store(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values).encode())

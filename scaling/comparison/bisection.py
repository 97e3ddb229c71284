"""Halves a history until the candidate that brought a slowdown is found.

Knows neither git nor training: a function judges a candidate against the first one, so that tests
simulate steps. The history may branch; it then is halved by numbers of ancestors, as git does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scaling.comparison.history import History
from scaling.comparison.verdict import Judgement, Verdict, format_judgement

Totals = Mapping[str, object]


class CannotMeasure(Exception):
    """A candidate does not build or train; the message says why."""


# Judges the second candidate against the first; the number is the slowdown that must not pass.
Measure = Callable[[str, str, float], Judgement]
PrintLine = Callable[[str], None]


class Halving:
    """What is still possible: candidates that may be the first bad one."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.bad = history.bad
        self.skipped: dict[str, str] = {}  # candidate -> why it cannot be judged
        self._ancestors: dict[str, set[str]] = {}  # with the candidate itself
        for name, parents in history.parents.items():
            self._ancestors[name] = {name}.union(*(self._ancestors[parent] for parent in parents))
        self._good = {history.good}

    @property
    def suspects(self) -> list[str]:
        """Candidates that may be the first bad one, oldest first; the last is known to be bad."""
        possible = self._ancestors[self.bad] - self._good
        return [name for name in self.history.parents if name in possible]

    @property
    def untested(self) -> list[str]:
        """Suspects of which a judgement is missing and possible."""
        return [name for name in self.suspects[:-1] if name not in self.skipped]

    def choose(self) -> str | None:
        """Returns the untested suspect that divides the suspects best; None if there is none."""
        possible = set(self.suspects)

        def smaller_part(name: str) -> int:
            before = len(self._ancestors[name] & possible)
            return min(before, len(possible) - before)

        return max(self.untested, key=smaller_part, default=None)

    def note_good(self, name: str) -> None:
        self._good |= self._ancestors[name]

    def note_bad(self, name: str) -> None:
        self.bad = name

    def go_on_after(self, name: str) -> None:
        """Looks for the next bad candidate among the descendants of `name` alone."""
        self._good |= {other for other, before in self._ancestors.items() if name not in before}
        self._good.add(name)
        self.bad = self.history.bad

    @property
    def last_good(self) -> str:
        """The newest good ancestor of all suspects; the parent of a single suspect."""
        first = self.suspects[0]
        parents = self.history.parents[first]
        return next(parent for parent in parents if parent in self._good)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """What a bisection by time found."""

    whole: Judgement  # of BAD against GOOD
    suspects: tuple[str, ...] = ()  # oldest first; one if it was found, none if nothing is slower
    parent: str | None = None  # good, before all suspects
    # Of the last suspect against `parent`; None, and a reason, if they cannot be measured together.
    judgement: Judgement | None = None
    not_judged: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_confirmed(self) -> bool:
        """Whether the step from `parent` to the culprit is itself slower."""
        return self.judgement is not None and self.judgement.verdict is Verdict.SLOWER


def bisect_by_time(
    history: History, measure: Measure, *, threshold: float, print_line: PrintLine
) -> Culprit:
    """Finds the first candidate that is as slow as the last one.

    Each candidate is judged against the first one, by half of the slowdown of the last one: what
    is nearer to the last one is bad. One that stays inconclusive, or does not train, is skipped.

    Raises:
        CannotMeasure: the first or the last candidate does not train.
    """
    halving, good = Halving(history), history.good
    number = len(history.parents) - 1
    print_line(f"BAD against GOOD, with {number - 1} candidates between them:")
    whole = measure(good, history.bad, threshold)
    print_line(f"  {format_judgement(whole)}")
    if whole.verdict is not Verdict.SLOWER:
        return Culprit(whole=whole)
    assert whole.ratio is not None
    measured = {history.bad: whole}
    while (name := halving.choose()) is not None:
        left = len(halving.untested)
        steps = math.ceil(math.log2(left + 1))
        print_line(f"{left} left, about {steps} to measure: {history.titles[name]}")
        try:
            # What is half as slow as BAD decides between good and bad.
            measured[name] = judgement = measure(good, name, whole.ratio - 1)
        except CannotMeasure as error:
            halving.skipped[name] = str(error)
            print_line(f"  skipped: {error}")
            continue
        print_line(f"  {format_judgement(judgement)}")
        if judgement.verdict is Verdict.SLOWER:
            halving.note_bad(name)
        elif judgement.verdict is Verdict.INCONCLUSIVE:
            halving.skipped[name] = f"inconclusive after {judgement.pairs} pairs"
        else:
            halving.note_good(name)
    suspects, parent = halving.suspects, halving.last_good
    confirmed, not_judged = measured.get(halving.bad), None
    if parent != good:
        print_line(f"{history.titles[halving.bad]} against {history.titles[parent]}:")
        try:
            confirmed = measure(parent, halving.bad, threshold)
            print_line(f"  {format_judgement(confirmed)}")
        except CannotMeasure as error:
            confirmed, not_judged = None, str(error)
            print_line(f"  cannot be measured: {error}")
    return Culprit(
        whole=whole,
        suspects=tuple(suspects),
        parent=parent,
        judgement=confirmed,
        not_judged=not_judged,
        skipped=halving.skipped,
    )


@dataclass(frozen=True, kw_only=True)
class CounterChange:
    """A place in the history where counters changed."""

    suspects: tuple[str, ...]  # oldest first; one unless others cannot be counted
    parent: str


def bisect_by_counters(
    history: History, count: Callable[[str], Totals], *, print_line: PrintLine
) -> tuple[list[CounterChange], dict[str, str]]:
    """Finds every candidate that changed a counter, oldest first, and those that cannot be counted.

    A change that a later one takes back is not seen.

    Args:
        count: returns the totals of a candidate; called once for each.

    Raises:
        CannotMeasure: the first or the last candidate cannot be counted.
    """
    halving = Halving(history)
    counted = {name: count(name) for name in (history.good, history.bad)}
    changes: list[CounterChange] = []
    known = counted[history.good]
    while known != counted[history.bad]:
        while (name := halving.choose()) is not None:
            print_line(f"{len(halving.untested)} left: counting {history.titles[name]}")
            try:
                counted[name] = counted[name] if name in counted else count(name)
            except CannotMeasure as error:
                halving.skipped[name] = str(error)
                print_line(f"  skipped: {error}")
                continue
            if counted[name] == known:
                halving.note_good(name)
            else:
                halving.note_bad(name)
        changes.append(CounterChange(suspects=tuple(halving.suspects), parent=halving.last_good))
        known = counted[halving.bad]
        halving.go_on_after(halving.bad)
    return changes, halving.skipped

"""Halves a history until the candidate that brought a slowdown is found.

Knows neither git nor training: a function judges a candidate against the first one, so that tests
simulate steps. The history may branch; it then is halved by numbers of ancestors, as git does.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scaling.comparison.history import History
from scaling.comparison.verdict import Judgement, Verdict, format_judgement

Totals = Mapping[str, object]


class CannotMeasure(Exception):
    """A candidate does not build or train; the message says why."""


# Judges the second candidate against the first; the number is the slowdown that must not pass.
Measure = Callable[[str, str, float], Judgement]
PrintLine = Callable[[str], None]


def find_ancestors(history: History) -> dict[str, set[str]]:
    """Returns the ancestors of each candidate, with the candidate itself."""
    ancestors: dict[str, set[str]] = {}
    for name, parents in history.parents.items():
        ancestors[name] = {name}.union(*(ancestors[parent] for parent in parents))
    return ancestors


class Halving:
    """What is still possible: candidates that may be the first bad one."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.bad = history.bad
        self.skipped: dict[str, str] = {}  # candidate -> why it cannot be judged
        self._ancestors = find_ancestors(history)
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

    Each is compared with its parents. A change that a later one takes back is not seen, nor one on
    a branch whose merge changed nothing.

    Args:
        count: returns the totals of a candidate; called once for each.

    Raises:
        CannotMeasure: the first or the last candidate cannot be counted.
    """
    counted = {name: count(name) for name in (history.good, history.bad)}
    search = CounterSearch(history, count, counted, print_line)
    seen, ends, changes = {history.good}, [history.bad], []
    while ends:
        line = search.line_to(ends.pop(), seen)
        seen.update(line)
        for before, after in search.steps(line):
            suspects, sources = search.suspects_of(after)
            ends += sources
            if not search.is_explained(after, sources):
                changes.append(CounterChange(suspects=suspects, parent=before))
    order = list(history.parents).index
    return sorted(changes, key=lambda change: order(change.suspects[-1])), search.skipped


class CounterSearch:
    """Counts candidates, each once, and compares them along the branches of a history.

    Args:
        counted: totals that are known; those of the first candidate are.
    """

    def __init__(
        self,
        history: History,
        count: Callable[[str], Totals],
        counted: Mapping[str, Totals],
        print_line: PrintLine,
    ) -> None:
        self.skipped: dict[str, str] = {}  # candidate -> why it cannot be counted
        self._history, self._count, self._print_line = history, count, print_line
        self._counted = dict(counted)
        self._ancestors = find_ancestors(history)

    def totals(self, name: str) -> Totals | None:
        """Returns None if the candidate cannot be counted."""
        if name not in self._counted and name not in self.skipped:
            self._print_line(f"counting {self._history.titles[name]}")
            try:
                self._counted[name] = self._count(name)
            except CannotMeasure as error:
                self.skipped[name] = str(error)
                self._print_line(f"  skipped: {error}")
        return self._counted.get(name)

    def line_to(self, end: str, seen: Collection[str]) -> list[str]:
        """Returns the first parents of `end`, oldest first, from a seen one that can be counted."""
        line = [end]
        while line[-1] not in seen or self.totals(line[-1]) is None:
            line.append(self._history.parents[line[-1]][0])
        return line[::-1]

    def steps(self, line: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields the neighbours that differ, of those candidates of a line that can be counted.

        Nothing is looked for between two that are equal.
        """
        if self.totals(line[0]) == self.totals(line[-1]):
            return
        inner = sorted(range(1, len(line) - 1), key=lambda index: abs(index - len(line) // 2))
        for index in inner:
            if self.totals(line[index]) is not None:
                yield from self.steps(line[: index + 1])
                yield from self.steps(line[index:])
                return
        yield line[0], line[-1]

    def suspects_of(self, name: str) -> tuple[tuple[str, ...], list[str]]:
        """Returns a candidate with all before it that cannot be counted, and what they build on."""
        suspects, sources = [name], list[str]()
        for suspect in suspects:  # grows
            for parent in self._history.parents[suspect]:
                group = suspects if self.totals(parent) is None else sources
                if parent not in group:
                    group.append(parent)
        return tuple(other for other in self._history.parents if other in suspects), sources

    def is_explained(self, name: str, sources: Sequence[str]) -> bool:
        """Whether a candidate may count what it does only because it merges `sources`.

        A counter that one of them changed has its value in the merge. One that several changed may
        have any.
        """
        base = next(
            other
            for other in reversed(list(self._history.parents))
            if all(other in self._ancestors[source] for source in sources)
            and self.totals(other) is not None
        )
        before, after = self._flat(base), self._flat(name)
        sides = [self._flat(source) for source in sources]
        for counter in set().union(before, after, *sides):
            old = before.get(counter)
            changed = [new for side in sides if (new := side.get(counter)) != old]
            if len(changed) < 2 and after.get(counter) != (changed[0] if changed else old):
                return False
        return True

    def _flat(self, name: str) -> dict[tuple[str, ...], object]:
        """Returns the totals of a counted candidate, each operator by itself."""
        flat: dict[tuple[str, ...], object] = {}
        for counter, total in self._counted[name].items():
            if isinstance(total, Mapping):
                flat |= {(counter, part): number for part, number in total.items()}
            else:
                flat[counter,] = total
        return flat

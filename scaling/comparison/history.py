"""The candidates of a bisection: commits between two revisions, or versions of a package.

It only reads the repository: nothing is checked out, and no index, HEAD or ref changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling.comparison.sides import find_commit, git
from unitransformer.cli import suggest

SHORT = 10  # letters of a commit


@dataclass(frozen=True, kw_only=True)
class History:
    """Candidates, oldest first: the first is good and the last is bad.

    `parents` holds the parents of each candidate that are candidates too; each stands before it.
    """

    parents: Mapping[str, tuple[str, ...]]
    titles: Mapping[str, str]

    @property
    def good(self) -> str:
        return next(iter(self.parents))

    @property
    def bad(self) -> str:
        return list(self.parents)[-1]


def read_history(good: str, bad: str, repository: Path) -> History:
    """Returns the commits that descend from `good` and are ancestors of `bad`, with both.

    A branch that left before `good` counts as the commit that merged it.

    Raises:
        ValueError: an unknown revision, equal ones, or `good` is not an ancestor of `bad`.
    """
    first, last = (find_revision(text, repository) for text in (good, bad))
    if first == last:
        raise ValueError(f"GOOD {good} and BAD {bad} are the same commit, {first[:SHORT]}")
    options = ("--topo-order", "--reverse", "--ancestry-path", "--parents")
    lines = git(repository, "rev-list", *options, f"{first}..{last}").splitlines()
    if not lines:
        is_reversed = git(repository, "rev-list", "--ancestry-path", f"{last}..{first}")
        hint = (
            f"; BAD is an ancestor of GOOD: swap them, as bisect {bad} {good}"
            if is_reversed
            else "; choose a GOOD from git log BAD"
        )
        raise ValueError(f"GOOD {good} is not an ancestor of BAD {bad}{hint}")
    rows = [line.split() for line in lines]
    known = {first, *(row[0] for row in rows)}
    parents: dict[str, tuple[str, ...]] = {first: ()}
    for commit, *others in rows:
        parents[commit] = tuple(other for other in others if other in known)
    titles = git(repository, "log", "-z", "--format=%H %h %s", f"{first}..{last}").split("\0")
    titles += git(repository, "log", "-1", "-z", "--format=%H %h %s", first).split("\0")
    by_commit = {title.split()[0]: " ".join(title.split()[1:]) for title in titles if title.strip()}
    return History(parents=parents, titles={commit: by_commit[commit] for commit in parents})


def find_revision(text: str, repository: Path) -> str:
    """Returns the full hash of a revision; raises ValueError that names similar refs."""
    try:
        if text.startswith("-"):
            raise ValueError(f"{text!r} is no revision")
        return find_commit(text, repository)
    except ValueError:
        refs = git(repository, "for-each-ref", "--format=%(refname:short)").split("\n")
        hint = suggest(text, refs, otherwise="git log --oneline lists revisions")
        raise ValueError(f"{text!r} is no revision of this repository; {hint}") from None


def list_versions(package: str, versions: Sequence[str]) -> History:
    """Returns a history of versions in the order given; raises ValueError for a bad list."""
    for version in versions:
        if versions.count(version) > 1:
            raise ValueError(f"package {package} names {version} twice; leave one out")
    parents = {
        version: () if index == 0 else (versions[index - 1],)
        for index, version in enumerate(versions)
    }
    return History(parents=parents, titles={v: f"{package} {v}" for v in versions})

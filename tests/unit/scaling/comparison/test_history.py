"""Commits between two revisions of small repositories."""

from pathlib import Path

import pytest

from scaling.comparison.history import read_history
from tests.builders.revisions import commit, git, make_repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def test_candidates_are_the_commits_after_good_up_to_bad(repository: Path) -> None:
    names = [commit(repository, f"commit {number}") for number in range(4)]
    history = read_history("HEAD~2", "HEAD", repository)
    assert list(history.parents.items()) == [
        (names[1], ()),
        (names[2], (names[1],)),
        (names[3], (names[2],)),
    ]
    assert history.titles[names[3]] == f"{names[3][:7]} commit 3"


@pytest.mark.parametrize("mark", ["\f", "\u2028", "\x85", "\r"])
def test_a_subject_may_hold_any_character(mark: str, repository: Path) -> None:
    names = [commit(repository, f"a{mark}b {number}") for number in range(2)]
    history = read_history("HEAD~1", "HEAD", repository)
    assert [history.titles[name] for name in names] == [
        f"{name[:7]} a b {number}" for number, name in enumerate(names)
    ]


def test_a_branch_that_left_before_good_counts_as_its_merge(repository: Path) -> None:
    commit(repository, "first")
    git(repository, "branch", "side")
    good = commit(repository, "good")
    git(repository, "checkout", "--quiet", "side")
    side = commit(repository, "side")
    git(repository, "checkout", "--quiet", "main")
    git(repository, "-c", "user.name=a", "-c", "user.email=a", "merge", "--quiet", "side")
    history = read_history(good, "main", repository)
    assert list(history.parents.values()) == [(), (good,)]
    assert side not in history.parents


def test_equal_unrelated_and_swapped_revisions_are_refused(repository: Path) -> None:
    commit(repository, "first")
    last = commit(repository, "last")
    git(repository, "branch", "same")
    git(repository, "checkout", "--quiet", "--orphan", "other")
    commit(repository, "other")
    with pytest.raises(ValueError, match=f"are the same commit, {last[:10]}"):
        read_history("same", "main", repository)
    with pytest.raises(ValueError, match=r"is not an ancestor of BAD main~1; .*swap them"):
        read_history("main", "main~1", repository)
    with pytest.raises(ValueError, match="GOOD other is not an ancestor of BAD main; choose"):
        read_history("other", "main", repository)


def test_an_unknown_revision_is_refused_with_a_similar_name(repository: Path) -> None:
    commit(repository, "first")
    for typed in ("mainx", "--all"):
        with pytest.raises(ValueError, match=f"'{typed}' is no revision of this repository; "):
            read_history(typed, "main", repository)
    with pytest.raises(ValueError, match="did you mean main"):
        read_history("mainx", "main", repository)


def test_reading_changes_nothing_in_the_repository(repository: Path) -> None:
    for number in range(3):
        commit(repository, str(number))
    files = sorted((p, p.stat().st_mtime_ns) for p in (repository / ".git").rglob("*"))
    read_history("HEAD~2", "HEAD", repository)
    assert sorted((p, p.stat().st_mtime_ns) for p in (repository / ".git").rglob("*")) == files

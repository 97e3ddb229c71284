"""Records and certificates in; whether today's code and torch are still theirs out.

The report marks what is stale and says against what it was held, so that whoever reads the text
later can write it again whatever has become of the code since.
"""

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scaling.markdown import escaped
from scaling.store.reader import Store

DECISIVE = ("unitransformer", "recipes")  # folders whose code decides what is measured
SHORT = 12  # letters of a commit
MARK = "†"
NO_CHECKOUT = "not compared, for it is in no git checkout"
LINK = re.compile(r"\]\(([^()\s]+\.json)\)")


@dataclass(frozen=True, kw_only=True)
class Today:
    """What records are held against: the code of a checkout, and the torch that is installed."""

    torch: str | None  # None: not installed
    is_checkout: bool
    changed: frozenset[str] = frozenset()  # commits whose decisive code is not today's
    unknown: frozenset[str] = frozenset()  # commits that are not in the checkout

    def is_stale(self, content: Mapping[str, Any]) -> bool:
        """Args: content: of a record or a certificate."""
        return self.has_other_torch(content) or self.has_other_code(content)

    def has_other_torch(self, content: Mapping[str, Any]) -> bool:
        return self.torch is not None and content["versions"].get("torch") != self.torch

    def has_other_code(self, content: Mapping[str, Any]) -> bool:
        return short_commit(content) in self.changed


NOT_COMPARED = Today(torch=None, is_checkout=False)


def short_commit(content: Mapping[str, Any]) -> str | None:
    """None: not told, or no commit."""
    commit = str(content["code"].get("commit"))
    return commit[:SHORT] if re.fullmatch("[0-9a-f]+", commit) else None


def contents(store: Store) -> list[tuple[str, Mapping[str, Any]]]:
    """Everything that was measured, by the name of its file."""
    measured: list[tuple[str, Mapping[str, Any]]] = [(r.name, r.record) for r in store.runs]
    return measured + [(c.name, c.content) for c in store.certificates]


def look(store: Store, code: Path) -> Today:
    """Args: code: folder with `DECISIVE` in it; its HEAD is compared with the records' commits."""
    torch = _installed_torch()
    if not _is_checkout(code):
        return Today(torch=torch, is_checkout=False)
    commits = {short_commit(content) for _, content in contents(store)}
    ended = {commit: _compare(code, commit) for commit in commits if commit is not None}
    return Today(
        torch=torch,
        is_checkout=True,
        changed=frozenset(commit for commit, code_ in ended.items() if code_ == 1),
        unknown=frozenset(commit for commit, code_ in ended.items() if code_ not in (0, 1)),
    )


def _installed_torch() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_checkout(code: Path) -> bool:
    """Whether this very code is in a checkout: a folder of packages may lie in that of others."""
    return shutil.which("git") is not None and any(
        _git(code, "rev-parse", "--verify", f"HEAD:./{folder}") == 0 for folder in DECISIVE
    )


def _compare(code: Path, commit: str) -> int:
    """0: its decisive code is that of HEAD; 1: it is not; else there is no such commit."""
    return _git(code, "diff", "--quiet", "--end-of-options", commit, "HEAD", "--", *DECISIVE)


def _git(folder: Path, *words: str) -> int:
    """The exit code."""
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode


# ---------------------------------------------------------------------------------- the text


def explain(today: Today) -> str:
    """What the mark means and what is marked; `read_today` reads it again."""
    torch = f"`{escaped(today.torch)}`" if today.torch is not None else "not installed"
    return (
        f"{MARK} after a record: it tells little of today's code, for `{'` and `'.join(DECISIVE)}` "
        f"have changed since its commit, or it had another torch. Code: {_code(today)}. "
        f"Torch here: {torch}."
    )


def _code(today: Today) -> str:
    if not today.is_checkout:
        return NO_CHECKOUT
    told = [
        f"{words} {', '.join(sorted(commits))}"
        for words, commits in (("changed since", today.changed), ("not known at", today.unknown))
        if commits
    ]
    return "; ".join(told) or "that of every commit"


def read_today(text: str) -> Today:
    """What a report was held against, by its own words; `NOT_COMPARED` where it says nothing."""
    line = next((line for line in text.split("\n") if line.startswith(f"{MARK} after")), None)
    found = line and re.search(r" Code: (.*)\. Torch here: (?:`([^`]*)`|not installed)\.$", line)
    if not found:
        return NOT_COMPARED
    told = {words: _commits(found[1], words) for words in ("changed since", "not known at")}
    return Today(
        torch=found[2],
        is_checkout=found[1] != NO_CHECKOUT,
        changed=told["changed since"],
        unknown=told["not known at"],
    )


def _commits(words: str, begin: str) -> frozenset[str]:
    found = re.search(rf"{begin} ((?:[0-9a-f]+(?:, )?)+)", words)
    return frozenset(found[1].split(", ")) if found else frozenset()


def marked(text: str, store: Store, today: Today) -> str:
    """The text with the mark after every link to a stale record or certificate."""
    stale = {quote(name) for name, content in contents(store) if today.is_stale(content)}
    return LINK.sub(lambda link: link[0] + MARK * (link[1] in stale), text) if stale else text


def stale_reasons(content: Mapping[str, Any], today: Today) -> Iterable[str]:
    """Why a record or certificate tells nothing of today's code, in words."""
    code, commit = content["code"], short_commit(content)
    if today.has_other_torch(content):
        measured = content["versions"].get("torch") or "not told"
        yield f"measured with torch {measured}; {today.torch} is installed"
    if commit is None:
        yield "its commit is not told"
        return
    if code.get("is_dirty") is None:
        yield "not told whether its commit was changed"
    elif code["is_dirty"]:
        yield "measured with uncommitted changes"
    if commit in today.unknown:
        yield f"its commit {commit} is not in this checkout"
    elif commit in today.changed:
        yield f"the code has changed since its commit {commit}"

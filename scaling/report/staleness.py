"""Records and certificates in; whether today's code and torch are still theirs out.

The report marks what is stale and says against what it was held, so that whoever reads the text
later can write it again whatever has become of the code since.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import quote

from scaling.markdown import escaped
from scaling.report.code_digest import compare_commits
from scaling.store.reader import Store
from unitransformer.record.fields import Kinds, check_fields, check_lists

SHORT = 12  # letters of a commit
MARK = "†"
NO_CHECKOUT = "not compared, for it is in no git checkout"
BEGIN, END = "<!-- scaling report ", " -->"
STATE: dict[str, Kinds] = {"command": str, "torch": (str, NoneType), "is_checkout": bool}
LINK = re.compile(r"\]\(([^()\s]+\.json)\)")


@dataclass(frozen=True, kw_only=True)
class CurrentCode:
    """What records are held against: the code of a checkout, and the torch that is installed."""

    torch: str | None  # None: not installed
    is_checkout: bool
    changed: frozenset[str] = frozenset()  # commits whose code computes something else than HEAD's
    unknown: frozenset[str] = frozenset()  # commits that are not in the checkout

    def is_stale(self, content: Mapping[str, Any]) -> bool:
        """Args: content: of a record or a certificate."""
        return self.has_other_torch(content) or self.has_other_code(content)

    def has_other_torch(self, content: Mapping[str, Any]) -> bool:
        return self.torch is not None and content["versions"].get("torch") != self.torch

    def has_other_code(self, content: Mapping[str, Any]) -> bool:
        return short_commit(content) in self.changed


@dataclass(frozen=True, kw_only=True)
class ReportState:
    """What a report says of how it was written."""

    command: str
    today: CurrentCode  # what its records were held against


NOT_COMPARED = CurrentCode(torch=None, is_checkout=False)


def short_commit(content: Mapping[str, Any]) -> str | None:
    """None: not told, or no commit."""
    commit = str(content["code"].get("commit"))
    return commit[:SHORT] if re.fullmatch("[0-9a-f]+", commit) else None


def measured_files(store: Store) -> list[tuple[str, Mapping[str, Any]]]:
    """Everything that was measured, by the name of its file."""
    measured: list[tuple[str, Mapping[str, Any]]] = [(r.name, r.record) for r in store.runs]
    return measured + [(c.name, c.content) for c in store.certificates]


def compare_with_today(store: Store, code: Path) -> CurrentCode:
    """Args: code: folder with the packages in it; its HEAD is compared with the records' commits by
    the rule of `code_digest`."""
    torch = _installed_torch()
    commits = {short_commit(content) for _, content in measured_files(store)} - {None}
    compared = compare_commits(code, [str(commit) for commit in commits])
    if compared is None:
        return CurrentCode(torch=torch, is_checkout=False)
    return CurrentCode(
        torch=torch,
        is_checkout=True,
        changed=frozenset(commit for commit, is_same in compared.items() if is_same is False),
        unknown=frozenset(commit for commit, is_same in compared.items() if is_same is None),
    )


def _installed_torch() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------- the text


def explain(today: CurrentCode) -> str:
    """What the mark means, and against what the records were held."""
    torch = f"`{escaped(today.torch)}`" if today.torch is not None else "not installed"
    return (
        f"{MARK} after a record: it tells little of today's code, for what a recipe computes has "
        f"changed since its commit, or it had another torch. Code: {_code(today)}. Torch here: "
        f"{torch}."
    )


def _code(today: CurrentCode) -> str:
    if not today.is_checkout:
        return NO_CHECKOUT
    told = [
        f"{words} {', '.join(sorted(commits))}"
        for words, commits in (("changed since", today.changed), ("not known at", today.unknown))
        if commits
    ]
    return "; ".join(told) or "that of every commit"


def state_comment(command: str, today: CurrentCode) -> str:
    """One HTML comment of JSON for the end of a report, from which `read_state` reads all that it
    takes to write the report again. The folders are arguments of the command."""
    state = {
        "command": command,
        "torch": today.torch,
        "is_checkout": today.is_checkout,
        "changed": sorted(today.changed),
        "unknown": sorted(today.unknown),
    }
    text = json.dumps(state).replace("-", "\\u002d")  # a comment ends at its first -->
    return f"{BEGIN}{text}{END}"


def read_state(text: str) -> ReportState | None:
    """None where the text does not end with a comment of `state_comment`."""
    line = text.rstrip("\n").rpartition("\n")[2]
    if not (line.startswith(BEGIN) and line.endswith(END)):
        return None
    try:
        told = json.loads(line.removeprefix(BEGIN).removesuffix(END))
        check_fields(told, STATE, "state")
        check_lists(told, {"changed": str, "unknown": str}, "state")
    except (ValueError, RecursionError):
        return None
    today = CurrentCode(
        torch=told["torch"],
        is_checkout=told["is_checkout"],
        changed=frozenset(told["changed"]),
        unknown=frozenset(told["unknown"]),
    )
    return ReportState(command=told["command"], today=today)


def marked(text: str, store: Store, today: CurrentCode) -> str:
    """The text with the mark after every link to a stale record or certificate."""
    stale = {quote(name) for name, content in measured_files(store) if today.is_stale(content)}
    return LINK.sub(lambda link: link[0] + MARK * (link[1] in stale), text) if stale else text


def stale_reasons(content: Mapping[str, Any], today: CurrentCode) -> Iterable[str]:
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

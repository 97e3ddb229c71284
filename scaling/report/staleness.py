"""Decides which records are stale: measured with other code or another torch than the current ones.

A report marks stale records and stores what they were compared with, so that `lint` can write the
same text again after the code has changed.
"""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from scaling.markdown import escaped, quoted
from scaling.peers.record import is_comparison
from scaling.report.code_digest import ENTRIES, PEER_ENTRIES, compare_commits
from scaling.store.reader import Store
from unitransformer.record.fields import Kinds, check_fields, check_lists

SHORT = 12  # characters of a commit
MARK = "†"
WITH_PEERS = " (peers)"
NO_CHECKOUT = "not compared, for it is in no git checkout"
STATE_BEGIN, STATE_END = "<!-- scaling report ", " -->"
STATE_FIELDS: dict[str, Kinds] = {"command": str, "torch": (str, NoneType), "is_checkout": bool}
LINK = re.compile(r"\]\(([^()\s]+\.json)\)")


@dataclass(frozen=True, kw_only=True)
class CurrentCode:
    """What records are compared with: the code of a checkout and the installed torch."""

    torch: str | None  # None: not installed
    is_checkout: bool
    changed: frozenset[str] = frozenset()  # commits whose code differs from HEAD's
    unknown: frozenset[str] = frozenset()  # commits that are not in the checkout

    def is_stale(self, content: Mapping[str, Any]) -> bool:
        return self.has_other_torch(content) or self.has_other_code(content)

    def has_other_torch(self, content: Mapping[str, Any]) -> bool:
        return self.torch is not None and content["versions"].get("torch") != self.torch

    def has_other_code(self, content: Mapping[str, Any]) -> bool:
        return code_key(content) in self.changed


NOT_COMPARED = CurrentCode(torch=None, is_checkout=False)


def short_commit(content: Mapping[str, Any]) -> str | None:
    commit = str(content["code"].get("commit"))
    return commit[:SHORT] if re.fullmatch("[0-9a-f]+", commit) else None


def code_key(content: Mapping[str, Any]) -> str | None:
    """Returns the commit, and for a comparison that the code of peers counts too."""
    commit = short_commit(content)
    return f"{commit}{WITH_PEERS}" if commit is not None and is_comparison(content) else commit


def measured_files(store: Store) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the file name and content of every record, certificate and comparison."""
    runs = [(run.name, run.record) for run in store.runs]
    proofs = [(proof.name, proof.content) for proof in store.certificates]
    return [*runs, *proofs, *((other.name, other.content) for other in store.comparisons)]


def compare_with_today(store: Store, code: Path) -> CurrentCode:
    """Compares the records' commits with HEAD of `code`, the folder that holds the packages."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    keys = {str(code_key(content)) for _, content in measured_files(store)} - {"None"}
    compared: dict[str, bool | None] = {}
    for ending, entries in (("", ENTRIES), (WITH_PEERS, PEER_ENTRIES)):
        commits = [k.removesuffix(ending) for k in keys if k.endswith(WITH_PEERS) == bool(ending)]
        found = compare_commits(code, commits, entries)
        if found is None:
            return CurrentCode(torch=torch, is_checkout=False)
        compared |= {f"{commit}{ending}": is_same for commit, is_same in found.items()}
    changed = frozenset(key for key, is_same in compared.items() if is_same is False)
    unknown = frozenset(key for key, is_same in compared.items() if is_same is None)
    return CurrentCode(torch=torch, is_checkout=True, changed=changed, unknown=unknown)


def explain(today: CurrentCode) -> str:
    """Returns what the mark means, and what the records were compared with."""
    torch = f"`{escaped(today.torch)}`" if today.torch is not None else "not installed"
    parts = [
        f"{state} {', '.join(sorted(commits))}"
        for state, commits in (("changed since", today.changed), ("not known at", today.unknown))
        if commits
    ]
    code = "; ".join(parts) or "that of every commit" if today.is_checkout else NO_CHECKOUT
    return (
        f"{MARK} after a record: it is stale, for what a recipe computes has changed since its "
        f"commit, or it had another torch. Code: {code}. Torch here: {torch}."
    )


def state_comment(command: str, today: CurrentCode) -> str:
    """Returns an HTML comment of JSON for the end of a report, which `read_state` reads again."""
    state = {
        "command": command,
        "torch": today.torch,
        "is_checkout": today.is_checkout,
        "changed": sorted(today.changed),
        "unknown": sorted(today.unknown),
    }
    text = json.dumps(state).replace("-", "\\u002d")  # a comment ends at its first -->
    return f"{STATE_BEGIN}{text}{STATE_END}"


def read_state(text: str) -> tuple[str, CurrentCode] | None:
    """Returns command and code of the `state_comment` that ends the text; None: there is none."""
    line = text.rstrip("\n").rpartition("\n")[2]
    if not (line.startswith(STATE_BEGIN) and line.endswith(STATE_END)):
        return None
    try:
        state = json.loads(line.removeprefix(STATE_BEGIN).removesuffix(STATE_END))
        check_fields(state, STATE_FIELDS, "state")
        check_lists(state, {"changed": str, "unknown": str}, "state")
    except (ValueError, RecursionError):
        return None
    today = CurrentCode(
        torch=state["torch"],
        is_checkout=state["is_checkout"],
        changed=frozenset(state["changed"]),
        unknown=frozenset(state["unknown"]),
    )
    return state["command"], today


def marked(text: str, store: Store, today: CurrentCode) -> str:
    """Returns the text with the mark after every link to a stale record or certificate."""
    stale = {quoted(name) for name, content in measured_files(store) if today.is_stale(content)}
    return LINK.sub(lambda link: link[0] + MARK * (link[1] in stale), text) if stale else text


def stale_reasons(content: Mapping[str, Any], today: CurrentCode) -> Iterable[str]:
    """Yields why the content of a record or certificate may not represent the current code."""
    code, commit = content["code"], short_commit(content)
    if today.has_other_torch(content):
        measured = content["versions"].get("torch") or "not recorded"
        yield f"measured with torch {measured}; {today.torch} is installed"
    if commit is None:
        yield "its commit is not recorded"
        return
    if code.get("is_dirty") is None:
        yield "not recorded whether its commit was changed"
    elif code["is_dirty"]:
        yield "measured with uncommitted changes"
    key = code_key(content)
    if key in today.unknown:
        yield f"its commit {commit} is not in this checkout"
    elif key in today.changed:
        yield f"the code has changed since its commit {commit}"

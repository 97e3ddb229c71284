"""What a way to train has to have done beside reaching the same numbers: a record goes in.

A compiler that made no graph, and checkpointing that computed nothing again, train the plain model
in the plain way; equal losses then prove nothing of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.parity.cases import Case


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of every rank; None: it told nothing."""

    graphs: tuple[int | None, ...]  # that the compiler made
    graph_breaks: tuple[int, ...]
    late_recompiles: tuple[int, ...]  # after the first step, which has made one a layer
    recomputed_layers: tuple[int | None, ...]


def work_of(record: Mapping[str, Any]) -> Work:
    """What the ranks of a run tell of it."""
    ledgers: Sequence[Mapping[str, Any]] = record["compile"]
    return Work(
        graphs=tuple(ledger["graphs"] for ledger in ledgers),
        graph_breaks=tuple(len(ledger["graph_breaks"]) for ledger in ledgers),
        late_recompiles=tuple(len(_late(ledger["recompiles"])) for ledger in ledgers),
        recomputed_layers=tuple(record["recomputed_layers"]),
    )


def _late(recompiles: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # Without a step: in validation, which differs in what it asks of a layer.
    return [found for found in recompiles if found["step"]]


def find_inactive_feature(case: Case, work: Work, *, num_layers: int) -> str | None:
    """Why a run was not `case`, whatever its losses are; None if it was."""
    if case.compile != "off":
        if not all(work.graphs):
            return f"compile {case.compile} made no graph"
        if any(work.graph_breaks):
            return f"compile {case.compile} broke graphs {max(work.graph_breaks)} times"
        if any(work.late_recompiles):
            times = max(work.late_recompiles)
            return f"compile {case.compile} compiled again {times} times after the first step"
    expected = 0 if case.activation_checkpointing == "off" else num_layers
    if any(number != expected for number in work.recomputed_layers):
        told = ", ".join(map(str, sorted(set(map(str, work.recomputed_layers)))))
        return (
            f"checkpointing {case.activation_checkpointing} computed {told} of {num_layers} "
            "layers again"
        )
    return None

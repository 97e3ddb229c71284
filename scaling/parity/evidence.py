"""Checks that a run really compiled and recomputed as its case asks.

A compiler that made no graph and checkpointing that recomputed nothing train the plain model; then
equal losses prove nothing about these features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling.parity.cases import Case


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the compiler and checkpointing did on each rank; None: not recorded."""

    graphs: tuple[int | None, ...]
    graph_breaks: tuple[int, ...]
    late_recompiles: tuple[int, ...]  # after the first step, which compiles each layer once
    recomputed_layers: tuple[int | None, ...]


def work_of(record: Mapping[str, Any]) -> Work:
    ranks = record["compile"]
    return Work(
        graphs=tuple(rank["graphs"] for rank in ranks),
        graph_breaks=tuple(len(rank["graph_breaks"]) for rank in ranks),
        # A recompile without a step belongs to validation, which uses layers in another mode.
        late_recompiles=tuple(sum(bool(r["step"]) for r in rank["recompiles"]) for rank in ranks),
        recomputed_layers=tuple(record["recomputed_layers"]),
    )


def find_inactive_feature(case: Case, work: Work, *, num_layers: int) -> str | None:
    """Returns why a run was not `case`, whatever its losses are; None if it was."""
    if case.compile != "off":
        if not all(work.graphs):
            return f"compile {case.compile} made no graph"
        if any(work.graph_breaks):
            return f"compile {case.compile} broke graphs {max(work.graph_breaks)} times"
        if any(work.late_recompiles):
            times = max(work.late_recompiles)
            return f"compile {case.compile} compiled again {times} times after the first step"
    checkpointing = case.activation_checkpointing
    expected = 0 if checkpointing == "off" else num_layers
    if any(number != expected for number in work.recomputed_layers):
        layers = ", ".join(sorted(set(map(str, work.recomputed_layers))))
        return f"checkpointing {checkpointing} computed {layers} of {num_layers} layers again"
    return None

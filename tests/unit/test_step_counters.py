"""Tests what torch.compile did, as counters."""

import pytest
import torch

from scaling.comparison.counters import differences
from unitransformer.step_counters import count_graphs


@pytest.mark.compiles
def test_graphs_breaks_and_recompiles_are_reported_with_their_code() -> None:
    @torch.compile(backend="eager")
    def broken(x: torch.Tensor, factor: str) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + len(factor)

    before = count_graphs()
    broken(torch.ones(2), "a")
    once = count_graphs()
    broken(torch.ones(2), "bb")
    actual = "\n".join(differences(before, once))
    assert "graph_breaks grew" in actual
    assert "test_step_counters.py" in actual
    again = "\n".join(differences(once, count_graphs()))
    assert "recompiles grew" in again

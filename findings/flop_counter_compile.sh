#!/usr/bin/env bash
# torch 2.13.0: a compiled function whose first call is under FlopCounterMode runs uncompiled, and stays
# uncompiled after the counter is gone, without an error or a warning
# (https://github.com/pytorch/pytorch/issues/123800).
# Expected: a warning; compiled calls afterwards.
# Seen:
#   graphs after the first and second call:                        [1, 1]
#   graphs after the first call under the counter, and the second: [0, 0]
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import contextlib, warnings
import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("error")


def count_graphs(first_call):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    square = torch.compile(lambda x: x @ x, backend=backend)
    counts = []
    for context in (first_call, contextlib.nullcontext()):
        with context:
            square(torch.randn(8, 8))
        counts.append(len(graphs))
    return counts


plain, counted = count_graphs(contextlib.nullcontext()), count_graphs(FlopCounterMode(display=False))
print("graphs after the first and second call:                       ", plain)
print("graphs after the first call under the counter, and the second:", counted)
assert (plain, counted) == ([1, 1], [0, 0]), "changed"
PY
"$python" check.py

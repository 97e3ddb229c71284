#!/usr/bin/env bash
# safetensors 0.8.0: `load_file` returns tensors in another order than they were given to `save_file`: by the size of
# their numbers, then by name. Code that goes through weights by position, such as an optimizer's parameters, pairs
# them wrongly, without an error where shapes agree.
# Expected: the order of the dict that was saved, as with torch.save.
# Seen:
#   saved: layer.2, layer.10, step; loaded: step, layer.10, layer.2; with torch.save: layer.2, layer.10, step
. "$(dirname "$0")/common.sh"
install safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import torch
from safetensors.torch import load_file, save_file

weights = {"layer.2": torch.zeros(2), "layer.10": torch.zeros(2), "step": torch.tensor([3])}
save_file(weights, "weights.safetensors")
torch.save(weights, "weights.pt")
loaded, other = load_file("weights.safetensors"), torch.load("weights.pt")
print(f"saved: {', '.join(weights)}; loaded: {', '.join(loaded)}; with torch.save: {', '.join(other)}")
assert list(loaded) == ["step", "layer.10", "layer.2"] and list(other) == list(weights), "changed"
PY
"$python" check.py

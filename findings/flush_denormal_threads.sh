#!/usr/bin/env bash
# torch 2.13.0: torch.set_flush_denormal(True) reaches the calling thread and threads created after it,
# not those that torch's pool already has. After any earlier parallel work, half of a tensor (on two
# threads) is flushed and the other half is not; the documentation does not say so.
# Expected: the setting holds for all threads of the pool, or the call returns False.
# Seen:
#   set early: 100% of the values are flushed
#   set late: 50% of the values are flushed
. "$(dirname "$0")/common.sh"
install torch==2.13.0 numpy==2.4.6
cat > check.py <<'PY'
import sys
import torch


def share_of_flushed():
    denormal = torch.full((1_000_000,), 1e-30) * 1e-10  # 1e-40, below the least normal float32
    return (denormal == 0).float().mean().item()


torch.set_num_threads(2)
if sys.argv[1] == "late":
    torch.ones(1_000_000) + 1  # the pool starts
assert torch.set_flush_denormal(True)
print(f"set {sys.argv[1]}: {share_of_flushed():.0%} of the values are flushed")
assert share_of_flushed() == {"early": 1.0, "late": 0.5}[sys.argv[1]], "changed"
PY
"$python" check.py early
"$python" check.py late

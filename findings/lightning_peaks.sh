#!/usr/bin/env bash
# lightning 2.6.6: the table behind ThroughputMonitor's MFU has dense bf16 peaks for the H100 SXM and
# peaks with sparsity for the H100 NVL, twice the dense ones, so that MFU is halved there; the name
# that an H200 reports ("NVIDIA H200") is not found (https://github.com/Lightning-AI/pytorch-lightning/issues/21677).
# Expected: dense peaks for all, and the H200 known.
# Seen:
#   NVIDIA H100 80GB HBM3: 989400000000000
#   NVIDIA H100 NVL: 1978800000000000
#   NVIDIA H200: None
. "$(dirname "$0")/common.sh"
install torch==2.13.0 lightning==2.6.6 numpy==2.4.6 setuptools==80.9.0
cat > check.py <<'PY'
from unittest import mock
import torch
from lightning.fabric.utilities.throughput import get_available_flops

peaks = {}
for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H200"):
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        peaks[name] = get_available_flops(torch.device("cuda:0"), torch.bfloat16)
    print(f"{name}: {peaks[name]}")
assert list(peaks.values()) == [989.4e12, 1978.8e12, None], "changed"
PY
"$python" check.py

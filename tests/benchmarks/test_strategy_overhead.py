"""A strategy adds little time on one device, where there is nothing to shard."""

from pathlib import Path

import pytest

from tests.benchmarks.interleaved import WARM_UP, Arm, check

STEPS = WARM_UP + 150
OPTIONS = (
    *("--model.width", "128", "--model.num-layers", "4", "--model.num-heads", "4"),
    *("--model.feedforward-width", "512", "--model.num-positions", "128"),
    *("--model.num-classes", "1000", "--data", "synthetic", "--batch-size", "2"),
    *("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--devices", "1"),
)
ARMS = {name: Arm(options=("--strategy", name)) for name in ("single", "ddp", "fsdp")}
WHOLE_BATCH = 128  # 16,384 tokens per step


@pytest.mark.alone
def test_strategies_add_almost_nothing_to_a_step_on_one_device(tmp_path: Path) -> None:
    check(tmp_path, ARMS, OPTIONS, WHOLE_BATCH, {"ddp": 0.01, "fsdp": 0.02})

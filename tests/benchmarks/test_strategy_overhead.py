"""What a strategy costs on one device, where it has nothing to spread."""

from pathlib import Path

from tests.benchmarks.turns import WARM_UP, Arm, check

STEPS = WARM_UP + 60
# FSDP2 copies weights and gradients once a step: little beside the products of 4,096 tokens.
OPTIONS = (
    *("--model.width", "128", "--model.num-layers", "4", "--model.num-heads", "4"),
    *("--model.feedforward-width", "512", "--model.num-positions", "128"),
    *("--model.num-classes", "1000", "--data", "synthetic", "--batch-size", "32"),
    *("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--devices", "1"),
)
ARMS = {name: Arm(options=("--strategy", name)) for name in ("single", "ddp", "fsdp")}


def test_strategies_cost_next_to_nothing_on_one_device(tmp_path: Path) -> None:
    check(tmp_path, ARMS, OPTIONS, {"ddp": 1.01, "fsdp": 1.02})

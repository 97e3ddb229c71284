"""A model that is too small for a real GPU is flagged as host-bound, and a large one is not."""

from pathlib import Path

import pytest
import torch

from recipes import gpt
from recipes.command_line import run_recipe
from unitransformer.measure.clock import HOST_BOUND
from unitransformer.record.schema import load_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("width", "batch_size", "is_flagged"), [(64, 1, True), (4096, 64, False)])
def test_only_the_steps_of_a_small_model_are_host_bound(
    width: int, batch_size: int, is_flagged: bool, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    arguments = [
        *("--model.width", str(width), "--model.feedforward-width", str(4 * width)),
        *("--model.num-layers", "2", "--model.num-heads", str(width // 32)),
        *("--batch-size", str(batch_size)),
        *("--data", "synthetic", "--devices", "1", "--strategy", "single", "--max-steps", "40"),
        *("--validate-every", "40", "--validation-batches", "1", "--log-every", "40"),
        *("--out", str(tmp_path), "--record", str(record)),
    ]
    assert run_recipe(gpt.PRESET, gpt.show, arguments) == 0
    assert (HOST_BOUND in load_record(record)["flags"]) == is_flagged

"""The recipes train on a real GPU with the same command line as on a CPU."""

from pathlib import Path

import pytest
import torch

from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from unitransformer.costs.gpus import find_gpu
from unitransformer.launch.devices import gpu_software, has_bf16
from unitransformer.record.schema import load_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TINY = [
    *("--model.width", "64", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "128", "--data", "synthetic", "--devices", "1"),
    *("--batch-size", "8", "--max-steps", "20", "--validation-batches", "2"),
]


@pytest.mark.parametrize("module", [bert, gpt, vit], ids=["bert", "gpt", "vit"])
@pytest.mark.parametrize("compile_mode", ["off", "default", "reduce-overhead"])
def test_a_recipe_trains_on_a_gpu_by_default_in_16_bits(
    module: object, compile_mode: str, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    arguments = [*TINY, "--compile", compile_mode, "--out", str(tmp_path), "--record", str(record)]
    assert run_recipe(module.PRESET, module.show, arguments) == 0  # type: ignore[attr-defined]
    kept = load_record(record)
    assert kept["config"]["parallel"]["accelerator"] == "cuda"
    expected = "bf16-mixed" if has_bf16() else "16-mixed"
    assert kept["config"]["parallel"]["precision"] == expected
    assert kept["peak_bytes_kind"] == "allocated"
    assert all(seconds > 0 for seconds in kept["step_s"])
    assert set(kept["samples"]["communication_s"]) == {0.0}
    assert kept["peak_reserved_bytes"][0] >= kept["peak_bytes"][0] > 0
    assert gpu_software().items() <= kept["versions"].items()
    if torch.version.hip is None:
        assert kept["gpu"][0]["samples"], kept["gpu"][0]["missing"]
    has_peak = find_gpu(torch.cuda.get_device_name()) is not None
    for row in kept["mfu"]:
        assert (row["peak_flops_per_s"] is not None) == has_peak, row["reason"]
        assert (row["share_of_ceiling"] or 0.0) <= 1


def test_a_gpu_and_a_cpu_train_the_same_model_in_float32(tmp_path: Path) -> None:
    losses = []
    for accelerator in ("cpu", "cuda"):
        record = tmp_path / f"{accelerator}.json"
        places = ["--out", str(tmp_path / accelerator), "--record", str(record)]
        options = ["--accelerator", accelerator, "--precision", "32-true", "--dropout", "0"]
        options += ["--data", "builtin", "--model.num-classes", "1000"]
        options += ["--optimizer.warmup-steps", "10", "--optimizer.schedule-steps", "100"]
        options += ["--optimizer.learning-rate", "1e-3"]
        assert run_recipe(gpt.PRESET, gpt.show, [*TINY, *options, *places]) == 0
        losses.append(load_record(record)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_run_that_exceeds_the_memory_of_a_gpu_has_the_status_oom(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = [*TINY, "--ceiling-s", "0", "--out", str(tmp_path), "--record", str(record)]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)  # 14 MB of an H200, less than the weights
    try:
        assert run_recipe(gpt.PRESET, gpt.show, arguments) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert load_record(record)["status"] == "oom"

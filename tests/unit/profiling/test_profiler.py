"""Tests traces of real runs: files, shares, and the steps that are excluded."""

import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import bert, gpt, vit
from recipes.presets import Preset
from unitransformer import run as running
from unitransformer.config import DataConfig, ParallelConfig, RunConfig
from unitransformer.measure import instruments
from unitransformer.profiling import profiler
from unitransformer.profiling.profiler import TraceCallback
from unitransformer.profiling.trace_breakdown import WORK_KINDS
from unitransformer.run import RunFailed, RunOutcome, RunPaths, run
from unitransformer.transformer import Transformer

SHAPE = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
TEXT = {**SHAPE, "num_classes": 300, "num_positions": 32}
IMAGES = {**SHAPE, "image_size": 16, "patch_size": 8}

Runner = Callable[..., tuple[RunOutcome | None, dict[str, Any]]]


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs a recipe with a `TraceCallback` between the clock's stop and its start."""
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(9)))
    # Two profilers cannot run together: tensor counting skips the traced steps.
    monkeypatch.setattr(instruments, "find_quiet_step", lambda config, first_step: None)
    build_trainer = running.build_trainer
    numbers = itertools.count()

    def run_traced(
        preset: Preset,
        *,
        first_step: int = 3,
        num_steps: int = 2,
        compile_mode: str = "off",
        model: dict[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[RunOutcome | None, dict[str, Any]]:
        trace = TraceCallback(tmp_path / "trace", first_step=first_step, num_steps=num_steps)

        def build(config: RunConfig, **options: Any) -> Any:
            options["callbacks"] = [trace, *options["callbacks"]]
            return build_trainer(config, **options)

        monkeypatch.setattr(running, "build_trainer", build)
        is_vit = preset.recipe == "vit"
        shape = {**(IMAGES if is_vit else TEXT), **(model or {})}
        config = RunConfig(
            recipe=preset.recipe,
            size="reference",
            model=preset.model_config("reference", **shape),
            data=DataConfig(source="builtin" if is_vit else str(text)),
            parallel=ParallelConfig(accelerator="cpu", compile=compile_mode),  # type: ignore[arg-type]
            batch_size=4,
            max_steps=8,
            validate_every=4,
            validation_batches=1,
            ceiling_s=0,
        )
        config = replace(config, **fields)
        folder = tmp_path / f"run-{next(numbers)}"
        places = RunPaths(
            folder=folder, checkpoints=folder / "checkpoints", record=folder / "record.json"
        )
        try:
            outcome = run(config, places, command="a test", print_line=lambda line: None)
        except RunFailed:
            outcome = None
        return outcome, trace.as_dict()

    return run_traced


def shares_of(expected: dict[str, Any]) -> dict[str, float]:
    return {row["part"]: row["share"] for row in expected["rows"]}


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_a_trace_of_every_recipe_has_shares_that_add_up(
    preset: Preset, traced: Runner, tmp_path: Path
) -> None:
    _, actual = traced(preset)
    shares = shares_of(actual)
    assert tuple(shares) == WORK_KINDS
    assert sum(shares.values()) == pytest.approx(1)
    for part in set(WORK_KINDS) - {"communication"}:
        assert shares[part] > 0, part
    assert shares["communication"] == 0
    seconds = sum(row["s_per_step"] for row in actual["rows"])
    assert seconds == pytest.approx(actual["step_s"])
    assert actual["steps"] == [3, 4]
    assert actual["reason"] is None


def test_trace_files_are_complete(traced: Runner, tmp_path: Path) -> None:
    _, actual = traced(gpt.PRESET)
    folder = tmp_path / "trace"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["shares-rank0.json", "trace-rank0.json.gz"]
    trace = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))
    steps = [e["name"] for e in trace["traceEvents"] if ": step " in e.get("name", "")]
    # Validation runs between steps 3 and 4, outside of both.
    assert steps[0].endswith("step 3")
    assert steps[-1].endswith("step 4")
    assert json.loads((folder / "shares-rank0.json").read_text()) == actual


@pytest.mark.alone
def test_a_larger_head_has_a_larger_share(traced: Runner) -> None:
    # 4,000 tokens in the vocabulary instead of 300 at width 16: the head dominates.
    _, small = traced(gpt.PRESET)
    _, large = traced(gpt.PRESET, model={"num_classes": 4000})
    share = shares_of(large)["head and loss"]
    assert share > shares_of(small)["head and loss"]
    assert share > 2 * shares_of(large)["matrix multiply"]


@pytest.mark.alone
def test_a_chunked_loss_counts_as_head_and_loss(traced: Runner) -> None:
    _, actual = traced(gpt.PRESET, model={"num_classes": 4000}, loss_chunk=32)
    shares = shares_of(actual)
    assert shares["head and loss"] > 2 * shares["matrix multiply"]


def test_micro_batches_of_one_step_are_all_traced(traced: Runner, tmp_path: Path) -> None:
    _, actual = traced(gpt.PRESET, first_step=2, num_steps=1, accumulate=3)
    content = (tmp_path / "trace" / "trace-rank0.json.gz").read_bytes()
    names = [e.get("name") for e in json.loads(gzip.decompress(content))["traceEvents"]]
    assert names.count("unitransformer: network") == 3
    assert actual["steps"] == [2]


def test_tracing_changes_no_loss_and_leaves_no_hooks(traced: Runner) -> None:
    seen, _ = traced(gpt.PRESET)
    unseen, actual = traced(gpt.PRESET, first_step=100)
    assert seen is not None
    assert unseen is not None
    assert seen.record is not None
    assert unseen.record is not None
    assert seen.record["loss"] == unseen.record["loss"]
    assert "states" not in vars(seen.network)
    assert (actual["rows"], actual["steps"]) == (None, [])
    assert actual["reason"] == "step 100 not reached"


def test_training_that_ends_during_the_trace_has_no_shares(traced: Runner) -> None:
    _, actual = traced(gpt.PRESET, first_step=6, num_steps=5)
    assert actual["rows"] is None
    assert actual["reason"] == "training ended before the last step to be traced"
    assert actual["steps"][:2] == [6, 7]


def test_a_trace_without_kernels_of_the_gpu_has_no_shares_and_is_kept(
    traced: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trace of a CPU stands for that of a GPU whose driver records no kernels."""
    time_shares = profiler.time_shares
    monkeypatch.setattr(
        profiler, "time_shares", lambda trace, **options: time_shares(trace, on_gpu=True)
    )
    outcome, actual = traced(gpt.PRESET)
    assert outcome is not None, "the run ends well"
    assert actual["rows"] is None
    assert actual["reason"].startswith("the trace has no GPU kernel")
    assert actual["step_s"] > 0
    assert json.loads((tmp_path / "trace" / "shares-rank0.json").read_text()) == actual
    assert (tmp_path / "trace" / "trace-rank0.json.gz").exists()


def test_training_that_fails_during_the_trace_has_no_shares(
    traced: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    states = Transformer.states

    def break_in_step_4(self: Transformer, *arguments: Any) -> torch.Tensor:
        if next(calls) == 4:
            raise ArithmeticError("step 4 went wrong")
        return states(self, *arguments)

    monkeypatch.setattr(Transformer, "states", break_in_step_4)
    outcome, actual = traced(gpt.PRESET)
    assert outcome is None
    assert actual["rows"] is None
    assert actual["reason"] == "training failed: ArithmeticError"


def test_a_head_inside_a_compiled_graph_is_recognized_by_its_shape(traced: Runner) -> None:
    _, actual = traced(
        gpt.PRESET, compile_mode="default", model={"num_layers": 1, "num_positions": 16}
    )
    shares = shares_of(actual)
    assert actual["head_by"] == "shape"
    assert shares["head and loss"] > 0
    assert shares["matrix multiply"] > 0
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("first_step", "num_steps"), [(-1, 1), (0, 0)])
def test_steps_that_cannot_be_traced_are_refused(
    first_step: int, num_steps: int, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"steps count from 0|at least 1"):
        TraceCallback(tmp_path, first_step=first_step, num_steps=num_steps)

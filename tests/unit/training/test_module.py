"""Training repeats and resumes bit for bit; decay, rates and precision follow common practice."""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from recipes import bert, gpt, vit
from recipes.presets import Preset
from recipes.results import measured_lines
from tests.builders.operators import OperatorCounter
from unitransformer.checkpoint.names import checkpoint_name
from unitransformer.checkpoint.reader import check_files, newest_checkpoint, read_run_state
from unitransformer.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from unitransformer.machine import loss_blocks
from unitransformer.measure.clock import HOST_BOUND, StepClock
from unitransformer.objectives import Batch, Objective
from unitransformer.parallel.strategies import INITIAL_SCALE_POWER, build_precision
from unitransformer.record.metrics import recorded_steady_state
from unitransformer.record.schema import load_record
from unitransformer.run import RunFailed, RunOutcome, RunPaths, run
from unitransformer.training import module
from unitransformer.training.module import TrainingModule
from unitransformer.training.optimizer import build_optimizer
from unitransformer.transformer import Transformer

TINY = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.1}
TEXT = {**TINY, "num_classes": 300, "num_positions": 16}
IMAGES = {**TINY, "image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20))
    path.write_text("".join(lines))
    return path


def config_of(preset: Preset, text: Path, **fields: Any) -> RunConfig:
    shape = IMAGES if preset.recipe == "vit" else TEXT
    config = RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **shape),
        data=DataConfig(source="builtin" if preset.recipe == "vit" else str(text)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, schedule_steps=20),
        parallel=ParallelConfig(accelerator="cpu"),
        batch_size=4,
        max_steps=20,
        validate_every=7,
        validation_batches=2,
        ceiling_s=0,
    )
    return replace(config, **fields)


def train(config: RunConfig, folder: Path, **options: Any) -> RunOutcome:
    changes = {"checkpoints", "keep_checkpoints"} & options.keys()
    places = RunPaths(
        folder=folder,
        record=folder / f"{config.hash()}.json",
        **{"checkpoints": folder / "checkpoints"} | {name: options.pop(name) for name in changes},
    )
    return run(config, places, command="a test", print_line=lambda line: None, **options)


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_twenty_steps_equal_ten_resumed_for_ten_more(
    preset: Preset, text: Path, tmp_path: Path
) -> None:
    config = config_of(preset, text)
    whole = train(config, tmp_path / "whole").record
    half = train(replace(config, max_steps=10), tmp_path / "parts").record
    rest = train(config, tmp_path / "parts", resume=True).record
    assert whole is not None
    assert half is not None
    assert rest is not None
    assert half["loss"] == whole["loss"][:10]
    assert rest["loss"] == whole["loss"]
    assert rest["gradient_norm"] == whole["gradient_norm"]
    assert rest["segment_starts"] == [0, 10]
    assert len(rest["step_s"]) == 20
    assert rest["validation"]["loss"] == whole["validation"]["loss"]


def test_a_resumed_run_computes_the_loss_in_the_blocks_of_the_first_launch(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = iter([16, 256])
    monkeypatch.setattr(loss_blocks, "has_blocked_loss", lambda config: True)
    monkeypatch.setattr(loss_blocks, "measure_columns", lambda *shape: {next(fastest): 1.0})
    config = config_of(gpt.PRESET, text, max_steps=4)
    half = train(replace(config, max_steps=2), tmp_path / "parts").record
    rest = train(config, tmp_path / "parts", resume=True).record
    whole = train(replace(config, loss_chunk=1024, loss_block=16), tmp_path / "whole").record
    other = train(config, tmp_path / "other").record
    assert half is not None
    assert rest is not None
    assert whole is not None
    assert other is not None
    columns = [record["loss_blocks"][0]["columns"] for record in (half, rest, whole, other)]
    assert columns == [16, 16, 16, 256]
    assert rest["loss"] == whole["loss"]
    assert rest["gradient_norm"] == whole["gradient_norm"] != other["gradient_norm"]


@pytest.mark.parametrize("ending", ["the last step", "an error"])
def test_only_weights_are_copied_to_the_host_when_training_ends(
    ending: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def tear_down(self: SingleDeviceStrategy) -> None:
        assert self.model is not None
        left.append(sum(len(optimizer.state) for optimizer in self.optimizers))
        left.append(sum(p.grad is not None for p in self.model.parameters()))
        assert any(weight.any() for weight in self.model.parameters())

    monkeypatch.setattr(SingleDeviceStrategy, "teardown", tear_down)
    if ending == "an error":
        monkeypatch.setattr(module.TrainingModule, "on_train_end", fail)
        with pytest.raises(RunFailed, match="the device has failed"):
            train(config_of(gpt.PRESET, text, max_steps=2), tmp_path)
    else:
        train(config_of(gpt.PRESET, text, max_steps=2), tmp_path)
    assert left == [0, 0]


def fail(*_: Any) -> None:
    raise RuntimeError("the device has failed")


def test_a_run_resumes_in_the_middle_of_an_epoch_with_accumulation(
    text: Path, tmp_path: Path
) -> None:
    config = config_of(gpt.PRESET, text, accumulate=3)
    whole = train(config, tmp_path / "whole").record
    train(replace(config, max_steps=9), tmp_path / "parts")
    rest = train(config, tmp_path / "parts", resume=True).record
    assert whole is not None
    assert rest is not None
    assert rest["loss"] == whole["loss"]


def test_restarted_ranks_begin_where_the_run_began_until_it_has_saved_a_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unitransformer.run.join_attempt", lambda: True)
    config = config_of(gpt.PRESET, text)
    train(replace(config, max_steps=5), tmp_path / "first")
    begin = newest_checkpoint(tmp_path / "first" / "checkpoints")
    for max_steps, starts in ((7, [0, 5]), (9, [0, 5, 7])):
        config = replace(config, max_steps=max_steps)
        record = train(config, tmp_path / "second", resume=begin).record
        assert record is not None
        assert record["segment_starts"] == starts


def test_a_step_that_was_skipped_is_not_counted_after_a_resumption(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def skip_the_first(self: torch.optim.AdamW, closure: Any) -> Any:
        # As a loss scaler does when the gradient overflows.
        return closure() if self.param_groups[0]["lr"] == first_rate else step(self, closure)

    config = config_of(gpt.PRESET, text, max_steps=6)
    first_rate = config.optimizer.learning_rate_at(0)
    monkeypatch.setattr(torch.optim.AdamW, "step", skip_the_first)
    whole = train(config, tmp_path / "whole").record
    train(replace(config, max_steps=3), tmp_path / "parts")
    rest = train(config, tmp_path / "parts", resume=True).record
    assert whole is not None
    assert rest is not None
    assert rest["loss"] == whole["loss"]
    assert rest["gradient_norm"] == whole["gradient_norm"]


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_may_be_resumed_with_other_micro_batches(
    steps: int, text: Path, tmp_path: Path
) -> None:
    model = gpt.model_config("reference", **{**TEXT, "dropout": 0.0})
    config = config_of(gpt.PRESET, text, model=model, max_steps=8)
    whole = train(config, tmp_path / "whole").record
    train(replace(config, max_steps=steps), tmp_path / "parts")
    halves = replace(config, batch_size=2, accumulate=2)
    rest = train(halves, tmp_path / "parts", resume=True).record
    assert whole is not None
    assert rest is not None
    assert rest["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_finished_run_may_be_extended_beyond_its_schedule(text: Path, tmp_path: Path) -> None:
    config = config_of(gpt.PRESET, text)
    train(config, tmp_path)
    longer = replace(config, max_steps=25, optimizer=replace(config.optimizer, schedule_steps=25))
    assert longer.identity_hash() == config.identity_hash()
    record = train(longer, tmp_path, resume=True).record
    assert record is not None
    assert len(record["loss"]) == 25


def test_a_run_does_not_resume_on_other_data(text: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text(text.read_text())
    config = config_of(gpt.PRESET, data, max_steps=4)
    train(config, tmp_path / "run")
    data.write_text(text.read_text().replace("makes", "gives"))
    with pytest.raises(ValueError, match="is not what"):
        train(replace(config, max_steps=8), tmp_path / "run", resume=True)


def test_a_seed_repeats_a_run_to_the_bit_and_another_does_not(text: Path, tmp_path: Path) -> None:
    config = config_of(gpt.PRESET, text, max_steps=5)
    losses = [
        train(replace(config, seed=seed), tmp_path / str(number)).record["loss"]  # type: ignore[index]
        for number, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_micro_batches_add_up_to_the_whole_batch(text: Path, tmp_path: Path) -> None:
    model = gpt.model_config("reference", **{**TEXT, "dropout": 0.0})
    config = config_of(gpt.PRESET, text, model=model, max_steps=6)
    whole = train(replace(config, batch_size=8), tmp_path / "a").record
    parts = train(replace(config, batch_size=2, accumulate=4), tmp_path / "b").record
    assert whole is not None
    assert parts is not None
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_chunked_loss_trains_the_same_model(text: Path, tmp_path: Path) -> None:
    config = config_of(bert.PRESET, text, max_steps=6)
    whole = train(config, tmp_path / "a").record
    parts = train(replace(config, loss_chunk=5), tmp_path / "b").record
    assert whole is not None
    assert parts is not None
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


# The losses of a gpt with compiled kernels are compared on two ranks, in `tests/distributed`.
@pytest.mark.compiles
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.proof)]
)
@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_a_compiled_network_is_one_graph_and_trains_the_same(
    preset: Preset, backend: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A backend that builds no kernels finds a graph break and a wrong graph as well.
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        Objective,
        "compile",
        lambda self, **options: compile_module(self, **options, backend=backend),
    )
    # One layer compiles in half the time, and breaks a graph where two would.
    shape = {**(IMAGES if preset.recipe == "vit" else TEXT), "dropout": 0.0, "num_layers": 1}
    config = config_of(preset, text, model=preset.model_config(**shape), max_steps=3)
    eager = train(config, tmp_path / "eager").record
    # A graph break is an error: `compile_objective` asks for the full graph.
    compiling = replace(config.parallel, compile="default")
    compiled = train(replace(config, parallel=compiling), tmp_path / "compiled").record
    assert eager is not None
    assert compiled is not None
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_a_record_says_what_ran_and_validates(text: Path, tmp_path: Path) -> None:
    config = config_of(gpt.PRESET, text)
    record = train(config, tmp_path).record
    assert record is not None
    path = tmp_path / f"{config.hash()}.json"
    assert load_record(path) == json.loads(json.dumps(record))
    assert record["status"] == "ok"
    assert len(record["loss"]) == len(record["step_s"]) == len(record["learning_rate"]) == 20
    assert record["learning_rate"][:2] == pytest.approx([1.5e-3, 3e-3])
    assert record["validation"]["value"] == pytest.approx(math.exp(record["validation"]["loss"]))
    assert record["validation"]["baseline"]["name"] == "unigram entropy"
    # A busy machine may slow the last of so few steps: then a reason replaces the rate.
    if record["steady_from"] is None:
        assert "needs" in record["no_steady_state_reason"]
    else:
        steady = recorded_steady_state(record).select(record["step_s"])
        assert record["tokens_per_s"] == 4 * 16 / statistics.median(steady)
    assert {"csv", "tensorboard", "checkpoints"} <= {path.name for path in tmp_path.iterdir()}


def test_an_overflowed_gradient_norm_is_none_in_the_record(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([math.inf, 0.5, math.nan, 0.25])
    monkeypatch.setattr(module, "clip_gradients", lambda *arguments: torch.tensor(next(norms)))
    config = config_of(gpt.PRESET, text, max_steps=2)
    train(config, tmp_path)
    record = train(replace(config, max_steps=4), tmp_path, resume=True).record
    assert record is not None
    assert record["gradient_norm"] == [None, 0.5, None, 0.25]
    assert load_record(tmp_path / f"{replace(config, max_steps=4).hash()}.json") == record


def test_a_run_too_short_has_a_reason_in_place_of_a_rate(text: Path, tmp_path: Path) -> None:
    record = train(config_of(gpt.PRESET, text, max_steps=3), tmp_path).record
    assert record is not None
    assert record["steady_from"] is None
    assert record["no_steady_state_reason"] == "3 steps, needs 8"
    assert record["tokens_per_s"] is None


@pytest.mark.parametrize(("keep", "steps"), [(1, [20]), (2, [18, 20]), (9, [6, 12, 18, 20])])
def test_the_newest_checkpoints_are_kept(
    keep: int, steps: list[int], text: Path, tmp_path: Path
) -> None:
    train(config_of(gpt.PRESET, text, checkpoint_every=6), tmp_path, keep_checkpoints=keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [checkpoint_name(step) for step in steps]
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    check_files(newest)
    assert len(read_run_state(newest)["loss"]) == 20


def test_a_failing_run_leaves_a_record(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*arguments: object) -> None:
        raise ArithmeticError("the third step went wrong")

    config = config_of(gpt.PRESET, text)
    calls = iter(range(100))
    states = Transformer.states
    monkeypatch.setattr(
        Transformer,
        "states",
        lambda self, *a: states(self, *a) if next(calls) < 2 else give_up(),
    )
    with pytest.raises(RunFailed, match="third step"):
        train(config, tmp_path)
    record = load_record(tmp_path / f"{config.hash()}.json")
    assert record["status"] == "crashed"
    assert record["error"]["type"] == "ArithmeticError"
    assert len(record["loss"]) == 2


def lose(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> list[int]:
    """Lets `Objective` return NaN from call `number` of a method on; returns the list of calls."""
    original, calls = getattr(Objective, name), list[int]()

    def compute(self: Objective, batch: Batch) -> Any:
        calls.append(len(calls) + 1)
        value = original(self, batch)
        is_lost = len(calls) >= number
        if name == "forward":
            return value * math.nan if is_lost else value
        return value._replace(loss=value.loss * math.nan) if is_lost else value

    monkeypatch.setattr(Objective, name, compute)
    return calls


def test_a_run_without_checkpoints_stops_within_one_log_interval_of_a_nan_loss(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = lose(monkeypatch, "forward", 7)
    config = config_of(gpt.PRESET, text, max_steps=1000, validate_every=1000, log_every=5)
    with pytest.raises(RunFailed, match=r"loss is nan at step 7; lower optimizer\.learn"):
        train(config, tmp_path, checkpoints=None)
    assert len(calls) == 11  # the line of step 10 shows it, and the next step is the last
    record = load_record(tmp_path / f"{config.hash()}.json")
    assert (record["status"], record["error"]["type"]) == ("diverged", "FloatingPointError")
    assert len(record["loss"]) == 6
    assert "nan" in record["log"][-1]


def test_a_run_stops_after_a_nan_validation(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch, "score", 1)
    config = config_of(gpt.PRESET, text, max_steps=1000)
    with pytest.raises(RunFailed, match="validation loss is nan after step 7; lower optimizer"):
        train(config, tmp_path, checkpoints=None)
    record = load_record(tmp_path / f"{config.hash()}.json")
    assert (record["status"], len(record["loss"])) == ("diverged", 8)


def test_a_host_bound_run_says_so_in_its_record(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepClock, "flags", lambda clock: [HOST_BOUND])
    record = train(config_of(gpt.PRESET, text, max_steps=4), tmp_path, checkpoints=None).record
    assert record is not None
    assert HOST_BOUND in record["flags"]
    assert any("host-bound: the processor" in line for line in measured_lines(record))


@pytest.mark.parametrize(
    ("parallel", "waits"),
    [
        (ParallelConfig(precision="bf16-mixed"), False),
        (ParallelConfig(devices=2, strategy="fsdp"), False),
        (ParallelConfig(precision="16-mixed"), True),  # for the overflow
        (ParallelConfig(devices=2, strategy="zero2"), True),  # for the norm
        (ParallelConfig(devices=2, strategy="fsdp", cpu_offload=True), True),
    ],
)
def test_host_bound_is_not_judged_where_every_step_waits_for_the_gpu(
    parallel: ParallelConfig, waits: bool
) -> None:
    assert parallel.waits_for_gpu == waits


def test_weight_decay_is_for_matrices_only(text: Path) -> None:
    config = config_of(vit.PRESET, text, optimizer=OptimizerConfig(weight_decay=0.1))
    network = Transformer(config.model)
    optimizer = build_optimizer(network.named_parameters(), config)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert all(p.squeeze().ndim >= 2 for p in decayed["params"])
    names = {id(p): name for name, p in network.named_parameters()}
    undecayed = {names[id(p)] for p in free["params"]}
    assert "class_embedding" in undecayed
    assert "transformer_layers.0.ln1.weight" in undecayed
    assert len(decayed["params"]) + len(free["params"]) == len(names)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_adamw_needs_few_operators_on_a_gpu_in_every_precision(
    precision: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop over the parameters, as on a CPU, would be more than all the rest of a step."""
    # torch uses foreach only for types in this list, and a fake tensor has its own.
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizers, "_foreach_supported_types", [Tensor, FakeTensor])
    config = config_of(gpt.PRESET, text, parallel=ParallelConfig(precision=precision))  # type: ignore[arg-type]
    training = TrainingModule(config)
    with FakeTensorMode():
        weights = {
            name: torch.nn.Parameter(torch.empty(weight.shape, device="cuda"))
            for name, weight in training.network.named_parameters()
        }
        monkeypatch.setattr(training.network, "named_parameters", weights.items)
        optimizer = training.configure_optimizers()
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # creates the moments
        with OperatorCounter() as counter:
            optimizer.step()
    # Two groups: those with weight decay, and the others.
    limit = 2 * (2 if precision == "bf16-mixed" else 20)
    assert len(weights) > 20
    assert 0 < len(counter.names) <= limit, counter.names


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_its_floor() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule_steps=24, floor=0.1)
    assert [config.learning_rate_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert config.learning_rate_at(14) == pytest.approx(0.55)
    assert config.learning_rate_at(24) == config.learning_rate_at(1000) == pytest.approx(0.1)


def test_training_flushes_denormal_floats(text: Path, tmp_path: Path) -> None:
    torch.set_flush_denormal(False)
    train(config_of(gpt.PRESET, text, max_steps=1), tmp_path)
    smallest = torch.tensor([1e-38]) * 1e-3
    assert float(smallest) == 0.0


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp1"])
def test_float16_on_a_cpu_scales_the_loss(strategy: str) -> None:
    parallel = ParallelConfig(strategy=strategy, precision="16-mixed")  # type: ignore[arg-type]
    precision: Any = build_precision(parallel, "cpu")
    assert precision.precision == "16-mixed"
    assert precision.scaler.is_enabled()
    assert float(precision.scaler.scale(torch.ones(()))) == 2**INITIAL_SCALE_POWER

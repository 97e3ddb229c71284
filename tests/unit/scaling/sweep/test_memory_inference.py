"""Tests which cells an out-of-memory cell implies to be out of memory too."""

from dataclasses import replace
from typing import Any

import pytest

from scaling.sweep.memory_inference import find_cause, is_selected, needs_at_least, unrefuted
from tests.builders.records import make_config
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.memory import rank_bytes


def make(
    batch_size: int = 4, max_steps: int = 10, num_layers: int = 8, **parallel: Any
) -> RunConfig:
    chosen = {"accelerator": "cuda", "strategy": "fsdp", "devices": 2} | parallel
    model = replace(make_config().model, num_layers=num_layers)
    config = replace(make_config(), model=model, batch_size=batch_size, max_steps=max_steps)
    return replace(config, parallel=ParallelConfig(**chosen))


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (make(batch_size=8), make(batch_size=4)),
        (make(devices=2), make(devices=4)),
        (make(precision="32-true"), make(precision="bf16-mixed")),
        (make(precision="bf16-mixed"), make(precision="bf16-true")),
        (make(), make(activation_checkpointing="selective")),
        (make(activation_checkpointing="selective"), make(activation_checkpointing="full")),
        (make(), replace(make(), loss_chunk=64)),
        (replace(make(), model=replace(make().model, width=32)), make()),
    ],
)
def test_more_of_an_axis_needs_at_least_as_much(more: RunConfig, less: RunConfig) -> None:
    assert needs_at_least(more, less)
    assert not needs_at_least(less, more)
    assert needs_at_least(more, more)


@pytest.mark.parametrize(
    "other",
    [
        make(batch_size=8, strategy="ddp"),
        make(batch_size=8, precision="bf16-mixed"),
        make(batch_size=8, devices=4),
        make(batch_size=8, devices=1),
        make(batch_size=8, cpu_offload=True),
        replace(make(batch_size=8), data=replace(make().data, num_workers=4)),
        make(batch_size=8, compile="default"),
        replace(make(batch_size=8), model=replace(make().model, dropout=0.1)),
    ],
)
def test_memory_of_cells_that_differ_otherwise_is_not_ordered(other: RunConfig) -> None:
    assert not needs_at_least(other, make())
    assert not needs_at_least(make(), other)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        # Autocast's copies of all weights exceed what float32 activations of few tokens add.
        (
            make(strategy="ddp", precision="32-true", activation_checkpointing="full"),
            make(strategy="ddp", precision="bf16-mixed", activation_checkpointing="full"),
        ),
        # Checkpointing adds one recomputed layer, which is much of a model of two.
        (make(num_layers=2), make(num_layers=2, activation_checkpointing="selective")),
    ],
)
def test_a_config_that_needs_less_by_formula_is_not_inferred(
    config: RunConfig, cause: RunConfig
) -> None:
    assert rank_bytes(config) < rank_bytes(cause)
    assert not needs_at_least(config, cause)


def test_replicated_weights_need_the_same_memory_on_any_number_of_devices() -> None:
    two, four = make(strategy="ddp", devices=2), make(strategy="ddp", devices=4)
    assert needs_at_least(two, four)
    assert needs_at_least(four, two)


def test_cpu_memory_is_shared_by_all_ranks_and_does_not_order_device_counts() -> None:
    for strategy in ("ddp", "fsdp", "zero2"):
        two, four = (
            make(accelerator="cpu", strategy=strategy, devices=devices) for devices in (2, 4)
        )
        assert not needs_at_least(two, four)
        assert not needs_at_least(four, two)


def test_the_length_of_a_run_does_not_change_its_memory() -> None:
    assert needs_at_least(make(max_steps=5), make(max_steps=500))


def test_a_larger_cell_that_ran_refutes_an_out_of_memory_inference() -> None:
    too_large = {"a": make(batch_size=8)}
    assert find_cause(make(batch_size=16), unrefuted(too_large, [])) == "a"
    assert find_cause(make(batch_size=4), unrefuted(too_large, [])) is None
    assert find_cause(make(batch_size=16), unrefuted(too_large, [make(batch_size=4)])) == "a"
    assert find_cause(make(batch_size=16), unrefuted(too_large, [make(batch_size=32)])) is None


def test_the_requested_share_of_inferred_cells_is_checked() -> None:
    cells = [f"{number:012x}" for number in range(5000)]
    assert sum(is_selected(cell, 0.1) for cell in cells) == pytest.approx(500, rel=0.15)
    assert not any(is_selected(cell, 0) for cell in cells)
    assert all(is_selected(cell, 1) for cell in cells)

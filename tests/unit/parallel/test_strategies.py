"""Tests the options of the strategies that a run on one machine does not show."""

import datetime

import pytest

from recipes import gpt
from unitransformer.config import Compile, ParallelConfig, RunConfig, Strategy
from unitransformer.parallel.strategies import build_strategy


def config_of(strategy: Strategy, compile_mode: Compile = "off") -> RunConfig:
    return RunConfig(
        recipe="gpt",
        size="reference",
        model=gpt.model_config(),
        parallel=ParallelConfig(
            accelerator="cpu", devices=2, strategy=strategy, compile=compile_mode
        ),
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "fsdp1", "zero1", "zero3"])
@pytest.mark.parametrize(("mode", "minutes"), [("off", 10), ("default", 10), ("max-autotune", 60)])
def test_collectives_wait_longer_for_ranks_that_try_kernels(
    mode: Compile, minutes: int, strategy: Strategy
) -> None:
    timeout = build_strategy(config_of(strategy, mode), "cpu")._timeout  # type: ignore[attr-defined]
    assert timeout == datetime.timedelta(minutes=minutes)

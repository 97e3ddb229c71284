"""Tests what counts as the memory of training."""

from dataclasses import replace
from typing import Any

import pytest

from tests.builders.records import make_config
from unitransformer.config import DataConfig, ParallelConfig
from unitransformer.machine.loss_blocks import LossBlocks
from unitransformer.peers import worker
from unitransformer.peers.catalog import OURS


def test_what_our_first_run_measures_is_no_memory_from_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_bytes = [100]

    def measure(config: Any) -> LossBlocks:
        held_bytes[0] += 50  # of what it frees, the process keeps this much
        return LossBlocks(rows=0, columns=0, reason="measured")

    monkeypatch.setattr(worker, "choose_loss_blocks", measure)
    monkeypatch.setattr(worker, "_memory_bytes", lambda device: held_bytes[0])
    for name in ("set_up_process", "keep_freed_memory"):  # they would change this process
        monkeypatch.setattr(worker, name, lambda *arguments: None)
    config = replace(
        make_config("gpt"),
        parallel=ParallelConfig(accelerator="cpu"),
        data=DataConfig(source="synthetic"),
    )
    assert worker.Trainee(config, OURS, "", "off").base_bytes == 100

"""Tests on which processor the side of a comparison stays."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.service import paired_worker


def chosen(monkeypatch: pytest.MonkeyPatch, *, threads: int, device: str, start: Any) -> list[Any]:
    """Returns the sets of processors that were set; this process may use 2 and 5."""
    sets: list[Any] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, to: sets.append(to), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    paired_worker._share_processor(trainer, start)
    return sets


@pytest.mark.parametrize(("start", "processor"), [(0, 2), (1, 5), (2, 2)])
def test_sides_of_one_thread_stay_on_the_processor_of_their_start(
    monkeypatch: pytest.MonkeyPatch, start: int, processor: int
) -> None:
    assert chosen(monkeypatch, threads=1, device="cpu", start=start) == [{processor}]


@pytest.mark.parametrize(
    ("threads", "device", "start"), [(2, "cpu", 0), (1, "cuda", 0), (1, "cpu", None)]
)
def test_several_threads_and_gpus_are_left_to_the_system(
    monkeypatch: pytest.MonkeyPatch, threads: int, device: str, start: int | None
) -> None:
    assert chosen(monkeypatch, threads=threads, device=device, start=start) == []

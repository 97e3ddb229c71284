"""A timed step reads no value from its device, so it never waits for the device."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unitransformer.run
from recipes import bert, gpt, vit
from tests.distributed.launching import begin
from unitransformer.config import RunConfig
from unitransformer.data.sources import Synthetic
from unitransformer.linear_cross_entropy import linear_cross_entropy
from unitransformer.training.module import TrainingModule

# Operators that return a value, or a shape that depends on values, to Python.
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
STEPS, ACCUMULATE = 12, 2
OPTIONS = (
    *("--max-steps", str(STEPS), "--validate-every", str(STEPS), "--log-every", str(STEPS)),
    *("--accumulate", str(ACCUMULATE), "--loss-chunk", "8"),
)


class SyncCounter(TorchDispatchMode):
    """Counts reads by Python and autograd, not those inside of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        # Operators on tensors of two devices, or that wait for a copy.
        self.crossing: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        goes_to = kwargs.get("device")
        is_copy = bool(devices) and goes_to is not None and devices != {goes_to}
        if name in SYNCS:
            self.syncs.append(name)
        if len(devices) > 1 or (is_copy and not kwargs.get("non_blocking")):
            self.crossing.append(name)
        return func(*args, **kwargs)


class CountSyncs(pl.Callback):
    """Counts reads up to the start of the next step, on this rank. Must be the last callback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mode = folder, SyncCounter()
        self.ends = CountSyncsToStepEnd(self.mode)
        self.until: list[int] = []
        self.is_done = False

    def on_train_start(self, *args: Any) -> None:
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.is_done:
            return
        self.until.append(len(self.mode.syncs))
        if trainer.global_step == STEPS - 1:
            self.is_done = True
            self.mode.__exit__(None, None, None)
            path = self.folder / f"asked-{trainer.global_rank}.json"
            path.write_text(json.dumps([self.ends.until, self.until]))


class CountSyncsToStepEnd(pl.Callback):
    """Counts reads up to the end of a step. Must be the first callback."""

    def __init__(self, mode: SyncCounter) -> None:
        self.mode = mode
        self.until: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.until.append(len(self.mode.syncs))


def count_syncs(
    recipe: str, folder: Path, *, strategy: str = "single", injects: bool = False
) -> list[list[int]]:
    """Reads in each micro-batch of each rank, without the first and last step, which are logged.

    For one rank, reads between steps count too; several ranks agree there through gloo.
    """

    def watch() -> None:
        build_trainer = unitransformer.run.build_trainer

        def build(*arguments: Any, callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
            counts = CountSyncs(folder)
            watched = [counts.ends, *callbacks, counts]
            return build_trainer(*arguments, callbacks=watched, **options)

        unitransformer.run.build_trainer = build
        if injects:
            step = TrainingModule.training_step

            def read_value(self: TrainingModule, *arguments: Any) -> Tensor:
                loss = step(self, *arguments)
                assert loss.item() > 0
                return loss

            TrainingModule.training_step = read_value  # type: ignore[method-assign]

    spread = ("--strategy", strategy, "--devices", "1" if strategy == "single" else "2")
    process = begin(recipe, folder / "run", *OPTIONS, *spread, fault=watch, is_whole=True)
    process.join()
    assert process.exitcode == 0, (folder / "run" / "output.log").read_text()[-2000:]
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("asked-*.json"))]
    if strategy == "single":
        return [
            [now - before for before, now in pairwise(begins[ACCUMULATE - 1 :])]
            for _, begins in ranks
        ]
    return [
        [
            end - begin
            for begin, end in zip(begins[ACCUMULATE - 1 : -1], ends[ACCUMULATE:], strict=True)
        ]
        for ends, begins in ranks
    ]


NOTHING = [0] * ACCUMULATE * (STEPS - 2)


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
def test_no_step_reads_a_value_from_the_device(recipe: str, tmp_path: Path) -> None:
    assert count_syncs(recipe, tmp_path) == [NOTHING]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_step_of_several_ranks_reads_a_value_from_the_device(
    strategy: str, tmp_path: Path
) -> None:
    assert count_syncs("gpt", tmp_path, strategy=strategy) == [NOTHING] * 2


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_one_item_call_per_step_is_detected(strategy: str, tmp_path: Path) -> None:
    for asked in count_syncs("gpt", tmp_path, strategy=strategy, injects=True):
        assert min(asked) >= 1


# The meta device stands in for a GPU: a copy to it, or a host value used by an operator, would
# synchronize a GPU.
DEVICE = torch.device("meta")


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_synthetic_samples_reach_a_device_without_a_synchronization(preset: Any) -> None:
    config = RunConfig(
        recipe=preset.recipe, size="reference", model=preset.model_config("reference")
    )
    order = torch.arange(4)
    with SyncCounter() as counter:
        Synthetic(config, 8).fill({"inputs": order, "targets": order}, DEVICE)
    assert counter.syncs + counter.crossing == []


def test_a_chunked_loss_copies_nothing_from_the_host() -> None:
    states, weight = (torch.empty(rows, 8, device=DEVICE, requires_grad=True) for rows in (32, 50))
    targets = torch.zeros(32, dtype=torch.long, device=DEVICE)
    with SyncCounter() as counter:
        linear_cross_entropy(states, weight, None, targets, rows=8, columns=20).backward()
    assert counter.syncs + counter.crossing == []

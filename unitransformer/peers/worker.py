"""Trains one network a few steps at a time: `python -m unitransformer.peers.worker`.

Each line of standard input is a request in JSON, each line of standard output its answer:

- {"about": "cpu"}: the versions of packages, and the commit of this code
- {"config": {...}, "peer": "gpt2", "form": "own loss", "compile": "off"} builds a network of the
  catalog, or "ours": its parameters, and the memory of the process before
- {"steps": 3} trains: the seconds of wall clock and processor, the losses and the peak memory

{"failure": "..."} answers a request that failed. The process works only on request, so that several
can take turns on one machine.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unitransformer.config import Compile, RunConfig, from_dict
from unitransformer.data.sources import load_source
from unitransformer.launch.devices import keep_freed_memory, set_up_process
from unitransformer.launch.failures import is_out_of_memory
from unitransformer.machine.loss_blocks import choose_loss_blocks
from unitransformer.machine.software import describe_code, describe_versions
from unitransformer.measure.instruments import read_peaks, reset_peaks
from unitransformer.objectives import Batch
from unitransformer.parallel.strategies import clip_gradients
from unitransformer.peers.catalog import OURS, PEERS
from unitransformer.training.module import TrainingModule

NUM_BATCHES = 4  # made before the first step; steps use them in turn
PEER_PACKAGES = ("transformers", "timm")


class Trainee:
    """A network in training, with its optimizer and batches on the device."""

    def __init__(self, config: RunConfig, peer: str, form: str, compile_mode: Compile) -> None:
        self.config, parallel = config, config.parallel
        set_up_process(parallel, parallel.accelerator)
        self.device = torch.device(parallel.accelerator)
        batches = _draw_batches(config, self.device)
        _import(peer)
        # From here on our side trains: a first run measures, and keeps what it frees.
        self.base_bytes = _memory_bytes(self.device)
        if peer == OURS:  # what a run of this project sets; peers run as their users run them
            keep_freed_memory(parallel.accelerator)
            blocks = choose_loss_blocks(config)
        torch.manual_seed(config.seed)
        if peer == OURS:
            module = TrainingModule(config)
            module.set_loss_blocks(blocks)
            self.objective: nn.Module = module.objective.to(self.device)
            self.optimizer: Any = module.configure_optimizers()
        else:
            from unitransformer.peers.build import build_peer, peer_batch

            self.objective = build_peer(PEERS[peer].name, form, config).to(self.device)  # type: ignore[index]
            if compile_mode != "off":
                self.objective.compile(mode=None if compile_mode == "default" else compile_mode)
            self.optimizer = _build_optimizer(self.objective, config)
            batches = [peer_batch(batch) for batch in batches]  # type: ignore[misc]
        if parallel.precision == "bf16-true":
            self.objective.to(torch.bfloat16)
            batches = [_to_bfloat16(batch) for batch in batches]
        self.batches: Sequence[Any] = batches
        self.objective.train()
        self.num_steps = 0

    def describe(self) -> dict[str, Any]:
        """Returns the memory before the network was built, and its parameters."""
        return {
            "base_bytes": self.base_bytes,
            "num_parameters": sum(p.numel() for p in self.objective.parameters()),
        }

    def train(self, steps: int) -> dict[str, Any]:
        """Trains some steps; returns their seconds, losses and peak memory."""
        reset_peaks(self.device)
        self._synchronize()
        started_s, processor_s = time.perf_counter(), time.process_time()
        losses = [self._step() for _ in range(steps)]
        self._synchronize()
        return {
            "wall_s": time.perf_counter() - started_s,
            "processor_s": time.process_time() - processor_s,
            "losses": [float(loss) for loss in losses],
            "peak_bytes": self._peak_bytes(),
        }

    def _step(self) -> Tensor:
        optimizer = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.learning_rate_at(self.num_steps)
        batch = self.batches[self.num_steps % len(self.batches)]
        is_mixed = self.config.parallel.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed):
            loss: Tensor = self.objective(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer.clip_norm:
            clip_gradients(self.objective, optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return loss.detach()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak_bytes(self) -> int:
        peaks = read_peaks(self.device)
        peak = peaks["peak_bytes" if self.device.type == "cuda" else "peak_resident_bytes"]
        assert peak is not None
        return peak


def _draw_batches(config: RunConfig, device: torch.device) -> list[Batch]:
    """Returns batches of random samples: a function of the config alone."""
    source: Any = load_source(config).train
    order = np.random.default_rng(config.seed).permutation(len(source))
    batches = []
    for number in range(NUM_BATCHES):
        samples = order[number * config.batch_size : (number + 1) * config.batch_size]
        batch = source.fill(source[np.zeros_like(samples), samples], device)
        batches.append({name: tensor.contiguous() for name, tensor in batch.items()})
    return batches  # type: ignore[return-value]


def _import(peer: str) -> None:
    """Imports the library of a peer, whose memory is not that of training."""
    package = None if peer == OURS else PEERS[peer].package  # type: ignore[index]
    if package == "transformers":
        import transformers  # noqa: F401
    if package == "timm":
        import timm.models.vision_transformer  # noqa: F401


def _memory_bytes(device: torch.device) -> int:
    """Returns what the process holds before there is a network."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    reset_peaks(device)
    resident = read_peaks(device)["peak_resident_bytes"]
    assert resident is not None
    return resident


def _build_optimizer(objective: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Returns the fused AdamW of `build_optimizer`: weight decay on matrices alone."""
    optimizer = config.optimizer
    parameters = list(objective.parameters())
    is_matrix = [sum(size > 1 for size in p.shape) >= 2 for p in parameters]
    pairs = list(zip(parameters, is_matrix, strict=True))
    return torch.optim.AdamW(
        [
            {"params": [p for p, m in pairs if m], "weight_decay": optimizer.weight_decay},
            {"params": [p for p, m in pairs if not m], "weight_decay": 0.0},
        ],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )


def _to_bfloat16(batch: Any) -> Any:
    return {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in batch.items()
    }


def _build(request: Mapping[str, Any]) -> Trainee:
    config = from_dict(RunConfig, request["config"])
    return Trainee(config, request["peer"], request["form"], request["compile"])


def _answer(request: Mapping[str, Any], trainee: Trainee | None) -> dict[str, Any]:
    if trainee is not None:
        return trainee.train(request["steps"])
    return {"versions": _describe_versions(request["about"]), "code": describe_code()}


def _describe_versions(accelerator: str) -> dict[str, str]:
    versions = describe_versions(accelerator)
    for package in PEER_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def main() -> int:
    """Answers until standard input ends; returns the exit code."""
    # Answers have a pipe of their own: libraries print to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainee: Trainee | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "peer" in request:
                trainee = _build(request)
                answer = trainee.describe()
            else:
                answer = _answer(request, trainee)
        except Exception as error:  # of any library: the others are still measured
            text = " ".join(str(error).split()) or type(error).__name__
            kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
            answer = {"failure": f"{kind}: {text[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    sys.exit(main())

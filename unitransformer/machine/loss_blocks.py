"""Chooses how many classes of the head the loss multiplies at once, by measuring on this CPU.

The fastest number differs between processors, libraries and numbers of threads. A measurement takes
about a second and is kept in the cache folder: later runs on the same kind of machine, with the
same version of torch, dtype, threads and width, compute the same sums in the same order.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from unitransformer.config import RunConfig
from unitransformer.costs.memory import LOSS_ROWS, has_blocked_loss
from unitransformer.files import cache_folder, read_if_there, write_atomically
from unitransformer.linear_cross_entropy import linear_cross_entropy
from unitransformer.machine.host import describe_machine

CANDIDATES = (512, 1024, 2048, 4096, 8192)  # columns
BUDGET_S = 1.0
MEASURED_ROWS = 512  # at most
MIN_ROUNDS = 3  # each measures every candidate, in turn, so that a busy moment spoils none
GIVEN = "given"  # by the options of the run
TIE = 1.02  # candidates this close are equally fast: the smallest is taken


@dataclass(frozen=True, kw_only=True)
class LossBlocks:
    """The sizes of the blocks of a loss; 0: all at once."""

    rows: int
    columns: int
    reason: str


def choose_loss_blocks(config: RunConfig, resumed: LossBlocks | None = None) -> LossBlocks:
    """Returns the sizes that the config gives, or those that were measured for its shapes.

    Args:
        config: resolved, so that its accelerator is "cpu" or "cuda".
        resumed: those of the run that this one resumes. A measured number of columns stays, on
            whichever machine, so that the resumed run computes the same sums.
    """
    if config.loss_block is not None:
        return LossBlocks(rows=config.loss_chunk, columns=config.loss_block, reason=GIVEN)
    if not has_blocked_loss(config):
        reason = "rows given" if config.loss_chunk else "all logits at once"
        return LossBlocks(rows=config.loss_chunk, columns=0, reason=reason)
    rows = config.loss_chunk or LOSS_ROWS
    if resumed is not None and resumed.rows == rows and resumed.columns and resumed.reason != GIVEN:
        return replace(resumed, reason="measured before the run was resumed")
    key = {
        "machine": describe_machine().fingerprint,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": config.parallel.precision,
        "rows": rows,
        "width": config.model.width,
        "num_logits": config.num_logits,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder() / "loss-blocks" / f"{name}.json"
    try:
        columns = json.loads(read_if_there(path) or "{}").get("columns")
    except (ValueError, AttributeError):
        columns = None  # a file that something else has damaged: measure again
    if isinstance(columns, int) and columns in CANDIDATES:
        return LossBlocks(rows=rows, columns=columns, reason="measured before")
    seconds = measure_columns(rows, config.model.width, config.num_logits)
    best = min(seconds.values())
    columns = min(columns for columns, value in seconds.items() if value <= TIE * best)
    reason = "measured"
    try:
        content: dict[str, Any] = {**key, "seconds": seconds, "columns": columns}
        write_atomically(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        reason = f"measured, not kept: {error}"
    return LossBlocks(rows=rows, columns=columns, reason=reason)


def measure_columns(rows: int, width: int, num_logits: int) -> dict[int, float]:
    """Returns the least seconds of loss and gradients with each candidate; leaves generators be."""
    rows = min(rows, MEASURED_ROWS)
    candidates = [columns for columns in CANDIDATES if columns <= num_logits] or [CANDIDATES[0]]
    classes = min(num_logits, CANDIDATES[-1])
    generator = torch.Generator().manual_seed(0)
    states, weight = (
        torch.randn(size, width, generator=generator).requires_grad_() for size in (rows, classes)
    )
    targets = torch.arange(rows) % classes
    seconds = dict.fromkeys(candidates, math.inf)
    started_s, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started_s < BUDGET_S:
        for columns in candidates:
            before_s = time.perf_counter()
            linear_cross_entropy(states, weight, None, targets, rows=rows, columns=columns)
            seconds[columns] = min(seconds[columns], time.perf_counter() - before_s)
        rounds += 1
    return seconds

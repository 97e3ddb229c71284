"""Infers which cells run out of memory from a smaller cell that did.

A config needs at least as much memory as another if it is no smaller on any axis that memory grows
with, equal in everything else, and needs no less by the formula of `costs.memory`. To check this
rule, a share of the inferred cells is run.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaling.store.outcome import CellOutcome
from scaling.sweep.plan import CellTask
from unitransformer.config import Precision, RunConfig, to_dict
from unitransformer.costs.memory import loss_rows, rank_bytes

# A larger number needs more memory. Both mixed modes keep float32 weights and 16-bit activations.
PRECISION: dict[Precision, int] = {"bf16-true": 0, "16-mixed": 1, "bf16-mixed": 1, "32-true": 2}
CHECKPOINTING = {"full": 0, "selective": 1, "off": 2}

# Fields that do not change the peak memory, and the value that stands for all others.
IGNORED: dict[str, Any] = {
    "max_steps": 1,
    "validate_every": 1,
    "log_every": 1,
    "checkpoint_every": 0,
    "until_interval": None,
    "ceiling_s": 0.0,
    "seed": 0,
}

SIZES = ("width", "num_layers", "num_heads", "feedforward_width", "num_classes", "num_positions")

# Fields that `_demands` compares, or that it makes redundant.
COMPARED = [
    "size",
    "batch_size",
    "accumulate",
    "loss_chunk",
    "loss_block",
    "optimizer",
    *(f"model.{name}" for name in SIZES),
    "data.sequence_length",
    "parallel.precision",
    "parallel.activation_checkpointing",
]


def needs_at_least(config: RunConfig, other: RunConfig) -> bool:
    """Whether `config` needs at least as much memory per device as `other`."""
    pairs = zip(_demands(config), _demands(other), strict=True)
    return all(ours >= theirs for ours, theirs in pairs) and _rest(config) == _rest(other)


@functools.lru_cache(maxsize=65536)
def _demands(config: RunConfig) -> tuple[float, ...]:
    """Returns numbers with each of which the memory per device grows."""
    parallel = config.parallel
    # Without sharding every device holds all weights, and buckets of their gradients.
    is_divided = parallel.is_sharded or parallel.uses_deepspeed
    shards = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    return (
        config.batch_size,
        config.sequence_length,
        -shards if is_divided else 0,
        PRECISION[parallel.precision],
        CHECKPOINTING[parallel.activation_checkpointing],
        loss_rows(config),
        *(getattr(config.model, name) for name in SIZES),
        config.accumulate > 1,
        # On some axes memory grows with most configs only. Autocast's 16-bit copies of unsharded
        # weights can need more than 32-true adds, as can the layer that checkpointing recomputes.
        rank_bytes(config),
    )


@functools.lru_cache(maxsize=65536)
def _rest(config: RunConfig) -> str:
    """Returns as text the fields that must be equal."""
    values = to_dict(replace(config, **IGNORED))
    removed = [*COMPARED]
    # CPU ranks share one memory, so more of them need more of it. One device does not communicate.
    if config.parallel.accelerator == "cuda" and config.parallel.world_size > 1:
        removed += ["parallel.devices", "parallel.num_nodes"]
    for path in removed:
        group, _, name = path.rpartition(".")
        del (values[group] if group else values)[name]
    return json.dumps(values, sort_keys=True)


def unrefuted(
    too_large: Mapping[str, RunConfig], fitting: Collection[RunConfig]
) -> dict[str, RunConfig]:
    """Returns the configs of `too_large`, by cell, without those that need no more than a fit."""
    return {
        cell: config
        for cell, config in too_large.items()
        if not any(needs_at_least(other, config) for other in fitting)
    }


def find_cause(config: RunConfig, causes: Mapping[str, RunConfig]) -> str | None:
    """Returns the first cell of `causes` that implies that `config` is out of memory, or None."""
    return next((cell for cell, other in causes.items() if needs_at_least(config, other)), None)


def root_cause(config: RunConfig, causes: Mapping[str, RunConfig]) -> str | None:
    """Returns a cell as `find_cause` does, but one that no smaller cell implies."""
    cause = find_cause(config, causes)
    if cause is None:
        return None
    found = causes[cause]
    smaller = {cell: other for cell, other in causes.items() if not needs_at_least(other, found)}
    return root_cause(found, smaller) or cause


class OomCauses:
    """Configs that ran out of memory, by cell, except refuted ones.

    A cell that ran out of a machine's memory implies nothing for another kind of machine. A cell
    that exceeded the memory limit of the sweep does.
    """

    def __init__(self, outcomes: Collection[CellOutcome]) -> None:
        self._outcomes = outcomes
        self._by_host: dict[str, Mapping[str, RunConfig]] = {}

    def on(self, host: Mapping[str, Any] | None) -> Mapping[str, RunConfig]:
        """Returns those that count on machines like `host`."""
        key = json.dumps(host, sort_keys=True)
        if key not in self._by_host:
            pairs = [(o, o.config) for o in self._outcomes if o.config is not None]
            exceeded = [(o, c) for o, c in pairs if o.status == "ok" or _exceeded_limit(o)]
            here = [(o, c) for o, c in pairs if o.host == host and not _exceeded_limit(o)]
            self._by_host[key] = {**_unrefuted(exceeded), **_unrefuted(here)}
        return self._by_host[key]


def _exceeded_limit(outcome: CellOutcome) -> bool:
    return outcome.status == "oom" and outcome.exit_code is None


def _unrefuted(pairs: Sequence[tuple[CellOutcome, RunConfig]]) -> dict[str, RunConfig]:
    too_large = {outcome.cell: config for outcome, config in pairs if outcome.status == "oom"}
    return unrefuted(too_large, [config for outcome, config in pairs if outcome.status == "ok"])


def is_selected(cell: str, share: float) -> bool:
    """Whether an inferred cell is run; every process of a sweep decides alike, by the id alone."""
    return _hash(cell) < share * 2**32


def _hash(cell: str) -> int:
    return int(hashlib.sha256(cell.encode()).hexdigest()[:8], 16)


def is_recheck(
    task: CellTask,
    cause: tuple[str, RunConfig],
    tasks: Sequence[CellTask],
    done: Mapping[str, CellOutcome],
    share: float,
) -> bool:
    """Whether to run a task although `cause` implies that it is out of memory.

    A share of these cells is run, and unless the share is 0 at least one per cause.
    """
    if share == 0 or is_selected(task.cell.id, share):
        return share > 0
    cell, config = cause
    inferred = {
        other.name: other.cell.id
        for other in tasks
        if other.config and other.cell.id != cell and needs_at_least(other.config, config)
    }
    if any(done[name].status in ("ok", "oom") for name in inferred.keys() & done.keys()):
        return False
    return task.cell.id == min(inferred.values(), key=_hash, default=None)

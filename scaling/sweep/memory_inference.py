"""Which cells a lack of memory settles: what did not fit does not fit with more of everything.

A config needs at least as much as another if it asks for at least as much on every axis that
memory grows with, and is the same in all else. Whether that is so in truth is looked at again for a
share of the cells that were settled.
"""

import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaling.store.outcome import Outcome
from scaling.sweep.plan import CellTask
from unitransformer.config import Precision, RunConfig, to_dict

# Larger needs more. Both mixed ones keep float32 weights and 16-bit activations.
PRECISION: dict[Precision, int] = {"bf16-true": 0, "16-mixed": 1, "bf16-mixed": 1, "32-true": 2}

CHECKPOINTING = {"full": 0, "selective": 1, "off": 2}

# These change what is trained or measured and not what is held at the peak.
FREE: dict[str, Any] = {
    "max_steps": 1,
    "validate_every": 1,
    "log_every": 1,
    "checkpoint_every": 0,
    "until_interval": None,
    "ceiling_s": 0.0,
    "seed": 0,
}


def needs_at_least(config: RunConfig, other: RunConfig) -> bool:
    """Whether `config` needs at least the memory of `other`."""
    return all(
        own >= its for own, its in zip(_demands(config), _demands(other), strict=True)
    ) and _rest(config) == _rest(other)


@functools.lru_cache(maxsize=65536)
def _demands(config: RunConfig) -> tuple[float, ...]:
    """Each grows with the memory that a device needs."""
    parallel, model = config.parallel, config.model
    # Whole weights are on every device however many there are, and their gradients' buckets too.
    divides = parallel.is_sharded or parallel.uses_deepspeed
    shards = parallel.devices if parallel.strategy == "hsdp" else parallel.world_size
    return (
        config.batch_size,
        config.sequence_length,
        -shards if divides else 0,
        PRECISION[parallel.precision],
        CHECKPOINTING[parallel.activation_checkpointing],
        math.inf if config.loss_chunk == 0 else config.loss_chunk,
        model.width,
        model.num_layers,
        model.num_heads,
        model.feedforward_width,
        model.num_classes,
        model.num_positions,
        config.accumulate > 1,
    )


@functools.lru_cache(maxsize=65536)
def _rest(config: RunConfig) -> str:
    """What has to be the same: all that `_demands` does not order."""
    whole = to_dict(replace(config, **FREE))
    for name in ("size", "batch_size", "accumulate", "loss_chunk", "optimizer"):
        del whole[name]
    for name in (
        *("width", "num_layers", "num_heads", "feedforward_width", "num_classes"),
        "num_positions",
    ):
        del whole["model"][name]
    del whole["data"]["sequence_length"]
    del whole["parallel"]["precision"], whole["parallel"]["activation_checkpointing"]
    # The memory of a CPU is that of all ranks together, which more ranks need more of, and one
    # device communicates nothing.
    if config.parallel.accelerator == "cuda" and config.parallel.world_size > 1:
        del whole["parallel"]["devices"], whole["parallel"]["num_nodes"]
    return json.dumps(whole, sort_keys=True)


def unrefuted(
    too_large: Mapping[str, RunConfig], fitting: Collection[RunConfig]
) -> dict[str, RunConfig]:
    """Cells that did not fit and that nothing contradicts.

    Args:
        too_large: configs that ran out of memory, by their cell.
        fitting: configs that ran. One that needs at least as much as a cell that did not fit
            refutes that cell: it settles nothing any more.
    """
    return {
        cell: config
        for cell, config in too_large.items()
        if not any(needs_at_least(other, config) for other in fitting)
    }


def find_cause(config: RunConfig, causes: Mapping[str, RunConfig]) -> str | None:
    """The first of the cells that did not fit which settles `config`; None if none does."""
    return next((cell for cell, other in causes.items() if needs_at_least(config, other)), None)


def root_cause(config: RunConfig, causes: Mapping[str, RunConfig]) -> str | None:
    """As `find_cause`, of all that settle `config` one that no smaller one settles."""
    found = find_cause(config, causes)
    while found is not None:
        own = causes[found]
        smaller = {cell: other for cell, other in causes.items() if not needs_at_least(other, own)}
        if (below := find_cause(own, smaller)) is None:
            return found
        found = below
    return None


def is_checked_again(cell: str, share: float) -> bool:
    """Whether a settled cell is run all the same: decided by its id alone, so that everybody who
    works on a sweep decides alike."""
    return _place(cell) < share * 2**32


def first_to_check(cells: Collection[str]) -> str:
    """Of all that one cause settles, the one that is run if no other is: chosen as blindly."""
    return min(cells, key=_place)


def _place(cell: str) -> int:
    return int(hashlib.sha256(cell.encode()).hexdigest()[:8], 16)


class OomCauses:
    """Configs that ran out of memory, by their cell, those aside that a cell which ran refutes.

    What did not fit the memory of one machine tells nothing of another; what passed the limit that
    all cells of a sweep have does.
    """

    def __init__(self, outcomes: Collection[Outcome]) -> None:
        self._outcomes = outcomes
        self._known: dict[str, Mapping[str, RunConfig]] = {}

    def on(self, host: Mapping[str, Any] | None) -> Mapping[str, RunConfig]:
        """Those that count on machines of one kind."""
        key = json.dumps(host, sort_keys=True)
        if key not in self._known:
            told = [(each, each.config) for each in self._outcomes if each.config is not None]
            self._known[key] = {
                **_unrefuted([(o, c) for o, c in told if o.status == "ok" or _passed_limit(o)]),
                **_unrefuted([(o, c) for o, c in told if o.host == host and not _passed_limit(o)]),
            }
        return self._known[key]


def _passed_limit(outcome: Outcome) -> bool:
    return outcome.status == "oom" and outcome.exit_code is None


def _unrefuted(told: Sequence[tuple[Outcome, RunConfig]]) -> dict[str, RunConfig]:
    too_large = {outcome.cell: config for outcome, config in told if outcome.status == "oom"}
    return unrefuted(too_large, [config for outcome, config in told if outcome.status == "ok"])


def is_recheck(
    task: CellTask,
    cause: tuple[str, RunConfig],
    tasks: Sequence[CellTask],
    done: Mapping[str, Outcome],
    share: float,
) -> bool:
    """Whether a task that another cell settles runs all the same: so do a share of them, and of all
    that one cause settles at least one, unless the share is 0."""
    if share == 0 or is_checked_again(task.cell.id, share):
        return share > 0
    cell, config = cause
    settled = [
        each
        for each in tasks
        if each.config is not None and each.cell.id != cell and needs_at_least(each.config, config)
    ]
    seen = (done.get(each.name) for each in settled)
    if not settled or any(o is not None and o.status in ("ok", "oom") for o in seen):
        return False
    return task.cell.id == first_to_check({each.cell.id for each in settled})

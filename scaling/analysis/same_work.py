"""Says which runs do the same work: they train the same model on the same data.

They may differ in their configuration, and in what changes no step: how long a run is, how often it
reports, and its seed.
"""

import functools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from unitransformer.config import ParallelConfig, RunConfig

# Fields that change no step, and the value that stands for all others.
CHANGES_NO_STEP: dict[str, Any] = {
    "max_steps": 1,
    "until_interval": None,
    "ceiling_s": 1.0,
    "validate_every": 1,
    "validation_batches": 1,
    "checkpoint_every": 0,
    "log_every": 1,
    "seed": 0,
}
BATCH: dict[str, Any] = {"batch_size": 1, "accumulate": 1}
# Options of a recipe, by name, with which a configuration is chosen, and those that change no step.
OF_A_CONFIGURATION = {
    *(name.replace("_", "-") for name in BATCH),
    *(field.name.replace("_", "-") for field in fields(ParallelConfig)),
} - {"devices", "num-nodes", "accelerator"}
OF_A_LAUNCH = {
    *(name.replace("_", "-") for name in CHANGES_NO_STEP),
    "optimizer.schedule-steps",  # follows from the number of steps
}


@functools.lru_cache(maxsize=1024)  # thousands of runs share few
def without_length(config: RunConfig) -> RunConfig:
    """Returns what launches of one configuration share, whatever their length and seed."""
    optimizer = replace(config.optimizer, schedule_steps=1)
    return replace(config, optimizer=optimizer, **CHANGES_NO_STEP)


@functools.lru_cache(maxsize=1024)
def work_of(config: RunConfig) -> RunConfig:
    """Returns what all configurations for the same work on one kind of machine share."""
    parallel = ParallelConfig(accelerator=config.parallel.accelerator)
    # The name of a size says nothing beside the model.
    return replace(without_length(config), size="", parallel=parallel, **BATCH)


def options_of_configuration(options: Mapping[str, object]) -> dict[str, object]:
    """Returns the options of a cell without those of `OF_A_LAUNCH`."""
    return {name: value for name, value in options.items() if name not in OF_A_LAUNCH}


def options_of_work(options: Mapping[str, object]) -> dict[str, object]:
    """Returns those of `options_of_configuration` that all cells of the same work share."""
    configuration = options_of_configuration(options)
    return {name: configuration[name] for name in configuration if name not in OF_A_CONFIGURATION}

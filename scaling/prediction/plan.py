"""Plans one run of a recipe for a hardware that is not here.

    python -m scaling.prediction.plan h200-sxm-8 gpt --nodes 2 --devices 8 -- --size 6.7b

Recipes and `slurm.submit` start it as a process, as neither imports `scaling`. `--nodes` and
`--devices` are those of a job, if the options of the recipe do not say. Exit code 2: bad usage.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

from scaling.prediction.best import largest_batch
from scaling.prediction.hardware import THIS_MACHINE, Hardware, load_hardware
from scaling.prediction.measured_rows import model_for
from scaling.prediction.memory import FREE_SHARE, Memory, predict_memory
from scaling.prediction.options import parse_command, resolve_on
from scaling.prediction.predict import (
    Interval,
    Prediction,
    format_interval,
    format_rounded,
    predict,
)
from unitransformer.cli import fail, run_main
from unitransformer.config import Recipe
from unitransformer.costs.flops import count_parameters
from unitransformer.record.units import UNIT, format_bytes, format_count, format_duration

WARNING = "warning: "  # `slurm.submit` prints such lines to standard error too


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan; returns the exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    end = typed.index("--") if "--" in typed else len(typed)
    parser = argparse.ArgumentParser(prog="python -m scaling.prediction.plan")
    parser.add_argument("hardware")
    parser.add_argument("recipe", choices=sorted(UNIT))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=None)
    given = parser.parse_args(typed[:end])
    recipe = cast(Recipe, given.recipe)
    try:
        hardware = load_hardware(given.hardware)
        command = parse_command(recipe, typed[end + 1 :])
        config, nodes, reason = resolve_on(
            command, hardware, devices=given.devices, num_nodes=given.nodes
        )
        prediction = predict(config, nodes, model_for(hardware))
        if not prediction.fits:

            def fits(batch: int) -> bool:
                smaller = replace(command, options=replace(command.options, batch_size=batch))
                config, nodes, _ = resolve_on(  # which may choose another strategy
                    smaller, hardware, devices=given.devices, num_nodes=given.nodes
                )
                return predict_memory(config, nodes).fits

            largest = largest_batch(fits)
            print(f"{WARNING}does not fit: {explain_lack(prediction, largest)}\n")
    except ValueError as error:
        return fail(str(error), 2)
    print("\n".join(render_plan(prediction, hardware, reason)))
    return 0


def explain_lack(prediction: Prediction, largest: int) -> str:
    """Returns what a device needs and has, and what to change.

    Args:
        largest: the largest batch per device that fits; 0: none does.
    """
    lack = f"{_needs(prediction.memory)}; "
    if largest:
        return (
            f"{lack}the largest batch per device that fits is {largest}: give --batch-size "
            f"{largest}"
        )
    parallel = prediction.config.parallel
    fixes = (
        ["--activation-checkpointing full"] if parallel.activation_checkpointing == "off" else []
    )
    sharded = "fsdp1" if parallel.precision == "16-mixed" else "fsdp"
    fixes += (
        [f"--strategy {sharded}"] if not parallel.is_sharded and parallel.world_size > 1 else []
    )
    tries = " or ".join([*fixes, "more devices"])
    return f"{lack}no batch fits: try {tries}; `python -m scaling predict --best` searches"


def _needs(memory: Memory) -> str:
    spare = round(FREE_SHARE * memory.allocated_bytes)
    return (
        f"a device needs {format_bytes(memory.total_bytes)}, and about {format_bytes(spare)} for "
        f"fragmentation, and has {format_bytes(memory.capacity)}"
    )


def render_plan(prediction: Prediction, hardware: Hardware, reason: str) -> Iterator[str]:
    """Yields the lines of a plan: what would run, whether it fits, how long, and for how much."""
    config, memory = prediction.config, prediction.memory
    parallel, unit = config.parallel, UNIT[config.recipe]
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "gathered": memory.gathered,
        "activations": sum(memory.activations.values()),
        "logits": memory.logits,
        "communication": memory.communication,
        "inputs": memory.inputs,
        "context": memory.context,
    }
    where = "as it was calibrated" if hardware.name == THIS_MACHINE else "not this machine"
    named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
    lines = {
        "hardware": f"{hardware.name}, {where}",
        "memory": f"{'fits' if prediction.fits else 'does not fit'}: {_needs(memory)}; the peak is "
        "at the "
        f"{memory.moment}",
        "  in GiB": named,
        "model": f"{config.recipe} {config.size}, {count_parameters(config.model):,} parameters",
        "devices": f"{parallel.num_nodes} x {parallel.devices} {parallel.accelerator}, "
        f"{parallel.precision}, compile {parallel.compile}, activation checkpointing "
        f"{parallel.activation_checkpointing}",
        "strategy": f"{parallel.strategy}: {reason}{_two_counts(reason)}",
        "batch": f"{config.global_batch_size} = {config.batch_size} per device x "
        f"{format_count(config.accumulate, 'micro-batch', 'micro-batches')} x "
        f"{format_count(parallel.world_size, 'device')}",
    }
    if prediction.fits:
        lines |= _times(prediction, hardware, unit)
    yield from (f"{name:<15} {value}" for name, value in lines.items())


def _two_counts(reason: str) -> str:
    """Says why the reason for a strategy counts otherwise than the line on memory."""
    if "a tenth left free" not in reason:
        return ""
    return (
        " (this count of a recipe is without buffers, for which the tenth is; the memory above "
        "has them, and leaves a twentieth for fragmentation)"
    )


def _times(prediction: Prediction, hardware: Hardware, unit: str) -> dict[str, str]:
    time, config = prediction.time, prediction.config

    def text(interval: Interval, form: str | Callable[[float], str]) -> str:
        return format_interval(interval, time.provenance, form)

    run_s = format_interval(prediction.run_s, time.provenance, format_duration)
    units = float(config.global_batch_size * config.tokens_per_sample * config.max_steps)
    run = f"{config.max_steps:,} steps in {run_s}, without start-up and validation; "
    run += f"{text(prediction.cost(units, 1.0), format_rounded)} device-hours"
    if hardware.price_per_device_hour is not None:
        price = hardware.price_per_device_hour
        run += f", {text(prediction.cost(units, price), ',.2f')} USD at {price:,.2f} each"
    return {
        "step": f"{text(prediction.step_s, '.3g')} s, limited by {time.limited_by}",
        "speed": f"{text(prediction.units_per_s, format_rounded)} {unit}/s, MFU "
        f"{text(prediction.mfu, '.1%')}",
        "run": run,
        "intervals": f"90 %, {time.provenance}"
        + (f": {'; '.join(time.beyond)}" if time.beyond else ""),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))

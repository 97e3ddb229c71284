"""Draws configs to predict, and checks what holds for all of them."""

from dataclasses import replace

from hypothesis import strategies as st

from recipes import bert, gpt, vit
from scaling.prediction.hardware import Hardware
from scaling.prediction.memory import predict_memory
from scaling.prediction.parameters import (
    count_numbers,
    count_padded_rows,
    layer_parameters,
    outer_parameters,
)
from unitransformer.config import ParallelConfig, RunConfig

PRESETS = (bert.PRESET, gpt.PRESET, vit.PRESET)


@st.composite
def random_configs(draw: st.DrawFn) -> RunConfig:
    """Any config on whole nodes of eight GPUs."""
    preset = draw(st.sampled_from(PRESETS))
    heads = draw(st.integers(1, 16))
    shape = {
        "num_heads": heads,
        "width": heads * draw(st.integers(1, 128)),
        "num_layers": draw(st.integers(1, 64)),
        "feedforward_width": draw(st.integers(1, 20_000)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
    }
    if preset is not vit.PRESET:
        shape |= {"num_classes": draw(st.integers(2, 130_000))}
        shape |= {"num_positions": draw(st.integers(3, 4096))}
    precision = draw(st.sampled_from(["32-true", "bf16-mixed"]))
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **shape),
        batch_size=draw(st.integers(1, 64)),
        accumulate=draw(st.integers(1, 4)),
        loss_chunk=draw(st.sampled_from([0, 512])),
        parallel=ParallelConfig(
            accelerator="cuda",
            devices=8,
            num_nodes=draw(st.integers(1, 1024)),
            strategy=draw(
                st.sampled_from(["ddp", "fsdp", "fsdp1", "hsdp", "zero1", "zero2", "zero3"])
            ),
            precision=precision,
            activation_checkpointing=draw(st.sampled_from(["off", "selective", "full"])),
        ),
    )


def check_memory(config: RunConfig, hardware: Hardware) -> None:
    """Asserts what holds for the memory of every sharded or replicated config."""
    memory = predict_memory(config, hardware)
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.gathered)
    parts += (memory.logits, memory.communication, memory.inputs, memory.context)
    assert all(part >= 0 for part in (*parts, *memory.activations.values()))
    assert memory.total_bytes == sum(parts) + sum(memory.activations.values())
    larger = replace(config, batch_size=config.batch_size + 1)
    assert predict_memory(larger, hardware).total_bytes >= memory.total_bytes
    nodes = config.parallel.num_nodes
    more = replace(config, parallel=replace(config.parallel, num_nodes=2 * nodes))
    added = predict_memory(more, hardware).total_bytes - memory.total_bytes
    # Ranks that do not divide the rows of a weight pad it in each of four buffers, as they do in
    # rehearsals: ViT `s` needs more on 512 devices than on 64.
    assert added <= 4 * 4 * _padded_numbers(more)


def _padded_numbers(config: RunConfig) -> int:
    """Returns the numbers that pad embedding, head and a layer when they are sharded."""
    if config.parallel.strategy not in ("fsdp", "fsdp1"):
        return 0
    parameters = (*outer_parameters(config.model), *layer_parameters(config.model))
    return count_padded_rows(parameters, config.parallel.world_size) - count_numbers(parameters)

"""Builds the recipe's command line for a parity case."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.parity.cases import Case
from unitransformer.config import Recipe

# A model that trains in seconds and has every part: attention, norms, biases, embeddings. Its
# activation is smooth, because rounding can open a ReLU at zero: one of some 20 ViT runs then had a
# loss difference of 2e-5 after 20 steps, without a fault.
SMALL = shlex.split(
    "--model.width 64 --model.num-layers 2 --model.num-heads 2 --model.feedforward-width 128 "
    "--model.activation gelu"
)
SMALL_TEXT = shlex.split("--model.num-positions 32 --model.num-classes 1000")
SMALL_IMAGES = shlex.split("--model.image-size 32 --model.patch-size 8 --model.num-classes 3")
# The same on every machine. The learning rate is at its maximum after four steps, so that a fault
# shows. With three times this rate the loss of images falls so fast that bf16 differs by 2e-2.
OPTIMIZER = shlex.split("--optimizer.learning-rate 1e-3 --optimizer.warmup-steps 4")

# Options that the case or the comparison decides; a user cannot pass them to the recipe.
DECIDED_OPTIONS = shlex.split(
    "--strategy --devices --num-nodes --precision --compile --accelerator "
    "--activation-checkpointing --cpu-offload --batch-size --accumulate --max-steps --dropout "
    "--model.dropout --out --record --checkpoint-dir --resume --summary --dry-run --config "
    "--print_config --help -h"
)


@dataclass(frozen=True, kw_only=True)
class ParityTask:
    """What all cases of a recipe have in common."""

    recipe: Recipe
    accelerator: str
    steps: int
    global_batch_size: int
    options: tuple[str, ...] = ()  # of the user, for the recipe

    def arguments(self, case: Case) -> list[str]:
        """Returns the options of the recipe that train `case`; the last of a name wins."""
        small = [*SMALL, *(SMALL_IMAGES if self.recipe == "vit" else SMALL_TEXT)]
        if "--size" in map(_name_of, self.options):
            small = []
        steps, batch_size = self.steps, self.global_batch_size // (case.devices * case.accumulate)
        common = (
            f"--dropout 0 --optimizer.schedule-steps {steps} --validate-every {steps} "
            f"--validation-batches 1 --log-every {steps} --num-workers 0 --ceiling-s 0"
        ).split()
        nodes = f"--num-nodes {case.num_nodes} " if case.num_nodes > 1 else ""
        decided = (
            f"--accelerator {self.accelerator} --max-steps {steps} --strategy {case.strategy} "
            f"--devices {case.devices_per_node} {nodes}--precision {case.precision} "
            f"--compile {case.compile} --activation-checkpointing {case.activation_checkpointing} "
            f"--batch-size {batch_size} --accumulate {case.accumulate}"
        ).split()
        return [*small, *OPTIMIZER, *common, *self.options, *decided]


def _name_of(option: str) -> str:
    """Returns the name in `--name=value`."""
    return option.partition("=")[0]


def check_options(options: Sequence[str]) -> None:
    """Raises ValueError for an option that the comparison itself decides."""
    for name in map(_name_of, options):
        if name in DECIDED_OPTIONS:
            raise ValueError(f"{name} is decided by the comparison; leave it out")

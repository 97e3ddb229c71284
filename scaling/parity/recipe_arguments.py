"""What a way to train asks of a recipe: a case goes in, the options of a command line come out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling.parity.cases import Case
from unitransformer.config import Recipe

# A model that trains in seconds; all of it is there: attention, norms, biases, word vectors. Its
# activation is smooth: a ReLU at zero opens for sums in one order and not in another, and 20 steps
# later the loss is 2e-5 away without a fault (ViT, one of some twenty runs).
SMALL = (
    *("--model.width", "64", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "128", "--model.activation", "gelu"),
)
SMALL_TEXT = (*SMALL, "--model.num-positions", "32", "--model.num-classes", "1000")
SMALL_IMAGES = (
    *SMALL,
    *("--model.image-size", "32", "--model.patch-size", "8", "--model.num-classes", "3"),
)
# The same on every machine; after four steps the rate is at the top, so that a fault shows. Three
# times this rate, and the pictures' loss falls so fast that bf16 lands 2e-2 beside it.
OPTIMIZER = ("--optimizer.learning-rate", "1e-3", "--optimizer.warmup-steps", "4")

# What a case, and what comparing, decides; none of it can be said to the recipe.
DECIDED_OPTIONS = (
    *("--strategy", "--devices", "--num-nodes", "--precision", "--compile", "--accelerator"),
    *("--activation-checkpointing", "--cpu-offload", "--batch-size", "--accumulate"),
    *("--max-steps", "--dropout", "--model.dropout", "--out", "--record", "--checkpoint-dir"),
    *("--resume", "--summary", "--dry-run", "--config", "--print_config", "--help", "-h"),
)


@dataclass(frozen=True, kw_only=True)
class ParityTask:
    """What all cases of a recipe train alike."""

    recipe: Recipe
    accelerator: str
    steps: int
    global_batch_size: int
    options: tuple[str, ...] = ()  # for the recipe, in a person's words

    def arguments(self, case: Case) -> list[str]:
        """The options of the recipe that train `case`; the last of a name wins."""
        small = SMALL_IMAGES if self.recipe == "vit" else SMALL_TEXT
        has_size = "--size" in map(flag_of, self.options)
        batch_size = self.global_batch_size // (case.devices * case.accumulate)
        return [
            *(() if has_size else small),
            *("--dropout", "0"),
            *OPTIMIZER,
            *("--optimizer.schedule-steps", str(self.steps)),
            *("--validate-every", str(self.steps), "--validation-batches", "1"),
            *("--log-every", str(self.steps), "--num-workers", "0", "--ceiling-s", "0"),
            *self.options,
            *("--accelerator", self.accelerator, "--max-steps", str(self.steps)),
            *("--strategy", case.strategy, "--devices", str(case.devices_per_node)),
            *(("--num-nodes", str(case.num_nodes)) if case.num_nodes > 1 else ()),
            *("--precision", case.precision, "--compile", case.compile),
            *("--activation-checkpointing", case.activation_checkpointing),
            *("--batch-size", str(batch_size), "--accumulate", str(case.accumulate)),
        ]


def flag_of(word: str) -> str:
    """The option in `--option=value`."""
    return word.partition("=")[0]


def check_options(options: Sequence[str]) -> None:
    """Raises ValueError for an option of a recipe that the comparison itself decides."""
    taken = [word for word in options if flag_of(word) in DECIDED_OPTIONS]
    if taken:
        raise ValueError(f"{flag_of(taken[0])} is decided by the comparison; leave it out")


def check_batch(global_batch_size: int, cases: Iterable[Case]) -> None:
    """Raises ValueError for a global batch that cannot be dealt out equally."""
    for case in cases:
        parts = case.devices * case.accumulate
        if global_batch_size % parts:
            raise ValueError(
                f"global-batch-size {global_batch_size} does not divide into {parts} parts for "
                f"{case.label}; choose a multiple of {parts}"
            )

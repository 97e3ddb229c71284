"""What a run is: frozen, plain, validated. Options go in, one `RunConfig` comes out.

Nothing here imports torch: a configuration is read, checked, hashed and written on a login node.
Every check names the field, the value and the fix.
"""

import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

Recipe = Literal["bert", "gpt", "vit"]
Activation = Literal["relu", "gelu"]
Accelerator = Literal["auto", "cpu", "cuda"]
Strategy = Literal["auto", "single", "ddp", "fsdp", "fsdp1", "hsdp", "zero1", "zero2", "zero3"]
SHARDED: tuple[Strategy, ...] = ("fsdp", "fsdp1", "hsdp", "zero3")  # no device holds all weights
DEEPSPEED: tuple[Strategy, ...] = ("zero1", "zero2", "zero3")
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
Compile = Literal["off", "default", "reduce-overhead", "max-autotune"]
ActivationCheckpointing = Literal["off", "selective", "full"]

C = TypeVar("C")


def _at_least(owner: str, least: float, **values: float | None) -> None:
    """Raise `ValueError` for the first of `values` that is below `least` or not a finite number."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{owner}.{name} is {value}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the backbone. Tokens are read unless `image_size` is given; then pictures are.

    Raises:
        ValueError: a shape that cannot be built, naming the fields, the values and the fix.
    """

    width: int  # channels of the residual stream
    num_layers: int
    num_heads: int
    feedforward_width: int
    num_classes: int  # words for BERT and GPT, labels for ViT
    num_positions: int  # longest sequence; for pictures the patches and the class token
    causal: bool = False  # a position sees itself and what came before
    dropout: float = 0.0
    activation: Activation = "relu"
    final_norm: bool = False  # a LayerNorm between the last layer and the head
    tied_head: bool = False  # the head shares the matrix of the word vectors
    head_bias: bool = True
    image_size: int | None = None  # pixels along each side
    patch_size: int | None = None  # pixels along each side
    num_channels: int = 3

    def __post_init__(self) -> None:
        _at_least(
            "model",
            1,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            feedforward_width=self.feedforward_width,
            num_classes=self.num_classes,
            num_positions=self.num_positions,
            num_channels=self.num_channels,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width {self.width} does not divide into model.num_heads {self.num_heads}; "
                f"choose a width that is a multiple of {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        if (self.image_size is None) != (self.patch_size is None):
            raise ValueError(
                f"model.image_size is {self.image_size} and model.patch_size is {self.patch_size}; "
                "give both or neither"
            )
        if self.image_size is not None and self.patch_size is not None:
            self._check_pictures(self.image_size, self.patch_size)

    def _check_pictures(self, image_size: int, patch_size: int) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"model.image_size {image_size} does not divide into patches of model.patch_size "
                f"{patch_size}; choose an image size that is a multiple of {patch_size}"
            )
        positions = (image_size // patch_size) ** 2 + 1
        if self.num_positions != positions:
            raise ValueError(
                f"model.num_positions is {self.num_positions}; pictures of {image_size} pixels in "
                f"patches of {patch_size} and the class token need {positions}"
            )
        if self.tied_head:
            raise ValueError("model.tied_head is true; pictures have no word vectors to share")
        if self.causal:
            raise ValueError("model.causal is true; the class token is read first and sees nothing")

    @property
    def reads_images(self) -> bool:
        return self.image_size is not None

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from.

    Raises:
        ValueError: a length, share or count that cannot be used.
    """

    source: str = "builtin"  # builtin, synthetic, or the path of a text or picture folder
    sequence_length: int | None = None  # tokens of one sample; None: all the model's positions
    mask_fraction: float = 0.15  # BERT: share of positions whose word has to be found
    num_workers: int | None = None  # loader processes a rank; None: decided by the kind of data

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data is empty; give builtin, synthetic or a path")
        _at_least("data", 2, sequence_length=self.sequence_length)
        _at_least("data", 0, num_workers=self.num_workers)
        if not 0 < self.mask_fraction < 1:
            raise ValueError(f"data.mask_fraction is {self.mask_fraction}; it must be in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decay on matrices only, linear warm-up and a cosine down to a floor."""

    learning_rate: float = 3e-4  # at the end of the warm-up
    floor: float = 0.1  # last learning rate as a share of the highest
    warmup_steps: int = 20
    schedule_steps: int = 100  # the step at which the cosine reaches the floor
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # largest global gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        _at_least(
            "optimizer",
            0,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
        )
        _at_least("optimizer", 1, schedule_steps=self.schedule_steps)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} is {value}; it must be in [0, 1)")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"optimizer.floor is {self.floor}; it must be between 0 and 1")
        # A word that a batch does not hold has a gradient of 0: without epsilon its step is 0 / 0.
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"optimizer.epsilon is {self.epsilon}; it must be above 0, as 1e-8")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        decay_steps = max(1, self.schedule_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / decay_steps)
        share = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * share


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread and in which numbers it is done."""

    accelerator: Accelerator = "auto"
    devices: int = 1  # ranks on each node
    num_nodes: int = 1
    strategy: Strategy = "auto"
    precision: Precision = "32-true"
    compile: Compile = "off"
    activation_checkpointing: ActivationCheckpointing = "off"
    cpu_offload: bool = False  # weights and optimizer states wait in host memory

    def __post_init__(self) -> None:
        _at_least("parallel", 1, devices=self.devices, num_nodes=self.num_nodes)
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError(
                f"strategy is single with {self.world_size} devices; choose ddp, or one device"
            )
        if self.strategy in ("fsdp", "hsdp") and self.precision == "16-mixed":
            raise ValueError(
                f"precision 16-mixed is not for strategy {self.strategy}, whose gradients no loss "
                "scaler sees; choose bf16-mixed, or strategy ddp or fsdp1"
            )
        if self.uses_deepspeed and self.precision == "bf16-true":
            raise ValueError(
                f"precision bf16-true is not for strategy {self.strategy}: DeepSpeed keeps float32 "
                "weights beside the bf16 ones; choose bf16-mixed"
            )
        if self.cpu_offload and self.strategy in ("single", "ddp"):
            raise ValueError(
                f"cpu_offload is not for strategy {self.strategy}, which keeps everything on the "
                "device; choose fsdp, or leave it out"
            )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients and optimizer states are divided over devices."""
        return self.strategy in SHARDED

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy in DEEPSPEED


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes; two equal ones train the same model."""

    recipe: Recipe
    size: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch_size: int = 8  # samples a device takes at once
    accumulate: int = 1  # micro-batches whose gradients are added before a step
    max_steps: int = 100  # optimizer steps
    # Stop earlier, once the 95 % interval of the median step is this share of it wide; None: never.
    until_interval: float | None = None
    ceiling_s: float = 1.0  # spent on this machine's own ceilings around training; 0: none
    validate_every: int = 50  # optimizer steps; the last step always validates
    validation_batches: int = 12  # micro-batches a rank looks at, at most
    checkpoint_every: int = 0  # optimizer steps; 0: only at the end
    log_every: int = 10  # optimizer steps
    loss_chunk: int = 0  # positions whose logits exist at once; 0: all
    seed: int = 0
    init_from: str | None = None  # file of the first weights; None: drawn from the seed

    def __post_init__(self) -> None:
        _at_least(
            "run",
            1,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            max_steps=self.max_steps,
            validate_every=self.validate_every,
            validation_batches=self.validation_batches,
            log_every=self.log_every,
        )
        _at_least(
            "run",
            0,
            checkpoint_every=self.checkpoint_every,
            loss_chunk=self.loss_chunk,
            seed=self.seed,
        )
        _at_least("run", 0, ceiling_s=self.ceiling_s)
        if self.until_interval is not None and not 0 < self.until_interval < 1:
            raise ValueError(
                f"run.until_interval is {self.until_interval}; it must be between 0 and 1, as 0.01 "
                "for 1%"
            )
        if self.seed >= 2**32:
            raise ValueError(f"run.seed is {self.seed}; it must be below 2**32")
        if self.sequence_length > self.model.num_positions:
            raise ValueError(
                f"data.sequence_length {self.sequence_length} is longer than model.num_positions "
                f"{self.model.num_positions}; shorten the one or raise the other"
            )
        self._check_task()

    def _check_task(self) -> None:
        """Refuse a model or a length that cannot do what the recipe asks for."""
        if (self.recipe == "vit") != self.model.reads_images:
            reads = "pictures" if self.model.reads_images else "words"
            raise ValueError(
                f"model.image_size is {self.model.image_size}: the model reads {reads}, and the "
                f"recipe {self.recipe} does not; choose another recipe or leave the sizes out"
            )
        if self.recipe == "vit" and self.data.sequence_length is not None:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}; the length of a picture is "
                "that of its patches: leave it out"
            )
        if self.recipe == "bert" and self.model.causal:
            raise ValueError("model.causal is true; a masked word is found from both its sides")
        if self.recipe == "gpt" and not self.model.causal:
            raise ValueError("model.causal is false; the next word is found from those before it")
        if self.recipe == "bert" and self.sequence_length < 3:
            raise ValueError(
                f"data.sequence_length is {self.sequence_length}; [CLS], a word and [SEP] need 3"
            )

    @property
    def sequence_length(self) -> int:
        """Positions of one sample that attention sees."""
        if self.model.reads_images or self.data.sequence_length is None:
            return self.model.num_positions
        return self.data.sequence_length

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.batch_size * self.accumulate * self.parallel.world_size

    @property
    def tokens_per_sample(self) -> int:
        """Tokens (BERT, GPT) or pictures (ViT, 1) that one sample counts for in a rate."""
        return 1 if self.model.reads_images else self.sequence_length

    def identity(self) -> dict[str, Any]:
        """The fields, by dotted name, that decide what is learned at each step.

        How long a run and its schedule go on, how often it reports, and how a global batch is
        spread over devices are left out: a run may be resumed with those changed.
        """
        free = {"max_steps", "until_interval", "validate_every", "validation_batches"}
        free |= {"checkpoint_every", "log_every", "loss_chunk", "batch_size", "accumulate"}
        free |= {"ceiling_s", "data.num_workers", "optimizer.schedule_steps"}
        kept = {
            name: value
            for name, value in flat_dict(self).items()
            if name not in free and not name.startswith("parallel.")
        }
        return {**kept, "global_batch_size": self.global_batch_size}

    def identity_hash(self) -> str:
        """Eight hexadecimal digits over `identity`: the name of the run's folder."""
        return _digest(self.identity())[:8]

    def hash(self) -> str:
        """Twelve hexadecimal digits over every field: the name of the record."""
        return hash_values(to_dict(self))


def hash_values(values: Mapping[str, Any]) -> str:
    """`RunConfig.hash` of a config as it was written down, perhaps before it had every field."""
    return _digest(values)[:12]


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return asdict(config)


def flat_dict(config: Any) -> dict[str, Any]:
    """The fields of a config and of its groups, by dotted name, as plain JSON values."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """Build a config dataclass from plain JSON values.

    Raises:
        ValueError: a field that is unknown, missing or of another type, by its dotted name.
    """
    hints, required = _hints(kind), _required(kind)  # type: ignore[arg-type]  # classes are keys
    for name in values:
        if name not in hints:
            raise ValueError(f"{where}.{name} is not a field; known: {', '.join(sorted(hints))}")
    for name in required:
        if name not in values:
            raise ValueError(f"{where}.{name} is missing; it must be {describe_type(hints[name])}")
    arguments = {
        name: _checked(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    return kind(**arguments)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


@functools.cache
def _required(kind: type) -> tuple[str, ...]:
    assert is_dataclass(kind)
    have_none = (f for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return tuple(f.name for f in have_none)


@functools.cache
def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _checked(hint: Any, value: Any, where: str) -> Any:
    if _is_group(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; it must be a group of fields")
        try:
            items = tuple((name, type(item), item) for name, item in value.items())
            return _group(hint, items, where)
        except TypeError:  # it holds a list, or what else cannot be a key
            return from_dict(hint, value, where)
    if not _fits(hint, value):
        raise ValueError(f"{where} is {value!r}; it must be {describe_type(hint)}")
    return value


@functools.lru_cache(maxsize=1024)  # thousands of records share few groups
def _group(hint: Any, items: tuple[tuple[str, type, Any], ...], where: str) -> Any:
    """Args: items: with the types of the values, as 1, 1.0 and True are equal keys."""
    return from_dict(hint, {name: value for name, _, value in items}, where)


def _fits(hint: Any, value: Any) -> bool:
    return _predicate(hint)(value)


@functools.cache  # a report of thousands asks the same few hints a million times
def _predicate(hint: Any) -> Callable[[Any], bool]:
    """Whether a plain JSON value is of a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return lambda value: value in parts
    if origin in (Union, types.UnionType):
        options = [_predicate(part) for part in parts]
        return lambda value: any(fits(value) for fits in options)
    if origin is tuple:
        return lambda value: isinstance(value, tuple) and _all_fit(parts, value)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return lambda value: isinstance(value, hint)


def _all_fit(parts: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    kinds = parts[:1] * len(values) if parts[-1] is ... else parts
    return len(kinds) == len(values) and all(map(_fits, kinds, values))


def describe_type(hint: Any) -> str:
    """A type as a person would say it: "one of a, b", "an integer"."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        return " or ".join(map(describe_type, options))
    if typing.get_origin(hint) is tuple:
        return "a list"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


__all__ = [
    "DEEPSPEED",
    "SHARDED",
    "Accelerator",
    "Activation",
    "ActivationCheckpointing",
    "Compile",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "Recipe",
    "RunConfig",
    "Strategy",
    "from_dict",
    "hash_values",
    "describe_type",
    "to_dict",
]

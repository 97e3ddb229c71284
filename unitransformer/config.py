"""Describes a run completely: frozen dataclasses, validated when they are built.

`RunConfig` holds one config each for the model, the data, the optimizer and the parallelism. This
module does not import torch, so a login node can read, check, hash and write a config. Every error
names the field, its value and the fix.
"""

import codecs
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
Compile = Literal["off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# Modes that replay CUDA graphs on a GPU, and the same optimization without them.
CUDA_GRAPH_MODES: dict[Compile, Compile] = {
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
ActivationCheckpointing = Literal["off", "selective", "full"]

# Fields that were added to `DataConfig` after runs were made; at these values a run is the same.
ADDED_DATA_FIELDS = {"encoding": "utf-8", "field": None}

C = TypeVar("C")


def _check_minimum(config: Any, group: str, minimum: float, *names: str) -> None:
    """Raises ValueError for the first named field below `minimum` or not finite; None passes.

    Fields of `group`, if it is not empty, are options such as `--model.width`.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            option = name.replace("_", "-")
            raise ValueError(f"{group}{option} is {value}; it must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network. It reads images if `image_size` is given, otherwise tokens."""

    width: int  # channels of the residual stream
    num_layers: int
    num_heads: int
    feedforward_width: int
    num_classes: int  # vocabulary size for BERT and GPT, number of labels for ViT
    num_positions: int  # longest sequence; for images the patches and the class token
    causal: bool = False  # a position attends only to itself and earlier ones
    dropout: float = 0.0
    activation: Activation = "relu"
    final_norm: bool = False  # a LayerNorm between the last layer and the head
    tied_head: bool = False  # the head shares the matrix of the token embeddings
    head_bias: bool = True
    image_size: int | None = None  # pixels along each side
    patch_size: int | None = None  # pixels along each side
    num_channels: int = 3

    def __post_init__(self) -> None:
        _check_minimum(self, "model.", 1, "width", "num_layers", "num_heads", "feedforward_width")
        _check_minimum(self, "model.", 1, "num_classes", "num_positions", "num_channels")
        _check_minimum(self, "model.", 1, "image_size", "patch_size")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width {self.width} does not divide into model.num-heads {self.num_heads}; "
                f"choose a width that is a multiple of {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be in [0, 1)")
        if (self.image_size is None) != (self.patch_size is None):
            raise ValueError(
                f"model.image-size is {self.image_size} and model.patch-size is {self.patch_size}; "
                "give both or neither"
            )
        if self.image_size is not None and self.patch_size is not None:
            self._check_images(self.image_size, self.patch_size)

    def _check_images(self, image_size: int, patch_size: int) -> None:
        if image_size % patch_size:
            raise ValueError(
                f"model.image-size {image_size} does not divide into patches of model.patch-size "
                f"{patch_size}; choose an image size that is a multiple of {patch_size}"
            )
        positions = (image_size // patch_size) ** 2 + 1
        if self.num_positions != positions:
            raise ValueError(
                f"model.num-positions is {self.num_positions}; images of {image_size} pixels in "
                f"patches of {patch_size} and the class token need {positions}"
            )
        if self.tied_head:
            raise ValueError("model.tied-head is true; images have no token embeddings to share")
        if self.causal:
            raise ValueError(
                "model.causal is true; the class token is first and would see no patch"
            )

    @property
    def reads_images(self) -> bool:
        return self.image_size is not None

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads


def _codec_name(encoding: str) -> str:
    """Returns the name of a text encoding in Python; raises ValueError if there is none."""
    # The first are no encodings of files; the last change their meaning with escape sequences.
    refused = ("undefined", "idna", "punycode", "unicode", "raw-unicode", "iso2022", "hz", "utf-7")
    try:
        "".encode(encoding)  # raises LookupError for codecs that encode no text, such as zip
        name = codecs.lookup(encoding).name.replace("_", "-")
    except (LookupError, ValueError):
        name = "undefined"
    if name.startswith(refused):
        raise ValueError(
            f"data-encoding is {encoding!r}; it must be an encoding that Python knows, without "
            "escape sequences, such as utf-8, utf-16, cp1252 or shift_jis"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from, and how long they are."""

    source: str = "builtin"  # builtin, synthetic, or a path of texts or images
    sequence_length: int | None = None  # tokens of one sample; None: all the model's positions
    mask_fraction: float = 0.15  # BERT: share of the positions to predict
    num_workers: int | None = None  # loader processes per rank; None: 2 for image folders, else 0
    encoding: str = "utf-8"  # of text files, by the name that Python's codecs give it
    field: str | None = None  # to read of each line of JSON Lines files

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("data is empty; give builtin, synthetic or a path")
        _check_minimum(self, "", 2, "sequence_length")
        _check_minimum(self, "", 0, "num_workers")
        if not 0 < self.mask_fraction < 1:
            raise ValueError(f"data.mask_fraction is {self.mask_fraction}; it must be in (0, 1)")
        object.__setattr__(self, "encoding", _codec_name(self.encoding))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with weight decay on matrices only; linear warm-up, then a cosine down to a floor."""

    learning_rate: float = 3e-4  # at the end of the warm-up
    floor: float = 0.1  # last learning rate as a share of the highest
    warmup_steps: int = 20
    schedule_steps: int = 100  # the step at which the cosine reaches the floor
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0  # largest global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        _check_minimum(
            self, "optimizer.", 0, "learning_rate", "weight_decay", "warmup_steps", "clip_norm"
        )
        _check_minimum(self, "optimizer.", 1, "schedule_steps")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} is {value}; it must be in [0, 1)")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"optimizer.floor is {self.floor}; it must be between 0 and 1")
        # The gradient of a token that is not in the batch is 0; without epsilon its step is 0 / 0.
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"optimizer.epsilon is {self.epsilon}; it must be above 0, as 1e-8")

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        decay_steps = max(1, self.schedule_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        share = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is divided over devices, in which precision, and how it is compiled."""

    accelerator: Accelerator = "auto"
    devices: int = 1  # ranks on each node
    num_nodes: int = 1
    strategy: Strategy = "auto"
    precision: Precision = "32-true"
    compile: Compile = "off"
    activation_checkpointing: ActivationCheckpointing = "off"
    cpu_offload: bool = False  # weights and optimizer states stay in host memory

    def __post_init__(self) -> None:
        _check_minimum(self, "", 1, "devices", "num_nodes")
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError(
                f"strategy is single with {self.world_size} devices; choose ddp, or one device"
            )
        if self.strategy in ("fsdp", "hsdp") and self.precision == "16-mixed":
            raise ValueError(
                f"precision 16-mixed does not work with strategy {self.strategy}, which does not "
                "scale the loss; choose bf16-mixed, or strategy ddp or fsdp1"
            )
        if self.uses_deepspeed and self.precision == "bf16-true":
            raise ValueError(
                f"precision bf16-true does not work with strategy {self.strategy}: DeepSpeed keeps "
                "float32 weights as well; choose bf16-mixed"
            )
        if self.cpu_offload and self.strategy in ("single", "ddp"):
            raise ValueError(
                f"cpu-offload does not work with strategy {self.strategy}, which keeps everything "
                "on the device; choose fsdp, or leave it out"
            )

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def is_sharded(self) -> bool:
        """Whether the weights themselves are divided over devices, so that none holds them all."""
        return self.strategy in SHARDED

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy in DEEPSPEED

    @property
    def waits_for_gpu(self) -> bool:
        """Whether every step waits for the GPU: for the overflow, the norm or the gradients."""
        return self.precision == "16-mixed" or self.uses_deepspeed or self.cpu_offload


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes: equal configs train the same model."""

    recipe: Recipe
    size: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch_size: int = 8  # samples per device and micro-batch
    accumulate: int = 1  # micro-batches per optimizer step
    max_steps: int = 100  # optimizer steps
    # Stop early once the 95 % interval of the median step time is this narrow, as a share of it.
    until_interval: float | None = None
    ceiling_s: float = 1.0  # seconds for measuring peak matmul and copy speed here; 0: skip
    validate_every: int = 50  # optimizer steps; the last step always validates
    validation_batches: int = 12  # micro-batches per rank, at most
    checkpoint_every: int = 0  # optimizer steps; 0: only at the end
    log_every: int = 10  # optimizer steps
    loss_chunk: int = 0  # positions whose logits are in memory at once; 0: all
    # Logits that one product of the loss computes for a position; 0: all; None: a CPU measures.
    loss_block: int | None = None
    pad_vocabulary: int = 0  # GPUs multiply fast if rows of logits are a multiple of it; 0: off
    seed: int = 0
    init_from: str | None = None  # file with the initial weights; None: random, from the seed

    def __post_init__(self) -> None:
        _check_minimum(self, "", 1, "batch_size", "accumulate", "max_steps", "validate_every")
        _check_minimum(self, "", 1, "validation_batches", "log_every")
        _check_minimum(self, "", 0, "checkpoint_every", "loss_chunk", "seed", "ceiling_s")
        _check_minimum(self, "", 0, "pad_vocabulary", "loss_block")
        if self.until_interval is not None and not 0 < self.until_interval < 1:
            raise ValueError(
                f"until-interval is {self.until_interval}; it must be between 0 and 1, such as "
                "0.01 for 1%"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be below 2**32")
        if self.sequence_length > self.model.num_positions:
            raise ValueError(
                f"sequence-length {self.sequence_length} is longer than model.num-positions "
                f"{self.model.num_positions}; shorten the sequence or raise model.num-positions"
            )
        self._check_cuda_graphs()
        self._check_task()

    def _check_cuda_graphs(self) -> None:
        """Raises ValueError where CUDA graphs would reuse memory that is still needed.

        A replayed graph frees what the one before it has returned: the gradients of the last
        micro-batch, or what the last layer of a validation passes on. Sources: pytorch issues
        169545, 170604.
        """
        parallel = self.parallel
        if parallel.compile not in CUDA_GRAPH_MODES or parallel.accelerator == "cpu":
            return
        if parallel.is_sharded:
            why = f"strategy {parallel.strategy}, whose layers are compiled one by one"
        elif self.accumulate > 1:
            why = f"accumulate {self.accumulate}: each micro-batch frees the gradients before it"
        else:
            return
        raise ValueError(
            f"compile {parallel.compile} replays CUDA graphs, which do not work with {why}; "
            f"choose compile {CUDA_GRAPH_MODES[parallel.compile]}"
        )

    def _check_task(self) -> None:
        """Raises ValueError if the model or the sequence length does not suit the recipe."""
        if (self.recipe == "vit") != self.model.reads_images:
            reads = "images" if self.model.reads_images else "tokens"
            raise ValueError(
                f"model.image-size is {self.model.image_size}: the model reads {reads}, recipe "
                f"{self.recipe} does not; choose another recipe or leave out the image size"
            )
        if self.recipe == "vit" and self.pad_vocabulary:
            raise ValueError(
                f"pad-vocabulary is {self.pad_vocabulary}, but recipe vit has no vocabulary; "
                "leave it out"
            )
        if self.recipe == "vit" and self.data.sequence_length is not None:
            raise ValueError(
                f"sequence-length is {self.data.sequence_length}; the length of an image is "
                "its number of patches: leave it out"
            )
        reads_files = self.recipe != "vit" and self.data.source not in ("builtin", "synthetic")
        for name, default in ADDED_DATA_FIELDS.items():
            if (value := getattr(self.data, name)) != default and not reads_files:
                raise ValueError(
                    f"data-{name} is {value}, but recipe {self.recipe} with data "
                    f"{self.data.source} reads no text files; leave out --data-{name}"
                )
        if self.recipe == "bert" and self.model.causal:
            raise ValueError("model.causal is true; a masked token is predicted from both sides")
        if self.recipe == "gpt" and not self.model.causal:
            raise ValueError("model.causal is false; the next token is predicted from earlier ones")
        if self.recipe == "bert" and self.sequence_length < 3:
            raise ValueError(
                f"sequence-length is {self.sequence_length}; [CLS], a token and [SEP] need 3"
            )

    @property
    def sequence_length(self) -> int:
        """Positions of one sample."""
        if self.model.reads_images or self.data.sequence_length is None:
            return self.model.num_positions
        return self.data.sequence_length

    @property
    def num_logits(self) -> int:
        """Logits that a training step computes for a position: the classes and their padding."""
        multiple = max(1, self.pad_vocabulary)
        return math.ceil(self.model.num_classes / multiple) * multiple

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.batch_size * self.accumulate * self.parallel.world_size

    @property
    def tokens_per_sample(self) -> int:
        """Tokens per sample; 1 for ViT, whose rates count images."""
        return 1 if self.model.reads_images else self.sequence_length

    def identity(self) -> dict[str, Any]:
        """Returns the fields, by dotted name, that decide what is learned at each step.

        It leaves out how long the run and its schedule are, how often the run reports, and how a
        global batch is divided over devices: a run may be resumed with those changed.
        """
        free = {"max_steps", "until_interval", "validate_every", "validation_batches"}
        free |= {"checkpoint_every", "log_every", "loss_chunk", "batch_size", "accumulate"}
        free |= {"ceiling_s", "data.num_workers", "optimizer.schedule_steps", "pad_vocabulary"}
        free |= {"loss_block"}
        fixed = {
            name: value
            for name, value in flat_dict(self).items()
            if name not in free and not name.startswith("parallel.")
        }
        return {**fixed, "global_batch_size": self.global_batch_size}

    def identity_hash(self) -> str:
        """Returns 8 hexadecimal digits over `identity`: the name of the run's folder."""
        added = {(f"data.{name}", value) for name, value in ADDED_DATA_FIELDS.items()}
        identity = self.identity()
        return hash_values({k: v for k, v in identity.items() if (k, v) not in added})[:8]

    def hash(self) -> str:
        """Returns 12 hexadecimal digits over every field: the name of the record."""
        return hash_values(to_dict(self))


def hash_values(values: Mapping[str, Any]) -> str:
    """Returns `RunConfig.hash` of a config in a file, which may lack fields added since."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON values."""
    return asdict(config)


def flat_dict(config: Any) -> dict[str, Any]:
    """Returns the fields of a config and of its groups as plain JSON values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "config") -> C:
    """Builds a config dataclass from plain JSON values.

    Raises:
        ValueError: a field is unknown, missing or of the wrong type; names it from `where` on.
    """
    hints, required = _fields(kind)  # type: ignore[arg-type]  # classes are hashable
    for name in values:
        if name not in hints:
            raise ValueError(f"{where}.{name} is not a field; known: {', '.join(sorted(hints))}")
    for name in required:
        if name not in values:
            raise ValueError(f"{where}.{name} is missing; it must be {describe_type(hints[name])}")
    arguments = {
        name: _from_json(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    return kind(**arguments)


@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], list[str]]:
    """Returns the types of all fields, and the names of those without a default."""
    assert is_dataclass(kind)
    hints, items = typing.get_type_hints(kind), fields(kind)
    required = [f.name for f in items if f.default is MISSING and f.default_factory is MISSING]
    return {f.name: hints[f.name] for f in items}, required


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; it must be a group of fields")
        try:
            items = tuple((name, type(item), item) for name, item in value.items())
            return _group(hint, items, where)
        except TypeError:  # a value that cannot be hashed, such as a list
            return from_dict(hint, value, where)
    if not _type_check(hint)(value):
        raise ValueError(f"{where} is {value!r}; it must be {describe_type(hint)}")
    return value


@functools.lru_cache(maxsize=1024)  # thousands of records share few groups
def _group(hint: Any, items: tuple[tuple[str, type, Any], ...], where: str) -> Any:
    """Builds a group; `items` hold the types too, because 1, 1.0 and True are equal keys."""
    return from_dict(hint, {name: value for name, _, value in items}, where)


@functools.cache  # a report of thousands of records checks the same few types a million times
def _type_check(hint: Any) -> Callable[[Any], bool]:
    """Returns a function that says whether a plain JSON value is of a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return lambda value: value in parts
    if origin in (Union, types.UnionType):
        options = [_type_check(part) for part in parts]
        return lambda value: any(fits(value) for fits in options)
    if origin is tuple:
        return lambda value: isinstance(value, tuple) and _fits_tuple(parts, value)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return lambda value: isinstance(value, hint)


def _fits_tuple(parts: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    hints = parts[:1] * len(values) if parts[-1] is ... else parts
    return len(hints) == len(values) and all(
        _type_check(hint)(value) for hint, value in zip(hints, values, strict=True)
    )


def describe_type(hint: Any) -> str:
    """Returns a type in words, such as "one of a, b" or "an integer"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in parts if part is not types.NoneType)
    if origin is tuple:
        return "a list"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))

"""Lists the cases of a parity study, and compares loss curves with bounds for each precision.

Every strategy must train the same model: the same seed, data and global batch must give the curves
of one plain float32 process, up to the rounding of each precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from unitransformer.config import (
    ActivationCheckpointing,
    Compile,
    ParallelConfig,
    Precision,
    RunConfig,
    Strategy,
)

ParityVerdict = Literal["equal", "different", "refused", "failed"]
STRATEGIES: tuple[Strategy, ...] = tuple(name for name in get_args(Strategy) if name != "auto")
LEAST_STEPS = 20  # a growing error needs steps to show


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The largest relative differences that count as equal, and why."""

    loss: float
    gradient_norm: float
    why: str


# Rounding grows from step to step, so that the bounds say nothing about many more.
BOUND_STEPS = 24
# Measured on CPUs with so many steps of the small models of all three recipes: every combination
# on 2 devices; on 4 devices float32 that is not compiled.
BOUNDS: dict[Precision, Bound] = {
    "32-true": Bound(
        loss=1e-5,
        gradient_norm=1e-4,
        why="sums in another order; measured 1.8e-7 and 5.9e-6, which leaves a factor of 16 for "
        "other machines and larger models",
    ),
    "bf16-mixed": Bound(
        loss=2e-3,
        gradient_norm=2.5e-2,
        why="8 bits in every product (relative 3.9e-3), averaged over many; measured 9.2e-4 and "
        "1.0e-2, times 2",
    ),
    "bf16-true": Bound(
        loss=6e-3,
        gradient_norm=1e-1,
        why="weights of 8 bits, which small steps do not change, and a norm of 8 bits; measured "
        "1.7e-3 and 3.3e-2, times 3; a small fault can hide here",
    ),
    "16-mixed": Bound(
        loss=6e-4,
        gradient_norm=1.2e-2,
        why="11 bits in every product, and images whose loss falls fast; measured 1.1e-4 and "
        "8.6e-4, times 5 and more",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Loss, and gradient norm before clipping, of each optimizer step."""

    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CurveComparison:
    """The largest relative differences from the reference; steps are counted from 1."""

    loss_difference: float
    loss_step: int
    gradient_norm_difference: float
    gradient_norm_step: int
    first_loss_difference: float  # before any optimizer step

    def verdict(self, bound: Bound) -> Literal["equal", "different"]:
        is_loss_equal = self.loss_difference <= bound.loss
        is_norm_equal = self.gradient_norm_difference <= bound.gradient_norm
        return "equal" if is_loss_equal and is_norm_equal else "different"


def compare(reference: Curves, curves: Curves) -> CurveComparison:
    """Raises ValueError for curves that are empty or not of the same length."""
    loss, loss_step = _largest_difference(reference.loss, curves.loss)
    norm, norm_step = _largest_difference(reference.gradient_norm, curves.gradient_norm)
    return CurveComparison(
        loss_difference=loss,
        loss_step=loss_step,
        gradient_norm_difference=norm,
        gradient_norm_step=norm_step,
        first_loss_difference=relative_difference(reference.loss[0], curves.loss[0]),
    )


def _largest_difference(reference: Sequence[float], values: Sequence[float]) -> tuple[float, int]:
    if not 0 < len(reference) == len(values):
        raise ValueError(f"{len(values)} steps cannot be compared with {len(reference)}")
    relative = list(map(relative_difference, reference, values))
    return max(relative), relative.index(max(relative)) + 1


def relative_difference(reference: float, value: float) -> float:
    return 0.0 if value == reference else abs(value - reference) / max(abs(reference), 1e-300)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a parity study."""

    strategy: Strategy
    devices: int = 1  # over all nodes
    num_nodes: int = 1
    precision: Precision = "32-true"
    compile: Compile = "off"
    activation_checkpointing: ActivationCheckpointing = "off"
    accumulate: int = 1  # micro-batches per step, which divide the same global batch

    @property
    def kind(self) -> tuple[str, ...]:
        """The settings that a certificate proves for any number of devices."""
        return (self.strategy, self.precision, self.compile, self.activation_checkpointing)

    @property
    def label(self) -> str:
        parts = [f"{self.strategy} x {self.spread}", self.precision]
        if self.compile != "off":
            parts.append(f"compile {self.compile}")
        if self.activation_checkpointing != "off":
            parts.append(f"checkpointing {self.activation_checkpointing}")
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} micro-batches")
        return ", ".join(parts)

    @property
    def spread(self) -> str:
        """The number of devices, and how the nodes share them."""
        if self.num_nodes == 1:
            return str(self.devices)
        return f"{self.devices} ({self.num_nodes} nodes x {self.devices_per_node})"

    @property
    def devices_per_node(self) -> int:
        return self.devices // self.num_nodes


REFERENCE = Case(strategy="single")  # one plain float32 process
# The fields that a case and a parallel config share.
PARALLEL_SETTINGS = ("strategy", "num_nodes", "precision", "compile", "activation_checkpointing")


def case_of(config: RunConfig) -> Case:
    """Returns the case that a run with this config trained."""
    parallel = config.parallel
    settings = {name: getattr(parallel, name) for name in PARALLEL_SETTINGS}
    return Case(devices=parallel.world_size, accumulate=config.accumulate, **settings)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The settings that a study varies, in order."""

    strategies: Sequence[Strategy]
    devices: Sequence[int]
    precisions: Sequence[Precision]
    compile: Sequence[Compile]
    activation_checkpointing: Sequence[ActivationCheckpointing]


def list_cases(axes: Axes, *, is_quick: bool) -> list[Case]:
    """Returns every combination, and each strategy once with two micro-batches.

    `single` always has one device. `hsdp` replicates between nodes, so it has two nodes if each
    node then has several devices. In a quick study, combinations differ from float32, not compiled,
    not checkpointed in one axis at most.
    """
    cases: list[Case] = []
    for strategy in axes.strategies:
        for devices in (1,) if strategy == "single" else axes.devices:
            has_nodes = strategy == "hsdp" and devices > 2 and devices % 2 == 0
            spread = Case(strategy=strategy, devices=devices, num_nodes=2 if has_nodes else 1)
            product = [
                replace(spread, precision=p, compile=c, activation_checkpointing=checkpointing)
                for p in axes.precisions
                for c in axes.compile
                for checkpointing in axes.activation_checkpointing
            ]
            for case in product:
                changes = zip(case.kind[1:], REFERENCE.kind[1:], strict=True)  # not of the strategy
                if not is_quick or sum(setting != plain for setting, plain in changes) <= 1:
                    cases.append(case)
            cases.append(replace(product[0], accumulate=2))
    return cases


def refusal(case: Case) -> str | None:
    """Returns why the config refuses a case; None if only the machine can refuse it."""
    try:
        settings = {name: getattr(case, name) for name in PARALLEL_SETTINGS}
        ParallelConfig(devices=case.devices_per_node, **settings)
    except ValueError as error:
        return str(error)
    return None

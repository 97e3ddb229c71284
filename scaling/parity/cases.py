"""Loss parity: which ways to train are compared, and when two are equal.

The loss and the gradient norm of every step go in; how far they are from those of one plain
float32 process comes out. The strategies promise the same model: the same seed, data and global
batch have to give the same curves, up to what each precision rounds away.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unitransformer.config import (
    ActivationCheckpointing,
    Compile,
    ParallelConfig,
    Precision,
    Strategy,
)

ParityVerdict = Literal["equal", "different", "refused", "failed"]
STRATEGIES: tuple[Strategy, ...] = (
    *("single", "ddp", "fsdp", "fsdp1", "hsdp"),
    *("zero1", "zero2", "zero3"),
)
LEAST_STEPS = 20  # an error that grows needs time to show

# ---------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Largest relative differences of two curves that count as equal, and why these."""

    loss: float
    gradient_norm: float
    why: str


# Measured on CPUs: 24 steps of the small model, all three recipes; every combination over 2
# devices, and those in float32 that are not compiled over 4.
BOUNDS: dict[Precision, Bound] = {
    "32-true": Bound(
        loss=1e-5,
        gradient_norm=1e-4,
        why="sums in another order; measured 1.8e-7 and 5.9e-6, so 16 times and more are left for "
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
        why="weights of 8 bits, which small steps leave where they are, and a norm of 8 bits; "
        "measured 1.7e-3 and 3.3e-2, times 3; a small fault can hide here",
    ),
    "16-mixed": Bound(
        loss=6e-4,
        gradient_norm=1.2e-2,
        why="11 bits in every product, and pictures whose loss falls fast; measured 1.1e-4 and "
        "8.6e-4, times 5 and more",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One number an optimizer step: the loss, and the gradient norm before clipping."""

    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two curves, where it is largest."""

    relative: float
    step: int  # counted from 1


@dataclass(frozen=True, kw_only=True)
class CurveComparison:
    """How far a way to train is from the reference."""

    loss: Difference
    gradient_norm: Difference
    first_loss: float  # relative; before any optimizer step

    def verdict(self, bound: Bound) -> Literal["equal", "different"]:
        is_equal = (
            self.loss.relative <= bound.loss and self.gradient_norm.relative <= bound.gradient_norm
        )
        return "equal" if is_equal else "different"


def compare(reference: Curves, own: Curves) -> CurveComparison:
    """The largest relative differences of `own` from `reference`.

    Raises:
        ValueError: curves that are empty or not of the same length.
    """
    return CurveComparison(
        loss=_largest_difference(reference.loss, own.loss),
        gradient_norm=_largest_difference(reference.gradient_norm, own.gradient_norm),
        first_loss=relative_difference(reference.loss[0], own.loss[0]),
    )


def _largest_difference(reference: Sequence[float], own: Sequence[float]) -> Difference:
    if not 0 < len(reference) == len(own):
        raise ValueError(f"{len(own)} steps cannot be compared with {len(reference)}")
    relative = list(map(relative_difference, reference, own))
    largest = max(relative)
    return Difference(relative=largest, step=relative.index(largest) + 1)


def relative_difference(reference: float, own: float) -> float:
    return 0.0 if own == reference else abs(own - reference) / max(abs(reference), 1e-300)


# ---------------------------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train a model."""

    strategy: Strategy
    devices: int = 1  # of all nodes
    num_nodes: int = 1
    precision: Precision = "32-true"
    compile: Compile = "off"
    activation_checkpointing: ActivationCheckpointing = "off"
    accumulate: int = 1  # micro-batches of a step; the global batch stays the same

    @property
    def kind(self) -> tuple[str, ...]:
        """What a certificate proves for any number of devices."""
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
        """Over how many devices, and how these are dealt out to nodes."""
        if self.num_nodes == 1:
            return str(self.devices)
        return f"{self.devices} ({self.num_nodes} nodes x {self.devices_per_node})"

    @property
    def devices_per_node(self) -> int:
        return self.devices // self.num_nodes


REFERENCE = Case(strategy="single")  # one plain float32 process


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What is varied, in the order in which it is tried."""

    strategies: Sequence[Strategy]
    devices: Sequence[int]
    precisions: Sequence[Precision]
    compile: Sequence[Compile]
    activation_checkpointing: Sequence[ActivationCheckpointing]


def list_cases(axes: Axes, *, is_quick: bool) -> list[Case]:
    """Every combination, and each strategy once with its global batch in two micro-batches.

    `single` is one process whatever the device counts are.

    Args:
        is_quick: of the combinations only those that differ in one axis at most from
            float32, not compiled, nothing checkpointed.
    """
    cases: list[Case] = []
    for strategy in axes.strategies:
        for devices in (1,) if strategy == "single" else axes.devices:
            place = Case(
                strategy=strategy, devices=devices, num_nodes=_count_nodes(strategy, devices)
            )
            product = [
                replace(
                    place,
                    precision=precision,
                    compile=compile_,
                    activation_checkpointing=checkpointing,
                )
                for precision, compile_, checkpointing in itertools.product(
                    axes.precisions, axes.compile, axes.activation_checkpointing
                )
            ]
            kept = [case for case in product if not is_quick or num_changes(case) <= 1]
            in_parts = replace(
                place,
                precision=axes.precisions[0],
                compile=axes.compile[0],
                activation_checkpointing=axes.activation_checkpointing[0],
                accumulate=2,
            )
            cases += [*kept, in_parts]
    return cases


def _count_nodes(strategy: Strategy, devices: int) -> int:
    """Two for what replicates between nodes, if then each still divides something."""
    return 2 if strategy == "hsdp" and devices > 2 and devices % 2 == 0 else 1


def num_changes(case: Case) -> int:
    """Axes beside strategy, devices and micro-batches in which a case differs from the plain."""
    return sum(
        getattr(case, name) != getattr(REFERENCE, name)
        for name in ("precision", "compile", "activation_checkpointing")
    )


def refusal(case: Case) -> str | None:
    """Why the config alone refuses a case; None if it does not, but perhaps the machine will."""
    try:
        ParallelConfig(
            strategy=case.strategy,
            devices=case.devices_per_node,
            num_nodes=case.num_nodes,
            precision=case.precision,
            compile=case.compile,
            activation_checkpointing=case.activation_checkpointing,
        )
    except ValueError as error:
        return str(error)
    return None

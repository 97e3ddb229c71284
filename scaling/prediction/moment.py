"""What is alive on one device at one moment of a training step, in bytes by category."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Moment:
    moment: str
    parameters: int
    optimizer: int
    gradients: int
    inputs: int
    gathered: int = 0
    activations: Mapping[str, int] = field(default_factory=dict)
    logits: int = 0
    communication: int = 0

    @property
    def allocated_bytes(self) -> int:
        named = self.parameters + self.gradients + self.optimizer + self.gathered
        named += self.logits + self.communication + self.inputs
        return named + sum(self.activations.values())

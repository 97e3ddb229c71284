"""The parity certificate that covers a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scaling.parity.cases import REFERENCE, Case, ParityVerdict
from scaling.parity.certificate import Certificate, newest_first
from scaling.store.run import Run

# ---------------------------------------------------------------------------------- one run


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the newest certificate that covers a way to train says of it."""

    verdict: ParityVerdict | Literal["reference"]  # of several results the worst
    devices: tuple[int, ...]  # counts it was tried on
    certificate: str | None  # name of its file; None: the reference needs none
    code: Mapping[str, Any] = field(default_factory=dict)  # that was proven: commit, whether dirty

    @property
    def holds(self) -> bool:
        """Whether this way trains the same model as the reference."""
        return self.verdict in ("equal", "reference")


def doubts(proof: Proof, code: Mapping[str, Any]) -> str:
    """What speaks against a proof for something that was measured with `code`; empty: nothing."""
    if proof.certificate is None:
        return ""
    told, (proven, measured) = [], (proof.code.get("commit"), code.get("commit"))
    if proof.code.get("is_dirty") is not False:
        state = "with" if proof.code.get("is_dirty") else "perhaps with"
        told.append(f"of a tree {state} changes that were not committed")
    if proven is None or proven != measured:
        told.append(f"of commit {_short(proven)}, measured at {_short(measured)}")
    return " and ".join(told)


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12]


def find_proof(run: Run, certificates: Sequence[Certificate]) -> Proof | None:
    """Whether this way to train is the plain one; None if no certificate covers it."""
    parallel = run.config.parallel
    is_alone = parallel.strategy == "auto" and parallel.world_size == 1
    own = Case(
        strategy="single" if is_alone else parallel.strategy,
        devices=parallel.world_size,
        num_nodes=parallel.num_nodes,
        precision=parallel.precision,
        compile=parallel.compile,
        activation_checkpointing=parallel.activation_checkpointing,
        accumulate=run.config.accumulate,
    )
    if own == REFERENCE:
        return Proof(verdict="reference", devices=(1,), certificate=None)
    accelerator = "cpu" if run.record["hardware"][0]["device"] == "cpu" else "cuda"
    for certificate in newest_first(certificates):
        covering = certificate.verdicts_of_kinds.get(own.kind)
        told = (certificate.recipe, certificate.content["accelerator"])
        if covering and told == (run.config.recipe, accelerator):
            return _coverage(certificate, covering)
    return None


def _coverage(certificate: Certificate, covering: Sequence[tuple[Case, ParityVerdict]]) -> Proof:
    verdicts = {verdict for _, verdict in covering}
    worst: Sequence[ParityVerdict] = ("different", "failed", "refused", "equal")
    return Proof(
        verdict=next(verdict for verdict in worst if verdict in verdicts),
        devices=tuple(sorted({case.devices for case, _ in covering})),
        certificate=certificate.name,
        code=certificate.content["code"],
    )

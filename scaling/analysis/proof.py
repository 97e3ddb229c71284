"""Finds the parity certificate that covers a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scaling.parity.cases import REFERENCE, ParityVerdict, case_of
from scaling.parity.certificate import Certificate, newest_first
from scaling.store.run import Run


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result of the newest certificate that covers a configuration."""

    verdict: ParityVerdict | Literal["reference"]  # the worst of several results
    devices: tuple[int, ...]  # device counts of these results
    certificate: str | None  # name of its file; None: the reference needs none
    code: Mapping[str, Any] = field(default_factory=dict)  # that was proven: commit, whether dirty

    @property
    def holds(self) -> bool:
        """Whether this configuration trains the same model as the reference."""
        return self.verdict in ("equal", "reference")


def doubts(proof: Proof, code: Mapping[str, Any]) -> str:
    """Returns why the proof may not hold for a measurement of `code`; empty without a reason."""
    if proof.certificate is None:
        return ""
    reasons, (proven, measured) = [], (proof.code.get("commit"), code.get("commit"))
    if proof.code.get("is_dirty") is not False:
        state = "with" if proof.code.get("is_dirty") else "perhaps with"
        reasons.append(f"of a tree {state} changes that were not committed")
    if proven is None or proven != measured:
        reasons.append(f"of commit {_short(proven)}, measured at {_short(measured)}")
    return " and ".join(reasons)


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12]


def find_proof(run: Run, certificates: Sequence[Certificate]) -> Proof | None:
    """Returns what proves the loss parity of a run; None if no certificate covers it.

    No parity study offloads to the host, where other code computes the optimizer step.
    """
    if run.config.parallel.cpu_offload:
        return None
    case = case_of(run.config)
    if case.strategy == "auto" and case.devices == 1:
        case = replace(case, strategy="single")
    if case == REFERENCE:
        return Proof(verdict="reference", devices=(1,), certificate=None)
    accelerator = "cpu" if run.record["hardware"][0]["device"] == "cpu" else "cuda"
    for certificate in newest_first(certificates):
        results = certificate.verdicts_of_kinds.get(case.kind)
        trained = (certificate.recipe, certificate.content["accelerator"])
        if results and trained == (run.config.recipe, accelerator):
            verdicts = {verdict for _, verdict in results}
            worst_first: Sequence[ParityVerdict] = ("different", "failed", "refused", "equal")
            return Proof(
                verdict=next(verdict for verdict in worst_first if verdict in verdicts),
                devices=tuple(sorted({case.devices for case, _ in results})),
                certificate=certificate.name,
                code=certificate.content["code"],
            )
    return None

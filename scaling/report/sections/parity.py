"""Loss parity in the report: certificates go in, Markdown comes out. Verdicts are derived again."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from scaling.analysis.proof import Proof, find_proof
from scaling.markdown import code_block, command_lines, details, escaped, link, shortened, table
from scaling.parity.cases import BOUNDS, ParityVerdict
from scaling.parity.certificate import Certificate, CaseResult, newest_first
from scaling.report import run_formatting
from scaling.report.environment import (
    describe_commit,
    describe_hardware,
    describe_versions,
    without_places,
)
from scaling.report.table_notes import draw
from scaling.store.run import Run
from unitransformer.config import Precision, Recipe
from unitransformer.record.units import count

LONGEST_REASON = 240  # letters in a table; the certificate has all of them

INTRODUCTION = (
    "Does every strategy train the same model? Each configuration is compared with one plain "
    "process: float32, not compiled, no activation checkpointing, with the same seed, data and "
    "global batch, and without dropout. The tables hold the largest relative difference of the "
    "loss and of the gradient norm (before clipping) over all steps, and over all ways to compile, "
    "to checkpoint activations and to divide the batch. Verdicts follow from the raw samples of "
    "the certificate and the bounds of this version of the code."
)


def parity_section(certificates: Sequence[Certificate]) -> list[str]:
    """Bounds, then a table for each certificate; nothing if there are none."""
    if not certificates:
        return []
    ordered = [
        certificate
        for recipe in get_args(Recipe)
        for certificate in newest_first(certificates)
        if certificate.recipe == recipe
    ]
    return [
        INTRODUCTION,
        _bounds(),
        *(block for certificate in ordered for block in _of(certificate)),
    ]


def _bounds() -> str:
    rows = [
        (precision, f"{bound.loss:g}", f"{bound.gradient_norm:g}", escaped(bound.why))
        for precision, bound in BOUNDS.items()
    ]
    return table(("precision", "loss within", "gradient norm within", "why"), rows)


def _of(certificate: Certificate) -> list[str]:
    content, config = certificate.content, certificate.config
    counts = ", ".join(map(str, content["device_counts"]))
    facts = (
        describe_commit(content["code"]),
        describe_hardware(content["hardware"]),
        describe_versions(content["versions"]),
    )
    shape = f"{config.model.num_layers} layers, width {config.model.width:,}"
    return [
        f"## {run_formatting.TITLES[certificate.recipe]} on {content['accelerator']}, "
        f"devices {counts}",
        f"{_tally(certificate)} over {count(config.max_steps, 'step')} of a global batch of "
        f"{config.global_batch_size:,}, {shape}, seed {config.seed}; "
        f"{link(certificate.name, 'certificate')}, made by",
        code_block(command_lines(content["command"]), "sh"),
        f"Commit {escaped('; '.join(facts))}.",
        *_figures(certificate),
        *_bad(certificate),
        *_refusals(certificate),
    ]


def _tally(certificate: Certificate) -> str:
    verdicts = Counter(map(certificate.verdict, certificate.results))
    told = ", ".join(f"{verdicts[v]} {v}" for v in get_args(ParityVerdict) if verdicts[v])
    return f"{count(len(certificate.results), 'configuration')}: {told}"


def _figures(certificate: Certificate) -> list[str]:
    """A row for each strategy and device count, a column for each precision."""
    tried = {result.case.precision for result in certificate.results}
    precisions = [precision for precision in get_args(Precision) if precision in tried]
    places = dict.fromkeys((r.case.strategy, r.case.spread) for r in certificate.results)
    heads = [
        *("strategy", "devices"),
        *(f"{precision}: loss, norm" for precision in precisions),
        *get_args(ParityVerdict),
    ]
    rows = []
    for place in places:
        own = [r for r in certificate.results if (r.case.strategy, r.case.spread) == place]
        verdicts = Counter(map(certificate.verdict, own))
        rows.append(
            [
                *place,
                *(_largest(certificate, own, precision) for precision in precisions),
                *(str(verdicts[verdict]) for verdict in get_args(ParityVerdict)),
            ]
        )
    columns = {head: [row[index] for row in rows] for index, head in enumerate(heads)}
    return draw(columns, ("strategy", "devices"))


def _largest(certificate: Certificate, results: Sequence[CaseResult], precision: Precision) -> str:
    """The largest differences of some cases in one precision, or what became of them."""
    own = [result for result in results if result.case.precision == precision]
    found = [c for c in map(certificate.comparison, own) if c is not None]
    if not found:
        return ", ".join(sorted({certificate.verdict(result) for result in own})) or "not tried"
    loss = max(comparison.loss.relative for comparison in found)
    norm = max(comparison.gradient_norm.relative for comparison in found)
    return f"{loss:.1e}, {norm:.1e}"


def _bad(certificate: Certificate) -> list[str]:
    bad = [r for r in certificate.results if certificate.verdict(r) in ("different", "failed")]
    if not bad:
        return []
    rows = [(r.case.label, certificate.verdict(r), _told(certificate, r)) for r in bad]
    commands = [f"# {r.case.label}\n{command_lines(r.command)}" for r in bad]
    return [
        "Not equal:",
        table(("configuration", "verdict", "difference"), rows),
        details("Commands of those that are not equal", code_block("\n".join(commands), "sh")),
    ]


def _told(certificate: Certificate, result: CaseResult) -> str:
    comparison = certificate.comparison(result)
    if comparison is None:
        told = without_places(
            result.reason or "no reason recorded", certificate.content["hardware"]
        )
        return escaped(shortened(told, LONGEST_REASON))
    loss, norm = comparison.loss, comparison.gradient_norm
    idleness = certificate.inactive_feature(result)
    return (
        f"{'' if idleness is None else f'{escaped(idleness)}; '}"
        f"loss {loss.relative:.1e} at step {loss.step}, gradient norm {norm.relative:.1e} at step "
        f"{norm.step}; first loss {comparison.first_loss:.1e}"
    )


def _refusals(certificate: Certificate) -> list[str]:
    """Each reason once, with the strategies it is told of."""
    told: dict[str, list[str]] = {}
    for result in certificate.results:
        if certificate.verdict(result) == "refused":
            strategy = result.case.strategy
            reason = _told(certificate, result).replace(f"strategy {strategy}", "strategy …")
            told.setdefault(reason, []).append(strategy)
    if not told:
        return []
    lines = [
        f"- {count(len(names), 'configuration')} ({', '.join(dict.fromkeys(names))}): {reason}"
        for reason, names in told.items()
    ]
    return ["\n".join(["Refused:", "", *lines])]


def parity_cell(run: Run, certificates: Sequence[Certificate]) -> str:
    """The certificate that says whether this way to train is the plain one, and what it says."""
    proof = find_proof(run, certificates)
    return "none" if proof is None else describe_proof(proof)


def describe_proof(proof: Proof) -> str:
    """A cell."""
    if proof.certificate is None:
        return proof.verdict
    word = proof.verdict if proof.holds else f"**{proof.verdict}**"
    spread = f"{' and '.join(map(str, proof.devices))} device{'s' * (proof.devices != (1,))}"
    return f"{word} on {spread}, {link(proof.certificate, 'certificate')}"

"""The page of loss parity: bounds, and a table of differences and verdicts per certificate.

Verdicts follow from the stored loss curves, not from the stored verdicts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from scaling.analysis.proof import Proof, find_proof
from scaling.markdown import command_block, escaped, folded_commands, link, shortened, table
from scaling.parity.cases import BOUNDS, ParityVerdict
from scaling.parity.certificate import CaseResult, Certificate, newest_first
from scaling.report import run_formatting
from scaling.report.run_formatting import without_folder
from scaling.report.table_notes import draw
from scaling.store.run import Run
from unitransformer.config import Precision, Recipe
from unitransformer.record.units import format_count

LONGEST_REASON = 240  # characters in a table; the certificate has all of them
INTRODUCTION = (
    "Does every strategy train the same model? Each configuration is compared with one plain "
    "process: float32, not compiled, no activation checkpointing, with the same seed, data and "
    "global batch, and without dropout. The tables hold the largest relative difference of the "
    "loss and of the gradient norm (before clipping) over all steps, and over all ways to compile, "
    "to checkpoint activations and to divide the batch. Verdicts follow from the raw samples of "
    "the certificate and the bounds of this version of the code."
)


def parity_section(certificates: Sequence[Certificate]) -> list[str]:
    """Returns bounds, then a table for each certificate; nothing without certificates."""
    if not certificates:
        return []
    bounds = [
        (precision, f"{bound.loss:g}", f"{bound.gradient_norm:g}", escaped(bound.why))
        for precision, bound in BOUNDS.items()
    ]
    order = get_args(Recipe)
    by_recipe = sorted(newest_first(certificates), key=lambda proof: order.index(proof.recipe))
    blocks = [block for certificate in by_recipe for block in _blocks(certificate)]
    headings = ("precision", "loss within", "gradient norm within", "why")
    return [INTRODUCTION, table(headings, bounds), *blocks]


def _blocks(certificate: Certificate) -> list[str]:
    content, config = certificate.content, certificate.config
    counts = ", ".join(map(str, content["device_counts"]))
    environment = (
        run_formatting.describe_commit(content["code"]),
        run_formatting.describe_hardware(content["hardware"]),
        run_formatting.describe_versions(content["versions"]),
    )
    results = format_count(len(certificate.results), "configuration")
    tally = Counter(map(certificate.verdict, certificate.results))
    verdicts = ", ".join(f"{tally[v]} {v}" for v in get_args(ParityVerdict) if tally[v])
    shape = f"{config.model.num_layers} layers, width {config.model.width:,}"
    title = run_formatting.TITLES[certificate.recipe]
    return [
        f"## {title} on {content['accelerator']}, devices {counts}",
        f"{results}: {verdicts} over {format_count(config.max_steps, 'step')} of a global batch of "
        f"{config.global_batch_size:,}, {shape}, seed {config.seed}; "
        f"{link(certificate.name, 'certificate')}, made by",
        command_block(without_folder(content["command"])),
        f"Commit {escaped('; '.join(environment))}.",
        *_differences(certificate),
        *_not_equal(certificate),
        *_refused(certificate),
    ]


def _differences(certificate: Certificate) -> list[str]:
    """Returns a row for each strategy and device count, with a column for each precision."""
    tried = {result.case.precision for result in certificate.results}
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for result in certificate.results:
        groups.setdefault((result.case.strategy, result.case.spread), []).append(result)
    rows = []
    for (strategy, devices), results in groups.items():
        verdicts = Counter(map(certificate.verdict, results))
        row = {"strategy": strategy, "devices": devices}
        for precision in get_args(Precision):
            if precision in tried:
                row[f"{precision}: loss, norm"] = _largest(certificate, results, precision)
        rows.append(row | {verdict: str(verdicts[verdict]) for verdict in get_args(ParityVerdict)})
    return draw(rows, always=("strategy", "devices"))


def _largest(certificate: Certificate, results: Sequence[CaseResult], precision: Precision) -> str:
    results = [result for result in results if result.case.precision == precision]
    comparisons = [c for c in map(certificate.comparison, results) if c is not None]
    if not comparisons:
        verdicts = {certificate.verdict(result) for result in results}
        return ", ".join(sorted(verdicts)) or "not tried"
    loss = max(comparison.loss_difference for comparison in comparisons)
    norm = max(comparison.gradient_norm_difference for comparison in comparisons)
    return f"{loss:.1e}, {norm:.1e}"


def _not_equal(certificate: Certificate) -> list[str]:
    rows, commands = [], []
    for result in certificate.results:
        if (verdict := certificate.verdict(result)) in ("different", "failed"):
            rows.append((result.case.label, verdict, _about(certificate, result)))
            commands.append((result.case.label, result.command))
    if not rows:
        return []
    return [
        "Not equal:",
        table(("configuration", "verdict", "difference"), rows),
        folded_commands("Commands of those that are not equal", commands),
    ]


def _about(certificate: Certificate, result: CaseResult) -> str:
    comparison = certificate.comparison(result)
    if comparison is None:
        reason, hosts = result.reason or "no reason recorded", certificate.content["hardware"]
        return escaped(shortened(run_formatting.without_paths(reason, hosts), LONGEST_REASON))
    inactive = certificate.inactive_feature(result)
    return (
        f"{'' if inactive is None else f'{escaped(inactive)}; '}"
        f"loss {comparison.loss_difference:.1e} at step {comparison.loss_step}, "
        f"gradient norm {comparison.gradient_norm_difference:.1e} at step "
        f"{comparison.gradient_norm_step}; first loss {comparison.first_loss_difference:.1e}"
    )


def _refused(certificate: Certificate) -> list[str]:
    """Lists each reason once, with its strategies."""
    reasons: dict[str, list[str]] = {}
    for result in certificate.results:
        if certificate.verdict(result) == "refused":
            strategy = result.case.strategy
            reason = _about(certificate, result).replace(f"strategy {strategy}", "strategy …")
            reasons.setdefault(reason, []).append(strategy)
    lines = [
        f"- {format_count(len(same), 'configuration')} ({', '.join(dict.fromkeys(same))}): {reason}"
        for reason, same in reasons.items()
    ]
    return ["\n".join(["Refused:", "", *lines])] if lines else []


def parity_cell(run: Run, certificates: Sequence[Certificate]) -> str:
    """Returns the verdict and the certificate that covers the configuration of this run."""
    proof = find_proof(run, certificates)
    return "none" if proof is None else describe_proof(proof)


def describe_proof(proof: Proof) -> str:
    if proof.certificate is None:
        return "the reference itself" if proof.verdict == "reference" else proof.verdict
    verdict = proof.verdict if proof.holds else f"**{proof.verdict}**"
    counts, plural = " and ".join(map(str, proof.devices)), "" if proof.devices == (1,) else "s"
    return f"{verdict} on {counts} device{plural}, {link(proof.certificate, 'certificate')}"

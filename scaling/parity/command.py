"""The parity study as it was asked for: certificates written, what came of it told."""

from collections import Counter
from collections.abc import Sequence

from scaling.parity.certificate import Certificate
from scaling.parity.study import ParityOptions, certify
from unitransformer.config import Strategy


def run_parity(options: ParityOptions) -> str | None:
    """Compare, write the certificates, say what came of it; what is not equal, or None.

    Raises:
        ValueError: options that the recipe refuses.
        RuntimeError: a reference failed.
        OSError: a certificate could not be written.
    """
    bad = []
    for path, certificate in certify(options, lambda line: print(line, flush=True)):
        verdicts = Counter(map(certificate.verdict, certificate.results))
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
        print(f"{path}: {counts}")
        unproven = _unproven(certificate, options.axes.strategies)
        nothing = f"; no way to train with {', '.join(unproven)} is equal" if unproven else ""
        if verdicts["different"] or verdicts["failed"] or unproven:
            bad.append(f"{path.name}: {counts}{nothing}")
    return "; ".join(bad) or None


def _unproven(certificate: Certificate, strategies: Sequence[Strategy]) -> list[Strategy]:
    """Strategies that were asked for and of which not one case is equal, whatever the reason."""
    proven = {r.case.strategy for r in certificate.results if certificate.verdict(r) == "equal"}
    return [strategy for strategy in strategies if strategy not in proven]

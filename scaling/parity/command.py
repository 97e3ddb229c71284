"""Runs `python -m scaling parity`: writes certificates and prints their verdicts."""

from collections import Counter

from scaling.parity.study import ParityOptions, certify


def run_parity(options: ParityOptions) -> str | None:
    """Runs the studies, and returns what is not equal; None if everything is.

    Raises:
        ValueError: the recipe refuses the options.
        RuntimeError: a reference failed.
        OSError: a certificate cannot be written.
    """
    bad = []
    for path, certificate in certify(options, lambda line: print(line, flush=True)):
        verdicts = Counter(map(certificate.verdict, certificate.results))
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
        print(f"{path}: {counts}")
        equal = {r.case.strategy for r in certificate.results if certificate.verdict(r) == "equal"}
        unproven = [name for name in options.axes.strategies if name not in equal]
        suffix = f"; not one case of {', '.join(unproven)} is equal" if unproven else ""
        if verdicts["different"] or verdicts["failed"] or unproven:
            bad.append(f"{path.name}: {counts}{suffix}")
    return "; ".join(bad) or None

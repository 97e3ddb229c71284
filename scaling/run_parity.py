"""The parity study as it was asked for: certificates written, what came of it told."""

from collections import Counter

from scaling.certify import ParityOptions, certify


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
        if verdicts["different"] or verdicts["failed"] or not verdicts["equal"]:
            bad.append(f"{path.name}: {counts}")
    return "; ".join(bad) or None

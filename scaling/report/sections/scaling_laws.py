"""Laws of scaling in the report: a fitted law in, its cells of a table out."""

from collections.abc import Sequence

from scaling.analysis.scaling_laws import LawFit
from scaling.markdown import escaped
from scaling.report.table_notes import figure

TITLES = {"Amdahl": "Amdahl's law", "USL": "Universal scalability law"}
PARAMETERS = {"s": "serial share s", "a": "contention a", "b": "coherency b"}


def law_cells(law: LawFit, *, is_split: bool) -> tuple[str, str]:
    """Parameters and remark.

    Args:
        is_split: more devices share the same cores.
    """
    parameters = [
        f"{PARAMETERS[name]} = {figure(estimate, '{:.3g}')}"
        + (f"; no interval: {escaped(estimate.reason)}" if estimate.reason else "")
        for name, estimate in law.parameters.items()
    ]
    within = f"within {law.largest_error:.1%} of every point"
    split = ["the same cores: most of it is their split"] if is_split else []
    return ", ".join(parameters), "; ".join([within, *law.remarks, *split])


def why_not_fitted(laws: Sequence[LawFit]) -> list[str]:
    if all(law.reason for law in laws):
        return [f"no law of scaling is fitted: {laws[-1].reason}"]
    return [f"{TITLES[law.name]} is not fitted: {law.reason}" for law in laws if law.reason]

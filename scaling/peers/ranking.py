"""Ranks the peers of one network: the best variant of each, and our speed and memory over it."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.parity.cases import BOUNDS, relative_difference
from scaling.peers.ratios import Ratio, pool_launches
from scaling.peers.record import Comparison, processor_speed, speed
from unitransformer.config import RunConfig
from unitransformer.record.units import UNIT, format_rate

FLOAT32_BOUND = 1e-4  # relative, of the losses of the first steps: the order of sums differs
TITLES = {"bert": "BERT", "gpt": "GPT", "vit": "ViT"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """All launches of one way to train a peer beside this suite, under the same conditions."""

    comparisons: Sequence[Comparison]  # at least one, all measured
    speed: Ratio  # ours over the peer's
    processor_speed: Ratio
    training_memory: float  # ours over the peer's, without imports
    process_memory: float

    @property
    def first(self) -> Comparison:
        return self.comparisons[0]

    @property
    def label(self) -> str:
        return f"{self.first.peer.title}, {self.first.variant}"


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """The variants of a peer, fastest first, and why the others could not be measured."""

    title: str
    variants: Sequence[Variant]
    failed: Sequence[Comparison]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One network, batch and precision on one machine, with every peer it was compared with."""

    config: RunConfig
    comparisons: Sequence[Comparison]
    results: Sequence[PeerResult]  # the peer that is hardest to beat first

    @property
    def title(self) -> str:
        config, model = self.config, self.config.model
        compiled = config.parallel.compile
        parts = [
            f"{TITLES[config.recipe]} {config.size}",
            f"{model.num_layers} layers of width {model.width:,}",
            f"{model.num_positions if model.reads_images else config.sequence_length:,} positions",
            f"batch {config.batch_size:,}",
            config.parallel.precision,
            config.parallel.accelerator,
            "" if compiled == "off" else f"ours compiled ({compiled})",
        ]
        return ", ".join(filter(None, parts))

    @property
    def best(self) -> Variant | None:
        """The variant that is hardest to beat."""
        return next((r.variants[0] for r in self.results if r.variants), None)


def find_workloads(comparisons: Iterable[Comparison]) -> list[Workload]:
    """Groups comparisons whose ratios belong in one table.

    Of the same network on the same machine, only those with the versions and options of the newest
    one count, and of each variant only those of its newest code. Variants need not share a commit,
    since both sides of a ratio ran together.
    """
    groups: dict[Any, dict[Any, list[Comparison]]] = {}
    for comparison in sorted(comparisons, key=lambda c: (str(c.content["started_at"]), c.name)):
        groups.setdefault(_work(comparison), {}).setdefault(_conditions(comparison), []).append(
            comparison
        )
    workloads = []
    for work in sorted(groups, key=repr):
        newest = _with_newest_code(
            max(groups[work].values(), key=lambda same: str(same[-1].content["started_at"]))
        )
        workloads.append(
            Workload(config=newest[0].config, comparisons=newest, results=_rank(newest))
        )
    return workloads


def _work(comparison: Comparison) -> tuple[str, ...]:
    config = comparison.config
    machine = comparison.content["machine"]["fingerprint"]
    shape = (config.recipe, config.size, repr(config.model), str(config.sequence_length))
    parallel = (config.parallel.precision, config.parallel.accelerator)
    return (*shape, f"{config.batch_size:09d}", *parallel, machine)


def _conditions(comparison: Comparison) -> str:
    content = comparison.content
    return repr((comparison.config.hash(), sorted(content["versions"].items())))


def _with_newest_code(comparisons: Sequence[Comparison]) -> list[Comparison]:
    newest = {(c.peer.name, c.variant): c.content["code"] for c in comparisons}  # oldest first
    return [c for c in comparisons if c.content["code"] == newest[c.peer.name, c.variant]]


def _rank(comparisons: Sequence[Comparison]) -> list[PeerResult]:
    peers: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        peers.setdefault(comparison.peer.name, []).append(comparison)
    results = [_result(same) for same in peers.values()]
    return sorted(results, key=lambda r: r.variants[0].speed.median if r.variants else float("inf"))


def _result(comparisons: Sequence[Comparison]) -> PeerResult:
    variants: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        variants.setdefault(comparison.variant, []).append(comparison)
    measured, failed = [], []
    for same in variants.values():
        good = [comparison for comparison in same if comparison.failure is None]
        if good:
            measured.append(_pool(good))
        else:
            failed.append(same[-1])
    measured.sort(key=lambda variant: variant.speed.median)
    return PeerResult(title=comparisons[0].peer.title, variants=measured, failed=failed)


def _pool(comparisons: Sequence[Comparison]) -> Variant:
    sides = [(c.ours, c.other) for c in comparisons if c.ours is not None and c.other is not None]
    return Variant(
        comparisons=comparisons,
        speed=pool_launches([speed(ours, other) for ours, other in sides]),
        processor_speed=pool_launches([processor_speed(ours, other) for ours, other in sides]),
        training_memory=statistics.median(a.training_bytes / b.training_bytes for a, b in sides),
        process_memory=statistics.median(a.peak_bytes / b.peak_bytes for a, b in sides),
    )


def format_ratio(ratio: Ratio) -> str:
    """Formats as 1.27x (1.24 to 1.30)."""
    if ratio.low is None or ratio.high is None:
        count = f"{ratio.pairs} pair{'s' * (ratio.pairs > 1)}"
        return f"{ratio.median:.2f}x ({count}, no interval)"
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def answer(workload: Workload) -> str:
    """Returns one sentence: our speed over the best peer, and each peer that beats us."""
    config, best = workload.config, workload.best
    name = f"{TITLES[config.recipe]} {config.size}"
    if best is None:
        return f"{name} was compared with no peer: none could be measured."
    sentence = (
        f"{name} trains {format_ratio(best.speed)} as fast as the best peer, {best.label}, with "
        f"{best.training_memory:.2f}x its memory"
    )
    faster = [r.variants[0] for r in workload.results if r.variants and _is_faster(r.variants[0])]
    if faster:
        others = [f"{variant.label} ({variant.speed.median:.2f}x)" for variant in faster[1:]]
        also = f", and so do {' and '.join(others)}" if others else ""
        sentence += f"; this peer beats us{also}"
    elif best.speed.low is None:
        sentence += "; measure more pairs to decide"
    elif best.speed.low <= 1:
        sentence += "; that is a tie"
    return f"{sentence}."


def _is_faster(variant: Variant) -> bool:
    """Whether the whole interval says that a peer is faster."""
    return variant.speed.high is not None and variant.speed.high < 1


def has_single_launches(workload: Workload) -> bool:
    """Whether an interval in the rows is that of one launch alone."""
    best = [result.variants[0] for result in workload.results if result.variants]
    return any(len(v.comparisons) == 1 and v.speed.low is not None for v in best)


def rows(workload: Workload) -> list[dict[str, str]]:
    """Returns a row for the best variant of each peer, and one for each that failed."""
    table = []
    for result in workload.results:
        if result.variants:
            table.append(_row(result.title, result.variants[0], len(result.variants)))
        table += [
            {
                "peer": result.title,
                "variant": failed.variant,
                "our speed": f"failed: {failed.failure}",
            }
            for failed in result.failed
        ]
    return table


def _row(title: str, variant: Variant, num_tried: int) -> dict[str, str]:
    best = f"best of {num_tried}: " if num_tried > 1 else ""
    return {
        "peer": title,
        "variant": f"{best}{variant.first.variant}",
        "our speed": format_ratio(variant.speed),
        "processor time": format_ratio(variant.processor_speed),
        "our memory": f"{variant.training_memory:.2f}x",
        "with imports": f"{variant.process_memory:.2f}x",
        "losses agree": losses_agree(variant),
        "pairs": _pairs(variant),
    }


def _pairs(variant: Variant) -> str:
    launches = len(variant.comparisons)
    return f"{variant.speed.pairs}{f' in {launches} launches' if launches > 1 else ''}"


def losses_agree(variant: Variant) -> str:
    """Says whether the first losses are equal where the mathematics is the same."""
    first = variant.first
    if first.peer.differs is not None:
        return f"not comparable: {first.peer.differs}"
    precision = first.config.parallel.precision
    bound = max(FLOAT32_BOUND, BOUNDS[precision].loss)
    differences = [
        relative_difference(a, b)
        for c in variant.comparisons
        if c.ours is not None and c.other is not None
        for a, b in zip(c.ours.first_losses, c.other.first_losses, strict=True)
    ]
    largest = max(differences)
    return "yes" if largest <= bound else f"no: {largest:.1e} apart"


def our_rate(workload: Workload) -> str | None:
    """Returns our speed in tokens or images per second; None if nothing was measured."""
    config = workload.config
    seconds = [
        s / c.content["steps_per_block"]
        for c in workload.comparisons
        if c.ours is not None
        for s in c.ours.wall_s
    ]
    if not seconds:
        return None
    per_step = config.batch_size * (1 if config.recipe == "vit" else config.sequence_length)
    return format_rate(per_step / statistics.median(seconds), UNIT[config.recipe])

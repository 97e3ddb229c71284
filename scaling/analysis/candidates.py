"""Collects which candidate configurations were tried for the same work, and how each ended."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import RunConfig

# The options in which candidates differ, with their defaults; `strategy` has none.
DEFAULTS = {"compile": "off", "activation-checkpointing": "off", "cpu-offload": "no"}

Key = tuple[RunConfig, int]  # what all candidates of a comparison share, and their global batch
PLUS = " + "  # between the strategy and other settings in the name of a candidate


@dataclass(frozen=True, kw_only=True)
class MissingCandidate:
    """A candidate that was tried and has no steady run."""

    name: str
    why: str  # every status that its runs ended with


@dataclass(kw_only=True)
class TriedCandidates:
    """All candidates that were tried for one comparison."""

    config: RunConfig  # of the first candidate
    steady: list[Run] = field(default_factory=list)
    # Statuses in their order, by the name of a candidate.
    ended: dict[str, dict[str, None]] = field(default_factory=dict)

    def add_status(self, name: str, status: str) -> None:
        self.ended.setdefault(name, {})[status] = None

    @property
    def missing(self) -> tuple[MissingCandidate, ...]:
        steady = {name_of(run.config) for run in self.steady}
        return tuple(
            MissingCandidate(name=name, why=", ".join(statuses))
            for name, statuses in sorted(self.ended.items())
            if name not in steady
        )

    @property
    def strategies(self) -> set[str]:
        steady = {run.config.parallel.strategy for run in self.steady}
        return steady | {name.partition(PLUS)[0] for name in self.ended}


def name_of(config: RunConfig) -> str:
    """Returns the strategy and every setting that is not the default."""
    parallel = config.parallel
    options = {
        "strategy": parallel.strategy,
        "compile": parallel.compile,
        "activation-checkpointing": parallel.activation_checkpointing,
        "cpu-offload": "yes" if parallel.cpu_offload else "no",
    }
    return _name(options, config.accumulate)


def _name(options: Mapping[str, str], accumulate: int) -> str:
    parts = [options["strategy"]]
    if accumulate > 1:
        parts.append(f"{accumulate} micro-batches")
    if options["compile"] != "off":
        parts.append(f"compile {options['compile']}")
    if options["activation-checkpointing"] != "off":
        parts.append(f"checkpointing {options['activation-checkpointing']}")
    if options["cpu-offload"] not in ("no", "false", "False"):
        parts.append("offloaded to the host")
    return PLUS.join(parts)


def find_tried(runs: Iterable[Run], cells: Sequence[Cell]) -> dict[Key, TriedCandidates]:
    """Groups runs, and cells without a record, by what the candidates of a comparison share."""
    groups: dict[Key, TriedCandidates] = {}

    def group_of(config: RunConfig) -> TriedCandidates:
        return groups.setdefault(_shared(config), TriedCandidates(config=config))

    for run in sorted(runs, key=lambda run: run.name):
        group = group_of(run.config)
        if run.is_ok and run.metrics is not None:
            group.steady.append(run)
        else:
            status = "not steady" if run.is_ok else str(run.record["status"])
            group.add_status(name_of(run.config), status)
    for config, name, status in _without_record(cells):
        group_of(config).add_status(name, status)
    return groups


def _shared(config: RunConfig) -> Key:
    parallel = replace(
        config.parallel,
        strategy="auto",
        compile="off",
        activation_checkpointing="off",
        cpu_offload=False,
    )
    return replace(config, parallel=parallel, batch_size=1, accumulate=1), config.global_batch_size


def _without_record(cells: Sequence[Cell]) -> Iterator[tuple[RunConfig, str, str]]:
    """Yields a config of the same comparison, the name and the status of each cell without one.

    A cell whose options the recipe refused has no config. Another cell that differs only in
    candidate options lends it one.
    """
    configs: dict[tuple[Any, ...], RunConfig] = {}
    for cell in cells:
        if cell.outcome.config is not None:
            configs.setdefault(_place(cell), cell.outcome.config)
    for cell in sorted(cells, key=lambda cell: cell.name):
        if cell.run is not None:
            continue
        outcome = cell.outcome
        status = "without its record" if outcome.status == "ok" else outcome.status
        if outcome.config is not None:
            yield outcome.config, name_of(outcome.config), status
        elif (neighbor := configs.get(_place(cell))) is not None:
            plain = {"strategy": neighbor.parallel.strategy, **DEFAULTS}
            options = {name: str(outcome.options.get(name, plain[name])) for name in plain}
            yield neighbor, _name(options, neighbor.accumulate), status


def _place(cell: Cell) -> tuple[Any, ...]:
    """Returns everything about a cell except its candidate options."""
    options = {
        name: str(value)
        for name, value in cell.outcome.options.items()
        if name != "strategy" and name not in DEFAULTS
    }
    return cell.sweep, cell.outcome.recipe, *sorted(options.items())

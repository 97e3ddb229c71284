"""Runs and cells in; which ways to do the same work were tried, and what became of each, out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import RunConfig

# Options that tell one way to do the same work from another.
OPTIONS = ("strategy", "compile", "activation-checkpointing", "cpu-offload")

Key = tuple[RunConfig, int]  # what all ways of a comparison share; the number is the global batch


@dataclass(frozen=True, kw_only=True)
class MissingCandidate:
    """A way that was tried and has no steady run."""

    name: str
    strategy: str
    why: str  # every status that its runs ended with


@dataclass(kw_only=True)
class TriedCandidates:
    """Everything that was tried of one comparison."""

    config: RunConfig  # of the first that was tried
    steady: list[Run] = field(default_factory=list)
    ended: dict[str, tuple[str, dict[str, None]]] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[MissingCandidate, ...]:
        ran = {name_of(run.config) for run in self.steady}
        return tuple(
            MissingCandidate(name=name, strategy=strategy, why=", ".join(statuses))
            for name, (strategy, statuses) in sorted(self.ended.items())
            if name not in ran
        )

    @property
    def strategies(self) -> set[str]:
        ran = {run.config.parallel.strategy for run in self.steady}
        return ran | {missing.strategy for missing in self.missing}


def name_of(config: RunConfig) -> str:
    """The strategy, and what this way has that the plain one has not."""
    parallel = config.parallel
    return _name(
        {
            "strategy": parallel.strategy,
            "compile": parallel.compile,
            "activation-checkpointing": parallel.activation_checkpointing,
            "cpu-offload": "yes" if parallel.cpu_offload else "no",
        },
        config.accumulate,
    )


def _name(options: Mapping[str, str], accumulate: int) -> str:
    told = [options["strategy"]]
    if accumulate > 1:
        told.append(f"{accumulate} micro-batches")
    if options["compile"] != "off":
        told.append(f"compile {options['compile']}")
    if options["activation-checkpointing"] != "off":
        told.append(f"checkpointing {options['activation-checkpointing']}")
    if options["cpu-offload"] not in ("no", "false", "False"):
        told.append("offloaded to the host")
    return " + ".join(told)


def find_tried(runs: Iterable[Run], cells: Sequence[Cell]) -> dict[Key, TriedCandidates]:
    """By what the ways of a comparison share."""
    found: dict[Key, TriedCandidates] = {}

    def of(config: RunConfig) -> TriedCandidates:
        return found.setdefault(_way_aside(config), TriedCandidates(config=config))

    for run in sorted(runs, key=lambda run: run.name):
        if run.is_ok and run.metrics is not None:
            of(run.config).steady.append(run)
        else:
            status = "not steady" if run.is_ok else str(run.record["status"])
            _add(of(run.config), name_of(run.config), run.config.parallel.strategy, status)
    for config, name, strategy, status in _without_run(cells):
        _add(of(config), name, strategy, status)
    return found


def _add(tried: TriedCandidates, name: str, strategy: str, status: str) -> None:
    _, statuses = tried.ended.setdefault(name, (strategy, {}))
    statuses[status] = None


def _way_aside(config: RunConfig) -> Key:
    parallel = replace(
        config.parallel,
        strategy="auto",
        compile="off",
        activation_checkpointing="off",
        cpu_offload=False,
    )
    return replace(config, parallel=parallel, batch_size=1, accumulate=1), config.global_batch_size


def _without_run(cells: Sequence[Cell]) -> Iterator[tuple[RunConfig, str, str, str]]:
    """A config that belongs to the same comparison, name, strategy and status of each cell that
    left no record."""
    neighbours: dict[tuple[Any, ...], RunConfig] = {}
    for cell in cells:
        if cell.outcome.config is not None:
            neighbours.setdefault(_place(cell), cell.outcome.config)
    for cell in sorted(cells, key=lambda cell: cell.name):
        own, outcome = cell.outcome.config, cell.outcome
        if cell.run is not None:
            continue
        status = "without its record" if outcome.status == "ok" else outcome.status
        if own is not None:
            yield own, name_of(own), own.parallel.strategy, status
        elif (beside := neighbours.get(_place(cell))) is not None:
            # A recipe that refuses its options tells no config: the cell beside it has one that
            # differs in the way alone.
            yield beside, *_asked(outcome.options, beside), status


def _place(cell: Cell) -> tuple[Any, ...]:
    options = {name: str(v) for name, v in cell.outcome.options.items() if name not in OPTIONS}
    return cell.sweep, cell.outcome.recipe, *sorted(options.items())


def _asked(options: Mapping[str, Any], beside: RunConfig) -> tuple[str, str]:
    """Name and strategy of what was asked for."""
    plain = {"strategy": beside.parallel.strategy, "compile": "off"}
    plain |= {"activation-checkpointing": "off", "cpu-offload": "no"}
    asked = {name: str(options.get(name, by_default)) for name, by_default in plain.items()}
    return _name(asked, beside.accumulate), asked["strategy"]

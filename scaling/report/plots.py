"""Plots of a sweep: cells in; speed, efficiency and memory against batch and devices out."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scaling.analysis.efficiency import (
    OF_A_CURVE,
    Curve,
    Estimate,
    Point,
    batch_of,
    find_curves,
    pool,
)
from scaling.markdown import count
from scaling.report import run_formatting
from scaling.report.table_notes import PLAIN, SETTINGS, field_in_words, settings_of, telling
from scaling.store.conditions import processors_of
from scaling.store.reader import Cell
from unitransformer.config import RunConfig
from unitransformer.record.units import is_small

OFTEN_PLAIN = (*("parallel.compile", "parallel.activation_checkpointing", "parallel.cpu_offload"),)

Mark = tuple[float, Estimate]  # where on the axis, and what
Ideal = tuple[tuple[int, float], ...]  # devices, and the efficiency that loses nothing there
Panels = Mapping[str, Mapping[str, list[Mark]]]  # by what tells panels, and in them lines, apart


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn."""

    name: str  # of the file, without its ending
    title: str
    x: str
    y: str
    panels: Panels
    ideals: Sequence[Ideal] = ()  # lines to compare with


def plots_of(slug: str, own: Sequence[Cell]) -> list[Plot]:
    """The plots that the cells of one recipe in one sweep give; an axis with one value gives none.

    Args:
        slug: begins the names of the files.
    """
    runs = [cell.run for cell in own if cell.run is not None and cell.run.readout is not None]
    if not runs:
        return []
    recipe, unit = run_formatting.TITLES[runs[0].config.recipe], f"{runs[0].unit}s"
    points, curves = pool(runs), find_curves(runs)
    batch, devices, memory = "samples a device takes at once", "devices", _Memory(points)
    about_memory = f"{memory.unit}, peak of a rank"
    drawn = [
        ("speed", "batch", batch, f"{unit}/s", _by_batch(points, lambda point: point.rate)),
        ("memory", "batch", batch, about_memory, _by_batch(points, memory.of)),
        ("speed", "devices", devices, f"{unit}/s", _by_devices(curves, lambda _, p: p.rate)),
        (
            "memory",
            "devices",
            devices,
            about_memory,
            _by_devices(curves, lambda _, p: memory.of(p)),
        ),
        ("efficiency", "devices", devices, _efficiency_in_words(curves), _efficiencies(curves)),
    ]
    return [
        Plot(
            name=f"{slug}-{quantity}-by-{axis}",
            title=f"{recipe}: {quantity} against {axis}",
            x=x,
            y=y,
            panels=panels,
            ideals=_ideals(curves) if quantity == "efficiency" else (),
        )
        for quantity, axis, x, y, panels in drawn
        if panels
    ]


def not_drawn(own: Sequence[Cell]) -> str:
    """A sentence on the cells that no plot can show, if there are any."""
    told: Counter[str] = Counter()
    for cell in own:
        if cell.run is None or not cell.run.is_ok:
            told["without its record" if cell.outcome.status == "ok" else cell.outcome.status] += 1
        elif cell.run.readout is None:
            told["without a steady state"] += 1
    if not told:
        return ""
    counts = ", ".join(f"{number} {what}" for what, number in sorted(told.items()))
    return f"Not in the plots, of {count(len(own), 'cell')}: {counts}; the table tells why."


def draw(plot: Plot) -> bytes:
    """The SVG file of a plot."""
    from unitransformer.plots import figure_bytes, line_panels

    figure = line_panels(
        {
            panel: {
                name: [(x, told.value, told.low, told.high) for x, told in marks]
                for name, marks in lines.items()
            }
            for panel, lines in plot.panels.items()
        },
        title=plot.title,
        x=plot.x,
        y=plot.y,
        ideals=plot.ideals,
    )
    return figure_bytes(figure, "svg")


class _Memory:
    """Peaks in the unit that suits the largest of all."""

    def __init__(self, points: Iterable[Point]) -> None:
        largest = max((max(_peaks(point), default=0) for point in points), default=0)
        self.unit, self._bytes = ("MiB", 2**20) if is_small(largest) else ("GiB", 2**30)

    def of(self, point: Point) -> Estimate | None:
        """The largest of all ranks and launches; None where no step could be watched."""
        peaks = _peaks(point)
        return Estimate(value=max(peaks) / self._bytes, reason="counted") if peaks else None


def _peaks(point: Point) -> list[int]:
    return [peak for run in point.runs for peak in run.record["peak_bytes"] if peak is not None]


# ---------------------------------------------------------------------------------- lines


def _by_batch(points: Sequence[Point], told: Callable[[Point], Estimate | None]) -> Panels:
    aside = {"batch_size", "parallel.strategy", "parallel.devices", "parallel.num_nodes"}
    names = [f"{point.config.parallel.strategy} x {_spread(point.config)}" for point in points]
    return _panels(
        (panel, line, point.config.batch_size, told(point))
        for point, (panel, line) in zip(points, _labels(points, names, aside), strict=True)
    )


def _spread(config: RunConfig) -> str:
    nodes, devices = config.parallel.num_nodes, config.parallel.devices
    return f"{nodes} x {devices}" if nodes > 1 else f"{devices}"


def _by_devices(curves: Sequence[Curve], told: Callable[[Curve, Point], Estimate | None]) -> Panels:
    names = [f"{curve.strategy}, batch {batch_of(curve)}" for curve in curves]
    labels = _labels([curve.baseline for curve in curves], names, OF_A_CURVE)
    return _panels(
        (panel, line, point.devices, told(curve, point))
        for curve, (panel, line) in zip(curves, labels, strict=True)
        for point in curve.points
    )


def _efficiencies(curves: Sequence[Curve]) -> Panels:
    return _by_devices(curves, lambda curve, point: curve.efficiency(point))


def _ideals(curves: Iterable[Curve]) -> Sequence[Ideal]:
    return sorted({tuple((p.devices, curve.ideal(p)) for p in curve.points) for curve in curves})


def _efficiency_in_words(curves: Iterable[Curve]) -> str:
    is_split = any(curve.threads is not None for curve in curves)
    return "same cores: 1/n loses nothing" if is_split else "speed over the ideal one"


def _labels(
    points: Sequence[Point], names: Sequence[str], aside: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Panel and line of each point: together they tell everything in which points differ, what is
    aside excepted, which the names of the lines and the axis tell."""
    if not points:
        return
    columns = telling([point.config for point in points], aside)
    kinds = list(dict.fromkeys(processors_of(point.runs[0].record) for point in points))
    for index, (point, name) in enumerate(zip(points, names, strict=True)):
        line = [
            f"{field_in_words(field)} {values[index]}"
            for field, values in columns.items()
            if field not in SETTINGS
        ]
        if len(kinds) > 1:
            line.append(f"machine {kinds.index(processors_of(point.runs[0].record)) + 1}")
        yield _panel(point.config, columns.keys()), ", ".join([name, *line])


def _panel(config: RunConfig, differing: Collection[str]) -> str:
    """Precision and size always, other settings where they differ or are not the plain ones."""
    own = settings_of(config)
    told = [
        f"{SETTINGS[field]} {own[field]}"
        for field in SETTINGS
        if field not in ("size", "parallel.precision", "parallel.num_nodes")
        and (field in differing or (field in OFTEN_PLAIN and own[field] not in PLAIN))
    ]
    size = own["size"] if "size" in differing else own["size"].partition(" (")[0]
    return ", ".join([own["parallel.precision"], *told, size])


def _panels(marks: Iterable[tuple[str, str, int, Estimate | None]]) -> Panels:
    """Nothing where no line has two different places; no mark where nothing is told."""
    panels: dict[str, dict[str, list[Mark]]] = {}
    for panel, line, x, told in marks:
        if told is not None:
            panels.setdefault(panel, {}).setdefault(line, []).append((x, told))
    lines = [own for lines in panels.values() for own in lines.values()]
    if all(len({x for x, _ in own}) < 2 for own in lines):
        return {}
    for own in lines:
        own.sort(key=lambda mark: (mark[0], mark[1].value))
    return panels

"""Plots of a sweep: cells in; speed, efficiency and memory against batch and devices out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scaling import cells
from scaling.efficiency import Curve, Estimate, Point, find_curves, pool
from scaling.joining import processors_of
from scaling.store import Cell
from unitransformer.config import RunConfig
from unitransformer.flops import count_parameters
from unitransformer.summary import human_count

Mark = tuple[float, Estimate]  # where on the axis, and what
Panels = Mapping[str, Mapping[str, list[Mark]]]  # by what tells panels, and in them lines, apart


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn."""

    name: str  # of the file, without its ending
    title: str
    x: str
    y: str
    panels: Panels
    ideal: float | None = None  # a line to compare with


def plots_of(slug: str, own: Sequence[Cell]) -> list[Plot]:
    """The plots that the cells of one recipe in one sweep give; an axis with one value gives none.

    Args:
        slug: begins the names of the files.
    """
    runs = [cell.run for cell in own if cell.run is not None and cell.run.readout is not None]
    if not runs:
        return []
    recipe, unit = cells.TITLES[runs[0].config.recipe], f"{runs[0].unit}s"
    points, curves = pool(runs), find_curves(runs)
    batch, devices = "samples a device takes at once", "devices"
    drawn = [
        ("speed", "batch", batch, f"{unit}/s", _by_batch(points, lambda point: point.rate)),
        ("memory", "batch", batch, "GiB, peak of a rank", _by_batch(points, _peak)),
        ("speed", "devices", devices, f"{unit}/s", _by_devices(curves, lambda _, p: p.rate)),
        ("memory", "devices", devices, "GiB, peak of a rank", _by_devices(curves, _peak_on)),
        ("efficiency", "devices", devices, "speed over the ideal one", _efficiencies(curves)),
    ]
    return [
        Plot(
            name=f"{slug}-{quantity}-by-{axis}",
            title=f"{recipe}: {quantity} against {axis}",
            x=x,
            y=y,
            panels=panels,
            ideal=1.0 if quantity == "efficiency" else None,
        )
        for quantity, axis, x, y, panels in drawn
        if panels
    ]


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
        ideal=plot.ideal,
    )
    return figure_bytes(figure, "svg")


def _peak(point: Point) -> Estimate | None:
    """GiB, the largest of all ranks and launches; None where no step could be watched."""
    peaks = [peak for run in point.runs for peak in run.record["peak_bytes"] if peak is not None]
    return Estimate(value=max(peaks) / 2**30, reason="counted") if peaks else None


def _peak_on(_: Curve, point: Point) -> Estimate | None:
    return _peak(point)


def _by_batch(points: Iterable[Point], told: Callable[[Point], Estimate | None]) -> Panels:
    points = list(points)
    kinds = list(dict.fromkeys(processors_of(point.runs[0].record) for point in points))
    marks = [
        (
            _way(point.config),
            f"{point.config.parallel.strategy} x {point.devices}"
            + (f", machine {kinds.index(processors_of(point.runs[0].record)) + 1}")
            * (len(kinds) > 1),
            point.config.batch_size,
            told(point),
        )
        for point in points
    ]
    return _panels(marks)


def _by_devices(curves: Iterable[Curve], told: Callable[[Curve, Point], Estimate | None]) -> Panels:
    """A strong curve keeps the whole batch, a weak one the batch of a device."""
    marks = []
    for curve in curves:
        config = curve.baseline.config
        batch = config.global_batch_size if curve.scaling == "strong" else config.batch_size
        whose = "in all" if curve.scaling == "strong" else "a device"
        line = f"{curve.strategy}, batch {batch} {whose}"
        marks += [(_way(config), line, point.devices, told(curve, point)) for point in curve.points]
    return _panels(marks)


def _efficiencies(curves: Iterable[Curve]) -> Panels:
    return _by_devices(curves, lambda curve, point: curve.efficiency(point))


def _way(config: RunConfig) -> str:
    """What tells a panel apart."""
    parallel = config.parallel
    told = [str(parallel.precision)]
    if parallel.compile != "off":
        told.append(f"compile {parallel.compile}")
    if parallel.activation_checkpointing != "off":
        told.append(f"checkpointing {parallel.activation_checkpointing}")
    # A size may have been changed field by field: how many parameters it has says so.
    return f"{', '.join(told)}, {config.size} ({human_count(count_parameters(config.model))})"


def _panels(marks: Iterable[tuple[str, str, int, Estimate | None]]) -> Panels:
    """Lines of two different places at least; no mark where nothing is told."""
    panels: dict[str, dict[str, list[Mark]]] = {}
    for panel, line, x, told in marks:
        if told is not None:
            panels.setdefault(panel, {}).setdefault(line, []).append((x, told))
    kept = {
        panel: {
            line: sorted(own, key=lambda mark: (mark[0], mark[1].value))
            for line, own in lines.items()
            if len({x for x, _ in own}) > 1
        }
        for panel, lines in panels.items()
    }
    return {panel: lines for panel, lines in kept.items() if lines}

"""Builds the plots of a sweep: speed, efficiency and memory by batch size and number of devices.

Colors show the strategy, panels the precision, markers the batch size or the number of devices.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling.analysis.efficiency import (
    ENOUGH_LAUNCHES,
    VARYING_ON_A_CURVE,
    Curve,
    Estimate,
    MeasuredPoint,
)
from scaling.report import run_formatting
from scaling.report.table_notes import PLAIN, SETTINGS, distinguishing, setting_name, settings_of
from unitransformer.record.units import is_shown_in_mib

if TYPE_CHECKING:  # importing it loads matplotlib, which only a report needs
    from unitransformer.plots import PlotLine, PlotPoint

    Lines = dict["Key", list[tuple[PlotPoint, float | None]]]  # each mark with its ideal

MOST_LINES = 6  # of a panel
MOST_PANELS = 6  # of a plot, which is drawn in a second then
# A search over mid tones gave these (Machado, Oliveira & Fernandes 2009, deuteranopia and
# protanopia): they differ for color-blind readers too, on white and on dark pages.
COLORS: Mapping[str, str] = {
    "auto": "#7b7b7b",
    "single": "#6e7781",
    "ddp": "#1490d8",
    "fsdp": "#c0622b",
    "fsdp1": "#998c4c",
    "hsdp": "#c07a80",
    "zero1": "#6a62c4",
    "zero2": "#a050a8",
    "zero3": "#3f9160",
}
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
STYLES = ("-", "-.", ":")
OFTEN_PLAIN = ("parallel.compile", "parallel.activation_checkpointing", "parallel.cpu_offload")
BEST = {"speed": "fastest", "memory": "smallest", "efficiency": "most efficient"}
X = {"batch size": "batch size per device", "devices": "devices"}
MARKED = {"batch size": "devices", "devices": "batch size"}  # by marker, for each x axis
ON_BATCH_AXIS = {"batch_size", "parallel.strategy", "parallel.devices", "parallel.num_nodes"}

Group = tuple[int, int]  # nodes and devices per node, or micro-batches and their size
Key = tuple[str, str, Group, str]  # of a line: panel, strategy, group, any other setting


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything that is drawn."""

    name: str  # of the file, without its ending
    title: str
    caption: str
    x: str
    y: str
    panels: Mapping[str, Sequence["PlotLine"]]  # by their titles
    markers: Mapping[str, str]  # by what they mean


def plots_of(slug: str, points: Sequence[MeasuredPoint], curves: Sequence[Curve]) -> list[Plot]:
    """Builds the plots of a sweep of one recipe; an axis with one value gives none.

    Args:
        slug: begins the names of the files.
    """
    if not points:
        return []
    runs = [run for point in points for run in point.runs]
    largest = max((peak for run in runs for peak in run_formatting.peaks(run)), default=0)
    unit, size = ("MiB", 2**20) if is_shown_in_mib(largest) else ("GiB", 2**30)

    def memory(x: int, point: MeasuredPoint) -> "PlotPoint | None":
        """The largest peak of all ranks and launches; None if no step was watched."""
        of_runs = filter(None, map(run_formatting.peaks, point.runs))
        peaks = [max(of_run) / size for of_run in of_runs]
        return _mark(x, Estimate(value=max(peaks)), peaks, [point]) if peaks else None

    shares_cores = any(curve.threads is not None for curve in curves)
    y = {
        "speed": f"{runs[0].unit}s per second",
        "memory": f"peak memory per rank ({unit})",
        "efficiency": f"efficiency (1 = {'linear speed-up' if shares_cores else 'ideal'})",
    }
    plots = {
        ("speed", "batch size"): _by_batch(points, _speed),
        ("memory", "batch size"): _by_batch(points, memory),
        ("speed", "devices"): _by_devices(curves, lambda _, p: _speed(p.devices, p), _ideal_speed),
        ("memory", "devices"): _by_devices(curves, lambda _, p: memory(p.devices, p)),
        ("efficiency", "devices"): _by_devices(curves, _efficiency, Curve.ideal),
    }
    sizes = {settings_of(run.config)["size"].partition(" (")[0] for run in runs}
    size_of_all = f" ({min(sizes)})" if len(sizes) == 1 else ""
    model = f"{run_formatting.TITLES[runs[0].config.recipe]}{size_of_all}"
    nodes = {p.devices: p.config.parallel.num_nodes for curve in curves for p in curve.points}
    on_nodes = [f"{n} on {count} nodes" for n, count in sorted(nodes.items()) if count > 1]
    x = X | {"devices": f"devices ({', '.join(on_nodes)})" if on_nodes else "devices"}
    return [
        _plot(lines, quantity, axis, slug, model, (x[axis], y[quantity]), shares_cores=shares_cores)
        for (quantity, axis), lines in plots.items()
        if lines
    ]


def interval_of(
    estimate: Estimate, points: Iterable[MeasuredPoint]
) -> tuple[float, float] | tuple[None, None]:
    """Returns the interval of an estimate from these points, if a plot may show it.

    An interval from two launches alone (Student's t with one degree of freedom) reaches 6 times as
    far as the launches do and would set the axis.
    """
    if estimate.low is None or estimate.high is None:
        return None, None
    is_known = all(point.is_pooled or len(point.runs) >= ENOUGH_LAUNCHES for point in points)
    return (estimate.low, estimate.high) if is_known else (None, None)


def _mark(
    x: int, estimate: Estimate, launches: Sequence[float], points: Iterable[MeasuredPoint]
) -> "PlotPoint":
    from unitransformer.plots import PlotPoint

    low, high = interval_of(estimate, points)
    samples = tuple(launches) if len(launches) > 1 else ()
    return PlotPoint(x=x, value=estimate.value, samples=samples, low=low, high=high)


def _speed(x: int, point: MeasuredPoint) -> "PlotPoint":
    return _mark(x, point.rate, [run.units_per_s or 0.0 for run in point.runs], [point])


def _ideal_speed(curve: Curve, point: MeasuredPoint) -> float:
    return curve.baseline.rate.value * curve.ideal(point) * point.devices / curve.baseline.devices


def _efficiency(curve: Curve, point: MeasuredPoint) -> "PlotPoint":
    per_rate = curve.baseline.devices / (point.devices * curve.baseline.rate.value)
    launches = [(run.units_per_s or 0.0) * per_rate for run in point.runs]
    return _mark(point.devices, curve.efficiency(point), launches, [point, curve.baseline])


def _by_batch(
    points: Sequence[MeasuredPoint], quantity: Callable[[int, MeasuredPoint], "PlotPoint | None"]
) -> "Lines":
    marks = []
    for point, (panel, variant) in zip(points, _places(points, ON_BATCH_AXIS), strict=True):
        parallel = point.config.parallel
        key = (panel, parallel.strategy, (parallel.num_nodes, parallel.devices), variant)
        marks.append((key, quantity(point.config.batch_size, point), None))
    return _lines(marks)


def _by_devices(
    curves: Sequence[Curve],
    quantity: Callable[[Curve, MeasuredPoint], "PlotPoint | None"],
    ideal: Callable[[Curve, MeasuredPoint], float | None] = lambda *_: None,
) -> "Lines":
    marks = []
    places = _places([curve.baseline for curve in curves], VARYING_ON_A_CURVE)
    for curve, (panel, variant) in zip(curves, places, strict=True):
        key = (f"{curve.scaling} scaling, {panel}", curve.strategy, batch_of(curve), variant)
        marks += [(key, quantity(curve, point), ideal(curve, point)) for point in curve.points]
    return _lines(marks)


def batch_of(curve: Curve) -> Group:
    """Returns micro-batches and their size; of a strong curve 1 and the global batch."""
    config = curve.baseline.config
    if curve.scaling == "strong":
        return 1, config.global_batch_size
    return config.accumulate, config.batch_size


def _lines(marks: Iterable[tuple[Key, "PlotPoint | None", float | None]]) -> "Lines":
    """Returns lines from left to right; nothing if no line has two places."""
    lines: Lines = {}
    for key, mark, ideal in marks:
        if mark is not None:
            lines.setdefault(key, []).append((mark, ideal))
    for line in lines.values():
        line.sort(key=lambda item: (item[0].x, item[0].value))
    return lines if any(line[0][0].x < line[-1][0].x for line in lines.values()) else {}


def _plot(
    lines: "Lines",
    quantity: str,
    axis: str,
    slug: str,
    model: str,
    labels: tuple[str, str],
    *,
    shares_cores: bool,
) -> Plot:
    """Draws the best lines of the best panels: those that reach farthest to the right, and of them
    the best there. The first line of a panel adds its ideal. `labels` are those of x and y."""
    from unitransformer.plots import DASHED, PlotLine, PlotPoint

    sign = 1 if quantity == "memory" else -1
    ranked = sorted(lines, key=lambda key: (-lines[key][-1][0].x, sign * lines[key][-1][0].value))
    best: dict[str, list[Key]] = {}
    for key in ranked:
        best.setdefault(key[0], []).append(key)
    panels = {panel: best[panel][:MOST_LINES] for panel in sorted([*best][:MOST_PANELS])}
    groups = sorted({group for keys in panels.values() for *_, group, _ in keys})
    markers = {group: MARKERS[index % len(MARKERS)] for index, group in enumerate(groups)}
    variants = sorted({variant for *_, variant in lines})
    drawn: dict[str, list[PlotLine]] = {panel: [] for panel in panels}
    for panel, strategy, group, variant in (key for keys in panels.values() for key in keys):
        line = PlotLine(
            label=", ".join(filter(None, [strategy, product(group), variant])),
            marks=tuple(mark for mark, _ in lines[panel, strategy, group, variant]),
            color=COLORS[strategy],
            marker=markers[group],
            style=STYLES[variants.index(variant) % len(STYLES)],
        )
        drawn[panel].append(line)
    has_ideal = axis == "devices" and quantity != "memory"
    for panel, keys in panels.items() if has_ideal else ():
        ideal = tuple(PlotPoint(x=mark.x, value=ideal or 0.0) for mark, ideal in lines[keys[0]])
        drawn[panel].append(PlotLine(label="ideal", marks=ideal, style=DASHED, thickness=1.0))
    marks = [mark for lines in drawn.values() for line in lines for mark in line.marks]
    of_curve = " (in total if strong, per device if weak)" if axis == "devices" else ""
    most = max(map(len, best.values()))
    sentences = {
        f"At line ends: strategy, {MARKED[axis]}{of_curve}.": True,
        "Small dots: single launches.": any(mark.samples for mark in marks),
        "Bars: 95\u00a0% intervals.": any(mark.low is not None for mark in marks),
        f"Of up to {most} lines, the {MOST_LINES} {BEST[quantity]} at the right end are shown.": (
            most > MOST_LINES
        ),
        f"Only the {MOST_PANELS} {BEST[quantity]} of {len(best)} panels.": len(best) > MOST_PANELS,
        f"Dashed: ideal scaling from the first point of the line that is {BEST[quantity]} at the "
        "right end.": has_ideal,
        "All ranks share the cores of one machine.": has_ideal and shares_cores,
    }
    return Plot(
        name=f"{slug}-{quantity}-by-{axis.partition(' ')[0]}",
        title=f"{model}: {quantity} by {'number of ' if axis == 'devices' else ''}{axis}",
        caption=" ".join(sentence for sentence, applies in sentences.items() if applies),
        x=labels[0],
        y=labels[1],
        panels=drawn,
        markers={f"{MARKED[axis]}: {product(group)}": markers[group] for group in groups},
    )


def product(group: Group) -> str:
    """Writes a group as a product; a first factor of 1 is left out."""
    return " x ".join(map(str, group if group[0] > 1 else group[1:]))


def _places(points: Sequence[MeasuredPoint], on_axis: Collection[str]) -> list[tuple[str, str]]:
    """Returns the panel and the variant of each point: together they give every setting in which
    points differ, except those that the axis, the color and the marker show."""
    if not points:
        return []
    columns = distinguishing([point.config for point in points], on_axis)
    kinds = list(dict.fromkeys(point.runs[0].processors for point in points))
    places = []
    for index, point in enumerate(points):
        settings = settings_of(point.config)
        panel = [settings["parallel.precision"]]
        for field, name in SETTINGS.items():
            is_shown = field in columns or (field in OFTEN_PLAIN and settings[field] not in PLAIN)
            if is_shown and field not in ("size", "parallel.precision", "parallel.num_nodes"):
                panel.append(f"{name} {settings[field]}")
        panel += [settings["size"]] if "size" in columns else []
        others = [field for field in columns if field not in SETTINGS]
        variant = [f"{setting_name(field)} {columns[field][index]}" for field in others]
        if len(kinds) > 1:
            variant.append(f"machine {kinds.index(point.runs[0].processors) + 1}")
        places.append((", ".join(panel), ", ".join(variant)))
    return places

"""Builds the plots of a sweep: speed, efficiency and memory by batch size and number of devices.

Colours tell strategies apart, panels precisions, and markers the other of batch size and devices.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling.analysis.efficiency import (
    VARYING_ON_A_CURVE,
    Curve,
    Estimate,
    MeasuredPoint,
    find_curves,
    pool,
)
from scaling.report import run_formatting
from scaling.report.table_notes import PLAIN, SETTINGS, field_in_words, settings_of, telling
from scaling.store.conditions import processors_of
from scaling.store.reader import Cell
from scaling.store.run import Run
from unitransformer.config import RunConfig
from unitransformer.record.units import count, is_small

if TYPE_CHECKING:  # importing it loads matplotlib, which only a report needs
    from unitransformer.plots import PlotLine, PlotPoint

    Lines = dict["Key", list[tuple[PlotPoint, float | None]]]  # each mark with its ideal

MOST_LINES = 6  # of a panel
# An interval of fewer launches is drawn nowhere: that of two (Student's t of one degree of
# freedom) reaches 6 times as far as the launches do, and would set the axis.
LEAST_LAUNCHES = 5
# A search over mid tones gave these (Machado, Oliveira & Fernandes 2009, deuteranopia and
# protanopia): they differ for colour-blind readers too, on white and on dark pages.
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

Group = tuple[int, int]  # nodes and devices of each, or micro-batches and their size
Key = tuple[str, str, Group, str]  # of a line: panel, strategy, group, any other setting
Drawn = tuple[
    Estimate, Sequence[float], Sequence[MeasuredPoint]
]  # its launches; what it follows from


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


def plots_of(slug: str, swept: Sequence[Cell]) -> list[Plot]:
    """Builds the plots of the cells of one recipe in one sweep; an axis with one value gives none.

    Args:
        slug: begins the names of the files.
    """
    runs = [cell.run for cell in swept if cell.run is not None and cell.run.metrics is not None]
    if not runs:
        return []
    points, curves, peaks = pool(runs), find_curves(runs), _Peaks(runs)
    sizes = {settings_of(run.config)["size"].partition(" (")[0] for run in runs}
    model = run_formatting.TITLES[runs[0].config.recipe] + (
        f" ({min(sizes)})" if len(sizes) == 1 else ""
    )
    shares_cores = any(curve.threads is not None for curve in curves)
    y = {
        "speed": f"{runs[0].unit}s per second",
        "memory": f"peak memory per rank ({peaks.unit})",
        "efficiency": f"efficiency (1 = {'linear speed-up' if shares_cores else 'ideal'})",
    }
    plots = [
        ("speed", "batch size", _by_batch(points, _speed)),
        ("memory", "batch size", _by_batch(points, peaks.of)),
        ("speed", "devices", _by_devices(curves, lambda _, point: _speed(point), _ideal_speed)),
        ("memory", "devices", _by_devices(curves, lambda _, point: peaks.of(point))),
        ("efficiency", "devices", _by_devices(curves, _efficiency, Curve.ideal)),
    ]
    return [
        _plot(lines, quantity, axis, slug, model, y[quantity], shares_cores=shares_cores)
        for quantity, axis, lines in plots
        if lines
    ]


def not_drawn(swept: Sequence[Cell]) -> str:
    """Returns a sentence on the cells that no plot can show, if there are any."""
    missing: Counter[str] = Counter()
    for cell in swept:
        if cell.run is None or not cell.run.is_ok:
            is_lost = cell.outcome.status == "ok"
            missing["without its record" if is_lost else cell.outcome.status] += 1
        elif cell.run.metrics is None:
            missing["without a steady state"] += 1
    if not missing:
        return ""
    counts = ", ".join(f"{number} {what}" for what, number in sorted(missing.items()))
    return f"Not in the plots, of {count(len(swept), 'cell')}: {counts}; the table gives reasons."


def draw(plot: Plot) -> bytes:
    """Renders the SVG file of a plot."""
    from unitransformer.plots import figure_bytes, line_panels

    figure = line_panels(
        plot.panels, title=plot.title, caption=plot.caption, x=plot.x, y=plot.y,
        markers=plot.markers,
    )  # fmt: skip
    return figure_bytes(figure, "svg")


def interval_of(
    estimate: Estimate, points: Iterable[MeasuredPoint]
) -> tuple[float, float] | tuple[None, None]:
    """Returns the interval of a figure of these points, if each has enough launches for a plot."""
    if estimate.low is None or estimate.high is None:
        return None, None
    is_known = all(len(point.runs) >= LEAST_LAUNCHES for point in points)
    return (estimate.low, estimate.high) if is_known else (None, None)


# ---------------------------------------------------------------------------------- marks


def _speed(point: MeasuredPoint) -> Drawn:
    return point.rate, [run.units_per_s or 0.0 for run in point.runs], [point]


def _efficiency(curve: Curve, point: MeasuredPoint) -> Drawn:
    per_rate = curve.baseline.devices / (point.devices * curve.baseline.rate.value)
    launches = [(run.units_per_s or 0.0) * per_rate for run in point.runs]
    return curve.efficiency(point), launches, [point, curve.baseline]


def _ideal_speed(curve: Curve, point: MeasuredPoint) -> float:
    return curve.baseline.rate.value * curve.ideal(point) * point.devices / curve.baseline.devices


class _Peaks:
    """Peak memory in the unit that suits the largest of all."""

    def __init__(self, runs: Iterable[Run]) -> None:
        largest = max((peak for run in runs for peak in _peaks(run)), default=0)
        self.unit, self._bytes = ("MiB", 2**20) if is_small(largest) else ("GiB", 2**30)

    def of(self, point: MeasuredPoint) -> Drawn | None:
        """The largest peak of all ranks and launches; None where no step could be watched."""
        peaks = [max(_peaks(run)) / self._bytes for run in point.runs if _peaks(run)]
        return (Estimate(value=max(peaks), reason="counted"), peaks, [point]) if peaks else None


def _peaks(run: Run) -> list[int]:
    return [peak for peak in run.record["peak_bytes"] if peak is not None]


def _mark(x: int, drawn: Drawn) -> "PlotPoint":
    from unitransformer.plots import PlotPoint

    estimate, launches, points = drawn
    low, high = interval_of(estimate, points)
    dots = tuple(launches) if len(launches) > 1 else ()
    return PlotPoint(x=x, value=estimate.value, samples=dots, low=low, high=high)


def _by_batch(
    points: Sequence[MeasuredPoint], quantity: Callable[[MeasuredPoint], Drawn | None]
) -> "Lines":
    fixed = {"batch_size", "parallel.strategy", "parallel.devices", "parallel.num_nodes"}
    return _lines(
        (
            (panel, parallel.strategy, (parallel.num_nodes, parallel.devices), variant),
            point.config.batch_size,
            quantity(point),
            None,
        )
        for point, (panel, variant) in zip(points, _places(points, fixed), strict=True)
        for parallel in [point.config.parallel]
    )


def _by_devices(
    curves: Sequence[Curve],
    quantity: Callable[[Curve, MeasuredPoint], Drawn | None],
    ideal: Callable[[Curve, MeasuredPoint], float | None] = lambda *_: None,
) -> "Lines":
    places = _places([curve.baseline for curve in curves], VARYING_ON_A_CURVE)
    return _lines(
        (
            (f"{curve.scaling} scaling, {panel}", curve.strategy, batch_of(curve), variant),
            point.devices,
            quantity(curve, point),
            ideal(curve, point),
        )
        for curve, (panel, variant) in zip(curves, places, strict=True)
        for point in curve.points
    )


def batch_of(curve: Curve) -> Group:
    """Returns micro-batches and their size; a strong curve keeps the whole batch, as one."""
    config = curve.baseline.config
    if curve.scaling == "strong":
        return 1, config.global_batch_size
    return config.accumulate, config.batch_size


def _lines(marks: Iterable[tuple[Key, int, Drawn | None, float | None]]) -> "Lines":
    """Marks and their ideals by line, from left to right; empty if no line has two places."""
    from unitransformer.plots import PlotPoint

    lines: Lines = {}
    for key, x, drawn, ideal in marks:
        if drawn is not None:
            estimate, launches, points = drawn
            low, high = interval_of(estimate, points)
            dots = tuple(launches) if len(launches) > 1 else ()
            mark = PlotPoint(x=x, value=estimate.value, samples=dots, low=low, high=high)
            lines.setdefault(key, []).append((mark, ideal))
    for line in lines.values():
        line.sort(key=lambda item: (item[0].x, item[0].value))
    has_line = any(line[0][0].x < line[-1][0].x for line in lines.values())
    return lines if has_line else {}


# ---------------------------------------------------------------------------------- panels


def _plot(
    lines: "Lines", quantity: str, axis: str, slug: str, model: str, y: str, *, shares_cores: bool
) -> Plot:
    """Takes the best lines of each panel: those that reach farthest to the right, and of them the
    best there. The first one adds its ideal."""
    from unitransformer.plots import DASHED, PlotLine, PlotPoint

    sign = 1 if quantity == "memory" else -1
    ranked = sorted(lines, key=lambda key: (-lines[key][-1][0].x, sign * lines[key][-1][0].value))
    panels = {panel: [key for key in ranked if key[0] == panel] for panel, *_ in sorted(lines)}
    groups = sorted({key[2] for keys in panels.values() for key in keys[:MOST_LINES]})
    markers = {group: MARKERS[index % len(MARKERS)] for index, group in enumerate(groups)}
    variants = sorted({variant for *_, variant in lines})
    drawn = {
        panel: [
            PlotLine(
                label=", ".join(filter(None, [strategy, product(group), variant])),
                marks=tuple(mark for mark, _ in lines[key]),
                color=COLORS[strategy],
                marker=markers[group],
                style=STYLES[variants.index(variant) % len(STYLES)],
            )
            for key in keys[:MOST_LINES]
            for _, strategy, group, variant in [key]
        ]
        for panel, keys in panels.items()
    }
    has_ideal = axis == "devices" and quantity != "memory"
    for panel, [first, *_] in panels.items() if has_ideal else ():
        ideal = tuple(PlotPoint(x=mark.x, value=ideal or 0.0) for mark, ideal in lines[first])
        drawn[panel].append(PlotLine(label="ideal", marks=ideal, style=DASHED, thickness=1.0))
    of_strong = " (in total if strong, per device if weak)" if axis == "devices" else ""
    most = max(map(len, panels.values()))
    caption = {
        f"At line ends: strategy, {MARKED[axis]}{of_strong}.": True,
        "Small dots: single launches.": any(m.samples for line in lines.values() for m, _ in line),
        f"Only the {MOST_LINES} {BEST[quantity]} at the right end, of up to {most} lines.": (
            most > MOST_LINES
        ),
        f"Dashed: ideal scaling{' of the fastest line' if quantity == 'speed' else ''}.": has_ideal,
        "Ranks share the cores of one machine: more add none.": has_ideal and shares_cores,
    }
    return Plot(
        name=f"{slug}-{quantity}-by-{axis.partition(' ')[0]}",
        title=f"{model}: {quantity} by {'number of ' if axis == 'devices' else ''}{axis}",
        caption=" ".join(sentence for sentence, applies in caption.items() if applies),
        x=X[axis],
        y=y,
        panels=drawn,
        markers={f"{MARKED[axis]}: {product(group)}": markers[group] for group in groups},
    )


def product(group: Group) -> str:
    """Writes a group as a product; a first factor of 1 is left out."""
    return " x ".join(map(str, group if group[0] > 1 else group[1:]))


def _places(points: Sequence[MeasuredPoint], fixed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the panel and the variant of each point: together they give every setting in which
    points differ, except `fixed` ones, which the axis, the colour and the marker show."""
    if not points:
        return
    columns = telling([point.config for point in points], fixed)
    machines = [processors_of(point.runs[0].record) for point in points]
    kinds = list(dict.fromkeys(machines))
    for index, point in enumerate(points):
        variant = [
            f"{field_in_words(field)} {values[index]}"
            for field, values in columns.items()
            if field not in SETTINGS
        ]
        if len(kinds) > 1:
            variant.append(f"machine {kinds.index(machines[index]) + 1}")
        yield _panel(point.config, columns.keys()), ", ".join(variant)


def _panel(config: RunConfig, differing: Collection[str]) -> str:
    """Gives the precision always, other settings where they differ or are unusual."""
    settings = settings_of(config)
    shown = [
        f"{name} {settings[field]}"
        for field, name in SETTINGS.items()
        if field not in ("size", "parallel.precision", "parallel.num_nodes")
        and (field in differing or (field in OFTEN_PLAIN and settings[field] not in PLAIN))
    ]
    size = [settings["size"]] if "size" in differing else []
    return ", ".join([settings["parallel.precision"], *shown, *size])

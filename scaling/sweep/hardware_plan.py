"""Plans a sweep for a hardware that is not here: time, memory, device-hours and money."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from scaling.prediction.hardware import Hardware
from scaling.prediction.measured_rows import model_for
from scaling.prediction.options import parse_command, resolve_on
from scaling.prediction.predict import (
    Interval,
    Prediction,
    format_interval,
    format_rounded,
    predict,
)
from scaling.prediction.time import Provenance
from scaling.sweep.plan import distinct_cells
from scaling.sweep.study import Cell, Study
from unitransformer.config import ModelConfig
from unitransformer.record.units import UNIT, format_bytes, format_count, format_duration

MOST_ROWS = 5  # of a table; --list has the others
MOST_REASONS = 3


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell, and what its run needs on the hardware."""

    cell: Cell
    repeats: int
    prediction: Prediction | None  # None: it cannot run there
    refusal: str | None = None  # why


def plan_cells(study: Study, hardware: Hardware) -> list[PlannedCell]:
    """Predicts every cell of a study.

    Raises:
        ValueError: a cell occurs twice or has an unknown option or value, or none can run there.
    """
    model = model_for(hardware)
    planned = []
    for cell in distinct_cells(study):
        try:
            command = parse_command(cell.recipe, cell.arguments)
        except ValueError as error:
            raise ValueError(f"recipe {cell.recipe}: {error}") from None
        prediction, refusal = None, None
        try:
            config, nodes, _ = resolve_on(command, hardware)
            prediction = predict(config, nodes, model)
        except ValueError as error:
            refusal = str(error)
        planned.append(
            PlannedCell(cell=cell, repeats=study.repeats, prediction=prediction, refusal=refusal)
        )
    if all(cell.prediction is None for cell in planned):
        raise ValueError(f"no cell can run on {hardware.name}: {planned[0].refusal}")
    return planned


def render_cells(
    cells: Sequence[PlannedCell],
    hardware: Hardware,
    *,
    price_per_hour: float | None,
    is_list: bool = False,
) -> str:
    """Returns the totals, the fastest cells of each model, and why others are extrapolated.

    Args:
        price_per_hour: USD for a device; None: that of the hardware, if it has one.
        is_list: adds every cell with its command.
    """
    price = hardware.price_per_device_hour if price_per_hour is None else price_per_hour
    lines = [*_totals(cells, hardware, price), *_fastest(cells), *_refusals(cells)]
    if not is_list:
        return "\n".join([*lines, "", "--list adds every cell with its command"])
    lines.append("")
    for planned in cells:
        repeats = f"  ({planned.repeats} times)" if planned.repeats > 1 else ""
        lines += [f"{planned.cell.id}  {planned.cell.command}{repeats}", f"    {_format(planned)}"]
    return "\n".join(lines)


def _fastest(cells: Sequence[PlannedCell]) -> Iterator[str]:
    """Yields a table for each model of each recipe: its fastest cells that fit."""
    groups: dict[tuple[str, ModelConfig], list[tuple[PlannedCell, Prediction]]] = {}
    for planned in cells:
        if (prediction := planned.prediction) is not None and prediction.fits:
            key = (planned.cell.recipe, prediction.config.model)
            groups.setdefault(key, []).append((planned, prediction))
    for (recipe, _), fitting in groups.items():
        options = [planned.cell.options for planned in cells if planned.cell.recipe == recipe]
        varied = [name for name in options[0] if len({o.get(name) for o in options}) > 1]
        varied = [name for name in varied if name != "size"]  # which the title names
        ranked = sorted(fitting, key=lambda pair: pair[1].units_per_s.value, reverse=True)
        rows = [
            [
                *(planned.cell.options.get(name, "") for name in varied),
                _text(prediction.units_per_s, prediction, format_rounded),
                format_bytes(prediction.memory.total_bytes),
                _text(prediction.run_s, prediction, format_duration),
            ]
            for planned, prediction in ranked[:MOST_ROWS]
        ]
        unit = UNIT[fitting[0][1].config.recipe]
        header = [*varied, f"{unit}/s of all devices", "memory", "time of the steps"]
        size = fitting[0][1].config.size
        first = f"the fastest {len(rows)} of " if len(rows) < len(fitting) else ""
        yield f"\n{recipe} {size}: {first}{format_count(len(fitting), 'cell')}, fastest first"
        yield tabulate(rows, headers=header, disable_numparse=True)


def _refusals(cells: Sequence[PlannedCell]) -> list[str]:
    """Returns why cells are refused, each reason once."""
    reasons = Counter(planned.refusal for planned in cells if planned.refusal is not None)
    counted = [f"refused, {format_count(n, 'cell')}: {reason}" for reason, n in reasons.items()]
    return ["", *counted] if counted else []


def _text(interval: Interval, prediction: Prediction, form: str | Callable[[float], str]) -> str:
    return format_interval(interval, prediction.time.provenance, form)


def _format(planned: PlannedCell) -> str:
    prediction = planned.prediction
    if prediction is None:
        return f"refused: {planned.refusal}"
    memory, parallel = prediction.memory, prediction.config.parallel
    needs = f"{format_bytes(memory.total_bytes)} of {format_bytes(memory.capacity)}"
    devices = format_count(parallel.world_size, "device")
    if not prediction.fits:
        return f"does not fit: it needs {needs} per device, {devices}, {parallel.strategy}"
    provenance = prediction.time.provenance
    time = format_interval(prediction.run_s, provenance, format_duration)
    return (
        f"fits: {needs} per device; {time} on {devices}, {parallel.strategy}, {provenance}, "
        f"limited by {prediction.time.limited_by}"
    )


def _totals(cells: Sequence[PlannedCell], hardware: Hardware, price: float | None) -> list[str]:
    predicted = [planned for planned in cells if planned.prediction is not None]
    fitting = [(p.prediction, p.repeats) for p in predicted if p.prediction and p.prediction.fits]
    counts = f"{format_count(len(cells), 'cell')} on {hardware.name}: {len(fitting):,} fit"
    if (num_runs := sum(n for _, n in fitting)) > len(fitting):
        counts += f" ({format_count(num_runs, 'launch', 'launches')})"
    counts += f", {len(predicted) - len(fitting):,} will not fit"
    if len(predicted) < len(cells):
        counts += f", {len(cells) - len(predicted):,} refused"
    if not fitting:
        return [counts]
    are_known = all(p.time.provenance != "extrapolated" for p, _ in fitting)
    provenance: Provenance = "fitted" if are_known else "extrapolated"
    run_s = _sum((p.run_s, float(n)) for p, n in fitting)
    used = _sum((p.run_s, n * p.config.parallel.world_size / 3600) for p, n in fitting)
    time = format_interval(run_s, provenance, format_duration)
    lines = [f"{format_interval(used, provenance, format_rounded)} device-hours"]
    minutes = sum(n * p.config.parallel.world_size for p, n in fitting)
    added = f"{format_rounded(minutes / 60)} device-hours"
    if price is not None:
        cost = _sum([(used, price)])
        lines[0] += f", {format_interval(cost, provenance, ',.2f')} USD at {price:,.2f} each"
        added += f", {minutes / 60 * price:,.2f} USD"
    lines[0] += ": for the steps alone"
    return [
        counts,
        f"{time}, one launch after the other",
        *lines,
        "not in it: start-up, compilation and validation; a minute of these in every launch adds "
        f"{added}",
        "intervals hold 90 % for a cell, and those of totals are their sums",
        *_beyond([p for p, _ in fitting]),
    ]


def _beyond(predictions: Sequence[Prediction]) -> list[str]:
    """Returns why predictions are extrapolated, the most frequent reasons."""
    reasons = Counter(reason for p in predictions for reason in p.time.beyond)
    lines = [
        f"extrapolated, so that only the interval is shown: {format_count(n, 'cell')} with {reason}"
        for reason, n in reasons.most_common(MOST_REASONS)
    ]
    more = len(reasons) - len(lines)
    return [*lines, f"and {format_count(more, 'more reason')} of that kind"] if more > 0 else lines


def _sum(terms: Iterable[tuple[Interval, float]]) -> Interval:
    """Returns the sum of intervals with their factors, as if all were off the same way."""
    items = list(terms)
    return Interval(
        value=sum(interval.value * factor for interval, factor in items),
        low=sum(interval.low * factor for interval, factor in items),
        high=sum(interval.high * factor for interval, factor in items),
    )

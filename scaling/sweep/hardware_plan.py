"""Plans a sweep for a hardware that is not here: time, memory, device-hours and money."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling.prediction.hardware import Hardware
from scaling.prediction.measured_rows import model_for
from scaling.prediction.options import parse_command, resolve_on
from scaling.prediction.predict import (
    Interval,
    Prediction,
    format_hours,
    format_interval,
    predict,
)
from scaling.prediction.time import Provenance
from scaling.sweep.plan import distinct_cells
from scaling.sweep.study import Cell, Study
from unitransformer.record.units import format_bytes, format_count, format_duration


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
    cells: Sequence[PlannedCell], hardware: Hardware, *, price_per_hour: float | None
) -> str:
    """Returns a text with every cell, and the totals of those that fit.

    Args:
        price_per_hour: USD for a device; None: that of the hardware, if it has one.
    """
    lines = []
    for planned in cells:
        repeats = f"  ({planned.repeats} times)" if planned.repeats > 1 else ""
        lines += [f"{planned.cell.id}  {planned.cell.command}{repeats}", f"    {_format(planned)}"]
    price = hardware.price_per_device_hour if price_per_hour is None else price_per_hour
    return "\n".join([*lines, "", *_totals(cells, hardware, price)])


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
    num_runs, num_fitting = sum(p.repeats for p in cells), sum(n for _, n in fitting)
    num_predicted = sum(p.repeats for p in predicted)
    counts = f"{format_count(num_runs, 'cell')} on {hardware.name}: {num_fitting:,} fit, "
    counts += f"{num_predicted - num_fitting:,} will not fit"
    if num_predicted < num_runs:
        counts += f", {num_runs - num_predicted:,} refused"
    if not fitting:
        return [counts]
    are_known = all(p.time.provenance != "extrapolated" for p, _ in fitting)
    provenance: Provenance = "fitted" if are_known else "extrapolated"
    run_s = _sum((p.run_s, float(n)) for p, n in fitting)
    used = _sum((p.run_s, n * p.config.parallel.world_size / 3600) for p, n in fitting)
    time = format_interval(run_s, provenance, format_duration)
    line = f"{format_interval(used, provenance, format_hours)} device-hours"
    if price is not None:
        cost = _sum([(used, price)])
        line += f", {format_interval(cost, provenance, ',.2f')} USD at {price:,.2f} each"
    return [
        counts,
        f"{time}, one cell after the other: steps alone, without start-up and validation",
        line,
        "intervals hold 90 % for a cell, and those of totals are their sums; extrapolated: beyond "
        "four times the fitted runs, so only the interval is shown",
    ]


def _sum(terms: Iterable[tuple[Interval, float]]) -> Interval:
    """Returns the sum of intervals with their factors, as if all were off the same way."""
    items = list(terms)
    return Interval(
        value=sum(interval.value * factor for interval, factor in items),
        low=sum(interval.low * factor for interval, factor in items),
        high=sum(interval.high * factor for interval, factor in items),
    )

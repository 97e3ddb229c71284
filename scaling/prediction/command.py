"""`python -m scaling predict`: prints predictions, the answer first."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from scaling.prediction.best import (
    cheapest,
    fastest_at_cost,
    fastest_by_devices,
    largest_batch,
    runners_up,
    search_batches,
    tie_share,
    usable_bytes,
)
from scaling.prediction.comparisons import (
    format_lag,
    format_saving,
    format_shares,
    hours_ratio,
    is_known,
)
from scaling.prediction.hardware import Hardware
from scaling.prediction.held_out import calibration_errors
from scaling.prediction.measured_rows import model_for, runs_on
from scaling.prediction.memory import LARGEST_ERROR, LOWEST_ERROR, predict_memory
from scaling.prediction.options import SEARCHED, PredictOptions
from scaling.prediction.page import Block, Table, render_page, text_of
from scaling.prediction.predict import (
    Interval,
    Prediction,
    format_interval,
    format_money,
    format_rounded,
    predict,
)
from scaling.prediction.time import TimeModel
from scaling.store.reader import load_store
from scaling.store.run import Run
from unitransformer.config import RunConfig, flat_dict
from unitransformer.files import write_atomically
from unitransformer.machine.host import describe_host
from unitransformer.record.units import UNIT, format_count

GIB = 2**30
NAMES = {
    "parallel.strategy": "strategy",
    "parallel.precision": "precision",
    "batch_size": "batch",
    "accumulate": "accumulate",
    "parallel.activation_checkpointing": "checkpointing",
    "parallel.compile": "compile",
}
# Follow from other fields.
DERIVED = ("parallel.devices", "parallel.num_nodes", "model.num_positions")
PROVENANCE = (
    "Ranges are 90 % intervals. measured: this configuration was measured on this hardware. "
    "fitted: parameters, devices and tokens of a micro-batch are each within four times those of "
    "the runs in the fit, and products are in a number format of theirs. extrapolated: one is not, "
    "so that only the range is shown."
)
COMPUTED = (
    "Memory is computed and not fitted: tests hold it between "
    f"{-LOWEST_ERROR:.0%} below and {LARGEST_ERROR:.0%} above what steps of this suite allocate."
)
MOST_TIES = 4
OF_LINE = ("parallel.strategy", "size", "sequence_length")
SEARCH_TEXTS = {
    name: f"{NAMES.get(f'parallel.{name}'.replace('-', '_'), name)} {values.replace(',', ', ')}"
    for name, values in SEARCHED.items()
}


def run_predict(options: PredictOptions) -> int:
    """Prints the predictions, and returns the exit code.

    Raises:
        ValueError: no run in the folder of records ended well, or none was on this hardware.
    """
    runs: list[Run] = []
    calibration: list[str] = []
    if options.records is not None:
        every = load_store([options.records], relative_to=options.records).successful_runs
        if not every:
            raise ValueError(f"calibration {options.records} holds no run that ended well")
        runs = runs_on(options.hardware, every)
        if not runs:
            host = every[0].record["hardware"][0]
            where = host["device"]
            if where == "cpu":
                where = format_cpu(host)
            name = options.hardware.name
            if options.hardware.is_cpu:
                name += f" ({format_cpu(describe_host())})"
            raise ValueError(
                f"calibration {options.records} holds no run on {name}, but on {where}; give a "
                f"folder of runs on {options.hardware.name}"
            )
        calibration = list(_about_calibration(options, runs, len(every) - len(runs)))
    model = model_for(options.hardware, runs)

    def of(config: RunConfig) -> Prediction:
        return predict(config, options.hardware, model)

    if "batch-size" in options.searched:
        predictions = search_batches(options.configs, of)
    else:
        predictions = [of(config) for config in options.configs]
    shown = list(blocks(predictions, options, model, calibration))
    print("\n\n".join(map(text_of, shown)))
    if options.plot is not None or options.html is not None:
        _write_plots(predictions, options, shown)
    return 0


def format_cpu(host: Mapping[str, Any]) -> str:
    return f"{host['cpu']}, {format_count(host['cpu_cores'], 'core')}"


def _write_plots(
    predictions: Sequence[Prediction], options: PredictOptions, shown: Sequence[Block]
) -> None:
    from scaling.prediction.plots import MOST_LINES, curves_of, draw

    _, varied = _axes(predictions)
    keys = [_label(prediction, varied) for prediction in predictions]
    names = varied
    if len(set(keys)) > MOST_LINES:  # a line is then the fastest of its strategy and model
        names = [n for n in varied if n in OF_LINE or n.startswith("model.")]
        keys = [_label(prediction, names) for prediction in predictions]
    curves = curves_of(predictions, keys)
    drawn = curves[:MOST_LINES]
    points = [prediction for curve in drawn for prediction in curve]
    common, left = _axes(points) if points else ([], [])  # what all share, and what they do not
    names, others = [n for n in left if n in names], [n for n in left if n not in names]
    labelled = {_curve_label(curve, names): curve for curve in drawn}
    chosen = [
        f"{label}: {_curve_label(curve, others)}" for label, curve in labelled.items() if others
    ]
    what: dict[str, Any] = {
        "tokens": options.tokens,
        "price_per_hour": options.price_per_hour,
        "common": common,
        "chosen": chosen,
        "num_lines": len(curves),
    }
    if options.html is not None:
        title = f"Prediction: {text_of(shown[0]).partition(':')[0]}"
        # A curve takes several numbers of devices, and something that fits.
        is_drawn = bool(drawn) and len({p.config.parallel.world_size for p in predictions}) > 1
        figure = draw(labelled, **what, kind="svg") if is_drawn else None
        today = datetime.datetime.now(datetime.UTC).date()
        origin = [f"$ {options.command}", f"unitransformer {version('unitransformer')}, {today}"]
        # The heading and the answer come before the figure.
        page = render_page(title, figure, [*shown, origin], before=2)
        write_atomically(options.html, page)
        print(f"page: {options.html}")
    if options.plot is not None:
        kind: Literal["png", "svg"] = "png" if options.plot.suffix == ".png" else "svg"
        write_atomically(options.plot, draw(labelled, **what, kind=kind))
        print(f"plot: {options.plot}")


def run_validate(rows: Path | None) -> int:
    """Prints how far predictions are off for runs that the fit has not seen.

    Raises:
        ValueError: the file cannot be read, or holds no run that can be judged.
    """
    from scaling.prediction.validation import table

    targets = table(rows)
    met = sum(target.is_met for target in targets)
    print(f"{met} of {len(targets)} targets are met\n")
    header = ["what", "reached", "target", "met", "null predictor", "rows"]
    cells = [
        [
            target.name,
            f"{target.figure:.1%}",
            f"{target.low:.1%} to {target.high:.1%}",
            "yes" if target.is_met else "no",
            "" if target.null is None else f"{target.null:.1%}",
            str(target.num_rows),
        ]
        for target in targets
    ]
    print(tabulate(cells, headers=header, disable_numparse=True))
    return 0


def _label(prediction: Prediction, varied: Sequence[str]) -> str:
    """Returns what distinguishes a prediction, such as "fsdp, batch 4"."""
    values = flat_dict(prediction.config)
    if values["parallel.strategy"] == "single":  # is DDP on one device
        values["parallel.strategy"] = "ddp"
    plain = ("parallel.strategy", "parallel.precision", "size")
    names = [name for name in varied if not name.startswith("model.") or "size" not in varied]
    return ", ".join(
        str(values[name]) if name in plain else f"{_column(name)} {values[name]}" for name in names
    )


def _curve_label(curve: Sequence[Prediction], varied: Sequence[str]) -> str:
    """Returns what distinguishes a line; of a value that differs along it, the first and last."""
    labels = [[_label(prediction, [name]) for prediction in curve] for name in varied]
    parts = []
    for found in labels:
        name, _, last = found[-1].rpartition(" ")
        same = len(set(found)) == 1
        parts.append(found[0] if same else f"{found[0]} to {last}" if name else "varied")
    return ", ".join(parts) or "fastest"


def _about_calibration(
    options: PredictOptions, runs: Sequence[Run], num_others: int
) -> Iterator[str]:
    """Says what the time is fitted to, and how much that improves it."""
    left_out = f", and not to {format_count(num_others, 'run')} on other machines"
    yield (
        f"the time is fitted to {format_count(len(runs), 'run')} in {options.records} too"
        + (left_out if num_others else "")
    )
    errors = calibration_errors(options.hardware, runs)
    if errors is None:
        yield "they are too few to say by how much that improves predictions"
        return
    before, after = errors
    yield (
        f"without any of them their times are predicted with a median error of {before:.1%}; by "
        f"a fit to the others, that has not seen them, {after:.1%}"
    )


def blocks(
    predictions: Sequence[Prediction],
    options: PredictOptions,
    model: TimeModel,
    calibration: Sequence[str] = (),
) -> Iterator[Block]:
    """Yields the parts of the output: the answer, and unless `--best`, every row.

    Args:
        model: that made the predictions; it says how sure their ratios are.
        calibration: lines on the records that the time is fitted to.
    """
    common, varied = _axes(predictions)
    yield [heading(predictions, options, common)]
    yield [*_answer(predictions, options, varied, model)]
    if choices := [*_choices(predictions, options, varied, model)]:
        yield choices
    if not options.is_best:
        yield ["every configuration", _speed_table(predictions, varied, model)]
        yield ["memory of one device at its peak, GiB", _memory_table(predictions)]
    yield [*_notes(options, calibration)]


def heading(
    predictions: Sequence[Prediction], options: PredictOptions, common: Sequence[str]
) -> str:
    hardware, recipe = options.hardware, predictions[0].config.recipe
    sizes = ", ".join(dict.fromkeys(prediction.config.size for prediction in predictions))
    fitting = sum(prediction.fits for prediction in predictions)
    number = f"{len(predictions):,} configurations"
    # Of a CPU, each process has more if there are fewer.
    nodes = {prediction.hardware.memory_bytes: prediction.hardware for prediction in predictions}
    usable = " or ".join(f"{usable_bytes(nodes[size]) / GIB:.1f}" for size in sorted(nodes))
    whole = " or ".join(f"{size / GIB:.1f}" for size in sorted(nodes))
    return (
        f"{recipe} {sizes} on {hardware.name}: {fitting:,} of {number} fit in {usable} GiB per "
        f"device ({whole} GiB less 5 % for fragmentation)\nall: {', '.join(common)}"
    )


def _axes(predictions: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    """Returns what all configs share, in words, and the names of the fields that differ."""
    flat = [flat_dict(prediction.config) for prediction in predictions]
    varied = [
        name
        for name in flat[0]
        if name not in DERIVED and len({values[name] for values in flat}) > 1
    ]
    shown = [name for name in NAMES if name not in varied]
    common = [f"{NAMES[name]} {flat[0][name]}" for name in shown]
    if not any(name.startswith("model.") for name in varied):
        config = predictions[0].config
        common.append(f"{config.sequence_length} positions")
    return common, varied


def _answer(
    predictions: Sequence[Prediction],
    options: PredictOptions,
    varied: Sequence[str],
    model: TimeModel,
) -> Iterator[str | Table]:
    best = fastest_by_devices(predictions)
    unit = UNIT[predictions[0].config.recipe]
    header = ["devices", *map(_column, varied), "memory GiB", "step s", f"{unit}/s", "MFU"]
    header += ["limited by", "from"]
    if options.tokens is not None:
        header.append("hours")
        header += ["USD"] if options.price_per_hour is not None else []
    rows = []
    for devices, found in best.items():
        if found is None:
            least = min(
                (p for p in predictions if p.config.parallel.world_size == devices),
                key=lambda p: p.memory.total_bytes,
            )
            empty = [""] * (header.index("limited by") - 1)
            empty[len(varied)] = f"{least.memory.total_bytes / GIB:.1f}"
            row = [f"{devices:,}", *empty, "memory: nothing fits; the least is shown"]
            rows.append(row + [""] * (len(header) - len(row)))
            continue
        row = _row(found, varied)
        if options.tokens is not None:
            row.append(_interval(found.hours(options.tokens), found, format_rounded))
            if options.price_per_hour is not None:
                cost = found.cost(options.tokens, options.price_per_hour)
                row.append(_interval(cost, found, format_money))
        rows.append(row)
    fixes = [
        _largest_batch(predictions, devices, varied) for devices, p in best.items() if p is None
    ]
    if len(fixes) < len(best):
        yield "fastest that fits"
    else:  # what would fit is then the answer
        yield from fixes
        yield "nothing fits: the configuration that needs least"
    yield Table(header=header, rows=rows)
    if len(fixes) < len(best):
        yield from fixes
    if options.tokens is not None:
        yield ""
        yield from _cheapest(predictions, options, varied, model)


def _largest_batch(predictions: Sequence[Prediction], devices: int, varied: Sequence[str]) -> str:
    """Says with which batch a configuration would fit on so many devices."""
    given = [p for p in predictions if p.config.parallel.world_size == devices]
    kinds = {replace(p.config, batch_size=1): p for p in given}  # whatever the batch

    def largest_of(kind: RunConfig, hardware: Hardware) -> int:
        return largest_batch(
            lambda batch: predict_memory(replace(kind, batch_size=batch), hardware).fits
        )

    batches = {kind: largest_of(kind, p.hardware) for kind, p in kinds.items()}
    kind = max(batches, key=lambda kind: batches[kind])
    where = format_count(devices, "device")
    if batches[kind] == 0:
        return (
            f"{where}: not even batch 1 fits; try a sharded strategy, checkpointing, more devices"
        )
    others = _label(kinds[kind], [name for name in varied if name != "batch_size"])
    return (
        f"{where}: batch {batches[kind]:,} is the largest that fits"
        f"{f', with {others}' if others else ''}; give --batch-size {batches[kind]}"
    )


def _choices(
    predictions: Sequence[Prediction],
    options: PredictOptions,
    varied: Sequence[str],
    model: TimeModel,
) -> Iterator[str]:
    """Says which other combinations are as fast as far as is known, and what was searched."""
    searched = {**SEARCH_TEXTS, "batch-size": _batches(predictions)}
    if options.searched:
        yield "searched: " + "; ".join(searched[name] for name in options.searched)
        flat = flat_dict(predictions[0].config)
        left = [name for name in ("parallel.precision", "parallel.compile") if name not in varied]
        if left:
            named = " and ".join(f"--{name.rpartition('.')[2]} ({flat[name]})" for name in left)
            yield f"not searched, give several values to compare: {named}"
    if "parallel.precision" in varied:
        yield (
            "precision: these configurations compute in different number formats, so the fastest "
            "may train to another loss; compare only those that you accept"
        )
    is_tied, tie = False, tie_share(model)
    for devices, best in fastest_by_devices(predictions).items():
        others = [] if best is None else runners_up(predictions, best)
        if best is None or not others:
            continue
        lags = [best.units_per_s.value / p.units_per_s.value - 1 for p in others]
        tied = [(p, lag) for p, lag in zip(others, lags, strict=True) if lag < tie]
        is_tied |= bool(tied)
        listed = [
            f"{_label(p, _unlike(p, best, varied))} ({format_lag(p, best, model)})"
            for p, _ in (tied or [(others[0], lags[0])])[:MOST_TIES]
        ]
        if len(tied) > MOST_TIES:
            listed.append(f"{len(tied) - MOST_TIES:,} more")
        kind = "tied with" if tied else "the next is"
        yield f"{format_count(devices, 'device')}: {kind} {'; '.join(listed)}"
    if is_tied:
        yield (
            f"A lead below {tie:.0%} is a tie: equal runs may differ by as much. "
            "The ranges are wider, as they hold errors that all rows share too."
        )


def _unlike(prediction: Prediction, other: Prediction, varied: Sequence[str]) -> list[str]:
    values, others = flat_dict(prediction.config), flat_dict(other.config)
    return [name for name in varied if values[name] != others[name]]


def _batches(predictions: Sequence[Prediction]) -> str:
    largest = max(prediction.config.batch_size for prediction in predictions)
    tried = f"batch 1 to {largest:,}, doubled" if largest > 1 else "batch 1, which would be doubled"
    return f"{tried} while it fits and is at least 1 % faster"


def _cheapest(
    predictions: Sequence[Prediction],
    options: PredictOptions,
    varied: Sequence[str],
    model: TimeModel,
) -> Iterator[str]:
    """Says which configuration needs the fewest device-hours, and what it gives up."""
    least, tokens, price = cheapest(predictions), options.tokens, options.price_per_hour
    assert tokens is not None
    if least is None:
        yield "cheapest: nothing fits"
        return
    tie = tie_share(model)
    chosen = fastest_at_cost(predictions, least, tie)
    fastest = max(
        (p for p in predictions if p.fits), key=lambda p: p.units_per_s.value, default=chosen
    )
    unit = UNIT[chosen.config.recipe]
    for title, found in (("cheapest", chosen), ("fastest", fastest)):
        hours = _interval(found.hours(tokens), found, format_rounded)
        text = f"{title} for {tokens:,.0f} {unit}: {_describe(found, varied)}: {hours} hours"
        if price is None:
            device_hours = found.cost(tokens, 1.0)
            text += f", {_interval(device_hours, found, format_rounded)} device-hours"
        else:
            text += f", {_interval(found.cost(tokens, price), found, format_money)} USD"
        yield text
    if chosen is not least:
        yield (
            f"{_describe(least, varied)} costs {format_saving(least, chosen, model)}, which is a "
            f"tie (below {tie:.0%}): the fastest of those tied in cost is named"
        )
    if chosen is fastest:
        yield "the cheapest gives up nothing: it is the fastest too"
        return
    ratio = hours_ratio(chosen, fastest, model)
    longer = f"{format_rounded(ratio.low)} to {format_rounded(ratio.high)}"
    if is_known(chosen, fastest):
        longer = format_rounded(ratio.value)
    yield (
        f"against the fastest, the cheapest costs {format_saving(chosen, fastest, model)} and "
        f"takes {longer} times as long"
    )


def _describe(prediction: Prediction, varied: Sequence[str]) -> str:
    values = flat_dict(prediction.config)
    parts = [f"{_column(name)} {values[name]}" for name in varied]
    return ", ".join([f"{prediction.config.parallel.world_size:,} devices", *parts])


def _column(name: str) -> str:
    return NAMES.get(name, name.rpartition(".")[2].replace("_", "-"))


def _row(prediction: Prediction, varied: Sequence[str]) -> list[str]:
    values = flat_dict(prediction.config)
    return [
        f"{prediction.config.parallel.world_size:,}",
        *(str(values[name]) for name in varied),
        f"{prediction.memory.total_bytes / GIB:.1f}",
        _interval(prediction.step_s, prediction, ".3g"),
        _interval(prediction.units_per_s, prediction, format_rounded),
        _interval(prediction.mfu, prediction, ".0%" if prediction.mfu.low >= 0.01 else ".2%"),
        prediction.time.limited_by,
        prediction.time.provenance,
    ]


def _interval(
    interval: Interval, prediction: Prediction, form: str | Callable[[float], str]
) -> str:
    return format_interval(interval, prediction.time.provenance, form)


def _speed_table(
    predictions: Sequence[Prediction], varied: Sequence[str], model: TimeModel
) -> Table:
    unit = UNIT[predictions[0].config.recipe]
    header = ["#", "devices", *map(_column, varied), "memory GiB", "step s", f"{unit}/s", "MFU"]
    header += ["limited by", "from", "fits", "compute", "exposed", "optimizer", "hidden"]
    rows = []
    for number, prediction in enumerate(predictions, start=1):
        fits = "yes" if prediction.fits else "no"
        rows.append(
            [str(number), *_row(prediction, varied), fits, *format_shares(prediction, model)]
        )
    return Table(header=header, rows=rows)


def _memory_table(predictions: Sequence[Prediction]) -> Table:
    names = ("parameters", "gradients", "optimizer", "gathered")
    kinds = list(dict.fromkeys(kind for p in predictions for kind in p.memory.activations))
    last = ("logits", "communication", "inputs", "context")
    header = ["#", "total", *names, *kinds, *last, "at"]
    rows = []
    for number, prediction in enumerate(predictions, start=1):
        memory = prediction.memory
        sizes = [memory.total_bytes, *(getattr(memory, name) for name in names)]
        sizes += [memory.activations.get(kind, 0) for kind in kinds]
        sizes += [getattr(memory, name) for name in last]
        rows.append([str(number), *(f"{size / GIB:.2f}" for size in sizes), memory.moment])
    return Table(header=header, rows=rows)


def _notes(options: PredictOptions, calibration: Sequence[str]) -> Iterator[str]:
    yield PROVENANCE
    yield COMPUTED
    if not options.is_best:
        yield (
            "compute, exposed communication and optimizer are shares of the step; hidden "
            "communication runs beside them."
        )
    yield from calibration
    for reason in options.left_out:
        yield f"left out: {reason}"
    sources = dict.fromkeys(chain.from_iterable(options.hardware.sources.values()))
    yield "\n".join(["sources of the hardware's figures:", *sources])

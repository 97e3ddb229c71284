"""Renders a store as one HTML file that needs no network: tables, plots and every record.

Strings of records reach the page only as JSON, and its script inserts them as text. The security
policy of the page lets only its two scripts run, and lets it load nothing.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, get_args

from scaling.report.plots import COLORS, batch_of, interval_of, product
from scaling.report.rows import NAMES, Entry, entries
from scaling.report.run_formatting import TITLES, without_paths
from scaling.report.sections.answer import MOST_ROWS, find_answers, summary
from scaling.report.sections.conditions import measured_on
from scaling.report.store_analysis import StoreAnalysis
from scaling.report.table_notes import distinguishing, setting_name
from scaling.store.reader import Store
from scaling.store.run import Run
from unitransformer.config import RunConfig, Strategy, flat_dict
from unitransformer.costs.flops import count_parameters
from unitransformer.record.parameter_summary import human_count
from unitransformer.record.units import format_count

MOST_POINTS = 200  # of a loss curve, so that a page of ten thousand rows opens
DIGITS = 5  # of a loss
LOG_LINES = 12
LONGEST_LINE = 300  # characters of a log line; the record has all of them
SCRIPTS = ("rows.js", "table.js", "plots.js", "efficiency.js", "detail.js", "page.js")  # in order
IN_COLUMNS = (  # settings that columns of a row show
    "size", "batch_size", "parallel.strategy", "parallel.precision", "parallel.compile",
    "parallel.devices", "parallel.num_nodes", "parallel.accelerator",
)  # fmt: skip
OF_AN_AXIS = ("batch_size", "parallel.devices")  # what the x axes of plots show


def render_html(analysis: StoreAnalysis, *, title: str) -> str:
    """Renders the page; equal stores give equal bytes."""
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    shown = entries(analysis.store)
    settings = [flat_dict(entry.config) if entry.config else {} for entry in shown]
    statuses = Counter(entry.row.status for entry in shown)
    counts = ", ".join(f"{number:,} {status}" for status, number in sorted(statuses.items()))
    plotly = get_plotlyjs()
    # A block keeps the names of this script apart from those of plotly.
    script = '"use strict";\n{\n' + "\n".join(map(_part, SCRIPTS)) + "}\n"
    parts = {
        "title": html.escape(title),
        "policy": html.escape(_policy([plotly, script])),
        "style": _part("page.css"),
        "opening": f"{format_count(len(shown), 'run')}: {counts}." if shown else "No runs.",
        "measured_on": html.escape(_measured_on(analysis)),
        "fastest": _fastest(analysis),
        "left_out": _left_out(analysis.store),
        "rows": _json(_table(shown, settings, analysis)),
        "details": _json(_details(shown, settings)),
        "plotly": plotly,
        "script": script,
    }
    # In one pass, so that names inside inserted text are not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _part("page.html"))


def _part(name: str) -> str:
    return (resources.files("scaling.report.html") / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Content Security Policy: these scripts by digest, inline styles, images made by the page."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json(values: Any) -> str:
    """Writes JSON that an HTML parser cannot take for a tag."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _measured_on(analysis: StoreAnalysis) -> str:
    runs = analysis.store.successful_runs
    return f"Measured on {measured_on(runs)}." if runs else ""


def _fastest(analysis: StoreAnalysis) -> str:
    """Lists the fastest configuration of each model and number of devices, as RESULTS.md does."""
    certificates = analysis.store.certificates
    lines = [
        f"<li>{html.escape(f'{TITLES[recipe]}, {summary(answer)}')}</li>"
        for recipe, points in analysis.points.items()
        for answer in find_answers(points, certificates, analysis.count_others)[:MOST_ROWS]
    ]
    return f"<h2>Fastest configuration</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _left_out(store: Store) -> str:
    """Lists damaged and duplicate records; files that are no records are not worth a line."""
    lines = [
        f"<li>{html.escape(f'{file.name}: {file.kind}, {file.reason}')}</li>"
        for file in store.left_out
        if file.kind != "foreign"
    ]
    head = f"{format_count(len(lines), 'file')} left out"
    return f"<details><summary>{head}</summary><ul>{''.join(lines)}</ul></details>" if lines else ""


def _table(
    shown: Sequence[Entry], settings: Sequence[Mapping[str, Any]], analysis: StoreAnalysis
) -> dict[str, Any]:
    models = []
    for entry in shown:  # the parameter count reveals a size that was changed field by field
        parts = [TITLES[entry.row.recipe], entry.row.size or ""]
        if entry.config is not None:
            parts.append(f"({human_count(count_parameters(entry.config.model))})")
        models.append(" ".join(filter(None, parts)))
    also = _also(shown, models)
    return {
        "names": ["model", "rest", "also", *NAMES],
        "rows": [
            [models[i], _rest(settings[i]), also[i], *(getattr(entry.row, name) for name in NAMES)]
            for i, entry in enumerate(shown)
        ],
        "strategies": get_args(Strategy),
        "colors": COLORS,
        "units": {model: entry.row.unit for model, entry in zip(models, shown, strict=True)},
        "curves": _curves(shown, analysis),
    }


def _rest(settings: Mapping[str, Any]) -> str | None:
    """A digest of every setting that no x axis shows: a line joins rows that share it."""
    rest = sorted((name, repr(value)) for name, value in settings.items() if name not in OF_AN_AXIS)
    return hashlib.sha256(repr(rest).encode()).hexdigest()[:8] if rest else None


def _also(shown: Sequence[Entry], models: Sequence[str]) -> list[str | None]:
    """The settings, beyond the columns, in which a row differs from others of its model."""
    groups: dict[str, dict[int, RunConfig]] = {}
    for index, (entry, model) in enumerate(zip(shown, models, strict=True)):
        if entry.config is not None:
            groups.setdefault(model, {})[index] = entry.config
    also: list[str | None] = [None] * len(shown)
    for configs in groups.values():
        columns = distinguishing(list(configs.values()), IN_COLUMNS)
        for number, index in enumerate(configs):
            parts = [f"{setting_name(field)} {cells[number]}" for field, cells in columns.items()]
            also[index] = ", ".join(parts) or None
    return also


def _curves(shown: Sequence[Entry], analysis: StoreAnalysis) -> list[dict[str, Any]]:
    """Efficiency over devices; a point is its row, devices, value, interval and ideal."""
    rows = {entry.run.name: row for row, entry in enumerate(shown) if entry.run is not None}
    return [
        {
            "panel": f"{curve.scaling} scaling, {curve.baseline.config.parallel.precision}",
            "strategy": curve.strategy,
            "batch": product(batch_of(curve)),
            "points": [
                [
                    *(rows[point.middle.name], point.devices, efficiency.value),
                    *interval_of(efficiency, [point, curve.baseline]),
                    curve.ideal(point),
                ]
                for point in curve.points
                for efficiency in [curve.efficiency(point)]
            ],
        }
        for curves in analysis.curves.values()
        for curve in curves
    ]


def _details(shown: Sequence[Entry], settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the record of each row holds beyond the row; settings that all share are given once."""
    known = [values.items() for values in settings if values]
    first = known[0] if known else ()
    shared = dict(item for item in first if all(item in other for other in known))
    rows = []
    for entry, values in zip(shown, settings, strict=True):
        rest = {name: value for name, value in values.items() if name not in shared}
        losses = {} if entry.run is None else _losses(entry.run)
        rows.append({"config": rest if values else None, "log": _log(entry), **losses})
    return {"shared": shared, "rows": rows}


def _log(entry: Entry) -> list[str]:
    """The last log lines: those of the cell if it failed, else those of the run."""
    lines: Sequence[Any] = () if entry.outcome is None else entry.outcome.last_lines
    hosts: Sequence[Any] = ()
    if entry.run is not None:
        lines, hosts = lines or entry.run.log, entry.run.record["hardware"]
    return [without_paths(str(line), hosts)[:LONGEST_LINE] for line in lines[-LOG_LINES:]]


def _losses(run: Run) -> dict[str, Any]:
    """Training loss of one step in `every`, the last included; [[step, validation loss]]."""
    losses = run.record["loss"]
    every = max(1, math.ceil(len(losses) / MOST_POINTS))
    history = run.record["validation"]["history"] if run.is_ok else []
    return {
        "every": every,
        "loss": [_short(loss) for loss in losses[::-1][::every][::-1]],
        "validation": [(point["step"], _short(point["val_loss"])) for point in history],
    }


def _short(loss: float) -> float:
    return float(f"{loss:.{DIGITS}g}")

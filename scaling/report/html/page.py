"""A store goes in; one HTML file comes out that needs no network: tables, plots, every record.

Texts of records reach the page as JSON only, and its script puts them there as text. The page's
own security policy lets nothing run but its two scripts, and nothing be loaded from anywhere.
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

from scaling.analysis.efficiency import batch_of, find_curves
from scaling.markdown import count
from scaling.report.environment import without_places
from scaling.report.rows import NAMES, Entry, Row, entries
from scaling.report.run_formatting import TITLES
from scaling.report.table_notes import field_in_words, telling
from scaling.store.reader import Store
from scaling.store.run import Run
from unitransformer.config import Recipe, RunConfig, Strategy, to_dict
from unitransformer.costs.flops import count_parameters
from unitransformer.record.parameter_summary import human_count

MOST_POINTS = 200  # of a loss curve: a page of ten thousand rows has to open
DIGITS = 5  # of a loss
LOG_LINES = 12
LONGEST_LINE = 300  # letters of a line of a log; the record has all of them
SCRIPTS = (  # in this order, as one
    *("rows.js", "table.js", "plots.js", "efficiency.js", "detail.js", "page.js"),
)
TOLD = (  # by columns of a row
    *("size", "batch_size", "parallel.strategy", "parallel.precision", "parallel.compile"),
    *("parallel.devices", "parallel.num_nodes", "parallel.accelerator"),
)
OF_AN_AXIS = ("batch_size", "parallel.devices")  # what stands on the x axis of a plot


def render_html(store: Store, *, title: str) -> str:
    """The page, the same for equal stores."""
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    found = entries(store)
    plotly, script = get_plotlyjs(), _script()
    parts = {
        "title": html.escape(title),
        "policy": html.escape(_policy([plotly, script])),
        "style": _part("page.css"),
        "opening": html.escape(_opening([entry.row for entry in found])),
        "left_out": _left_out(store),
        "rows": _json(_table(found)),
        "details": _json(_details(found)),
        "plotly": plotly,
        "script": script,
    }
    # In one pass: what is put in is not looked through for names again.
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _part("page.html"))


def _part(name: str) -> str:
    return (resources.files("scaling.report.html") / name).read_text(encoding="utf-8")


def _script() -> str:
    # A block keeps the names of the page's script from those of plotly.
    return '"use strict";\n{\n' + "\n".join(map(_part, SCRIPTS)) + "}\n"


def _policy(scripts: Sequence[str]) -> str:
    """Content Security Policy: these scripts by their digest, styles, pictures made by the page."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json(values: Any) -> str:
    """JSON that no parser of HTML takes for a tag."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _opening(rows: Sequence[Row]) -> str:
    statuses = Counter(row.status for row in rows)
    told = ", ".join(f"{number:,} {status}" for status, number in sorted(statuses.items()))
    return f"{count(len(rows), 'run')}: {told}." if rows else "No runs."


def _left_out(store: Store) -> str:
    """Damaged and double records; files that are something else are no business of a reader."""
    files = [file for file in store.left_out if file.kind != "foreign"]
    if not files:
        return ""
    lines = "".join(
        f"<li>{html.escape(f'{file.name}: {file.kind}, {file.reason}')}</li>" for file in files
    )
    head = f"{count(len(files), 'file')} left out"
    return f"<details><summary>{head}</summary><ul>{lines}</ul></details>"


def _table(found: Sequence[Entry]) -> dict[str, Any]:
    """Values without their names: those stand in front once."""
    also = _also(found)
    return {
        "names": ["model", "rest", "also", *NAMES],
        "rows": [
            [_model(entry), _rest(entry), told, *(getattr(entry.row, name) for name in NAMES)]
            for entry, told in zip(found, also, strict=True)
        ],
        "strategies": get_args(Strategy),
        "units": _units(found),
        "curves": _curves_of(found),
    }


def _rest(entry: Entry) -> str | None:
    """A short name of everything that no x axis tells: a line joins rows that share it."""
    config = _config(entry)
    told = sorted((name, repr(value)) for name, value in config.items() if name not in OF_AN_AXIS)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8] if told else None


def _also(found: Sequence[Entry]) -> list[str | None]:
    """What else tells a row from others of its model, in words: nothing else on a plot does."""
    places: dict[str, list[int]] = {}
    for place, entry in enumerate(found):
        if _config_of(entry) is not None:
            places.setdefault(_model(entry), []).append(place)
    told: list[str | None] = [None] * len(found)
    for own in places.values():
        configs = [config for place in own if (config := _config_of(found[place])) is not None]
        columns = telling(configs, TOLD)
        for index, place in enumerate(own):
            words = [
                f"{field_in_words(field)} {values[index]}" for field, values in columns.items()
            ]
            told[place] = ", ".join(words) or None
    return told


def _curves_of(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """Efficiency over devices; a point is its row, devices, figure, interval and ideal."""
    rows = {entry.run.name: row for row, entry in enumerate(found) if entry.run is not None}
    runs = [entry.run for entry in found if entry.run is not None]
    return [
        {
            "model": _model(found[rows[curve.points[-1].middle.name]]),
            "strategy": curve.strategy,
            "name": f"batch {batch_of(curve)}",
            "points": [
                [rows[point.middle.name], point.devices, told.value, told.low, told.high, ideal]
                for point in curve.points
                for told, ideal in [(curve.efficiency(point), curve.ideal(point))]
            ],
        }
        for recipe in get_args(Recipe)
        for curve in find_curves(run for run in runs if run.config.recipe == recipe)
    ]


def _model(entry: Entry) -> str:
    """Recipe and size; how many parameters it has tells of a size that was changed."""
    row, config = entry.row, _config_of(entry)
    size = [] if config is None else [f"({human_count(count_parameters(config.model))})"]
    return " ".join(filter(None, (TITLES[row.recipe], row.size, *size)))


def _units(found: Sequence[Entry]) -> dict[str, str]:
    return {_model(entry): entry.row.unit for entry in found}


# ---------------------------------------------------------------------------------- details


def _details(found: Sequence[Entry]) -> dict[str, Any]:
    """Of every row what its record holds beyond the row; what all configs share stands once."""
    configs = [_config(entry) for entry in found]
    told = [config for config in configs if config]
    shared = {
        name: value
        for name, value in (told[0] if told else {}).items()
        if all(name in config and config[name] == value for config in told)
    }
    return {
        "shared": shared,
        "rows": [
            {
                "config": None if not config else _without(config, shared),
                "log": _log(entry),
                **({} if entry.run is None else _curves(entry.run)),
            }
            for entry, config in zip(found, configs, strict=True)
        ],
    }


def _config(entry: Entry) -> dict[str, Any]:
    """Every field by its dotted name; empty: the recipe refused the options."""
    config = _config_of(entry)
    return {} if config is None else _flat(to_dict(config))


def _config_of(entry: Entry) -> RunConfig | None:
    return entry.run.config if entry.run else entry.outcome.config if entry.outcome else None


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


def _without(config: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in shared}


def _log(entry: Entry) -> list[str]:
    """The last lines: of the cell's log if it ended badly, else of the run's."""
    lines: Sequence[Any] = () if entry.outcome is None else entry.outcome.last_lines
    hosts: Sequence[Any] = ()
    if entry.run is not None:
        lines, hosts = lines or entry.run.log, entry.run.record["hardware"]
    return [without_places(str(line), hosts)[:LONGEST_LINE] for line in lines[-LOG_LINES:]]


def _curves(run: Run) -> dict[str, Any]:
    """Training loss of one step in `every`, the last one among them; [[step, validation loss]]."""
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

"""`python -m scaling counters`: what the FLOP counters of other packages print for a recipe.

Subprocesses read the options and count, since recipes and counters need more than this package.
"""

import json
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from unitransformer.cli import Parser
from unitransformer.config import Recipe
from unitransformer.launch.subprocess_module import run_module
from unitransformer.record.units import format_si

PLAN_LIMIT_S, COUNT_LIMIT_S = 120.0, 900.0
HEADER = ("counter", "package", "prints", "this network", "plain network", "why")


def build_counters_parser() -> Parser:
    parser = Parser(
        description="Count the forward pass of a recipe's model with every FLOP counter of another "
        "package that is installed, and compare with the true number. Nothing is computed."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--recipe", type=Recipe, default="gpt", help="model to count")
    parser.add_argument("--size", type=str, default="reference", help="named model size")
    parser.add_argument(
        "--sequence-length", type=int | None, default=None, help="default: all positions"
    )
    return parser


def run_counters(given: Any) -> int:
    """Prints a table with a row for each installed counter.

    Raises:
        ValueError: a size or length that the recipe refuses.
        RuntimeError: a subprocess failed.
    """
    arguments = ["--size", given.size]
    if given.sequence_length is not None:
        arguments += ["--sequence-length", str(given.sequence_length)]
    question = {"recipe": given.recipe, "arguments": arguments, "check": {"devices": 1}}
    plan = run_module(
        "recipes.service.plan", [], limit_s=PLAN_LIMIT_S, stdin_text=json.dumps(question)
    )
    answer = json.loads(plan)
    if "config" not in answer:
        raise ValueError(answer.get("misread") or answer["refused"])
    config = json.dumps(answer["config"])
    printed = run_module(
        "unitransformer.flop_counters", [], limit_s=COUNT_LIMIT_S, stdin_text=config
    )
    print(render(f"{given.recipe} {given.size}", json.loads(printed)))
    return 0


def render(model: str, counts: Mapping[str, Any]) -> str:
    """Returns the counts of `unitransformer.flop_counters` as text."""
    true, rows = counts["true"], counts["rows"]
    missing = dict.fromkeys(row["package"] for row in rows if row["version"] is None)
    table = [_cells(row, true) for row in rows if row["version"] is not None]
    lines = [
        f"{model}: a forward pass of one sample is {format_si(true['suite'])}FLOP in this network "
        f"and {format_si(true['plain'])}FLOP in a plain one made of nn.MultiheadAttention.",
        "Shares are of these numbers. A multiply-add (MAC) is two FLOPs.",
        "",
        tabulate(table, headers=HEADER, disable_numparse=True),
    ]
    if missing:
        names = [name for name in missing if "thop" not in name]
        fixes = [f"pip install {' '.join(names)}"] if names else []
        fixes += ["thop or ultralytics-thop, not both"] if len(names) < len(missing) else []
        lines += ["", f"not installed: {', '.join(missing)} ({'; '.join(fixes)})"]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], true: Mapping[str, float]) -> tuple[str, ...]:
    version = f"{row['package']} {row['version']}".strip()
    if "error" in row:
        return (row["name"], version, "", "", "", f"failed: {row['error']}")
    counted, unit = row["counted"], row["unit"]
    factor = 2 if unit == "MAC" else 1
    shares = (f"{factor * counted[name] / true[name]:.1%}" for name in true)
    return (row["name"], version, f"{format_si(counted['suite'])}{unit}", *shares, row["reason"])

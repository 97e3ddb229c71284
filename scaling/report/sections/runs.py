"""The page of single runs: what each recipe's longest run built, its speed, memory and FLOPs."""

from collections.abc import Callable, Mapping, Sequence

from scaling.markdown import code_block, command_lines, details, escaped
from scaling.report import run_formatting
from scaling.report.environment import apart
from scaling.report.sections.architecture import draw_architecture
from scaling.report.sections.speed import figures_table, passport_tables
from scaling.report.table_notes import draw
from scaling.store.run import Run
from unitransformer.record.units import count


def runs_blocks(
    runs: Sequence[Run], single: Sequence[Run], described: Mapping[str, Callable[[Run], str]]
) -> list[str]:
    """Blocks on the runs of one recipe.

    Args:
        runs: the longest first; the others are compared with it.
        single: those that are not cells of a sweep.
        described: cells by head, for the table of all single runs.
    """
    run, title = runs[0], run_formatting.TITLES[runs[0].config.recipe]
    return [
        f"## {title}",
        f"{escaped(run_formatting.label(run))}, {count(run.num_steps, 'step')}, "
        f"{run_formatting.record(run)}:",
        code_block(command_lines(run.record["command"]), "sh"),
        "### Architecture",
        code_block(draw_architecture(run.config), "mermaid"),
        "### Parameters",
        details("Parameters", code_block(run.record["summary"])),
        "### Speed and memory",
        figures_table(run, runs[1:]),
        "### FLOPs and MFU",
        *passport_tables(run),
        *_all_runs(single, described),
    ]


def _all_runs(runs: Sequence[Run], described: Mapping[str, Callable[[Run], str]]) -> list[str]:
    if len(runs) < 2:
        return []
    columns = {"#": [str(number) for number in range(1, len(runs) + 1)]}
    columns |= {head: [describe(run) for run in runs] for head, describe in described.items()}
    commands = [
        f"# {number}\n{command_lines(run.record['command'])}" for number, run in enumerate(runs, 1)
    ]
    return [
        "### All runs",
        apart([run.record for run in runs]),
        *draw(columns, ("#", "speed", "record")),
        details("Commands of all runs", code_block("\n".join(commands), "sh")),
    ]

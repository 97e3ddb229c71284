"""The page of single runs: what each recipe's longest run built, its speed, memory and FLOPs."""

from collections.abc import Collection, Sequence

from scaling.markdown import code_block, command_lines, details, escaped, folded_commands
from scaling.parity.certificate import Certificate
from scaling.report import run_formatting
from scaling.report.sections.architecture import draw_architecture
from scaling.report.sections.parity import parity_cell
from scaling.report.sections.speed import figures_table, mfu_tables
from scaling.report.table_notes import conditions_of_rows, draw
from scaling.store.run import Run
from unitransformer.record.units import format_count


def runs_blocks(
    runs: Sequence[Run], single: Collection[str], certificates: Sequence[Certificate]
) -> list[str]:
    """Returns the blocks on the runs of one recipe.

    Args:
        runs: the longest first; the others are compared with it.
        single: names of runs that are not cells of a sweep.
    """
    run = runs[0]
    return [
        f"## {run_formatting.TITLES[run.config.recipe]}",
        f"{escaped(run_formatting.label(run))}, {format_count(run.num_steps, 'step')}, "
        f"{run_formatting.record(run)}:",
        code_block(command_lines(run.record["command"]), "sh"),
        "### Architecture",
        code_block(draw_architecture(run.config), "mermaid"),
        "### Parameters",
        details("Parameters", code_block(run.record["summary"])),
        "### Speed and memory",
        figures_table(run, runs[1:]),
        "### FLOPs and MFU",
        *mfu_tables(run),
        *_all_runs([run for run in runs if run.name in single], certificates),
    ]


def _all_runs(runs: Sequence[Run], certificates: Sequence[Certificate]) -> list[str]:
    if len(runs) < 2:
        return []
    rows = [
        {"#": str(number)} | run_formatting.overview(run, parity_cell(run, certificates))
        for number, run in enumerate(runs, 1)
    ]
    commands = [(str(number), run.record["command"]) for number, run in enumerate(runs, 1)]
    return [
        "### All runs",
        *conditions_of_rows([run.record for run in runs]),
        *draw(rows, always=("#", "speed", "record")),
        folded_commands("Commands of all runs", commands),
    ]

"""Shows what the regression checks find, and what other rules say of the same steps."""

from collections.abc import Sequence

from scaling.markdown import escaped, folded_commands, link
from scaling.report.run_formatting import without_folder
from scaling.report.table_notes import draw
from scaling.store.self_test import SelfTest

SHORT = 12  # characters of a commit


def regressions_blocks(self_tests: Sequence[SelfTest]) -> list[str]:
    """Returns an answer and a table of the newest self-test; nothing without one."""
    if not self_tests:
        return []
    test = max(self_tests, key=lambda test: str(test.content["started_at"]))
    command = without_folder(str(test.content["command"]))
    rows = [{name: escaped(cell) for name, cell in row.items()} for row in test.rule_rows()]
    return [
        "## Regression checks",
        f"**{escaped(_answer(test))}**",
        _conditions(test),
        *draw(rows, always=tuple(rows[0])),
        "\n".join(f"- {escaped(line)}" for line in test.explain()),
        folded_commands("Command of the self-test", [("self-test", command)]),
    ]


def _answer(test: SelfTest) -> str:
    ours, trials = test.content["rules"][0], test.num_trials
    answer = (
        f"Beside {test.content['busy_processes']} busy processes, compare called equal steps "
        f"slower or faster in {ours['false_alarms']} of {trials} trials, and found 5 % more work "
        f"in {ours['found_5_percent']} and 2 % in {ours['found_2_percent']}."
    )
    broken = [promise["name"] for promise in test.broken_promises]
    return answer if not broken else f"{answer} Broken: {'; '.join(broken)}."


def _conditions(test: SelfTest) -> str:
    content = test.content
    parts = (
        str(content["machine"]["cpu"] or "processor unknown"),
        f"{content['machine']['cpu_cores']} cores",
        f"commit {str(content['code']['commit'])[:SHORT]}",
        str(content["started_at"])[:10],
    )
    return f"{escaped('; '.join(parts))}. Record: {link(test.name, 'self-test')}."

"""The pages of a report: short, without padding, every configuration once."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from unittest.mock import MagicMock

import pytest

from scaling.analysis.efficiency import find_curves, pool
from scaling.markdown import command_lines, table, wrapped
from scaling.report.results_md import rebased
from scaling.report.sections.answer import answer_blocks, find_answers
from scaling.report.store_analysis import StoreAnalysis, page_name, sweep_names
from scaling.store.reader import Store
from scaling.store.run import Run
from tests.builders.certificates import CERTIFICATES
from tests.builders.records import CEILING, HOST, make_crashed, make_record
from tests.builders.reports import make_store, pages_of
from tests.builders.runs import repeated, strong, way

LONGEST_LINE = 400
LARGEST_RESULTS = 40_000  # bytes


def tables(text: str) -> Iterator[list[list[str]]]:
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        yield [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]


@pytest.fixture(scope="module")
def stored(repository: Path) -> dict[str, str]:
    """The pages of this repository."""
    pages = [repository / "RESULTS.md", *(repository / "scaling" / "results").glob("*.md")]
    return {page.name: page.read_text() for page in pages}


def test_the_first_page_is_short_and_no_page_has_long_lines_or_padding(
    stored: dict[str, str],
) -> None:
    assert len(stored["RESULTS.md"].encode()) <= LARGEST_RESULTS
    for name, text in stored.items():
        assert max(map(len, text.splitlines())) <= LONGEST_LINE, name
        for rows in tables(text):
            assert {len(row) for row in rows} == {len(rows[0])}, name
            assert not [cell for row in rows for cell in row if "  " in cell.strip()], name
            assert all(len(cell) <= len(cell.strip()) + 2 for row in rows for cell in row), name


def test_every_link_of_the_stored_pages_leads_somewhere(
    stored: dict[str, str], repository: Path
) -> None:
    for name, text in stored.items():
        folder = repository if name == "RESULTS.md" else repository / "scaling" / "results"
        links = re.findall(r"(?<!\\)\]\(([^()\s]+)\)", text)
        assert [link for link in links if not (folder / link).is_file()] == [], name


def test_long_texts_of_records_make_no_long_lines() -> None:
    words = "word " * 400
    record = make_record(
        flags=[words], command=f"python -m recipes.gpt {'--option value ' * 100}".strip()
    )
    crashed = make_crashed(error={"type": "OSError", "message": words})
    for name, text in pages_of(make_store(record, record | {"flags": []}, crashed)).items():
        assert max(map(len, text.splitlines())) <= LONGEST_LINE, name


# ---------------------------------------------------------------------------------- the answer


def row_of(blocks: list[str], number: int = 0) -> dict[str, str]:
    (rows,) = [found for block in blocks for found in tables(f"{block}\n")]
    heads, _, *body = [[cell.strip() for cell in row] for row in rows]
    return dict(zip(heads, body[number], strict=True))


def test_the_answer_is_the_fastest_configuration_with_its_lead() -> None:
    runs = [*repeated("ddp", 0.05, 0.051), *repeated("zero1", 0.1, 0.101)]
    (answer,) = find_answers(pool(runs), CERTIFICATES)
    row = row_of(answer_blocks([answer], find_curves(runs)))
    assert row["devices"] == "2"
    assert row["fastest configuration"] == "ddp, 32-true, 4 per device"
    assert row["launches"].startswith("2: 1,2")
    assert row["runner-up"] == "zero1, 32-true, 4 per device"
    assert float(row["lead"].split(" ")[0]) == pytest.approx(2, rel=0.05)
    assert row["weak efficiency"] == "baseline"
    assert row["tried"] == "2"
    assert row["dropout"] == f"{runs[0].config.model.dropout:g}"
    assert row["utilisation"].endswith("% of the float32 ceiling")


def test_a_tie_is_called_a_tie_and_what_is_not_proven_is_not_the_answer() -> None:
    runs = [
        *repeated("ddp", 0.05, 0.051),
        *repeated("zero1", 0.0501, 0.0509),
        *repeated("fsdp", 0.01, 0.011),  # its certificate: another model
    ]
    (answer,) = find_answers(pool(runs), CERTIFICATES)
    row = row_of(answer_blocks([answer], find_curves(runs)))
    assert row["fastest configuration"].startswith(("ddp", "zero1"))
    assert row["lead"].startswith("tie: 1.0")
    assert row["tried"] == "3"
    assert row["of these"] == "1 tie, 1 without proven parity"
    nothing = row_of(answer_blocks(find_answers(pool(runs), []), []))
    assert nothing["fastest configuration"] == "none has proven loss parity"
    assert not {"speed", "lead"} & nothing.keys()


def test_the_best_of_few_configurations_says_of_how_many() -> None:
    runs = [*repeated("ddp", 0.05, 0.051), *repeated("zero1", 0.1, 0.101)]
    # Others that ended without a speed, such as out of memory, are no reason for doubt.
    for counts, tried in (((2, 2), "2 of 4"), ((9, 2), "2 of 11"), ((9, 3), "2 of 11")):
        (answer,) = find_answers(pool(runs), CERTIFICATES, MagicMock(return_value=counts))
        row = row_of(answer_blocks([answer], []))
        few = "best of 2 measured: " if counts == (9, 3) else ""
        assert row["fastest configuration"] == f"{few}ddp, 32-true, 4 per device"
        assert row["tried"] == tried


def lasting(run: Run, max_steps: int) -> Run:
    """The same run with the defaults of a command line that gives `max_steps`, and its seed."""
    config = replace(
        run.config,
        max_steps=max_steps,
        validate_every=max_steps // 4,
        log_every=max_steps // 20,
        seed=max_steps,
        optimizer=replace(run.config.optimizer, schedule_steps=max(100, max_steps)),
    )
    return replace(run, config=config)


def test_runs_of_other_lengths_are_launches_of_one_configuration() -> None:
    launches = [*repeated("ddp", 0.05, 0.051), *repeated("zero1", 0.1, 0.101)]
    runs = [lasting(run, 60 + 90 * (index % 2)) for index, run in enumerate(launches)]
    points = StoreAnalysis(Store(runs=tuple(runs), left_out=())).points["gpt"]
    blocks = answer_blocks(find_answers(points, CERTIFICATES), [])
    row = row_of(blocks)
    assert (row["tried"], row["launches"][:2]) == ("2", "2:")
    assert row["runner-up"] == "zero1, 32-true, 4 per device"
    assert "Same in all rows" not in blocks[0]


def test_rows_of_equal_models_say_in_which_work_they_differ() -> None:
    runs = [*repeated("ddp", 0.05), *repeated("zero1", 0.1)]
    optimizer = replace(runs[0].config.optimizer, learning_rate=0.125)
    others = [replace(run, config=replace(run.config, optimizer=optimizer)) for run in runs]
    moved = [
        replace(run, record=run.record | {"hardware": [HOST | {"cpu": "Other"}] * 2})
        for run in runs
    ]
    blocks = answer_blocks(find_answers(pool([*runs, *others]), CERTIFICATES), [])
    rates = {row_of(blocks, number)["optimizer.learning_rate"] for number in (0, 1)}
    assert rates == {"0.0003", "0.125"}
    blocks = answer_blocks(find_answers(pool([*runs, *moved]), CERTIFICATES), [])
    processors = " ".join(row_of(blocks, number)["processors"] for number in (0, 1))
    assert "Example 9000" in processors
    assert "Other" in processors


@pytest.mark.parametrize(
    ("steps", "ceilings", "why"),
    [
        (20, (1e11, 1e11), "one launch each, no interval"),
        (60, (1e11, 3e11), "one launch each, machine drift 200.0%"),
    ],
)
def test_an_undecided_lead_says_why(steps: int, ceilings: tuple[float, float], why: str) -> None:
    runs = [
        way(
            strategy,
            step_s,
            steps=steps,
            changes={"ceiling": [CEILING | {"matmul_flops_per_s": rate}]},
        )
        for strategy, step_s, rate in zip(("ddp", "zero1"), (0.05, 0.1), ceilings, strict=True)
    ]
    (answer,) = find_answers(pool(runs), CERTIFICATES)
    lead = row_of(answer_blocks([answer], []))["lead"]
    assert re.fullmatch(rf"not confirmed: (1\.9|2\.0)\d( \(.*\))?, {why}", lead)


def test_more_devices_have_the_efficiency_of_the_same_configuration() -> None:
    runs = [
        strong(0.1, 1, "a", batch_size=4),
        strong(0.125, 2, "b", batch_size=4),
    ]
    blocks = answer_blocks(find_answers(pool(runs), CERTIFICATES), find_curves(runs))
    assert row_of(blocks, 1)["weak efficiency"] == "80.0% (80.0% to 80.0%)"


# ---------------------------------------------------------------------------------- Markdown


def test_a_table_has_no_padding() -> None:
    assert table(("a", "long head"), [("1", "2")]) == "| a | long head |\n| --- | --- |\n| 1 | 2 |"


def test_long_paragraphs_and_lists_are_wrapped_and_begin_no_list_by_accident() -> None:
    text = " ".join(["word"] * 20 + ["- not a list", "end"])
    assert wrapped(text).splitlines()[1].startswith(r"\- not a list")
    item = wrapped("- " + "word " * 30).splitlines()
    assert [line[:6] for line in item] == ["- word", "  word"]
    quote = wrapped("> [!NOTE]\n> - " + "word " * 30).splitlines()
    assert [line[:8] for line in quote] == ["> [!NOTE", "> - word", ">   word"]
    code = f"```\n{'x ' * 200}\n```"
    assert wrapped(code) == code


def test_a_long_command_can_still_be_copied() -> None:
    command = "python -m recipes.gpt " + " ".join(f"--option-{n} {n}" for n in range(20))
    lines = command_lines(command).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(line.removesuffix(" \\").strip() for line in lines) == command
    quoted = f"{command} --data 'my data'"
    assert command_lines(quoted) == quoted


def test_links_of_a_page_lead_from_its_own_folder() -> None:
    text = "[a](x/a.json) [b](https://x.org/b) \\](x/c.json)\n```\n[d](x/d.json)\n```\n"
    assert rebased(text, PurePosixPath("x/pages")) == (
        "[a](../a.json) [b](https://x.org/b) \\](x/c.json)\n```\n[d](x/d.json)\n```\n"
    )


def test_the_page_of_a_sweep_takes_no_other_page_away() -> None:
    assert [page_name(name) for name in ("night", "night 2", "parity", "Runs")] == [
        *("night.md", "night-2.md", "sweep-parity.md", "sweep-Runs.md"),
    ]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("p/a", "q/b"), ["a", "b"]),
        (("p/a", "q/a"), ["a 1", "a 2"]),
        (("p/a", "q/a", "q/a-2"), ["a 1", "a 3", "a-2"]),
        (("p/a", "q/a", "r/a-2", "s/a-3"), ["a 1", "a 4", "a-2", "a-3"]),
        (("parity", "sweep-parity"), ["parity", "sweep-parity 2"]),
        (("p/Night", "q/night"), ["Night", "night 2"]),
    ],
)
def test_every_sweep_has_its_own_page(folders: Sequence[str], names: Sequence[str]) -> None:
    store = Store(runs=(), left_out=(), studies={folder: {} for folder in folders})
    assert list(sweep_names(store).values()) == names
    assert len({page_name(name).lower() for name in names}) == len(folders)

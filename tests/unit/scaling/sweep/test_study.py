"""Tests studies: axes become cells, and invalid studies give one line."""

from pathlib import Path
from typing import Any

import pytest

from scaling.sweep.plan import open_planner, plan_tasks
from scaling.sweep.study import Cell, list_studies, load_study, read_study
from tests.builders.modules import open_here


def options(study: dict[str, Any]) -> list[dict[str, str]]:
    return [dict(cell.options) for cell in read_study(study).cells()]


def test_every_combination_is_a_cell_and_the_last_axis_runs_fastest() -> None:
    found = options({"recipe": "gpt", "axes": {"devices": ["1", "2"], "batch-size": ["4", "8"]}})
    assert [tuple(cell.values()) for cell in found] == [
        ("1", "4"),
        ("1", "8"),
        ("2", "4"),
        ("2", "8"),
    ]


def test_zipped_axes_move_together() -> None:
    axes = {"devices": ["1", "2"], "batch-size": ["8", "4"], "precision": ["32-true", "bf16-true"]}
    found = options({"recipe": "gpt", "axes": axes, "zip": [["devices", "batch-size"]]})
    assert len(found) == 4
    assert {(cell["devices"], cell["batch-size"]) for cell in found} == {("1", "8"), ("2", "4")}


def test_a_cell_that_matches_all_values_of_an_exclusion_is_left_out() -> None:
    axes = {"devices": ["1", "2"], "strategy": ["single", "ddp", "fsdp"]}
    exclude = [
        {"devices": "2", "strategy": "single"},
        {"devices": "1", "strategy": ["ddp", "fsdp"]},
    ]
    found = options({"recipe": "gpt", "axes": axes, "exclude": exclude})
    assert [(cell["devices"], cell["strategy"]) for cell in found] == [
        ("1", "single"),
        ("2", "ddp"),
        ("2", "fsdp"),
    ]


def test_a_recipe_may_have_separate_values() -> None:
    study = read_study(
        {
            "recipe": {"bert": {"batch_size": ["32", "64"]}, "gpt": None},
            "axes": {"batch-size": "8"},
            "options": {"max-steps": "5"},
        }
    )
    assert [cell.label(["batch-size"]) for cell in study.cells()] == [
        "bert, batch-size 32",
        "bert, batch-size 64",
        "gpt, batch-size 8",
    ]
    assert study.varied_axes() == ["batch-size"]


def test_the_name_of_a_cell_does_not_depend_on_option_order() -> None:
    one = Cell(recipe="gpt", options={"devices": "2", "batch-size": "4"})
    other = Cell(recipe="gpt", options={"batch-size": "4", "devices": "2"})
    assert one.id == other.id
    assert one.id != Cell(recipe="bert", options=one.options).id
    assert one.command == "python -m recipes.gpt --devices 2 --batch-size 4 --no-checkpoint"


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ({}, "recipe is empty"),
        ({"recipe": "gtp"}, "recipe gtp is not known; did you mean gpt?"),
        ({"recipe": "gpt", "axis": {}}, "axis is not a field; did you mean axes?"),
        ({"recipe": "gpt", "axes": {"devices": []}}, "axis devices is empty"),
        ({"recipe": "gpt", "axes": {"devices": ["1", "1"]}}, "give each value once"),
        ({"recipe": "gpt", "axes": {"out": "x"}}, "out is decided by the sweep"),
        (
            {"recipe": "gpt", "axes": {"devices": {"a": "b"}}},
            "it must be a value or a list of values",
        ),
        ({"recipe": "gpt", "axes": {"devices": "1"}, "zip": [["device"]]}, "did you mean devices?"),
        (
            {"recipe": "gpt", "axes": {"a": ["1"], "b": ["1", "2"]}, "zip": [["a", "b"]]},
            "need equally many",
        ),
        ({"recipe": "gpt", "axes": {"devices": "1"}, "exclude": [{"devcies": "1"}]}, "devices?"),
        ({"recipe": "gpt", "axes": {"devices": "1"}, "exclude": [{"devices": "1"}]}, "is empty"),
        (
            {"recipe": "gpt", "axes": {"a": ["ddp", "x"]}, "exclude": [{"a": "dpp"}]},
            "exclude.a holds dpp; did you mean ddp?",
        ),
        ({"recipe": "gpt", "repeats": "0"}, "repeats is 0"),
        ({"recipe": "gpt", "repeats": "many"}, "repeats is 'many'"),
        ({"recipe": "gpt", "options": {"seed": ["1", "2"]}}, "make it an axis"),
        ("gpt", "it holds no fields"),
    ],
)
def test_an_invalid_study_is_refused_with_the_fix(study: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        read_study(study)
    assert expected in str(refusal.value)


def test_a_study_file_reads_off_as_text_and_not_as_false(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: [gpt]\naxes: {compile: [off, default], batch-size: [8, 16]}\n")
    assert (
        read_study({"recipe": ["gpt"], "axes": {"compile": ["off", "default"]}}).axes["compile"]
        == load_study(str(path)).axes["compile"]
    )


def test_a_study_file_keeps_names_that_look_like_other_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    names = "62117e96, 0012, 1_000, 2024-01-01, .inf"
    path.write_text(f"recipe: gpt\naxes: {{data: [{names}, null]}}\nrepeats: 2e0\n")
    study = load_study(str(path))
    assert study.axes["data"] == (*names.split(", "), "null")
    assert study.repeats == 2


def test_a_study_may_lie_below_the_home_of_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("recipe: gpt\naxes: {seed: [1, 2]}\n")
    assert len(load_study("~/mine.yaml").cells()) == 2
    with pytest.raises(ValueError, match="is neither a file nor a built-in"):
        load_study("~nobody-here/mine.yaml")


def test_an_axis_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: gpt\naxes:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ValueError, match="is not YAML: line 4 gives seed again"):
        load_study(str(path))


def test_a_missing_study_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean quick"):
        load_study("qick")
    broken = tmp_path / "broken.yaml"
    broken.write_text("recipe: [gpt\n")
    with pytest.raises(ValueError, match="is not YAML"):
        load_study(str(broken))


def test_the_included_studies_are_valid(
    is_whole_proof: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_here)
    assert list_studies() == [
        *("crossover", "hsdp", "laptop", "node-8", "precision", "quick", "single-gpu", "strong"),
        *("strong-nodes", "weak", "weak-nodes"),
    ]
    every = 1 if is_whole_proof else 6
    cells = [cell for name in list_studies() for cell in [*load_study(name).cells()][::every]]
    # Refused ones lack GPUs or a dtype here.
    with open_planner() as recipes:
        answers = [
            recipes.ask({"recipe": cell.recipe, "arguments": cell.arguments}) for cell in cells
        ]
    assert {key for answer in answers for key in answer} <= {"config", "refused"}
    assert sum("config" in answer for answer in answers) > 100 / every


def test_an_axis_that_no_recipe_knows_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_here)
    with open_planner() as recipes:
        actual = "--precison is not an option; did you mean --precision"
        with pytest.raises(ValueError, match=actual):
            plan_tasks(read_study({"recipe": "gpt", "axes": {"precison": "32-true"}}), recipes)
        with pytest.raises(ValueError, match="precision is '33-true'"):
            plan_tasks(read_study({"recipe": "gpt", "axes": {"precision": "33-true"}}), recipes)

"""Tests `python -m scaling sweep`: which options are axes, and what is refused."""

import os
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.sweep.command import run_sweep
from scaling.sweep.options import SweepOptions, build_sweep_parser, read_sweep_options, split_axes
from scaling.sweep.study import read_study


def read(*arguments: str) -> SweepOptions:
    parser = build_sweep_parser()
    known, axes = split_axes(arguments, parser)
    return read_sweep_options(parser.parse_args(known), axes)


def test_every_option_unknown_to_the_sweep_is_an_axis() -> None:
    options = read(
        *("--recipe", "gpt,vit", "--precision", "32-true, bf16-mixed", "--out", "here"),
        *("--batch_size=8,16", "--model.width", "64", "--repeats", "2", "--zip", "a,b"),
        *("--a", "1,2", "--b", "3,4"),
    )
    assert dict(options.study.axes) == {
        "precision": ("32-true", "bf16-mixed"),
        "batch-size": ("8", "16"),
        "model.width": ("64",),
        "a": ("1", "2"),
        "b": ("3", "4"),
    }
    assert list(options.study.recipes) == ["gpt", "vit"]
    assert (options.out, options.study.repeats) == (Path("here"), 2)
    assert len(options.study.cells()) == 2 * 2 * 2 * 2


def test_the_command_line_changes_a_named_study() -> None:
    plain, changed = read("quick"), read("quick", "--recipe", "gpt", "--batch-size", "2")
    assert plain.out == Path("sweeps/quick")
    assert list(changed.study.recipes) == ["gpt"]
    assert {cell.options["batch-size"] for cell in changed.study.cells()} == {"2"}
    assert len(changed.study.cells()) == len(plain.study.cells()) // 6
    cells = read("single-gpu", "--recipe", "gpt", "--batch-size", "1,2").study.cells()
    assert {cell.options["batch-size"] for cell in cells} == {"1", "2"}


@pytest.mark.parametrize(
    "line",
    [
        "report ~nobody-here",
        "lint ~nobody-here/a",
        "replay ~nobody-here",
        "report . --out ~nobody-here/a",
    ],
)
def test_the_home_of_nobody_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert " ~nobody-here" in error
    assert "there is no such user" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("group", ["batch-size,seed", "batch-size, seed", " batch_size,seed"])
def test_zipped_axes_are_named_as_axes_are(group: str) -> None:
    line = ("--recipe", "gpt", "--batch_size", "1,2", "--seed", "1,2", "--zip", group)
    assert len(read(*line).study.cells()) == 2
    axes = {"batch_size": [1, 2], "seed": [1, 2]}
    study = read_study({"recipe": "gpt", "axes": axes, "zip": [group.split(",")]})
    assert len(study.cells()) == 2


def test_memory_sizes_are_parsed_with_units() -> None:
    assert read("quick", "--memory-limit", "1.5GiB").limits.memory_limit_bytes == 3 * 2**29
    assert read("quick", "--memory-limit", "500 MB").limits.memory_limit_bytes == 500_000_000
    assert read("quick").limits.memory_limit_bytes is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to sweep: name a study (crossover,"),
        (["--recipe", "gtp"], "recipe gtp is not known; did you mean gpt?"),
        (["qick"], "did you mean quick?"),
        (["quick", "--retry-before", "2026-01-31"], "no status is retried; add --retry"),
        (
            ["quick", "--retry", "oom", "--retry-before", "noon"],
            "retry-before is noon; give a date",
        ),
        (["quick", "--recipe", "gpt", "--retry", "ooms"], "retry holds ooms; did you mean oom?"),
        (
            ["quick", "--memory-limit", "much"],
            "memory-limit is much; give a size above 0, for example 4GiB",
        ),
        (["quick", "--time-limit", "0"], "time-limit is 0.0; it must be above 0"),
        (["quick", "--recheck", "2"], "recheck is 2.0; it must be between 0 and 1"),
        (["quick", "--price-per-hour", "-1"], "price-per-hour is -1.0"),
        (["quick", "--price-per-hour", "nan"], "price-per-hour is 'nan'; it must be a number"),
        (["quick", "--price-per-hour", "3"], "price-per-hour is 3, and only a plan has costs"),
        (["quick", "--list", "--left", "--dry-run"], "dry-run plans every cell; leave one out"),
        (["quick", "--list", "--watch"], "watch and list do different things; leave one out"),
        (["quick", "--watch", "--max-cells", "2"], "max-cells is 2, but --watch runs no cell"),
        (["quick", "--watch", "--stop-after", "9"], "stop-after is 9.0, but --watch runs no cell"),
        (["quick", "--watch", "--only-nodes", "2"], "only-nodes is 2, but --watch runs no cell"),
        (["quick", "--prepare", "--dry-run"], "dry-run and prepare do different things"),
        (["quick", "--list", "--run-cell", "a"], "list and run-cell do different things"),
        (["--recipe", "gpt", "--precison", "bf16", "--list"], "did you mean --precision?"),
        (["--recipe", "gpt", "--precision", "bf16", "--list"], "precision"),
        (["quick", "--seed"], "--seed has no value"),
        (["quick", "--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["quick", "--seed", "1,1"], "axis seed is 1,1; give each value once"),
        (["quick", "--seed", "8,0x8"], "axis seed is 8,0x8; give each value once"),
        (["quick", "--batch-size", "1e1,10.0"], "give each value once"),
        (["quick", "--repeats", "1e9"], "repeats is 1000000000; it must be 1 to 1000"),
        (["quick", "--seed", ","], "axis seed is empty"),
        (["quick", "--checkpoint-dir", "x"], "--checkpoint-dir is decided by the sweep"),
        (["quick", "--rehearse", "8"], "--rehearse is decided by the sweep"),
        (["quick", "--find-max-batch", "64"], "batch-size has several values"),
        (["strong", "--recipe", "vit"], "recipe vit is not in study strong, which has gpt"),
        (["quick", "--", "--seed", "1"], "--seed comes after --"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_fix(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *arguments]) == 2
    output = capsys.readouterr()
    assert expected in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_study_with_an_unwritable_folder_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--recipe", "gpt", "--devices", "1", "--out", str(tmp_path / "file" / "sweep")]
    assert main(["sweep", *arguments]) == 2
    assert "is a file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]
    assert main(["sweep", *arguments[:-1], "/proc/nowhere"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not UTF-8, which TensorBoard needs"):
        run_sweep(read(*arguments[:-1], str(tmp_path / "caf\udce9")), arguments)


def test_a_list_for_so_many_nodes_has_their_cells_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["--recipe", "gpt", "--num-nodes", "1,2", "--devices", "2", "--strategy", "ddp"]
    out = ["--out", str(tmp_path / "sweep")]
    assert main(["sweep", *axes, *out, "--list", "--only-nodes", "2"]) == 0
    assert ["--num-nodes 2" in cell for cell in capsys.readouterr().out.splitlines()] == [True]

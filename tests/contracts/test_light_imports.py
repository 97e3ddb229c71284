"""Help, configs and refusals import no torch, numpy or lightning, so they work on login nodes."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.store.outcome import CellOutcome, write_outcome
from scaling.sweep.engine import CELLS, Limits, open_folder
from scaling.sweep.study import read_study
from tests.processes import PATIENCE_S

RECIPES = ("bert", "gpt", "vit")
BLOCK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    HEAVY = {"torch", "torchvision", "lightning", "numpy", "tokenizers", "matplotlib"}

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.HEAVY:
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Block())
"""


def run_python(*arguments: str, repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_imports_neither_torch_nor_lightning(recipe: str, repository: Path) -> None:
    script = f"""{BLOCK}
import runpy
sys.argv = ["recipes.{recipe}", "--help"]
runpy.run_module("recipes.{recipe}", run_name="__main__")
"""
    done = run_python("-c", script, repository=repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: python -m recipes.{recipe}" in done.stdout
    assert "--optimizer.learning-rate" in done.stdout


def test_export_help_and_errors_import_neither_torch_nor_lightning(
    repository: Path, tmp_path: Path
) -> None:
    lines = ["x", "x out.pt", f"x {tmp_path}", "x out.safetensors --forse"]
    script = f"""{BLOCK}
from unitransformer.export import main
for line in {lines!r}:
    print(main(line.split()))
main(["--help"])
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:4] == ["2"] * 4
    assert "usage: python -m unitransformer.export" in done.stdout
    assert len(done.stderr.splitlines()) == 4
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_calibrate_help_and_errors_import_neither_torch_nor_lightning(repository: Path) -> None:
    lines = ["--seconds 0", "--devices 0", "--accelerator tpu", "--out .", "--forse"]
    script = f"""{BLOCK}
from scaling.__main__ import main
for line in {lines!r}:
    print(main(["calibrate", *line.split()]))
main(["calibrate", "--help"])
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[: len(lines)] == ["2"] * len(lines)
    assert "--seconds" in done.stdout
    assert len(done.stderr.splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("slurm.submit recipes.gpt --dry-run -- --size 124m", 0),
        ("slurm.submit sweep node-8 --dry-run", 0),
        ("slurm.submit recipes.gtp", 2),
        ("slurm.status /nowhere", 2),
    ],
)
def test_submitting_a_job_imports_neither_torch_nor_lightning(
    line: str, code: int, repository: Path, tmp_path: Path
) -> None:
    done = run_blocked(line, repository, tmp_path)
    assert done.returncode == code, done.stderr
    assert "is imported" not in done.stderr


def run_blocked(line: str, repository: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a module with heavy imports blocked, also in the processes that it starts."""
    (folder / "sitecustomize.py").write_text(BLOCK)
    return subprocess.run(
        [sys.executable, "-m", *line.split()],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_sweep_list_and_watch_import_neither_torch_nor_lightning(
    repository: Path, tmp_path: Path
) -> None:
    study = read_study({"recipe": "gpt", "axes": {"batch-size": ["8", "16"]}})
    out = tmp_path / "sweep"
    open_folder(out, study, Limits(limit_s=60))
    for cell in study.cells():
        ended = CellOutcome(
            cell=cell.id, repeat=1, recipe="gpt", options=cell.options, command=cell.command,
            status="timeout", reason="so it was",
        )  # fmt: skip
        write_outcome(ended, out / CELLS / ended.name)
    sweep = f"scaling sweep --recipe gpt --batch-size 8,16 --out {out}"
    watched = run_blocked(f"{sweep} --watch", repository, tmp_path)
    assert watched.returncode == 0, watched.stderr
    listed = run_blocked(f"{sweep} --list", repository, tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert len(listed.stdout.splitlines()) == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_takes_half_a_second_of_cpu_time(recipe: str, repository: Path) -> None:
    # The bound is twice that, for the best of five: the machine may be busy.
    assert any(_cpu_s(f"recipes.{recipe}", repository) < 1.0 for _ in range(5))


def _cpu_s(module: str, repository: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-m", module, "--help", repository=repository)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_of_scaling_takes_no_longer_than_that_of_a_recipe(repository: Path) -> None:
    # The machine may be busy: the fastest of up to five.
    scaling, recipe = [], []
    for _ in range(5):
        scaling.append(_cpu_s("scaling", repository))
        recipe.append(_cpu_s("recipes.gpt", repository))
        if min(scaling) < 1.1 * min(recipe):
            break
    assert min(scaling) < 1.1 * min(recipe)


@pytest.mark.parametrize("subcommand", ["report", "sweep", "parity", "lint", "replay", "published"])
def test_help_of_a_subcommand_imports_no_other_one(subcommand: str, repository: Path) -> None:
    script = f"""
import sys
from scaling.__main__ import main
try:
    main(["{subcommand}", "--help"])
except SystemExit:
    print(*sorted({{name.split(".")[1] for name in sys.modules if name.startswith("scaling.")}}))
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 0, done.stderr
    commands = {"report", "sweep", "lint", "replay", "published", "calibrate"}
    assert commands & set(done.stdout.splitlines()[-1].split()) == {subcommand} & commands


def test_predictions_import_neither_torch_nor_lightning(repository: Path) -> None:
    line = "predict --recipe gpt --size 6.7b --hardware h200-sxm-8 --devices 8 --strategy fsdp"
    bad = [f"{line} --batch-size 0", f"{line} --hardware h100", f"{line} --devices 12"]
    script = f"""{BLOCK}
from scaling.__main__ import main
for line in {bad!r}:
    assert main(line.split()) == 2
Block.HEAVY.remove("numpy")  # solves the equations of the intervals
assert main({line!r}.split()) == 0
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 0, done.stderr
    assert "nothing fits: the configuration that needs least" in done.stdout
    assert len(done.stderr.splitlines()) == 3
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


def test_sizes_are_known_and_counted_without_torch(repository: Path) -> None:
    script = f"""{BLOCK}
from recipes import bert, gpt, vit
from unitransformer.costs.flops import count_parameters
print(gpt.model_config().width, bert.model_config("base").num_layers)
print(vit.model_config("b16").num_positions, count_parameters(gpt.model_config("124m")))
"""
    done = run_python("-c", script, repository=repository)
    assert done.stderr == ""
    # GPT-2's 124,439,808 without its 1,024 learned positions of 768.
    assert done.stdout.split() == ["768", "12", "197", "123653376"]


def test_bad_options_are_refused_before_torch_is_imported(repository: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    lines = [
        "--size refrence",
        "--max-stepz 3",
        "--max-steps many",
        "--strategy dpp",
        "--devices 0",
        "--strategy single --devices 2",
        "--optimizer.learning-rate nan",
        "--model.width 100 --model.num-heads 7",
        "--sequence-length 100000",
        "--dropout 1.0",
        "--data /nowhere/at/all",
        "--config /nowhere/at/all.yaml",
        "--init-from /nowhere/at/all.pt",
        f"--out {in_the_way}/runs",
    ]
    script = f"""{BLOCK}
from recipes import gpt
from recipes.command_line import run_recipe
for line in {lines!r}:
    print(run_recipe(gpt.PRESET, gpt.show, line.split()))
"""
    done = run_python("-c", script, repository=repository)
    assert done.stdout.split() == ["2"] * len(lines), done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(lines)
    assert all(line.startswith("error: ") for line in errors)


def test_a_side_of_a_comparison_refuses_bad_options_before_torch_is_imported(
    repository: Path,
) -> None:
    script = f"""{BLOCK}
import runpy
sys.argv = ["paired_worker.py", "gpt", "--no-such-option", "1"]
runpy.run_path("recipes/service/paired_worker.py", run_name="__main__")
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --no-such-option is not an option")


def test_the_import_block_stops_a_summary_which_needs_torch(repository: Path) -> None:
    script = f"""{BLOCK}
from recipes import gpt
from recipes.command_line import run_recipe
run_recipe(gpt.PRESET, gpt.show, ["--summary"])
"""
    done = run_python("-c", script, repository=repository)
    assert done.returncode == 1
    assert "AssertionError: torch is imported" in done.stderr

"""Every command line of every README does what it says on a machine with two CPU cores.

The lines of a page run one after another in an empty folder, as a reader would type them. Recipes
get the options of `$TINY`, which recipes/README.md defines for readers, and tiny data. Where the
comment of a line says that it `needs` or `takes` something, only its options are parsed.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from scaling.__main__ import build_parser
from tests.builders.modules import open_here, run_here
from tests.distributed.forking import fork_command

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
REPOSITORY = Path(__file__).parent.parent.parent
PAGES = ("README.md", *(f"{name}/README.md" for name in ("recipes", "scaling", "slurm")))
PAGES += ("unitransformer/README.md",)
SHELL = ("git", "cd", ".")
MAX_CELLS = 16  # of a sweep whose commands are all checked; of a larger one the first and the last
LIMIT_S = 240  # of a line, on a busy machine
ERRORS = (AssertionError, ValueError, SystemExit, ArgumentError)
TEXT = "--model.num-classes 300 --model.num-positions 8 --sequence-length 8"
IMAGES = "--model.image-size 16 --model.patch-size 8"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command line of a README."""

    where: str
    text: str  # without the comment
    is_parsed_only: bool

    @property
    def arguments(self) -> list[str]:
        return shlex.split(self.text)


def read_blocks(page: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a page: number of the first line, and text."""
    text = (REPOSITORY / page).read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def read_lines(page: str) -> list[Line]:
    lines = []
    for first, block in read_blocks(page, "sh"):
        for number, text in enumerate(block.splitlines(), start=first):
            command, _, comment = text.partition(" #")
            is_parsed_only = re.search(r"\b(needs|takes) ", comment) is not None
            where = f"{page}:{number}"
            lines.append(Line(where=where, text=command.strip(), is_parsed_only=is_parsed_only))
    return lines


def tiny_options() -> list[str]:
    """What recipes/README.md gives readers to append."""
    (line,) = [line for line in read_lines("recipes/README.md") if "TINY=" in line.text]
    return shlex.split(line.arguments[1].removeprefix("TINY="))


# ---- parsing the options of what is not run


def check_options(arguments: Sequence[str]) -> None:
    """Raises an error for a command, option or value that does not exist."""
    match list(arguments):
        case ["python", "-m", module, *options] if module.startswith("recipes."):
            check_recipe(module.removeprefix("recipes."), options)
        case ["torchrun", *options]:
            given = get_args_parser().parse_args(options)
            assert given.module
            if given.training_script == "scaling":
                check_options(["python", "-m", "scaling", *given.training_script_args])
                return
            check_recipe(given.training_script.removeprefix("recipes."), given.training_script_args)
        case ["python", "-m", "scaling", "sweep", *options] if "--dry-run" in options:
            call("scaling", ["sweep", *options])
        case ["python", "-m", "scaling", "sweep", *options]:
            at = options.index("--run-cell") if "--run-cell" in options else len(options)
            every = options[:at] + options[at + 2 :]  # instead of one cell
            asked = [option for option in every if option != "--watch"]
            cells = call("scaling", ["sweep", *asked, "--list"]).splitlines()
            for cell in cells if len(cells) <= MAX_CELLS else (cells[0], cells[-1]):
                check_options(shlex.split(cell))
        case ["python", "-m", "scaling", *options]:
            end = options.index("--") if "--" in options else len(options)
            given = build_parser(options[0]).parse_args(options[:end])[options[0]]
            if passed_on := options[end + 1 :]:
                is_named = passed_on[0] in PRESETS  # or else by an option
                recipe = passed_on[0] if is_named else given.recipe
                check_recipe(recipe, passed_on[1:] if is_named else passed_on)
        case ["pip", "install", package]:
            project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
            name, _, extra = package.removesuffix("]").partition("[")
            assert name == project["name"]
            assert extra in project["optional-dependencies"]
        case ["python", "-m", "slurm.submit", *options]:
            asked = [option for option in options if option != "--test-only"]
            call("slurm.submit", ["--dry-run", *asked])
        case ["python", "-m", "slurm.status", _]:
            pass
        case ["python", "-m", "tests.benchmarks.rehearsals", recipe, size, strategy, ranks]:
            for number in ranks.split(","):
                assert int(number) > 0
            check_recipe(recipe, ["--size", size, "--strategy", strategy])
        case ["sbatch", *options]:
            check_sbatch(options)
        case ["make", target]:
            command = ["make", "--dry-run", "--directory", str(REPOSITORY), target]
            assert subprocess.run(command, capture_output=True).returncode == 0
        case _:
            raise ValueError("the test does not know this command")


def check_recipe(recipe: str, options: Sequence[str]) -> None:
    """The options describe a run on eight GPUs."""
    preset = PRESETS[recipe]
    build_config(parse(preset, options), defaults=preset.cuda, devices=8)


def check_sbatch(options: Sequence[str]) -> None:
    (index,) = [index for index, option in enumerate(options) if option.endswith(".sbatch")]
    script = (REPOSITORY / options[index]).read_text()
    for option in options[:index]:
        assert f"#SBATCH {option.partition('=')[0]}=" in script, option
    target = re.search(r"-m slurm\.job (?:recipes\.)?(\w+)", script)
    assert target is not None
    check_recipe(target[1], options[index + 1 :])


def call(module: str, arguments: Sequence[str]) -> str:
    """Returns what the command prints; it must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_module(module, arguments)
    assert not code, err.getvalue()
    return out.getvalue()


def run_module(module: str, arguments: Sequence[str]) -> int:
    """`python -m module` in this process; returns the exit code."""
    name = f"{module}.__main__" if module == "scaling" else module
    loaded = sys.modules.pop(name, None)
    before, sys.argv = sys.argv, [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
        if loaded is not None:
            sys.modules[name] = loaded
    return 0


# ---- running


def run_line(line: Line, folder: Path) -> None:
    """Run the line in a fork; it must end with exit code 0."""
    if line.arguments[0] == "export":  # of TINY, which `tiny` appends
        return
    if line.arguments[0] == "make":  # the targets run everything that other tests run
        check_options(line.arguments)
        return
    _, _, module, *arguments = line.arguments
    assert line.arguments[:2] == ["python", "-m"], "the test does not know this command"
    if module.startswith("recipes."):
        arguments += tiny(module.removeprefix("recipes."), arguments)
    if "calibrate" in arguments:
        arguments += ["--seconds", "1"]
    log = folder / "output.log"

    def command() -> int:
        os.chdir(folder)
        return run_module(module, [option for option in arguments if option != "$TINY"])

    names = ("UNITRANSFORMER_CACHE", "UNITRANSFORMER_DATA")
    caches = {name: str(folder.parent / name) for name in names}
    process = fork_command(command, log=log, variables=caches)
    process.join(timeout=LIMIT_S)
    process.kill()
    assert process.exitcode == 0, log.read_text()[-2000:]


def tiny(recipe: str, arguments: Sequence[str]) -> list[str]:
    """Options that make a run of a recipe end within a second; the last of a name wins."""
    if "--summary" in arguments or "--dry-run" in arguments:
        return []
    options = [*tiny_options(), "--accelerator", "cpu"]
    if "--resume" in arguments:  # as if the run before had been stopped
        options += ["--max-steps", "8"]
    if recipe == "vit":
        return [*options, *shlex.split(IMAGES)]
    devices = int(arguments[arguments.index("--devices") + 1]) if "--devices" in arguments else 1
    data = [] if "--data" in arguments else ["--data", "books/"]
    return [*options, *data, *shlex.split(TEXT), "--devices", str(max(1, devices // 4))]


def make_data(folder: Path) -> None:
    """The text and the images that READMEs speak of."""
    folder.joinpath("books").mkdir(parents=True)
    lines = (f"{a} times {b} makes {a * b}\n" for a in range(60) for b in range(20))
    text = "".join(lines)
    folder.joinpath("books", "tables.txt").write_text(text)
    folder.joinpath("letters").mkdir()
    folder.joinpath("letters", "prices.txt").write_text(text.replace("makes", "€"), "cp1252")
    pages = (json.dumps({"text": line}) + "\n" for line in text.splitlines())
    folder.joinpath("pages.jsonl").write_text("".join(pages))
    for number in range(5):
        flowers = folder / "flowers" / f"flower-{number}"
        flowers.mkdir(parents=True)
        for image in range(4):
            pixels = np.full((16, 16, 3), 50 * number + image, dtype=np.uint8)
            Image.fromarray(pixels).save(flowers / f"{image}.png")


@pytest.fixture(autouse=True)
def _resolve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are resolved in this process, not in processes that import torch first."""
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_here)
    for asker in ("slurm.preflight", "recipes.command_line", "scaling.peers.command"):
        monkeypatch.setattr(f"{asker}.run_module", run_here)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_of_a_readme_works(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make_data(folder)
    failed = []
    for line in read_lines(page):
        try:
            if not line.is_parsed_only:
                run_line(line, folder)
                continue
            for part in line.text.split(" && "):
                if part.split()[0] not in SHELL:
                    check_options(shlex.split(part))
        except ERRORS as error:
            failed.append(f"{line.where}: {line.text}\n{error}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_the_text_of_a_readme_have_options_that_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.M | re.S)
    for command in re.findall(r"`((?:python -m|torchrun|sbatch|make) [^`]+)`", text):
        check_options(shlex.split(command))


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_of_a_readme_runs(page: str) -> None:
    for _, block in read_blocks(page, "python"):
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_manual_begins_with_three_commands(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    assert re.match(r"# .+\n\n```sh\n", text)
    _, first = read_blocks(page, "sh")[0]
    assert len(first.splitlines()) == 3


@pytest.mark.parametrize(
    "text",
    [
        "python -m recipes.gpt --max-step 3",
        "python -m recipes.gpt --strategy fdsp",
        "torchrun --nproc-per-nodes 8 -m recipes.gpt",
        "torchrun --nproc-per-node 8 -m recipes.gpt --max-step 3",
        "python -m scaling sweep --recipe gpt --batch-sizes 8",
        "python -m scaling sweep quik",
        "python -m scaling parity --recipe gtp",
        "python -m slurm.submit recipes.gpt --node 2",
        "python -m slurm.submit recipes.gpt -- --max-step 3",
        "sbatch --node=4 slurm/gpt.sbatch",
        "sbatch slurm/gpt.sbatch --max-step 3",
        "python -m recipe.gpt",
        "make ruun",
    ],
)
def test_a_misspelt_command_fails(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ERRORS):
        check_options(shlex.split(text))


def test_a_line_that_ends_with_an_error_fails(tmp_path: Path) -> None:
    line = Line(where="", text="python -m recipes.gpt --max-step 3", is_parsed_only=False)
    with pytest.raises(AssertionError, match="max-step is not an option"):
        run_line(line, tmp_path)

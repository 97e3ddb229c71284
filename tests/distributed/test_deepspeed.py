"""Only the ZeRO strategies need DeepSpeed, which compiles nothing on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.launching import environment, load, recipe_arguments, recipe_command
from tests.processes import PATIENCE_S

BRIEF = ("--batch-size", "4", "--max-steps", "1", "--validate-every", "1")
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "ninja", "nvcc")

# Two command lines in an interpreter that finds neither DeepSpeed nor its metadata.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            return None
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        found = PathFinder.find_distributions(*context)
        return (each for each in found if each.metadata["Name"] != "deepspeed")

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from recipes import gpt
from recipes.command_line import run_recipe

arguments = sys.argv[1:]
refused = run_recipe(gpt.PRESET, gpt.show, [*arguments, "--strategy", "zero2"])
trained = run_recipe(gpt.PRESET, gpt.show, [*arguments, "--strategy", "fsdp"])
sys.exit(f"exit codes {refused}, {trained}, DeepSpeed {'deepspeed' in sys.modules}")
"""


def run(command: list[str], variables: dict[str, str], repository: Path) -> str:
    """Runs a command; returns what it wrote to stderr."""
    done = subprocess.run(
        command, cwd=repository, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
    )
    return done.stderr


def test_without_deepspeed_only_zero_is_refused_with_the_install_command(
    tmp_path: Path, repository: Path
) -> None:
    arguments = recipe_arguments("gpt", tmp_path / "run", *BRIEF)
    said = run(
        [sys.executable, "-c", WITHOUT, *arguments], environment(tmp_path), repository
    ).splitlines()
    assert said[-1] == "exit codes 2, 0, DeepSpeed False", said
    assert said[0].startswith("error: strategy zero2 needs DeepSpeed, which is not installed: pip")
    assert load(tmp_path / "run")["config"]["parallel"]["strategy"] == "fsdp"


def test_deepspeed_on_a_cpu_calls_no_compiler(tmp_path: Path, repository: Path) -> None:
    shims, used, built = tmp_path / "bin", tmp_path / "used", tmp_path / "built"
    for folder in (shims, used, built):
        folder.mkdir()
    for name in COMPILERS:
        (shims / name).write_text(f"#!/bin/sh\ntouch '{used}/{name}'\nexit 1\n")
        (shims / name).chmod(0o755)
    path = f"{shims}{os.pathsep}{os.environ['PATH']}"
    variables = environment(tmp_path) | {"PATH": path, "TORCH_EXTENSIONS_DIR": str(built)}
    command = recipe_command(
        "gpt", tmp_path / "run", *BRIEF, "--devices", "2", "--strategy", "zero2"
    )
    said = run(command, variables, repository)
    assert load(tmp_path / "run")["status"] == "ok", said
    assert [path.name for folder in (used, built) for path in folder.iterdir()] == []

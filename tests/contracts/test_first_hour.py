"""The script for a first hour on a GPU: every command line holds, and it fits its time."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from tests.processes import PATIENCE_S

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
SCRIPT = "tests/gpu/first_hour.sh"


def lines_of(repository: Path, mode: str, folder: Path) -> list[str]:
    """A line per part: name, limit in seconds, command."""
    done = subprocess.run(
        [repository / SCRIPT, folder],
        env={**os.environ, "MODE": mode, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_every_recipe_command_of_the_plan_is_valid(repository: Path, tmp_path: Path) -> None:
    configs = {}
    for line in lines_of(repository, "plan", tmp_path):
        if command := re.fullmatch(r"(\S+) \d+ \S+ -m recipes\.(\w+) (.*)", line):
            name, recipe, arguments = command.groups()
            parsed = parse(PRESETS[recipe], shlex.split(arguments))
            configs[name] = build_config(parsed, defaults=parsed.preset.cuda, devices=1)
            assert parsed.options.record == tmp_path / "records" / f"{name}.json"
    assert {(config.recipe, config.size) for config in configs.values()} == {
        *(("gpt", size) for size in ("reference", "124m", "1.3b")),
        *(("bert", "large"), ("vit", "l")),
    }
    assert {config.parallel.precision for config in configs.values()} == {"bf16-mixed"}
    assert {
        config.parallel.strategy for config in configs.values() if config.parallel.cpu_offload
    } == {"fsdp", "zero2", "zero3"}
    assert sum(config.parallel.compile == "default" for config in configs.values()) == 5


def test_the_first_parts_fit_the_time_even_if_each_takes_its_limit(
    repository: Path, tmp_path: Path
) -> None:
    lines = lines_of(repository, "plan", tmp_path)
    limits = {line.split()[0]: int(line.split()[1]) for line in lines}
    names = list(limits)
    needed = names[: names.index("checkpoints") + 1]
    assert sum(limits[name] for name in needed) <= 680
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
    repository: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"  # fails for two parts, hangs in none
    python.write_text(
        '#!/bin/sh\ncase "$*" in *zero2*) echo "error: no"; exit 3;; esac\n'
        'echo "speed       12 tokens/s"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        [repository / SCRIPT, tmp_path / "out", "offload|trace"],
        env={**os.environ, "MODE": "gpu", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    page = (tmp_path / "out/README.md").read_text()
    assert re.search(r"- offload-fsdp: ok, \d+ s; speed 12 tokens/s", page)
    assert re.search(r"- offload-zero2: failed with 3, \d+ s; error: no", page)
    assert re.search(r"- offload-zero3: ok", page)
    assert page in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
def test_the_script_passes_shellcheck(repository: Path) -> None:
    done = subprocess.run(["shellcheck", repository / SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

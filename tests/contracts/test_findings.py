"""Every script of findings/ has a row in its README, and is a valid script."""

import re
import subprocess
from pathlib import Path

SHARED = "common.sh"


def test_every_script_has_a_row_and_every_row_a_script(repository: Path) -> None:
    folder = repository / "findings"
    table = re.findall(r"^\| \[(\w+)\]\((\w+\.sh)\) \|", (folder / "README.md").read_text(), re.M)
    scripts = sorted(file.name for file in folder.glob("*.sh") if file.name != SHARED)
    assert sorted(file for _, file in table) == scripts
    assert all(file == f"{name}.sh" for name, file in table)


def test_every_script_states_its_versions_and_what_one_would_expect(repository: Path) -> None:
    for script in (repository / "findings").glob("*.sh"):
        text = script.read_text()
        subprocess.run(["bash", "-n", script], check=True)
        if script.name != SHARED:
            assert text.startswith("#!/usr/bin/env bash\n# "), script.name
            assert re.search(r"^# Expected: ", text, re.M), script.name
            assert re.search(r"^# Seen:\n#   ", text, re.M), script.name
            assert re.search(r"\d+\.\d+\.\d+", text.splitlines()[1]), script.name
            installed = re.findall(r"^install(?:_deepspeed)? ((?:.*\\\n)*.*)$", text, re.M)
            packages = " ".join(installed).replace("\\", "").split()
            assert all(re.fullmatch(r"[\w-]+==[\w.]+", package) for package in packages), packages

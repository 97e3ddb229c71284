"""Builds jobs as `slurm.submit` does, without processes for the recipes and sweeps."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import job_options
from slurm.batch_script import Job

CELLS = 250  # of a sweep in the table of sites


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """A row of the table in slurm/README.md that says what is rendered for a site."""

    site: str
    given: tuple[str, ...]  # lines of a cluster's table, options, and the target sweep
    rendered: tuple[str, ...]  # lines of the script
    refused: str | None  # a part of the error

    def build(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
        """Returns the jobs as slurm.submit does, with the cluster's table in a file in `folder`.

        The recipe accepts its options, and a sweep has `CELLS` cells on one node.
        """
        listing = "python -m recipes.gpt\n" * CELLS
        monkeypatch.setattr("slurm.job_options.check_recipe", lambda job, recipe: True)
        monkeypatch.setattr("slurm.preflight.run_module", lambda *arguments, **options: listing)
        monkeypatch.setattr("slurm.preflight._ask", lambda commands, _: [{}] * len(commands))
        monkeypatch.chdir(folder)
        lines = [text for text in self.given if " = " in text]
        options = [o for text in self.given if text.startswith("--") for o in shlex.split(text)]
        (folder / "site.toml").write_text("\n".join(["[site]", *lines]))
        target = "sweep" if "sweep" in self.given else "recipes.gpt"
        table = ["--clusters", str(folder / "site.toml"), "--cluster", "site"]
        return job_options.build_jobs(*job_options.parse([target, *table, *options]))


def site_rows(repository: Path) -> list[SiteRow]:
    text = (repository / "slurm/README.md").read_text().partition("\n## What sites differ in\n")[2]
    rows = []
    for line in text.partition("\n## ")[0].splitlines():
        # A | in code is written with a backslash.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and "`" in cells[2]:
            site, given, rendered = (cell.replace(r"\|", "|") for cell in cells)
            snippets = tuple(re.findall("`(.*?)`", rendered))
            is_refused = rendered.startswith("refused")
            rows.append(
                SiteRow(
                    site=site,
                    given=tuple(re.findall("`(.*?)`", given)),
                    rendered=() if is_refused else snippets,
                    refused=snippets[0] if is_refused else None,
                )
            )
    return rows

"""Tests how options become jobs."""

from pathlib import Path

import pytest

from slurm import job_options


@pytest.mark.parametrize(
    ("study", "name"),
    [
        ("my study.yaml", "sweep-my-study"),
        ("a/b;c $(id).yaml", "sweep-b-c-id"),
        ("n\n.yaml", "sweep-n"),
        ("\u7814\u7a76.yaml", "sweep-sweep"),
        (f"{'x' * 200}.yaml", f"sweep-{'x' * 60}"),
        ("node-8", "sweep-node-8"),
    ],
)
def test_the_name_of_a_job_is_valid_whatever_the_file_of_its_study_is_called(
    study: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.job_options.sweep_jobs", lambda job, **options: [job])
    (job,) = job_options.build_jobs(*job_options.parse(["sweep", study]))
    assert (job.name, job.arguments) == (name, [study])
    assert Path(job.folder).name.startswith(f"{name}-")


def test_paths_may_begin_with_the_home_of_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    line = "recipes.gpt --folder ~/job --clusters ~/mine.toml"
    options, _ = job_options.parse(line.split())
    assert (options.folder, options.clusters) == (tmp_path / "job", tmp_path / "mine.toml")

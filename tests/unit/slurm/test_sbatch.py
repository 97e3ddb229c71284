"""Tests the calls of sbatch, with a script in its place."""

import pytest

from slurm import sbatch
from tests.builders.slurm import PutStub


def test_variables_of_a_job_do_not_reach_a_job_that_it_submits(
    put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_stub("sbatch", "env\n")
    passed_on = {"SLURM_CONF": "/etc/slurm/slurm.conf", "HOME": "/home/x"}
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "RANK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "3")
    for name, value in passed_on.items():
        monkeypatch.setenv(name, value)
    seen = dict(line.split("=", 1) for line in sbatch.run_sbatch([], "").splitlines())
    assert {name: seen.get(name) for name in passed_on} == passed_on
    assert not {"SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "RANK", "SBATCH_PARTITION"} & seen.keys()

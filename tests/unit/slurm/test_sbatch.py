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


def test_a_machine_without_a_slurm_configuration_refuses_no_job(put_stub: PutStub) -> None:
    put_stub(
        "sbatch",
        "echo 'sbatch: error: fetch_config: DNS SRV lookup failed' >&2\n"
        "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1\n",
    )
    with pytest.raises(
        ValueError, match=r"SLURM is not configured here .* or add --dry-run"
    ) as raised:
        sbatch.run_sbatch([], "")
    assert not isinstance(raised.value, sbatch.Refusal)

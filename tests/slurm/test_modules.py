"""Tests `modules` of a cluster's table on a real SLURM with the `module` of environment-modules."""

import os
import subprocess
from pathlib import Path

import pytest

from slurm import status
from slurm.batch_script import Job, render
from slurm.clusters import Cluster
from slurm.sbatch import submit
from tests.slurm.cluster import INSTALL, until
from tests.slurm.cluster import Cluster as RealCluster
from tests.slurm.conftest import skip_or_fail
from tests.slurm.waiting import log_of

pytestmark = pytest.mark.timeout(1800)
INIT = Path("/etc/profile.d/modules.sh")


@pytest.fixture
def job(cluster: RealCluster, work: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose interpreter is found only through a variable that the module `demo` sets."""
    if not INIT.exists():
        skip_or_fail(f"environment-modules not installed: {INSTALL}")
    interpreter, modulefile = work / "bin/demo-python", work / "modules/demo/1.0"
    for path in (interpreter, modulefile):
        path.parent.mkdir(parents=True)
    interpreter.write_text('#!/bin/sh\necho "demo $DEMO_VERSION runs: $*"\n')
    interpreter.chmod(0o755)
    modulefile.write_text(
        f"#%Module1.0\nsetenv DEMO_PYTHON {interpreter}\nsetenv DEMO_VERSION 1.0\n"
    )
    monkeypatch.setenv("MODULEPATH", str(work / "modules"))
    table = Cluster(modules=("demo/1.0",), python="$DEMO_PYTHON")
    return Job(
        target="recipes.gpt",
        arguments=["--seed", "1"],
        name="gpt",
        folder=str(work / "job"),
        directory=str(work),
        python="$DEMO_PYTHON",
        devices=1,
        on_gpus=False,
        time="10",
        cluster=table,
    )


def variables_of_a_login_shell() -> dict[str, str]:
    """The environment in which a user types: it may hold `module` as an exported function."""
    printed = subprocess.check_output(["bash", "-c", f"source {INIT}; env --null"], text=True)
    pairs = (line.partition("=") for line in printed.split("\0") if line)
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("is_login_shell", [True, False])
def test_modules_are_loaded_whether_or_not_the_shell_that_submits_has_the_command(
    is_login_shell: bool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = variables_of_a_login_shell()
    assert "BASH_FUNC_module%%" in login
    for name in login.keys() | os.environ.keys():
        if name.startswith(("BASH_FUNC_", "MODULES", "__MODULES")):
            monkeypatch.delenv(name, raising=False)
            if is_login_shell and name in login:
                monkeypatch.setenv(name, login[name])
    submit(job, render(job), rows=())
    expected = "demo 1.0 runs: -m slurm.job "
    until(lambda: expected in log_of(Path(job.folder)), "the module's interpreter runs")


def test_an_unknown_module_ends_the_job_and_is_named_by_its_status(
    job: Job, cluster: RealCluster
) -> None:
    script = render(job).replace("demo/1.0", "demo/9.9")
    number = submit(job, script, rows=()).split()[1]
    cluster.wait_for(number, "FAILED")
    assert "demo/9.9" in status.report(Path(job.folder))
    assert "runs: " not in log_of(Path(job.folder))

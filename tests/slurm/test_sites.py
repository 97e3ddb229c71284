"""What controllers of real SLURMs, each set up as some sites do it, make of the jobs.

Accounts and quality of service need slurmdbd, which is not here: a job_submit script refuses the
jobs with the error codes that it would use, and sbatch prints their texts.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from slurm import preflight, refusals, sbatch, scheduler, submit
from slurm.batch_script import Job, render
from slurm.clusters import Cluster
from tests.builders.modules import run_here
from tests.builders.submitting import SiteRow, site_rows
from tests.slurm.cluster import MIXED, UNCOUNTED, controller_alone

GPT = Job(
    target="recipes.gpt", arguments=[], name="gpt", folder="/nowhere", directory="/",
    python="python", time="30",
)  # fmt: skip
STUDY = """
recipe: [gpt]
axes: {batch-size: [1, 2, 3, 4, 5]}
options: {devices: 1, strategy: ddp, accelerator: cpu}
"""


@pytest.fixture(scope="module")
def mixed_config(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with controller_alone(tmp_path_factory.mktemp("mixed"), MIXED) as config:
        yield config


@pytest.fixture(scope="module")
def uncounted_config(has_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with controller_alone(tmp_path_factory.mktemp("uncounted"), UNCOUNTED) as config:
        yield config


@pytest.fixture
def mixed(mixed_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes with 4 A100, 8 H100 or 7 MIG slices in one partition."""
    monkeypatch.setenv("SLURM_CONF", mixed_config)


@pytest.fixture
def uncounted(uncounted_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes whose GPUs SLURM does not know."""
    monkeypatch.setenv("SLURM_CONF", uncounted_config)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        action()
    return str(caught.value)


def test_every_job_of_the_table_in_the_manual(
    repository: Path, tmp_path: Path, mixed: None, uncounted_config: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def check(row: SiteRow) -> None:
        for job in row.build(tmp_path, monkeypatch):
            rows = scheduler.list_partitions(job.partition)
            refusals.check_types(job, rows)
            sbatch.check_with_slurm([job], rows)

    for row in site_rows(repository):
        with pytest.MonkeyPatch.context() as patched:
            if 'gpu_request = "none"' in row.given:
                patched.setenv("SLURM_CONF", uncounted_config)
            if row.refused is None:
                check(row)
            else:
                assert row.refused in error_of(partial(check, row))


def test_slurm_itself_gives_a_job_several_types_of_gpus(mixed: None) -> None:
    """And so does without the check."""
    job = replace(GPT, nodes=4, devices=4)
    assert sbatch.run_sbatch(["--test-only"], render(job)) == ""
    text = error_of(lambda: refusals.check_types(job, scheduler.list_partitions(None)))
    assert text.startswith("partition all has GPUs of the types 1g.10gb, a100, h100, and the ranks")


def test_slices_of_gpus_are_refused_for_several_devices(mixed: None) -> None:
    rows = scheduler.list_partitions("mig")
    text = error_of(lambda: refusals.check_types(replace(GPT, devices=7), rows))
    assert text.startswith("partition mig has only GPUs of type 1g.10gb, a MIG slice of a GPU, and")
    one = replace(GPT, devices=1, partition="mig")
    assert refusals.check_types(one, rows) is None
    sbatch.check_with_slurm([one], rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"partition": "billed"},
            "Invalid account or account/partition combination specified; no account given; give --",
        ),
        ({"partition": "ruled"}, "Please choose a QOS; no qos given; give --qos (`sacctmgr show"),
        ({"partition": "nowhere"}, "Invalid partition name specified; partition is nowhere; give"),
        ({"partition": "short", "time": "UNLIMITED"}, "time is UNLIMITED; give another --time (`"),
        ({"partition": "short", "time": "1-00:00:00"}, "time is 1-00:00:00; give another --time"),
        ({"constraint": "b200"}, "Invalid feature specification; constraint is b200; give another"),
        ({"exclude": "h1,b[1-2]"}, "Invalid node name specified; exclude is h1,b[1-2]; give anoth"),
        ({"array": "0-100"}, "Invalid job array specification; here an array may have 100 tasks"),
        (
            {"gpu_type": "b200"},
            "not available; it needs 1 node with 8 GPUs of type b200, and partition all has 2 "
            "nodes with 4 x a100, 2 nodes with 7 x 1g.10gb, 2 nodes with 8 x h100",
        ),
        ({"nodes": 7}, "it needs 7 nodes with 8 GPUs, and partition all has 2 nodes with"),
    ],
)
def test_a_refusal_of_slurm_names_the_option(
    options: dict[str, object], expected: str, mixed: None
) -> None:
    job = replace(GPT, **options)  # type: ignore[arg-type]
    rows = scheduler.list_partitions(job.partition)
    text = error_of(lambda: sbatch.check_with_slurm([job], rows))
    assert expected in text
    assert "\n" not in text
    if "no account given" in text:
        sbatch.check_with_slurm([replace(job, account="lab")], rows)
    if "no qos given" in text:
        sbatch.check_with_slurm([replace(job, qos="long")], rows)


def test_a_site_without_whole_nodes_is_understood(mixed: None) -> None:
    sweep = replace(GPT, target="sweep", array="0-3", partition="shared")
    text = error_of(lambda: sbatch.check_with_slurm([sweep], []))
    assert "not given out here; without --exclusive it accepts the job: set exclusive = f" in text
    sbatch.check_with_slurm([replace(sweep, cluster=Cluster(exclusive=False, cpus_per_task=8))], [])


def test_a_site_that_does_not_count_gpus_is_understood(uncounted: None) -> None:
    for cluster in (Cluster(), Cluster(gpu_request="gpus-per-task"), Cluster(gpu_request="gres")):
        text = error_of(partial(sbatch.check_with_slurm, [replace(GPT, cluster=cluster)], []))
        assert "Invalid generic resource (gres) specification; gpu_request is g" in text
    job = replace(GPT, cluster=Cluster(gpu_request="none"))
    sbatch.check_with_slurm([job], [])
    text = error_of(lambda: sbatch.check_with_slurm([replace(job, time=None)], []))
    assert "Time limit specification required, but not provided; no time given; give --time" in text


def test_a_job_may_be_requeued_where_that_is_not_the_default(mixed: None, tmp_path: Path) -> None:
    script = render(replace(GPT, folder=str(tmp_path)))
    for text, expected in (
        (script, "Requeue=1"),
        (script.replace("#SBATCH --requeue\n", ""), "Requeue=0"),  # JobRequeue=0
    ):
        number = sbatch.run_sbatch(["--parsable", "--hold"], text).strip()
        assert expected in run("scontrol", "show", "job", number)
        run("scancel", number)


def test_a_sweep_beyond_the_jobs_of_a_user_is_named_and_continued_by_the_same_command(
    mixed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The site allows two jobs in the queue, and the sweep has three arrays of two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "run_module", run_here)
    monkeypatch.setattr(scheduler, "max_array_tasks", lambda: 2)
    (tmp_path / "s.yaml").write_text(STUDY)
    argv = ["sweep", "s.yaml", "--devices", "1", "--partition", "few", "--folder", "job"]
    assert submit.main(argv) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "AssocMaxSubmitJobLimit; the site limits how many jobs a user may have in the" in text
    assert "with 4 tasks; the same command later submits the other 1 task on 1 node\n" in text
    queued = [array["job"] for array in stored(tmp_path)]
    assert re.findall(r"arrays (\d+) and (\d+) are queued", text) == [tuple(queued)]
    assert f"afterany:{queued[0]}" in run("scontrol", "show", "job", queued[1])
    assert submit.main(argv) == 2
    assert "with 4 tasks; the same command later submits the other 1" in capsys.readouterr().err
    # The first array has ended, without its two cells.
    run("scancel", queued[0])
    monkeypatch.setattr(scheduler, "max_array_tasks", lambda: 3)
    assert submit.main(argv) == 0
    printed = capsys.readouterr().out
    assert f"queued  {queued[1]} has 2 tasks on 1 node\n" in printed
    assert re.search(r"^job     \d+, tasks 0-2%8$", printed, re.MULTILINE)
    run("scancel", *(array["job"] for array in stored(tmp_path)))


def stored(place: Path) -> list[dict[str, str]]:
    arrays: list[dict[str, str]] = json.loads((place / "sweeps/s/arrays").read_text())["arrays"]
    return arrays

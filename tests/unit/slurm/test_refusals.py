"""Tests the table of sites in README, and what is said about jobs that SLURM refuses."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm import refusals, sbatch, scheduler
from slurm.batch_script import Job, render
from slurm.clusters import Cluster
from slurm.scheduler import PartitionRow
from tests.builders.slurm import PutStub
from tests.builders.submitting import SiteRow, site_rows

GPT = Job(
    target="recipes.gpt", arguments=[], name="gpt", folder="/x", directory="/", python="python"
)
MIXED = """printf 'all|all*|up|%s\\n' 'gpu:a100:4|a1|a100,old' 'gpu:a100:4|a2|a100,old' \\
'gpu:h100:8(S:0-1),nvme:1|h1|h100'"""
WHOLE = re.compile("--(gpu|gres|exclusive|mem|cpus)")  # options of which a row names all


def build_checked(row: SiteRow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in row.build(folder, monkeypatch):
        refusals.check_types(job, scheduler.list_partitions(job.partition))


def test_the_table_of_sites_is_what_is_rendered(
    repository: Path, tmp_path: Path, put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_stub("scontrol", "echo MaxArraySize = 100\n")
    put_stub("sinfo", MIXED)
    rows = site_rows(repository)
    assert len(rows) >= 20
    for row in rows:
        if row.refused is not None:
            with pytest.raises(ValueError, match=re.escape(row.refused)):
                build_checked(row, tmp_path, monkeypatch)
            continue
        scripts = [render(job) for job in row.build(tmp_path, monkeypatch)]
        head = {line.removeprefix("#SBATCH ") for text in scripts for line in text.splitlines()}
        assert set(row.rendered) <= head, row.site
        directives = {
            line.removeprefix("#SBATCH ")
            for line in itertools.chain(*map(str.splitlines, scripts))
            if line.startswith("#SBATCH ")
        }
        named = {line for line in row.rendered if WHOLE.match(line)}
        assert named in ({line for line in directives if WHOLE.match(line)}, set()), row.site


@pytest.mark.parametrize(
    ("stderr", "reasons"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid qos specification\n",
            "Invalid qos sp",
        ),
        (
            "allocation failure: Requested node configuration is not available\n",
            "Requested node con",
        ),
        (
            "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: "
            "Job "
            "violates accounting/QOS policy (job submit limit, user's size and/or time limits)\n",
            "AssocMaxSubmitJobLimit",
        ),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job "
            "submit limit, user's size and/or time limits)\n",
            "Job violates accounting/QOS policy (job submit limit, user's size",
        ),
        (
            "sbatch: error: ------\nsbatch: error: Please choose\nsbatch: error: a queue.\n"
            "sbatch: error: ------\nallocation failure: Unspecified error\n",
            "Please choose; a queue",
        ),
        ("sbatch: INFO: hello\nsbatch: error: Pick one\nsbatch: error: Pick one\n", "Pick one"),
        ("something else\n", "something else"),
        ("", ""),
    ],
)
def test_the_reasons_of_a_refusal_are_one_line(stderr: str, reasons: str) -> None:
    assert refusals.reasons_of(stderr).startswith(reasons)
    assert "\n" not in refusals.reasons_of(stderr)
    assert len(refusals.reasons_of(stderr)) <= len(reasons) + 40


@pytest.mark.parametrize(
    ("reasons", "options", "expected"),
    [
        ("Invalid account or account/partition", {}, "no account given; give --account (`sacctmgr"),
        ("Invalid account", {"account": "lab"}, "account is lab; give another --account ("),
        ("User has no association with x", {}, "no account given; give --account"),
        ("Invalid qos specification", {"qos": "fast"}, "qos is fast; give another --qos ("),
        ("You have to choose a QOS", {}, "no qos given; give --qos"),
        ("QOSMaxWallDurationPerJobLimit", {"time": "9-0"}, "time is 9-0; give another --time ("),
        ("Time limit specification required, but not provided", {}, "no time given; give --time"),
        ("Requested time limit is invalid", {"time": "9-0"}, "time is 9-0; give another --time"),
        ("QOSMaxSubmitJobPerUserLimit", {}, "each task of an array is one: submit again when some"),
        (
            "AssocMaxSubmitJobLimit",
            {"target": "sweep"},
            "have ended, or give --max-array-tasks, as",
        ),
        ("QOSMaxGRESPerUser", {}, "this is a limit of your account or quality of service"),
        ("AssocGrpNodeLimit", {}, "this is a limit of your account or quality of service"),
        ("Job violates accounting/QOS policy (time limits)", {}, "this is a limit of your account"),
        (
            "Invalid partition name specified",
            {},
            "no partition given; give --partition (`sinfo -s`",
        ),
        ("Invalid feature specification", {"constraint": "x"}, "constraint is x; give another --c"),
        ("Invalid node name specified", {"exclude": "n[1-2]"}, "exclude is n[1-2]; give another"),
        ("Job dependency problem", {"dependency": "singleton"}, "dependency is singleton; give"),
        ("Invalid generic resource (gres) specification", {}, "gpu_request is gpus-per-node; set"),
        (
            "Requested node configuration is not available",
            {"gpu_type": "b200"},
            "it needs 1 node with 8 GPUs of type b200, and partition all has 1 node with 8 x h100, "
            "2 nodes with 4 x a100",
        ),
        ("Node count specification invalid", {"nodes": 9}, "it needs 9 nodes with 8 GPUs, and pa"),
        ("The site is closed on Mondays", {}, None),
    ],
)
def test_a_refusal_names_the_option_that_it_is_about(
    reasons: str, options: dict[str, object], expected: str | None, put_stub: PutStub
) -> None:
    put_stub("sinfo", MIXED)
    job = replace(GPT, **options)  # type: ignore[arg-type]
    hint = refusals.hint_of(reasons, job, scheduler.list_partitions(None))
    assert hint == expected if expected is None else expected in (hint or "")


def rows_of(*gres: str) -> list[PartitionRow]:
    """Two nodes with each, whose features are their number and ib."""
    return [
        PartitionRow("gpu", "gpu*", "up", text, f"{letter}{number}", f"f{number},ib")
        for number, text in enumerate(gres, 1)
        for letter in "ab"
    ]


@pytest.mark.parametrize(
    ("gres", "options", "expected"),
    [
        (("gpu:a100:4", "gpu:h100:8"), {"devices": 8, "nodes": 2}, None),  # only h100 has eight
        (
            ("gpu:a100:4", "gpu:h100:8"),
            {"devices": 4},
            "note: gpu has GPUs of the types a100, h100",
        ),
        (("gpu:a100:4", "gpu:h100:8"), {"devices": 4, "target": "sweep"}, "and the cells of this"),
        (("gpu:a100:4", "gpu:h100:8"), {"devices": 4, "nodes": 2}, "and the ranks of this job cou"),
        (("gpu:a100:4", "gpu:h100:8"), {"devices": 4, "nodes": 2, "gpu_type": "a100"}, None),
        *(
            (("gpu:a100:4", "gpu:h100:8", "gpu:1g.10gb:7"), {"devices": 4, **options}, expected)
            for options, expected in (
                ({"nodes": 2, "constraint": "f1"}, None),
                ({"nodes": 2, "constraint": "ib&f2"}, None),
                ({"nodes": 2, "constraint": "f1|f2"}, "types a100, h100, and the ranks of this j"),
                ({"nodes": 2, "constraint": "f1|(f2&ib)"}, "types a100, h100, and the ranks of t"),
                ({"nodes": 2, "constraint": "f2|f1&f2"}, None),  # from left to right
                ({"nodes": 2, "constraint": "ib"}, "types 1g.10gb, a100, h100, and the ranks of "),
                ({"nodes": 2, "constraint": "ib&[f1|f2]"}, "note: gpu has GPUs of the types a100"),
                ({"target": "sweep", "constraint": "[f1|f2]"}, "types a100, h100, and the cells "),
                ({"nodes": 2, "constraint": "[f1*1&f2*1]"}, "types a100, h100, and the ranks of "),
                ({"nodes": 2, "constraint": "[f1*1&ib*1]&f1"}, None),
                ({"constraint": "f3"}, "only GPUs of type 1g.10gb, a MIG slice of a GPU, and"),
                ({"nodes": 2, "constraint": "f9"}, None),  # SLURM refuses it
                ({"nodes": 2, "exclude": "b2,a2,a3,b3"}, None),
                ({"nodes": 2, "exclude": "a2,a3,b3"}, "types a100, h100, and the ranks of this j"),
            )
        ),
        *(
            (("gpu:a100:4", "gpu:h100:8"), {"devices": 4, "nodes": 2, "extra": (extra,)}, expected)
            for extra, expected in (
                ("--constraint=f1", None),
                ("--constraint=ib", "types a100, h100, and the ranks of this job could get diffe"),
                ("--exclude=a2,b2", None),
                ("--nodelist=a1,b1", None),
                ("--reservation=mine", None),
            )
        ),
        (("gpu:a100:4", "gpu:h100:8"), {"devices": 4, "nodes": 2, "on_gpus": False}, None),
        (("gpu:a100:4,gpu:h100:4",), {"devices": 4}, "and the ranks of this job could get differ"),
        (("gpu:a100:4,gpu:h100:4",), {"devices": 1}, "note: gpu has GPUs of the types a100, h100"),
        (
            ("gpu:4", "gpu:h100:8"),
            {"devices": 4, "nodes": 2},
            "types without a type, h100, and the",
        ),
        (("gpu:4(S:0,2)", "gpu:8"), {"devices": 4, "nodes": 2}, None),
        (("(null)",), {}, None),
        ((), {}, None),
        (
            ("gpu:1g.10gb:7",),
            {"devices": 7},
            "only GPUs of type 1g.10gb, a MIG slice of a GPU, and",
        ),
        (("gpu:1g.10gb:7",), {"devices": 1}, None),
        (("gpu:1g.10gb:7", "gpu:a100:4"), {"devices": 4, "nodes": 2}, "types 1g.10gb, a100, and t"),
    ],
)
def test_devices_of_one_job_are_not_of_several_types(
    gres: tuple[str, ...], options: dict[str, Any], expected: str | None, put_stub: PutStub
) -> None:
    put_stub("scontrol", 'echo "$3" | tr , "\\n"')  # show hostnames
    cluster = Cluster(cpus_per_task=4, extra=options.get("extra", ()))
    options = {name: value for name, value in options.items() if name != "extra"}
    job = replace(GPT, cluster=cluster, **options)
    if expected is None:
        assert refusals.check_types(job, rows_of(*gres)) is None
    elif expected.startswith("note"):
        note = refusals.check_types(job, rows_of(*gres))
        assert expected.replace("note: ", "partition ") in (note or "")
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            refusals.check_types(job, rows_of(*gres))


def test_a_script_that_is_accepted_without_exclusive_says_so(put_stub: PutStub) -> None:
    put_stub(
        "sbatch",
        "grep -q -e --exclusive && { echo 'sbatch: error: Whole nodes are not given out' >&2; "
        "exit 1; }; exit 0\n",
    )
    sweep = replace(GPT, target="sweep", array="0-3")
    with pytest.raises(ValueError, match="given out; without --exclusive it accepts the job: set"):
        sbatch.check_with_slurm([sweep], [])
    sbatch.check_with_slurm([replace(sweep, cluster=Cluster(cpus_per_task=4))], [])
    put_stub("sbatch", "echo 'sbatch: error: Nobody may run here' >&2; exit 1\n")
    with pytest.raises(ValueError, match=r"refuses this job: Nobody may run here$"):
        sbatch.check_with_slurm([sweep], [])

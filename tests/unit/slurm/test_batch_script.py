"""Tests the batch script of a job: its directives, and that values cannot inject any."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.batch_script import Job, render, seconds_of
from slurm.clusters import Cluster, load_cluster

GPT = Job(
    target="recipes.gpt",
    arguments=["--size", "1.3b", "--max-steps", "5000"],
    name="gpt",
    folder="/scratch/runs/gpt",
    directory="/home/someone/unitransformer",
    python="/home/someone/unitransformer/.venv/bin/python",
)
SCRIPTS = {
    "plain": GPT,
    "everything": replace(
        GPT,
        nodes=2,
        time="2:00:00",
        partition="batch",
        account="ml",
        qos="high",
        gpu_type="h200",
        exclude="node[3-5]",
        dependency="afterok:1234",
        array="0-4%2",
        requeue=False,
    ),
    "dgx": replace(GPT, nodes=64, gpu_type="h200", cluster=load_cluster("dgx")),
    "academic": replace(GPT, devices=4, gpu_type="a100", cluster=load_cluster("academic")),
    "cloud": replace(GPT, partition="spot", cluster=load_cluster("cloud")),
    "cpu": replace(GPT, devices=2, on_gpus=False, arguments=["--accelerator", "cpu"]),
    "sweep": replace(
        GPT, target="sweep", name="sweep-node-8", arguments=["node-8"], array="0-95%8"
    ),
    "sweep-academic": replace(
        GPT,
        target="sweep",
        name="sweep-single-gpu",
        arguments=["single-gpu"],
        devices=4,
        array="0-23%8",
        gpu_type="a100",
        cluster=load_cluster("academic"),
    ),
    "hostile": replace(
        GPT,
        folder="/scratch/it's 100 %j $(id)",
        directory="/home/a b;c",
        arguments=["--data", "a 'b' \"c\" $(touch x) `y`;\n# z", "--seed", "1"],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_batch_script_equals_the_stored_one(name: str, repository: Path) -> None:
    golden = repository / f"tests/slurm/scripts/{name}.sbatch"
    assert render(SCRIPTS[name]) == golden.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
def test_batch_scripts_pass_shellcheck(repository: Path) -> None:
    scripts = [*repository.glob("slurm/*.sbatch"), *repository.glob("tests/slurm/scripts/*.sbatch")]
    assert len(scripts) == 4 + len(SCRIPTS)
    # SC2016: text in single quotes is not expanded, on purpose.
    done = subprocess.run(
        ["shellcheck", "--exclude=SC2016", *scripts], capture_output=True, text=True
    )
    assert done.stdout == ""


def test_ready_scripts_differ_only_in_their_recipe(repository: Path) -> None:
    texts = {
        name: (repository / f"slurm/{name}.sbatch").read_text() for name in ("gpt", "bert", "vit")
    }
    for name, text in texts.items():
        directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert (
            directives[1:]
            == [line for line in texts["gpt"].splitlines() if line.startswith("#SBATCH")][1:]
        )
        assert f'-m slurm.job recipes.{name} -- "$@"' in text
        assert not re.search(r"devices|num-nodes", text)  # counted by the job


def test_a_sweep_task_requests_cores_for_all_ranks_of_a_cell() -> None:
    sweep, eight = SCRIPTS["sweep"], Cluster(cpus_per_task=14)
    assert "#SBATCH --cpus-per-task=112\n" in render(replace(sweep, cluster=eight))
    assert "#SBATCH --exclusive\n" not in render(replace(sweep, cluster=eight))
    assert "#SBATCH --exclusive\n" in render(sweep)
    assert "#SBATCH --cpus-per-task=14\n" in render(replace(GPT, cluster=eight))
    assert "#SBATCH --exclusive\n" not in render(GPT)


# ------------------------------------------------------------------------------- what it means

ANYTHING = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
PATH = st.text(st.characters(exclude_characters="\0\n\r\\", exclude_categories=["Cs"]), min_size=1)

# Text that would be a directive at the beginning of a line.
SMUGGLED = ANYTHING.map(lambda text: f"{text}\n#SBATCH --partition=nowhere\n")


def run_by_bash(job: Job, folder: Path) -> tuple[list[str], str | None]:
    """The arguments that `slurm.job` would get, and `$NCCL_SOCKET_IFNAME`."""
    actual = folder / "arguments.json"
    actual.unlink(missing_ok=True)
    stub = folder / "python stub"
    stub.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "result = [sys.argv[1:], os.environ.get('NCCL_SOCKET_IFNAME')]\n"
        f"open({str(actual)!r}, 'w').write(json.dumps(result))\n"
    )
    stub.chmod(0o755)
    script = folder / "script"
    script.write_text(render(replace(job, python=str(stub))))
    subprocess.run(["bash", script], cwd=folder, check=True, capture_output=True)
    assert {path.name for path in folder.iterdir()} == {"arguments.json", "python stub", "script"}
    arguments_read, variable = json.loads(actual.read_text())
    return arguments_read, variable


@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(ANYTHING, max_size=4), folder=PATH)
def test_every_option_value_is_quoted_literally(
    arguments: list[str], folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("script")
    arguments_read, _ = run_by_bash(replace(GPT, arguments=arguments, folder=folder), place)
    assert arguments_read == [
        "-m",
        "slurm.job",
        "--folder",
        folder,
        "recipes.gpt",
        "--",
        *arguments,
    ]


@settings(max_examples=30, deadline=None)
@given(value=ANYTHING, disk=PATH)
def test_cluster_settings_are_quoted_literally(
    value: str, disk: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster = Cluster(local_disk=disk, environment=(("NCCL_SOCKET_IFNAME", value),))
    arguments_read, variable = run_by_bash(
        replace(GPT, cluster=cluster), tmp_path_factory.mktemp("script")
    )
    assert arguments_read[arguments_read.index("--local-disk") + 1] == disk
    assert variable == value


@settings(max_examples=200, deadline=None)
@given(
    places=st.tuples(PATH, PATH, PATH),
    extra=PATH,
    arguments=st.lists(ANYTHING | SMUGGLED, max_size=3),
    variable=ANYTHING | SMUGGLED,
)
def test_no_value_adds_a_directive(
    places: tuple[str, str, str], extra: str, arguments: list[str], variable: str
) -> None:
    folder, directory, disk = places
    odd = replace(
        GPT,
        folder=folder,
        directory=directory,
        arguments=arguments,
        cluster=Cluster(
            extra=(f"--x={extra}",),
            modules=tuple(arguments),
            local_disk=disk,
            environment=(("NCCL_SOCKET_IFNAME", variable),),
        ),
    )
    plain = replace(GPT, cluster=Cluster(extra=("--x=1",)))
    assert directives(render(odd)) == directives(render(plain))
    # The requested resources do not depend on the recipe.
    assert directives(render(odd), whole=True) == directives(
        render(replace(odd, arguments=[], cluster=Cluster(extra=(f"--x={extra}",)))), whole=True
    )


def directives(script: str, *, whole: bool = False) -> list[str]:
    """The directives that sbatch reads, up to the first line that is not a comment."""
    lines = itertools.takewhile(lambda line: not line or line[0] == "#", script.split("\n"))
    return [
        line if whole else line.partition("=")[0] for line in lines if line.startswith("#SBATCH")
    ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("nodes", 0, "nodes is 0; it must be at least 1"),
        ("devices", -8, "devices is -8; it must be at least 1"),
        ("time", "2 hours", "time is '2 hours'; give 30 (minutes)"),
        ("time", "-1:00", "time is '-1:00'"),
        ("partition", "a b", "partition is 'a b'; give the name of a partition"),
        ("partition", "a,,b", "partition is 'a,,b'; give the name of a partition"),
        ("folder", "a\\b", "give a path without backslashes or line breaks"),
        ("partition", "gpu\n#SBATCH --qos=x", "partition is"),
        ("name", "a;b", "name is 'a;b'; give letters"),
        ("gpu_type", "h200:8", "gpu-type is 'h200:8'; give the type of a GPU"),
        ("exclude", "$(id)", "exclude is '$(id)'; give nodes"),
        (
            "dependency",
            "afterok:x",
            "dependency is 'afterok:x'; give one such as afterok:1234",
        ),
        ("array", "5-", "array is '5-'; give task numbers, such as 0-9"),
        ("folder", "a\nb", "folder is 'a\\nb'; give a path without"),
    ],
)
def test_invalid_values_are_refused_with_their_name(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(GPT, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("90:30", 5430),
        ("2:00:00", 7200),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:15", 131_415),
    ],
)
def test_time_limits_have_the_formats_of_slurm(time: str, seconds: int) -> None:
    assert f"#SBATCH --time={time}\n" in render(replace(GPT, time=time))
    assert seconds_of(time) == seconds


# ------------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("name", ["dgx", "academic", "cloud"])
def test_example_clusters_are_valid(name: str) -> None:
    assert load_cluster(name).local_disk is not None


def test_a_number_of_a_cluster_is_read_as_an_option_is(tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text("[a]\ndevices = '8'\nsignal_ahead_s = 1e2\naccount = 12\nenvironment = {N = 4}")
    cluster = load_cluster("a", path)
    assert (cluster.devices, cluster.signal_ahead_s, cluster.account) == (8, 100, "12")
    assert cluster.environment == (("N", "4"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a]\npartitoin = 'x'", "a.partitoin is unknown; did you mean partition?"),
        ("[a]\ndevices = 'eight'", "a.devices is 'eight'; it must be an integer"),
        ("[a]\nsignal = 'USR3'", "signal is USR3; did you mean USR"),
        ("[a]\nsignal_ahead_s = 0", "signal_ahead_s is 0; give seconds"),
        ("[a]\nextra = ['rm -rf']", "extra holds 'rm -rf'; give options of sbatch"),
        ("[a]\nenvironment = { 'A B' = 1 }", "environment holds 'A B'; give names of variables"),
        ("[a]\nmodules = 3", "a.modules is 3"),
        ("[a]\ndevices = 1.5", "a.devices is 1.5; it must be an integer"),
        ("[a]\naccount = 62117e96", "it must be text: write it in quotes"),
        ("[a]\naccount = 2024-01-01", "a.account is 2024-01-01; it must be text: write it in"),
        ("[a]\nenvironment = { A = true }", "a.environment.A is True; it must be text: write it"),
        ("[a]\nextra = [1.5]", "a.extra is 1.5; it must be text: write it in quotes"),
        ("a = 3", "a is 3; it must be a table"),
        ("[a", "is not TOML"),
        ("[b]", "cluster is a, and"),
    ],
)
def test_invalid_clusters_are_refused_with_their_key(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_cluster("a", path)
    assert "\n" not in str(caught.value)

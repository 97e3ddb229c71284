"""A batch job's script: what is asked for, and nothing that a value could smuggle in."""

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
        GPT, target="sweep", name="sweep-node-8", arguments=["node-8"], tasks=1, array="0-95%8"
    ),
    "sweep-academic": replace(
        GPT,
        target="sweep",
        name="sweep-single-gpu",
        arguments=["single-gpu"],
        devices=4,
        tasks=1,
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
def test_the_script_is_the_one_on_record(name: str, repository: Path) -> None:
    golden = repository / f"tests/slurm/scripts/{name}.sbatch"
    assert render(SCRIPTS[name]) == golden.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
def test_scripts_pass_shellcheck(repository: Path) -> None:
    scripts = [*repository.glob("slurm/*.sbatch"), *repository.glob("tests/slurm/scripts/*.sbatch")]
    assert len(scripts) == 4 + len(SCRIPTS)
    # SC2016: what stands in single quotes is not expanded, as it should be.
    done = subprocess.run(
        ["shellcheck", "--exclude=SC2016", *scripts], capture_output=True, text=True
    )
    assert done.stdout == ""


def test_ready_scripts_differ_in_their_recipe_alone(repository: Path) -> None:
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


def test_a_sweeps_task_has_the_cores_of_all_ranks_that_a_cell_may_start() -> None:
    sweep, eight = SCRIPTS["sweep"], Cluster(cpus_per_task=14)
    assert "#SBATCH --cpus-per-task=112\n" in render(replace(sweep, cluster=eight))
    assert "#SBATCH --exclusive\n" not in render(replace(sweep, cluster=eight))
    assert "#SBATCH --exclusive\n" in render(sweep)
    assert "#SBATCH --cpus-per-task=14\n" in render(replace(GPT, cluster=eight))
    assert "#SBATCH --exclusive\n" not in render(GPT)


# ------------------------------------------------------------------------------- what it means

ANYTHING = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
PATH = st.text(st.characters(exclude_characters="\0\n\r\\", exclude_categories=["Cs"]), min_size=1)

# What would be a directive if it came to stand at the beginning of a line.
SMUGGLED = ANYTHING.map(lambda text: f"{text}\n#SBATCH --partition=nowhere\n")


def run_by_bash(job: Job, folder: Path) -> tuple[list[str], str | None]:
    """The words that `slurm.job` would be given, and `$NCCL_SOCKET_IFNAME`."""
    told = folder / "told.json"
    told.unlink(missing_ok=True)
    stub = folder / "python stub"
    stub.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "found = [sys.argv[1:], os.environ.get('NCCL_SOCKET_IFNAME')]\n"
        f"open({str(told)!r}, 'w').write(json.dumps(found))\n"
    )
    stub.chmod(0o755)
    script = folder / "script"
    script.write_text(render(replace(job, python=str(stub))))
    subprocess.run(["bash", script], cwd=folder, check=True, capture_output=True)
    assert {path.name for path in folder.iterdir()} == {"told.json", "python stub", "script"}
    words, variable = json.loads(told.read_text())
    return words, variable


@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(ANYTHING, max_size=4), folder=PATH)
def test_every_value_means_itself(
    arguments: list[str], folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("script")
    words, _ = run_by_bash(replace(GPT, arguments=arguments, folder=folder), place)
    assert words == ["-m", "slurm.job", "--folder", folder, "recipes.gpt", "--", *arguments]


@settings(max_examples=30, deadline=None)
@given(value=ANYTHING, disk=PATH)
def test_settings_of_a_cluster_mean_themselves(
    value: str, disk: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster = Cluster(local_disk=disk, environment=(("NCCL_SOCKET_IFNAME", value),))
    words, variable = run_by_bash(replace(GPT, cluster=cluster), tmp_path_factory.mktemp("script"))
    assert words[words.index("--local-disk") + 1] == disk
    assert variable == value


@settings(max_examples=200, deadline=None)
@given(
    places=st.tuples(PATH, PATH, PATH),
    extra=PATH,
    words=st.lists(ANYTHING | SMUGGLED, max_size=3),
    variable=ANYTHING | SMUGGLED,
)
def test_no_value_adds_a_directive(
    places: tuple[str, str, str], extra: str, words: list[str], variable: str
) -> None:
    folder, directory, disk = places
    odd = replace(
        GPT,
        folder=folder,
        directory=directory,
        arguments=words,
        cluster=Cluster(
            extra=(f"--x={extra}",),
            modules=tuple(words),
            local_disk=disk,
            environment=(("NCCL_SOCKET_IFNAME", variable),),
        ),
    )
    plain = replace(GPT, cluster=Cluster(extra=("--x=1",)))
    assert directives(render(odd)) == directives(render(plain))
    # What is asked of SLURM does not depend on what runs.
    assert directives(render(odd), whole=True) == directives(
        render(replace(odd, arguments=[], cluster=Cluster(extra=(f"--x={extra}",)))), whole=True
    )


def directives(script: str, *, whole: bool = False) -> list[str]:
    """Those that sbatch reads: it stops at the first line that is no comment."""
    lines = itertools.takewhile(lambda line: not line or line[0] == "#", script.split("\n"))
    return [
        line if whole else line.partition("=")[0] for line in lines if line.startswith("#SBATCH")
    ]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("nodes", 0, "nodes is 0; it must be at least 1"),
        ("devices", -8, "devices is -8; it must be at least 1"),
        ("time", "2 hours", "time is '2 hours'; give a time as SLURM takes it"),
        ("time", "-1:00", "time is '-1:00'"),
        ("partition", "a b", "partition is 'a b'; give the name of a partition"),
        ("partition", "a,,b", "partition is 'a,,b'; give the name of a partition"),
        ("folder", "a\\b", "which cannot stand in a batch script"),
        ("partition", "gpu\n#SBATCH --qos=x", "partition is"),
        ("name", "a;b", "name is 'a;b'; give letters"),
        ("gpu_type", "h200:8", "gpu-type is 'h200:8'; give the type of a GPU"),
        ("exclude", "$(id)", "exclude is '$(id)'; give nodes"),
        ("dependency", "afterok:x", "dependency is 'afterok:x'; give as afterok:1234"),
        ("array", "5-", "array is '5-'; give as 0-9"),
        ("folder", "a\nb", "folder is 'a\\nb', which cannot stand in a batch script"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        replace(GPT, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        *(("30", 1800), ("90:30", 5430), ("2:00:00", 7200)),
        *(("1-12", 129_600), ("1-12:30", 131_400), ("1-12:30:15", 131_415)),
    ],
)
def test_times_are_those_of_slurm(time: str, seconds: int) -> None:
    assert f"#SBATCH --time={time}\n" in render(replace(GPT, time=time))
    assert seconds_of(time) == seconds


# ------------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("name", ["dgx", "academic", "cloud"])
def test_examples_of_clusters_are_sound(name: str) -> None:
    assert load_cluster(name).local_disk is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a]\npartitoin = 'x'", "a.partitoin is unknown; did you mean partition?"),
        ("[a]\ndevices = 'eight'", "a.devices is 'eight'; it must be an integer"),
        ("[a]\nsignal = 'USR3'", "signal is USR3; did you mean USR"),
        ("[a]\nsignal_ahead_s = 0", "signal_ahead_s is 0; give seconds"),
        ("[a]\nextra = ['rm -rf']", "extra holds 'rm -rf'; give options of sbatch"),
        ("[a]\nenvironment = { 'A B' = 1 }", "environment holds 'A B'; give names of variables"),
        ("[a]\nmodules = 3", "a.modules is 3"),
        ("a = 3", "a is 3; it must be a table"),
        ("[a", "is not TOML"),
        ("[b]", "cluster is a and"),
    ],
)
def test_bad_clusters_are_refused_by_key(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "clusters.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_cluster("a", path)
    assert "\n" not in str(caught.value)

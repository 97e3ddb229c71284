"""Tests the batch script of a job: its directives, and that values cannot inject any."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        constraint="[rack1*2&rack2*4]",
        exclude="node[3-5]",
        dependency="afterok:1234",
        array="0-4%2",
        requeue=False,
    ),
    "expanded": replace(
        GPT,
        time="0",
        account="abc@v100",
        gpu_type="h200",
        python="~/venv/bin/python",
        cluster=Cluster(
            gpu_request="gres",
            extra=("--gres=nvme:1",),
            modules=("$MODULES/cuda",),
            python="~/venv/bin/python",
            local_disk="/scratch/$USER",
            environment=(
                ("LIBRARY_PATH", "~/lib:${PROJECT}/lib"),
                ("PRICE", r"\$PRICE \$(id) \$5"),
            ),
        ),
    ),
    "dgx": replace(GPT, nodes=64, gpu_type="h200", cluster=load_cluster("dgx")),
    "academic": replace(GPT, devices=4, gpu_type="a100", cluster=load_cluster("academic")),
    "cloud": replace(GPT, partition="spot", cluster=load_cluster("cloud")),
    "cpu": replace(GPT, devices=2, on_gpus=False, arguments=["--accelerator", "cpu"]),
    "sweep": replace(
        GPT, target="sweep", name="sweep-node-8", arguments=["node-8"], array="0-95%8"
    ),
    "sweep-nodes": replace(
        GPT,
        target="sweep",
        name="sweep-weak-nodes-4",
        nodes=4,
        arguments=["weak-nodes", "--only-nodes", "4"],
        array="0-17%2",
        time="2:00:00",
        cluster=Cluster(cpus_per_task=12),
        shared="/scratch/sweeps/weak-nodes/study.json",
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

VARIABLES = {"HOME": "/home/$(touch x)", "PLACE": "a 'b' \"c\" `touch x`;\n# z", "EMPTY": ""}
ANYTHING = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
PATH = st.text(st.characters(exclude_characters="\0\n\r\\", exclude_categories=["Cs"]), min_size=1)
LITERAL = ANYTHING.map(lambda text: re.sub("[$~`]", "", text))  # in the table of a cluster
ONE_LINE = st.text(st.characters(exclude_characters="$~`", exclude_categories=["Cc", "Cs"]))

# Text that would be a directive at the beginning of a line.
SMUGGLED = LITERAL.map(lambda text: f"{text}\n#SBATCH --partition=nowhere\n")


def run_by_bash(job: Job, folder: Path) -> tuple[list[str], str | None]:
    """The arguments that `slurm.job` would get, and `$NCCL_SOCKET_IFNAME`."""
    actual = folder / "actual"
    actual.unlink(missing_ok=True)
    stub = folder / "python stub"
    # A shell starts in a millisecond. No argument or variable can hold a null byte.
    stub.write_text(
        f'#!/bin/sh\nprintf \'%s\\0\' "$@" ${{NCCL_SOCKET_IFNAME+"=$NCCL_SOCKET_IFNAME"}} '
        f"> {shlex.quote(str(actual))}\n"
    )
    stub.chmod(0o755)
    script = folder / "script"
    script.write_text(render(replace(job, python=str(stub))))
    subprocess.run(
        ["bash", script], cwd=folder, check=True, capture_output=True, env=os.environ | VARIABLES
    )
    assert {path.name for path in folder.iterdir()} == {"actual", "python stub", "script"}
    words = actual.read_bytes().decode().split("\0")[:-1]
    if "NCCL_SOCKET_IFNAME" not in dict(job.cluster.environment):
        return words, None
    return words[:-1], words[-1].removeprefix("=")


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


# Text of a cluster's table -> what the node makes of it.
PIECES = st.lists(
    LITERAL.map(lambda text: (text, text))
    | st.sampled_from(
        [
            ("$PLACE/", VARIABLES["PLACE"] + "/"),
            ("${PLACE}x", VARIABLES["PLACE"] + "x"),
            (":~/", f":{VARIABLES['HOME']}/"),
            ("/~", "/~"),
            *((rf"\{text}", text) for text in ("$HOME", "~", "$(touch x)", "${HOME:-x}", "$5")),
            (r"\`touch x\`", "`touch x`"),
        ]
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, begins_at_home=st.booleans())
def test_cluster_settings_are_literal_except_for_variables_and_home(
    pieces: list[tuple[str, str]], begins_at_home: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if begins_at_home:
        pieces = [("~/", f"{VARIABLES['HOME']}/"), *pieces]
    # The dot keeps a piece from changing the next one.
    text, expected = (".".join(piece[side] for piece in pieces) for side in (0, 1))
    cluster = Cluster(local_disk=text or "x", environment=(("NCCL_SOCKET_IFNAME", text),))
    arguments_read, variable = run_by_bash(
        replace(GPT, cluster=cluster), tmp_path_factory.mktemp("script")
    )
    assert arguments_read[arguments_read.index("--local-disk") + 1] == (expected or "x")
    assert variable == expected


@pytest.mark.parametrize("name", ["EMPTY", "ABSENT_ON_THE_NODE"])
def test_a_variable_that_the_node_lacks_ends_the_job_with_its_name(
    name: str, tmp_path: Path
) -> None:
    cluster = Cluster(local_disk=f"/scratch/${name}")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_by_bash(replace(GPT, cluster=cluster), tmp_path)
    assert re.search(rf"line \d+: {name}: not set$", caught.value.stderr.decode().strip())


def test_paths_inside_a_container_are_expanded_on_the_node(tmp_path: Path) -> None:
    cluster = Cluster(
        container="$PLACE.sqsh",
        container_mounts=("~/data:/data", "${PLACE}:/x y"),
        python="~/python",
        local_disk="/scratch/$PLACE",
    )
    home, place = VARIABLES["HOME"], VARIABLES["PLACE"]
    arguments, _ = run_by_bash(replace(GPT, cluster=cluster), tmp_path)
    disk = f"/scratch/{place}"
    mounts = f"{home}/data:/data,{place}:/x y,{GPT.directory}:{GPT.directory}"
    assert arguments[arguments.index("--local-disk") + 1] == disk
    assert arguments[arguments.index("--python") + 1] == f"{home}/python"
    assert f"--srun=--container-image={place}.sqsh" in arguments
    assert (
        f"--srun=--container-mounts={mounts},{GPT.folder}:{GPT.folder},{disk}:{disk}" in arguments
    )
    sweep = replace(GPT, cluster=Cluster(container="x"), target="sweep", shared="/out/a/study.json")
    assert "/out/a:/out/a" in " ".join(run_by_bash(sweep, tmp_path)[0])


@settings(max_examples=200, deadline=None)
@given(
    places=st.tuples(PATH, PATH, LITERAL),
    extra=ONE_LINE,
    arguments=st.lists(LITERAL | SMUGGLED, max_size=3),
    variable=LITERAL | SMUGGLED,
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
        ("array", "0,5-1", "array is '0,5-1'; 5-1 holds no task, give 1-5"),
        ("devices", -8, "devices is -8; it must be at least 1"),
        ("time", "2 hours", "time is '2 hours'; give 30 (minutes)"),
        ("time", "-1:00", "time is '-1:00'"),
        ("time", "-2", "time is '-2'; give 30 (minutes), 2:00:00, 1-12:00:00 or UNLIMITED"),
        ("time", "1:2:3:4", "time is '1:2:3:4'; give 30"),
        ("time", "99999-0", "time is 99999-0, more than the 24855 days that SLURM can count; give"),
        ("time", "\u0663", "time is '\u0663'; give 30"),
        ("time", "", "time is ''; give 30"),
        ("partition", "", "partition is ''; give the name of a partition"),
        ("account", "-x", "account is '-x'; give the name of an account"),
        ("account", "a\0", "account is 'a\\x00'; give the name of an account"),
        ("qos", "a\x1b[0m", "qos is 'a\\x1b[0m'; give the name of a quality"),
        ("constraint", "a\r\nb", "constraint is 'a\\r\\nb'; give features of nodes"),
        ("constraint", "a\udce9", "constraint is 'a\\udce9'; give features of nodes"),
        ("folder", "a\\b", "give a UTF-8 path without backslashes or line breaks"),
        ("directory", "caf\udce9", "directory is 'caf\\udce9'; give a UTF-8 path"),
        ("arguments", ["a\udce9"], "'a\\udce9' holds a zero byte, or is not UTF-8"),
        ("name", "a" * 101, "give at most 100 letters"),
        ("partition", "gpu\n#SBATCH --qos=x", "partition is"),
        ("name", "a;b", "name is 'a;b'; give at most 100 letters"),
        ("gpu_type", "h200:8", "gpu-type is 'h200:8'; give the type of a GPU"),
        ("exclude", "$(id)", "exclude is '$(id)'; give nodes"),
        (
            "dependency",
            "afterok:x",
            "dependency is 'afterok:x'; give one such as afterok:1234",
        ),
        ("array", "5-", "array is '5-'; give task numbers, such as 0-9"),
        ("folder", "a\nb", "folder is 'a\\nb'; give a UTF-8 path without"),
        (
            "cluster",
            Cluster(extra=("--gres=gpu:4",)),
            "devices is 8, but --gres in extra of the cl",
        ),
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
        ("90", 5400),
        ("90:30", 5430),
        ("2:90", 210),
        ("2:00:00", 7200),
        ("1-0", 86_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:15", 131_415),
        *((text, None) for text in ("0", "0:00", "0-0", "-1", "INFINITE", "unlimited")),
    ],
)
def test_time_limits_have_the_formats_of_slurm(time: str, seconds: int | None) -> None:
    script = render(replace(GPT, time=time))
    assert f"#SBATCH --time={'UNLIMITED' if seconds is None else time}\n" in script
    assert seconds_of(time) == seconds
    assert ("# There is no time limit." in script) == (seconds is None)


# --------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("options", "extra", "expected"),
    [
        ({}, (), ["--gpus-per-node=4"]),
        ({"gpu_request": "gres"}, (), ["--gres=gpu:4"]),
        ({"gpu_request": "gres"}, ("--gres=nvme:1",), ["--gres=gpu:4,nvme:1"]),
        ({"gpu_request": "none"}, (), []),
        ({"gpu_request": "none"}, ("--gpus=4",), ["--gpus=4"]),
        ({}, ("--gres=nvme:1",), ["--gpus-per-node=4", "--gres=nvme:1"]),
        ({}, ("--gres=gpu:h200:4",), ["--gres=gpu:h200:4"]),
        ({"gpu_request": "gres"}, ("--gres=gpu:h200:4",), ["--gres=gpu:h200:4"]),
        ({}, ("--gres=nvme:1,gpu:h200:3,gpu",), ["--gres=nvme:1,gpu:h200:3,gpu"]),
        ({}, ("--gpus-per-node=h200:4",), ["--gpus-per-node=h200:4"]),
        ({}, ("--gpus-per-task=1",), ["--gpus-per-task=1"]),
        ({}, ("--gpus=h200:4",), ["--gpus=h200:4"]),
        ({"gpu_request": "gpus-per-task"}, (), ["--gpus-per-task=1"]),
        *(
            ({}, (option, "--gpus-per-task=1"), [option, "--gpus-per-task=1"])
            for option in ("--gpus-per-node=4", "--gpus=4", "--gres=gpu:h200:1,gpu:a100:3")
        ),
    ],
)
def test_gpus_are_requested_once_in_the_way_of_the_cluster(
    options: dict[str, Any], extra: tuple[str, ...], expected: list[str]
) -> None:
    job = replace(GPT, devices=4, cluster=Cluster(extra=extra, **options))
    lines = re.findall(r"^#SBATCH (--g(?:pus|res).*)$", render(job), re.MULTILINE)
    assert lines == expected


def test_the_type_of_gpus_follows_the_request() -> None:
    job = replace(GPT, gpu_type="h200", cluster=Cluster(gpu_request="gres"))
    assert "#SBATCH --gres=gpu:h200:8\n" in render(job)
    assert "#SBATCH --gpus-per-node='a#b:8'\n" in render(replace(GPT, gpu_type="a#b"))
    on_cpus = replace(job, on_gpus=False, gpu_type=None)
    assert "gpu" not in render(on_cpus).partition("\n\n")[0].replace("gpt", "")
    for free, expected in (
        (Cluster(gpu_request="none"), "has gpu_request none; choose nodes with --partition"),
        (Cluster(extra=("--gres=gpu:8",)), "has a request for GPUs in extra; write the type there"),
    ):
        with pytest.raises(ValueError, match=f"gpu-type is h200, but the cluster {expected}"):
            replace(job, cluster=free)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "--gres=gpu:4",
            "devices is 8, but --gres in extra of the cluster requests 4 GPUs; give --devices 4",
        ),
        ("--gpus=8", "devices is 8 on 2 nodes, but --gpus in extra of the cluster requests 8 GPUs"),
        ("--gpus=9", "requests 9 GPUs; leave it out, and say with gpu_request how to ask"),
        (
            "--gpus-per-task=2",
            "devices is 8 on 2 nodes, but --gpus-per-task in extra of the cluster requests 32",
        ),
        ("--tres-per-task=cpu:2,gres/gpu:2", "extra of the cluster requests 32 GPUs"),
        ("--gres=gpu:1g.10gb:8", "gpu-type is 1g.10gb, a MIG slice of a GPU, and the job has 16"),
    ],
)
def test_a_request_for_gpus_in_extra_agrees_with_the_job(extra: str, expected: str) -> None:
    nodes = 2 if "2 nodes" in expected or "32" in expected or "9 GPUs" in expected else 1
    nodes = 2 if "16" in expected else nodes
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(GPT, nodes=nodes, cluster=Cluster(extra=(extra,)))


@pytest.mark.parametrize(
    "name", ["1g.10gb", "a100_1g.5gb", "nvidia_a100_3g.20gb", "1g.10gb+me", "h100-2g-20gb", "1g5gb"]
)
def test_a_slice_of_a_gpu_is_for_jobs_of_one_device(name: str) -> None:
    assert f"--gpus-per-node={name}:1\n" in render(replace(GPT, gpu_type=name, devices=1))
    for nodes, devices in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="a MIG slice of a GPU, and the job has 2 devices: a"):
            replace(GPT, gpu_type=name, nodes=nodes, devices=devices)


@pytest.mark.parametrize("name", ["h100_80gb", "a100-sxm4-40gb", "h200", "gb200", "h100.80gb"])
def test_whole_gpus_are_not_taken_for_slices(name: str) -> None:
    assert f"--gpus-per-node={name}:8\n" in render(replace(GPT, gpu_type=name))


@pytest.mark.parametrize(
    ("job", "cluster", "expected"),
    [
        (GPT, Cluster(), False),
        (GPT, Cluster(exclusive=True), True),
        (GPT, Cluster(gpu_request="none"), True),  # SLURM would give the GPUs to other jobs too
        (GPT, Cluster(gpu_request="none", exclusive=False), False),
        (GPT, Cluster(gpu_request="none", extra=("--gres=gpu:8",)), False),
        (SCRIPTS["sweep"], Cluster(), True),
        (SCRIPTS["sweep"], Cluster(cpus_per_task=4), False),
        (SCRIPTS["sweep"], Cluster(cpus_per_task=4, exclusive=False), False),
        (SCRIPTS["cpu"], Cluster(gpu_request="none"), False),
    ],
)
def test_whole_nodes_are_requested_where_a_job_needs_them(
    job: Job, cluster: Cluster, expected: bool
) -> None:
    assert ("#SBATCH --exclusive\n" in render(replace(job, cluster=cluster))) == expected


def test_a_task_of_a_sweep_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="share the one core of a sweep's task; give cpus_per_ta"):
        replace(SCRIPTS["sweep"], cluster=Cluster(exclusive=False))


def test_ranks_see_all_gpus_of_their_node_where_each_task_asks_for_one() -> None:
    job = replace(GPT, gpu_type="h200", cluster=Cluster(gpu_request="gpus-per-task"))
    assert "#SBATCH --gpus-per-task=h200:1\n" in render(job)
    assert (
        "\nunset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND SLURM_GPU_BIND\n"
        in render(job)
    )
    assert "\nexport SLURM_GPUS_PER_NODE=h200:8\n" in render(job)
    sweep = replace(job, target="sweep", array="0-3")
    assert "#SBATCH --gpus-per-task=h200:8\n" in render(sweep)  # its one task starts all ranks
    of_extra = replace(GPT, cluster=Cluster(extra=("--gpus-per-task=1",)))
    assert "\nexport SLURM_GPUS_PER_NODE=8\n" in render(of_extra)


def test_a_step_on_whole_nodes_has_the_requested_gpus_alone() -> None:
    for cluster, is_limited_by_slurm in (
        (Cluster(gpu_request="gres"), False),
        (Cluster(extra=("--gres=gpu:4",)), False),
        (Cluster(), True),
        (Cluster(gpu_request="none"), True),  # srun would refuse it where GPUs are not counted
    ):
        script = render(replace(GPT, devices=4, cluster=cluster))
        assert ("\nexport SLURM_GPUS_PER_NODE=4\n" in script) != is_limited_by_slurm


@pytest.mark.parametrize(
    ("nodes", "is_valid"),
    [
        ("node3", True),
        ("node[3-5,8],gpu-[01-16]", True),
        ("rack[1-2]node[3-4].cluster", True),
        ("n1,n2", True),
        ("node[3-5", False),
        ("node3-5]", False),
        ("node[]", False),
        ("node[a-b]", False),
        ("n1,,n2", False),
        ("n1,", False),
        ("-n1", False),
        ("n1 n2", False),
        ("./file", False),
    ],
)
def test_lists_of_hosts_are_checked(nodes: str, is_valid: bool) -> None:
    if is_valid:
        assert f"#SBATCH --exclude={nodes}\n" in render(replace(GPT, exclude=nodes)).replace(
            "'", ""
        )
    else:
        with pytest.raises(ValueError, match=re.escape(f"exclude is {nodes!r}; give nodes, such")):
            replace(GPT, exclude=nodes)

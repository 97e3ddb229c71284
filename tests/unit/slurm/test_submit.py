"""Tests `slurm.submit` up to the call of SLURM: checks, refusals, rendered scripts."""

import re
from pathlib import Path

import pytest

from slurm import job_options, scheduler, submit
from slurm.job_files import write_attempt
from slurm.runtime.srun import rank_variables
from tests.builders.slurm import ATTEMPT, VARIABLES, PutStub, args_of


@pytest.fixture
def place(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to submit from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "no target given; choose one of recipes.gpt"),
        ("recipes.gtp", "target is recipes.gtp; did you mean recipes.gpt?"),
        ("recipes.gpt --nodez 2", "--nodez is not an option; did you mean --nodes?"),
        ("recipes.gpt --nodes two", "nodes is 'two'"),
        ("recipes.gpt --nodes 0", "nodes is 0; it must be at least 1"),
        (
            "recipes.gpt --test-only --dry-run",
            "test-only asks SLURM and dry-run only prints; leave",
        ),
        ("recipes.gpt --devices -8", "devices is -8; it must be at least 1"),
        (
            "recipes.gpt --time yesterday",
            "time is 'yesterday'; give 30 (minutes)",
        ),
        ("recipes.gpt --cluster nowhere", "cluster is nowhere, and"),
        (
            "recipes.gpt --folder ~nobody-here/a",
            "folder ~nobody-here/a does not exist; check the path: there is no such user",
        ),
        ("recipes.gpt --devices 1.5", "devices is '1.5'; it must be an integer"),
        ("recipes.gpt --clusters /nowhere --cluster dgx", "clusters /nowhere cannot be read"),
        ("recipes.gpt --time 2", "time is 2, and the signal to save arrives 120 s before"),
        (
            "recipes.gpt --clusters x.toml",
            "clusters is x.toml; choose a table of it",
        ),
        (
            "recipes.gpt -- --repeats 3",
            "--repeats after --: a job runs its recipe once",
        ),
        ("recipes.gpt --folder a\\b", "give a UTF-8 path without backslashes"),
        ("recipes.gpt quick", "quick is before --; put options of the recipe after it"),
        ("recipes.gpt --hardware h200-sxm-8", "hardware is h200-sxm-8; it needs --dry-run"),
        ("recipes.gpt -- --hardware h200-sxm-8", "--hardware after --: give it before --"),
        ("recipes.gpt -- --devices 4", "--devices after --: give it before --"),
        ("recipes.gpt -- --size 124n", "recipe gpt: size"),
        ("recipes.gpt -- --max-stepz 4", "recipe gpt: --max-stepz is not an option"),
        ("recipes.gpt -- --strategy single", "recipe gpt: strategy"),
        ("recipes.gpt --folder /proc/x", "folder /proc/x: /proc cannot be written"),
        ("sweep qiuck", "qiuck"),
        ("sweep quick --nodes 2", "nodes is 2; the cells of a sweep say how many nodes they need"),
        ("sweep weak-nodes --max-nodes 7", "max-nodes is 7, and 18 cells need 8; give --max-nodes"),
        ("recipes.gpt --max-nodes 7", "max-nodes is 7, which is for sweeps; leave it out"),
        ("recipes.gpt --max-array-tasks 7", "max-array-tasks is 7, which is for sweeps; leave it"),
        (
            "recipes.gpt --max-parallel 7",
            "max-parallel is 7, which is for sweeps; leave it out: --a",
        ),
        (
            "recipes.gpt --dry-run --test-only",
            "test-only asks SLURM and dry-run only prints; leave",
        ),
        (
            "sweep quick --dry-run --test-only",
            "test-only asks SLURM and dry-run only prints; leave",
        ),
        ("recipes.gpt --nodes 1e9", "nodes is 1000000000; it must be at most 65535"),
        ("recipes.gpt --devices 4294967297", "devices is 4294967297; it must be at most 65535"),
        ("recipes.gpt --array 0-9%4294967297", "%4294967297; at most 65535 tasks can run at once"),
        ("sweep quick --max-parallel 1e9", "max-parallel is 1000000000; it must be at most 65535"),
        ("recipes.gpt --nodes 2 --nodes=3", "--nodes is given 2 times; give it once"),
        ("sweep quick --dry-run --dry-run", "--dry-run is given 2 times; give it once"),
        ("recipes.gpt --array 5-1", "array is '5-1'; 5-1 holds no task, give 1-5"),
        ("recipes.gpt --array 1,9-7:2%3", "array is '1,9-7:2%3'; 9-7 holds no task, give 7-9"),
        ("recipes.gpt --array 1-9:0", "array is 1-9:0, with a step of 0; give 1 or more"),
        ("recipes.gpt --array 0-4 -- --out x", "out is x, but the run of a job is in"),
        (
            "recipes.gpt --array 0-4 -- --record r.json",
            "record is r.json, which every task of the array would write; put %a, the number",
        ),
        ("recipes.gpt --array 0-4 -- --trace=t", "trace is t, which every task of the array would"),
        (
            "recipes.gpt --gpu-type h200 --dry-run -- --accelerator cpu",
            "gpu-type is h200, but this job trains on CPUs; leave gpu-type out",
        ),
        (
            "sweep quick --max-parallel 4 --max-array-tasks 0",
            "max-parallel is 4, but with max-array-tasks 0 a sweep is one job without an array",
        ),
        ("sweep quick -- --left", "--left after --: cells that are finished are not submitted"),
        ("sweep quick -- --prepare", "--prepare after --: the folder of the sweep is created when"),
        (
            "sweep quick -- --only-nodes 2",
            "--only-nodes after --: each array runs the cells on its",
        ),
        ("sweep quick -- --run-cell 01-1", "--run-cell after --: it is for torchrun; the tasks of"),
        ("sweep quick -- --price-per-hour 3", "--price-per-hour after --: only a plan has costs;"),
        (
            "sweep quick --time 1:00:00 -- --stop-after 60",
            "--stop-after after --: it follows from the time, 1:00:00; leave it out",
        ),
        ("sweep quick --max-array-tasks -1", "max_array_tasks is -1; give a number, or 0"),
        (
            "recipes.gpt --gpu-type a100_1g.5gb",
            "gpu-type is a100_1g.5gb, a MIG slice of a GPU, and",
        ),
        ("sweep quick --exclude node[3-5", "exclude is 'node[3-5'; give nodes, such as node3"),
        ("sweep quick --array 0-3", "array is 0-3; leave it out: a sweep makes its own arrays"),
        ("sweep quick --max-parallel 0", "max-parallel is 0; it must be at least 1"),
        ("sweep quick -- --batch-sizee 8,16", "batch-sizee"),
        ("sweep quick --time 4", "time is 4; 120 s to start a task and 120 s to end it leave no"),
        ("sweep quick -- --watch", "--watch after --: it needs no job; run it here: python -m"),
        ("sweep quick -- --dry-run", "run it here: python -m scaling sweep quick --dry-run"),
        ("sweep -- --recipe gpt --list", "--list after --: it needs no job"),
        (
            "sweep node-8 --devices 4 -- --recipe gpt",
            "a task has 4 per node, and the first of these cells needs 8: python -m recipes.gpt",
        ),
    ],
)
def test_bad_requests_are_one_line_and_submit_nothing(
    line: str, expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "extra", "expected"),
    [
        ("--partition day", "--partition=night", "partition is day, but extra of the cluster has"),
        ("--time 1:00:00", "--time=9", "time is 1:00:00, but extra of the cluster has --time=9,"),
        ("--name a", "--job-name=b", "name is a, but extra of the cluster has --job-name=b, which"),
        ("--array 0-4", "--array=0-9", "array is 0-4, but extra of the cluster has --array=0-9,"),
        ("--no-requeue", "--requeue", "no-requeue: extra of the cluster has --requeue; leave one"),
    ],
)
def test_an_option_that_the_table_of_the_cluster_replaces_is_refused(
    option: str, extra: str, expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "c.toml").write_text(f'[c]\nextra = ["{extra}"]\n')
    argv = ["recipes.gpt", "--clusters", "c.toml", "--cluster", "c", "--dry-run"]
    assert submit.main([*argv, *option.split()]) == 2
    assert expected in capsys.readouterr().err
    assert submit.main(argv) == 0
    assert f"#SBATCH {extra}\n" in capsys.readouterr().out


def test_tasks_of_an_array_write_to_paths_with_their_numbers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--", "--record", "r-%a.json", "--checkpoint-dir", "c/%a"]
    assert submit.main(["recipes.gpt", "--array", "0-4", "--dry-run", *recipe]) == 0
    one = ["--", "--record", "r.json"]
    assert submit.main(["recipes.gpt", "--array", "3", "--dry-run", *one]) == 0


def test_a_dry_run_prints_a_script_without_slurm(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "2", "--devices", "4", "--cluster", "academic", "--dry-run"]
    assert submit.main(["recipes.gpt", *options, "--", "--seed", "3"]) == 0
    script = capsys.readouterr().out
    for line in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=a100:4", "--time=12:00:00"),
        *("--partition=gpu-preempt", "--account=ml-group", f"--chdir={place}"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load python/3.11\n" in script
    assert script.endswith("  recipes.gpt -- \\\n  --seed 3\n")
    assert submit.main(["sweep", "node-8", "--dry-run", "--max-parallel", "3"]) == 0
    sweep = capsys.readouterr().out
    assert re.search(r"#SBATCH --array=0-\d+%3\n", sweep)
    assert "#SBATCH --ntasks-per-node=1\n" in sweep
    assert list(place.iterdir()) == []


def test_a_recipe_whose_file_of_options_says_cpu_gets_no_gpus(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "cfg.yaml").write_text("accelerator: cpu\n")
    assert submit.main(["recipes.gpt", "--dry-run", "--", "--config", "cfg.yaml"]) == 0
    assert "--gpus-per-node" not in capsys.readouterr().out
    line = ["recipes.gpt", "--dry-run", "--", "--config", "cfg.yaml", "--accelerator", "cuda"]
    assert submit.main(line) == 0
    assert "--gpus-per-node=8" in capsys.readouterr().out


def test_a_dry_run_for_a_hardware_adds_the_plan_as_comments(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "2", "--devices", "4", "--dry-run", "--hardware", "h100-sxm-8"]
    recipe = ["--", "--size", "1.3b", "--batch-size", "1", "--seed", "%a"]
    assert submit.main(["recipes.gpt", *options, "--array", "3-4", *recipe]) == 0
    script, plan = capsys.readouterr().out.split("\n\n# hardware ")
    assert script.startswith("#!")
    assert "# devices         2 x 4 cuda" in plan
    assert submit.main(["recipes.gpt", *options, *recipe[:3], "--batch-size", "64"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: does not fit: a device needs ")
    assert f"\n# {printed.err}" in printed.out
    cells = ["--", "--recipe", "gpt", "--batch-size", "1,2"]
    assert submit.main(["sweep", *options[2:], *cells]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "# 2 cells on h100-sxm-8: 2 fit, 0 will not fit" in lines
    assert any(line.endswith(": 2 cells, fastest first") for line in lines)
    # A minute of two cells on 4 devices each.
    assert any("in every launch adds 0.133 device-hours" in line for line in lines)
    assert list(place.iterdir()) == []


def test_caches_are_on_the_node_local_disk_in_a_folder_per_job(tmp_path: Path) -> None:
    line = f"--local-disk {tmp_path} recipes.gpt"
    jobs = [args_of(line, {**VARIABLES, "SLURM_JOB_ID": number}) for number in ("7", "8")]
    caches = [rank_variables(args, "7")["TORCHINDUCTOR_CACHE_DIR"] for args in jobs]
    assert caches == [f"{tmp_path}/unitransformer-{number}/inductor" for number in (7, 8)]
    assert "TORCHINDUCTOR_CACHE_DIR" not in rank_variables(args_of("sweep"), "7")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", None),
        ("--partition night", "partition night is down"),
        ("--partition night,gone", "partition gone is inact, partition night is down"),
        ("--partition night,day", None),
        ("--partition unknown", None),
        ("--clusters c.toml --cluster c", "partition night is down"),
    ],
)
def test_a_job_for_a_partition_that_is_down_is_accepted_and_says_so(
    options: str,
    expected: str | None,
    put_stub: PutStub,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_stub("sbatch", "echo 7\n")
    put_stub(
        "sinfo", "printf 'day|day*|up|a|n|f\\nnight|night|down|a|n|f\\ngone|gone|inact|a|n|f\\n'\n"
    )
    (place / "c.toml").write_text('[c]\nextra = ["--partition=night"]\n')
    argv = ["recipes.gpt", "--folder", "job", *options.split()]
    assert submit.main([*argv, "--test-only"]) == 0
    but = f", but it would wait: {expected}" if expected else ""
    assert capsys.readouterr().out == f"SLURM accepts this job{but}; nothing was submitted\n"
    assert submit.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("job     7\n")
    assert ("note" in printed) == (expected is not None)
    assert printed.endswith(f"\nnote    the job waits: {expected}\n") or expected is None


def test_a_folder_belongs_to_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_attempt(tmp_path / "it's", ATTEMPT)
    assert submit.main(["recipes.gpt", "--folder", str(tmp_path / "it's")]) == 2
    assert "belongs to another job; continue that job with sbatch" in capsys.readouterr().err
    assert job_options._new_folder("gpt") != job_options._new_folder("gpt")


def test_what_slurm_prints_is_read_in_any_encoding(put_stub: PutStub) -> None:
    put_stub("squeue", r"printf 'caf\303\251 caf\351'")
    assert scheduler.call("squeue").stdout == "café caf\ufffd"

"""Tests the arrays of a sweep before SLURM is asked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import job_options
from slurm.batch_script import Job, render
from slurm.preflight import RecipeCommand, are_on_gpus
from slurm.sweep_jobs import find_short_arrays
from tests.builders.slurm import PutStub

CONFIG = "Configuration data\nMaxArraySize            = 1001\nMaxJobCount             = 10000\n"


@pytest.fixture
def build_sweep(
    put_stub: PutStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., list[Job]]:
    """Builds the arrays of a sweep of so many cells on one node."""

    def build(
        cells: int, *options: str, config: str = CONFIG, key: str = "", cell: str = ""
    ) -> list[Job]:
        put_stub("scontrol", f"cat <<'END'\n{config}END\n" if config else "exit 1\n")
        listing = "\n".join([f"python -m recipes.gpt {cell}".strip()] * cells)
        monkeypatch.setattr("slurm.preflight.run_module", lambda *arguments, **options: listing)
        (tmp_path / "c.toml").write_text(f"[c]\n{key}\n")
        table = ["--clusters", "c.toml", "--cluster", "c"]
        return job_options.build_jobs(*job_options.parse(["sweep", "quick", *table, *options]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.preflight._ask", lambda commands, _: [{}] * len(commands))
    return build


@pytest.mark.parametrize(
    ("cells", "config", "key", "arrays"),
    [
        (3, CONFIG, "", ["0-2%8"]),
        (1001, CONFIG, "", ["0-1000%8"]),
        (1002, CONFIG, "", ["0-1000%8", "0-0%8"]),
        (1002, "", "", ["0-1000%8", "0-0%8"]),  # no controller: SLURM's default
        (3003, CONFIG.replace("1001", "4000001"), "", ["0-3002%8"]),
        (
            60,
            f"{CONFIG}SchedulerParameters     = defer,max_array_tasks=25\n",
            "",
            ["0-24%8", "0-24%8", "0-9%8"],
        ),
        (100, CONFIG, "max_array_tasks = 30", ["0-29%8"]),
        (1002, CONFIG, "max_array_tasks = 5000", ["0-1000%8", "0-0%8"]),
        (100, CONFIG.replace("1001", "20"), "max_array_tasks = 30", ["0-19%8", "0-9%8"]),
        (100, CONFIG.replace("1001", "0"), "max_array_tasks = 30", [None]),
        (100, CONFIG, "max_array_tasks = 0", [None]),
        (100, CONFIG.replace("1001", "0"), "", [None]),
        (1, CONFIG.replace("1001", "0"), "", [None]),
    ],
)
def test_a_sweep_has_a_task_per_cell_in_arrays_that_the_controller_allows(
    cells: int,
    config: str,
    key: str,
    arrays: list[str | None],
    build_sweep: Callable[..., list[Job]],
) -> None:
    jobs = build_sweep(cells, config=config, key=key)
    assert [job.array for job in jobs] == arrays
    assert {tuple(job.arguments) for job in jobs} == {("quick", "--max-cells", str(cells))}
    assert sum(job.left or 0 for job in jobs) == cells
    assert len({job.folder for job in jobs}) == len(jobs)
    if key == "":
        assert [job.array for job in build_sweep(cells, "--max-array-tasks", "2")] == [
            "0-1%8" if cells > 1 else "0-0%8"
        ]


@pytest.mark.parametrize(
    ("cell", "on_gpus"),
    [("", True), ("--accelerator cuda", True), ("--accelerator cpu --batch-size 1", False)],
)
def test_the_cells_of_a_study_say_whether_its_tasks_have_gpus(
    cell: str, on_gpus: bool, build_sweep: Callable[..., list[Job]]
) -> None:
    (job,) = build_sweep(3, cell=cell)
    assert job.on_gpus == on_gpus
    assert ("--gpus-per-node" in render(job)) == on_gpus


def test_a_sweep_on_cpus_and_gpus_is_refused() -> None:
    cells: list[RecipeCommand] = [("gpt", ("--accelerator", name)) for name in ("cpu", "cuda")]
    with pytest.raises(ValueError, match=r"accelerator is cpu in 1 of 2 cells .*--out"):
        are_on_gpus(cells)


def test_options_that_limit_the_cells_of_a_task_are_not_replaced(
    build_sweep: Callable[..., list[Job]],
) -> None:
    (search,) = build_sweep(100, "--", "--find-max-batch", "8")
    assert search.arguments == ["quick", "--find-max-batch", "8"]  # a search may need many cells
    (given,) = build_sweep(100, "--", "--max-cells", "1")
    assert given.arguments == ["quick", "--max-cells", "1"]


@pytest.mark.parametrize(
    ("options", "array"),
    [
        ("", "0-999%8"),  # the time limit of the partition is unknown
        ("--time UNLIMITED", "0-7%8"),
        ("--time UNLIMITED --max-parallel 3", "0-2%3"),
        ("--time 1:00:00", "0-999%8"),  # time for one cell, which may take that long
        ("--time 4:00:00", "0-333%8"),  # (4 h - 240 s) / (1 h + 120 s) is 3.8: three cells
        ("--time 4:00:00 -- --time-limit 60", "0-12%8"),  # 14160 s / 180 s is 78 cells
        ("--time 4:00:00 -- --time-limit 60 --max-cells 4", "0-249%8"),
        ("--time UNLIMITED -- --find-max-batch 8", "0-999%8"),
    ],
)
def test_an_array_has_no_more_tasks_than_its_cells_could_need(
    options: str, array: str, build_sweep: Callable[..., list[Job]]
) -> None:
    (job,) = build_sweep(1000, *options.split())
    assert job.array == array


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ("--time 4:00:00 --max-array-tasks 40", 120),  # three cells of an hour in each task
        ("--time 4:00:00 --max-array-tasks 84", None),
        ("--time 4:00:00 --max-array-tasks 0", 3),
        ("--time 4:00:00", None),
        ("--max-array-tasks 40", None),  # a task goes on when it is requeued at its time limit
        ("--max-array-tasks 40 --no-requeue", 40),
        ("--time UNLIMITED --max-array-tasks 4", None),
    ],
)
def test_a_sweep_says_how_many_cells_may_be_left_when_its_tasks_have_ended(
    options: str, cells: int | None, build_sweep: Callable[..., list[Job]]
) -> None:
    notes = find_short_arrays(build_sweep(250, *options.split()))
    assert [note[: note.index(" may")] for note in notes] == (
        [] if cells is None else [f"as few as {cells} of 250 cells on 1 node"]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ["--max-cells", "1"]),
        ("--time 2:00:00", ["--max-cells", "1", "--stop-after", "6960"]),
        ("--time 0", ["--max-cells", "1"]),
        ("--time -1", ["--max-cells", "1"]),
        (
            "--time 1:00:00",
            ["--time-limit", "3360", "--max-cells", "1", "--stop-after", "3360"],
        ),
        (
            "--time 2:00:00 -- --time-limit 7000 --max-cells 2",
            [
                *("--time-limit", "7000", "--max-cells", "2"),
                *("--time-limit", "6960", "--stop-after", "6960"),
            ],
        ),
        (
            "--time 1:00:00 -- --time-limit=60",
            ["--time-limit=60", "--max-cells", "1", "--stop-after", "3360"],
        ),
    ],
)
def test_the_time_limit_of_a_cell_follows_from_that_of_its_job(
    options: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = "python -m recipes.gpt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.preflight.run_module", lambda *arguments, **options: cells)
    monkeypatch.setattr("slurm.preflight._ask", lambda commands, _: [{}] * len(commands))
    (job,) = job_options.build_jobs(*job_options.parse(["sweep", "quick", *options.split()]))
    assert job.arguments == ["quick", *expected]

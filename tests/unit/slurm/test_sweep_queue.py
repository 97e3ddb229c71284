"""Tests the arrays of a sweep over nodes, with SLURM's commands replaced by scripts."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.store.outcome import write_outcome
from scaling.sweep.plan import CellTask
from scaling.sweep.run_cell import now, outcome_without_run
from scaling.sweep.study import Cell, load_study
from slurm import preflight, status, submit, sweep_queue
from slurm.batch_script import Job
from slurm.job_files import write_attempt
from tests.builders.modules import open_here, run_here
from tests.builders.slurm import ATTEMPT, PutStub

STUDY = """
recipe: [gpt]
axes: {num-nodes: [1, 2, 4], batch-size: [2, 4]}
options: {devices: 1, strategy: ddp, precision: bf16-mixed, accelerator: cpu}
"""
SBATCH = """
echo "$@" >> calls
case "$*" in *test-only*) exit 0;; esac
cat > script
grep -q -e "--nodes=$(cat refused 2>/dev/null)$" script && {
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
grep -e dependency script >> calls
number=$(($(cat number 2>/dev/null || echo 40) + 1)); echo $number > number; echo $number
"""


@pytest.fixture
def place(
    tmp_path: Path, repository: Path, put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder to submit from, where sbatch counts from 41."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    put_stub("sbatch", SBATCH)
    put_stub("sinfo", "")
    put_stub("squeue", "cat queue 2>/dev/null\n")
    put_stub("scontrol", "echo MaxArraySize = 1001\n")
    monkeypatch.setattr(preflight, "run_module", run_here)
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_here)
    (tmp_path / "s.yaml").write_text(STUDY)
    return tmp_path


def submitted(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = submit.main(["sweep", "s.yaml", "--devices", "1", *options])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def scripts(text: str) -> list[tuple[str, str, str]]:
    """Nodes, array and --max-cells of each printed script."""
    parts = text.split("#!/bin/bash\n")[1:]
    patterns = (r"--nodes=(\d+)", r"--array=(\S+)", r"--max-cells (\d+)")
    found = [[re.search(pattern, part) for pattern in patterns] for part in parts]
    return [(str(n and n[1]), str(a and a[1]), str(m and m[1])) for n, a, m in found]


def stored_arrays(place: Path) -> list[tuple[str, int, int | None]]:
    arrays = json.loads((place / "sweeps/s/arrays").read_text())["arrays"]
    return [(array["job"], array["nodes"], array["max_nodes"]) for array in arrays]


def tasks_in_queue(array: int, number: int) -> str:
    """What squeue prints for the tasks of an array."""
    return "".join(f"{array}|{array}|{n}|PENDING|Resources|1:00\n" for n in range(number))


def finish(place: Path, nodes: int) -> None:
    """Writes the outcomes of the cells on so many nodes."""
    for cell in load_study(str(place / "s.yaml")).cells():
        if cell.num_nodes == nodes:
            finish_cell(place, cell)


def finish_cell(place: Path, cell: Cell) -> None:
    task = CellTask(cell=cell, repeat=1, config=None, refusal="it does not fit")
    outcome = replace(outcome_without_run(task, None), finished_at=now())
    folder = place / "sweeps/s/cells" / task.name
    folder.mkdir(parents=True)
    write_outcome(outcome, folder)


def test_each_number_of_nodes_has_one_array_and_finished_cells_have_none(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = submitted(capsys, "--dry-run", "--time", "1:00:00")
    assert code == 0
    assert scripts(text) == [("1", "0-1%8", "2"), ("2", "0-1%8", "2"), ("4", "0-1%8", "2")]
    assert re.search(r"^# 4 +2 +0-1 +8 +8 +7\.5$", text, re.MULTILINE)
    assert not (place / "sweeps").exists()
    code, text = submitted(capsys, "--dry-run", "--max-nodes", "5")
    assert [array for _, array, _ in scripts(text)] == ["0-1%5", "0-1%2", "0-1%1"]
    assert submitted(capsys, "--folder", "first")[0] == 0
    finish(place, 2)
    _, text = submitted(capsys, "--dry-run")
    assert [nodes for nodes, *_ in scripts(text)] == ["1", "4"]
    finish(place, 1)
    finish(place, 4)
    text = submitted(capsys)[1]
    assert text == "every cell of this sweep is finished; nothing was submitted\n"


def test_the_arrays_are_submitted_once_each_and_wait_for_each_other_under_a_limit_of_nodes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = submitted(capsys, "--max-nodes", "4", "--folder", "job")
    assert code == 0
    calls = (place / "calls").read_text().splitlines()
    assert Counter(calls)["--parsable"] == 3
    assert Counter(calls)["--test-only"] == 3
    dependencies = [line for line in calls if "dependency" in line]
    assert [line.partition("=")[2] for line in dependencies] == ["afterany:41", "afterany:41:42"]
    assert "scancel 41 42 43" in text
    assert stored_arrays(place) == [("41", 1, 4), ("42", 2, 4), ("43", 4, 4)]
    # What is queued is not submitted again.
    (place / "queue").write_text(tasks_in_queue(42, 2))
    _, text = submitted(capsys, "--test-only")
    assert text == "SLURM accepts these 2 arrays; nothing was submitted\n"
    finish(place, 1)
    finish(place, 2)
    report = status.report(place / "job", now_s=0.0)
    assert re.findall(r"(\d/\d cells)", report) == ["2/2 cells", "2/2 cells", "0/2 cells"]


def test_a_sweep_that_another_process_has_just_submitted_is_not_submitted_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit_elsewhere(job: Job) -> None:
        prepare(job)
        pairs = (("7", 1), ("8", 2), ("9", 4))
        arrays = [{"job": number, "nodes": nodes, "max_nodes": None} for number, nodes in pairs]
        (place / "sweeps/s/arrays").write_text(json.dumps({"arrays": arrays}))
        (place / "queue").write_text(tasks_in_queue(7, 2) + tasks_in_queue(9, 2))

    prepare = preflight.prepare_sweep
    monkeypatch.setattr(sweep_queue, "prepare_sweep", submit_elsewhere)
    assert submitted(capsys)[0] == 0
    assert Counter((place / "calls").read_text().splitlines())["--parsable"] == 1
    assert stored_arrays(place) == [("7", 1, None), ("9", 4, None), ("41", 2, None)]


@pytest.mark.parametrize(
    ("stored", "code", "expected"),
    [
        ({"1": "7", "2": "8", "4": "9"}, 0, "queued  9 has 2 tasks on 4 nodes\n"),
        ("not JSON", 2, "arrays does not say which arrays of this sweep are queued; delete it"),
        ({"arrays": [{"job": "7", "nodes": 1, "hosts": 2}]}, 2, "does not say which arrays of t"),
        ({"arrays": [{"job": 7, "nodes": 1}]}, 2, "does not say which arrays of this sweep are"),
        ([], 2, "arrays does not say which arrays of this sweep are queued"),
    ],
)
def test_arrays_that_another_version_has_queued_are_not_queued_again(
    stored: object, code: int, expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(capsys)[0] == 0
    text = stored if isinstance(stored, str) else json.dumps(stored)
    (place / "sweeps/s/arrays").write_text(text)
    (place / "queue").write_text("".join(tasks_in_queue(array, 2) for array in (7, 8, 9)))
    ended, printed = submitted(capsys)
    assert (ended, printed.count("\n")) == (code, 1 if code else 4)
    assert expected in printed
    assert (place / "number").read_text() == "43\n"


def test_an_array_that_was_queued_with_other_options_is_not_taken_for_the_new_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "c.toml").write_text("[c]\nexclusive = true\n")
    time = ("--time", "2:00:00")
    assert submitted(capsys, *time)[0] == 0
    (place / "queue").write_text(tasks_in_queue(41, 1) + tasks_in_queue(43, 2))
    for options, expected in (
        ("--partition night", "partition = none, not night"),
        ("--time 3:00:00", "time = 2:00:00, not 3:00:00"),
        ("--no-requeue", "requeue = True, not False"),
        ("--clusters c.toml --cluster c", "exclusive = none, not True"),
        ("-- --retry crashed", "arguments = s.yaml --only-nodes 1 --stop-after 6960, not s.yaml -"),
    ):
        given = () if "--time" in options else time
        code, text = submitted(capsys, *given, *options.split())
        assert code == 2
        assert text.startswith(f"error: array 41 of this sweep is in the queue with {expected}")
        assert text.endswith("; give the same options, or cancel it first: scancel 41\n")
    assert submitted(capsys, *time)[0] == 0
    assert [job for job, *_ in stored_arrays(place)] == ["41", "43", "44", "45"]


@pytest.mark.parametrize("max_nodes", [(), ("--max-nodes", "4")])
@pytest.mark.parametrize(
    ("task", "waits_for", "text"),
    [
        ("RUNNING|None", ["41"], "queued  41 has 1 task on 1 node\n"),
        ("PENDING|JobHeldUser", [], "on 1 node, held: no array waits for it (scontrol release 41)"),
        ("SPECIAL_EXIT|None", [], "on 1 node, held: no array waits for it (scontrol release 41)\n"),
    ],
)
def test_an_array_says_for_which_arrays_it_waits_and_these_are_not_held(
    max_nodes: tuple[str, ...], task: str, waits_for: list[str], text: str, place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert submitted(capsys, *max_nodes)[0] == 0
    (place / "calls").unlink()
    (place / "queue").write_text(f"41|41|0|{task}|1:00\n")
    assert submitted(capsys, *max_nodes, "--test-only")[0] == 0
    _, printed = submitted(capsys, *max_nodes)
    assert text in printed
    waits = re.findall(r"^waits   for (.*) to end$", printed, re.MULTILINE)
    assert waits[:1] == (waits_for or (["44"] if max_nodes else []))
    assert (":41" in (place / "calls").read_text()) == bool(waits_for)


def test_the_table_counts_unfinished_cells_and_alternatives_exclude_a_limit_of_nodes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(capsys, "--folder", "first")[0] == 0
    finish(place, 2)
    next((place / "sweeps/s/cells").glob("*/outcome.json")).unlink()
    _, text = submitted(capsys, "--dry-run", "--", "--max-cells", "1")
    rows = re.findall(r"^# (\d) +(\d) +0-\d +8 ", text, re.MULTILINE)
    assert rows == [("1", "2"), ("2", "1"), ("4", "2")]
    code, text = submitted(capsys, "--max-nodes", "4", "--dependency", "afterok:1?afterok:2")
    assert code == 2
    assert "dependency is afterok:1?afterok:2; with --max-nodes arrays wait" in text


def test_a_refused_array_is_named_and_the_same_command_submits_the_rest(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "refused").write_text("1")
    code, text = submitted(capsys, "--folder", "none")
    assert code == 2
    assert "SLURM refuses this job: QOSMaxSubmitJobPerUserLimit" in text
    assert not (place / "sweeps/s").exists()
    (place / "refused").write_text("4")
    code, text = submitted(capsys)
    assert code == 2
    assert (
        "of this sweep, arrays 41 and 42 are queued with 4 tasks; the same command later submits "
        "the other 2 tasks on 4 nodes\n" in text
    )
    assert text.count("\n") == 1
    (place / "refused").unlink()
    (place / "queue").write_text(tasks_in_queue(41, 2) + tasks_in_queue(42, 2))
    code, text = submitted(capsys)
    assert code == 0
    assert "queued  41 has 2 tasks on 1 node\n" in text
    assert stored_arrays(place) == [("41", 1, None), ("42", 2, None), ("43", 4, None)]


def test_an_array_that_the_site_splits_is_queued_in_parts_that_wait_for_each_other(
    place: Path, put_stub: PutStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The controller allows two tasks in an array, and a user two jobs in the queue."""
    put_stub("scontrol", "echo MaxArraySize = 2\n")
    study = STUDY.replace("[1, 2, 4]", "[1]").replace("[2, 4]", "[1, 2, 3, 4, 5]")
    (place / "s.yaml").write_text(study)
    code, text = submitted(capsys, "--dry-run", "--max-parallel", "2")
    assert [array for _, array, _ in scripts(text)] == ["0-1%2", "0-1%2", "0-0%2"]
    assert "# arrays on the same number of nodes wait for each other: SLURM takes 2 tasks" in text
    limit = '[ "$(cat number 2>/dev/null || echo 40)" = "$(cat last)" ] && {\n'
    limit += "  echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1; }\n"
    put_stub("sbatch", SBATCH.replace("grep -q", f"{limit}grep -q", 1))
    (place / "last").write_text("41")
    code, text = submitted(capsys, "--folder", "job")
    assert code == 2
    assert "AssocMaxSubmitJobLimit; the site limits how many jobs a user may have in the qu" in text
    assert "array 41 is queued with 2 tasks; the same command later submits the other 3 tas" in text
    # One of the tasks has ended, and the other still runs.
    finish_cell(place, load_study(str(place / "s.yaml")).cells()[0])
    (place / "queue").write_text(tasks_in_queue(41, 1))
    (place / "last").write_text("99")
    code, text = submitted(capsys, "--folder", "job")
    assert code == 0
    assert "queued  41 has 1 task on 1 node\n" in text
    dependencies = [line for line in (place / "calls").read_text().splitlines() if "after" in line]
    assert [line.partition("=")[2] for line in dependencies] == ["afterany:41", "afterany:41:42"]
    folders = sorted(path.parent.name for path in place.glob("job/*/submitted"))
    assert folders == ["nodes-1", "nodes-1-2", "nodes-1-3"]
    sizes = [json.loads((place / f"job/{name}/submitted").read_text())["array"] for name in folders]
    assert sizes == ["0-1%8", "0-1%8", "0-0%8"]


def test_a_limit_of_nodes_counts_arrays_that_were_queued_before(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(capsys)[0] == 0
    (place / "queue").write_text(tasks_in_queue(41, 2) + tasks_in_queue(43, 1))
    for option in ("--test-only", "--no-requeue"):
        code, text = submitted(capsys, "--max-nodes", "4", option)
        assert code == 2
        assert text == (
            "error: max-nodes is 4, but arrays 41 and 43 are in the queue for this sweep with no "
            "limit; cancel first: scancel 41 43, or leave max-nodes out\n"
        )
    assert len(stored_arrays(place)) == 3


def test_shapes_that_could_never_run_are_named_and_nothing_is_queued(
    place: Path, put_stub: PutStub, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse = "grep -q -e --nodes=4 && { echo 'sbatch: error: Node count specification invalid' >&2"
    put_stub("sbatch", f"{refuse}; exit 1; }}; exit 0\n")
    for option in ("--test-only", "--no-requeue"):
        code, text = submitted(capsys, option)
        assert code == 2
        assert "Node count specification invalid; so 2 cells on 4 nodes could never run" in text
        assert text.count("\n") == 1
    assert not (place / "sweeps").exists()


def test_a_controller_that_does_not_answer_is_named(
    place: Path, put_stub: PutStub, capsys: pytest.CaptureFixture[str]
) -> None:
    put_stub("sbatch", "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1\n")
    code, text = submitted(capsys)
    assert code == 2
    assert text == (
        "error: SLURM's controller does not answer (Unable to contact slurm controller); the "
        "job was not submitted: try again when `scontrol ping` says UP\n"
    )
    assert not (place / "sweeps").exists()
    late = "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1\n"
    put_stub("sbatch", f'case "$*" in *test-only*) exit 0;; esac; {late}')
    code, text = submitted(capsys, "--folder", "job")
    assert code == 2
    assert "the job may be queued: look at `squeue --me` before you try again" in text
    assert (place / "job/nodes-1/job.sbatch").exists()  # which the job needs


def test_a_thousand_cells_take_one_call_of_sbatch_per_shape_and_few_questions(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, seeds = list(range(1, 11)), list(range(50))
    axes = f"{{num-nodes: [1, 2], batch-size: {sizes}, seed: {seeds}}}"
    (place / "s.yaml").write_text(
        f"recipe: [gpt]\naxes: {axes}\noptions: {{devices: 1, strategy: ddp, accelerator: cpu}}\n"
    )
    asked: list[int] = []
    ask = preflight._ask

    def count(commands: Any, shape: Any) -> Any:
        asked.append(len(commands))
        return ask(commands, shape)

    @contextlib.contextmanager
    def open_counting(module: str, *, limit_s: float) -> Iterator[Callable[[str], str]]:
        with open_here(module, limit_s=limit_s) as answer:
            yield lambda line: parsed.append(line) or answer(line)  # type: ignore[func-returns-value]

    parsed: list[str] = []
    monkeypatch.setattr(preflight, "_ask", count)
    monkeypatch.setattr("scaling.sweep.plan.open_module", open_counting)
    assert submitted(capsys)[0] == 0
    calls = Counter((place / "calls").read_text().splitlines())
    assert calls["--parsable"] == 2
    (number,) = asked
    few = 2 + len(sizes) + len(seeds)
    assert number <= few  # not a question per cell
    assert len(parsed) <= few


def test_the_status_of_an_array_costs_one_call_and_as_many_reads_as_it_has_tasks(
    tmp_path: Path, put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 100
    rows = "".join(f"{9 + n}|5|{n}|RUNNING|None|1:00\n" for n in range(number))
    (tmp_path / "queue").write_text(rows)
    put_stub("squeue", f"echo call >> {tmp_path}/calls; cat {tmp_path}/queue\n")
    submitted = {"job": "5", "name": "x", "array": f"0-{number - 1}%8", "target": "recipes.gpt"}
    (tmp_path / "job").mkdir()
    (tmp_path / "job/submitted").write_text(json.dumps(submitted))
    for task in range(number):
        (tmp_path / f"job/task-{task}").mkdir()
        attempt = replace(ATTEMPT, job=str(9 + task), array="5")
        write_attempt(tmp_path / f"job/task-{task}", attempt)
    reads: list[Path] = []
    read = Path.read_bytes

    def count(path: Path) -> bytes:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", count)
    report = status.report(tmp_path / "job", now_s=0.0)
    assert report.count(" running ") == number + 1
    assert (tmp_path / "calls").read_text() == "call\n"
    assert len(reads) <= 4 * number + 10

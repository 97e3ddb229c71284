"""Submits a batch job to SLURM. Imports nothing heavy, for use on a login node.

    python -m slurm.submit recipes.gpt --nodes 2 --devices 8 -- --size 1.3b --max-steps 5000
    python -m slurm.submit sweep node-8 --max-parallel 4 -- --retry oom

Exit code: 0 submitted; 2 refused by this command or by SLURM, with nothing queued or written.
"""

import datetime
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
from filelock import FileLock

from slurm import scheduler
from slurm.batch_script import EXCLUSIVE, Job, render, seconds_of
from slurm.clusters import CLUSTERS, NO_CLUSTER, load_cluster
from slurm.job_files import SCRIPT, SUBMITTED, list_attempts, read_json
from slurm.preflight import (
    STUDY,
    check_recipe,
    count_tasks,
    find_short_arrays,
    plan_on,
    prepare_sweep,
    sweep_folder,
    sweep_jobs,
    table_of,
    without_tasks,
)
from slurm.refusals import Refusal, check_types, hint_of, reasons_of
from slurm.runtime.allocation import flags_of, option_of
from slurm.scheduler import PartitionRow
from unitransformer.cli import (
    Parser,
    explain_parse_error,
    fail,
    only_reports,
    run_main,
    suggest,
)
from unitransformer.cli_help import HelpFormatter
from unitransformer.config import from_dict
from unitransformer.files import why_not_writable, write_atomically
from unitransformer.launch.variables import without_launcher
from unitransformer.record.units import format_count

TARGETS = ("recipes.gpt", "recipes.bert", "recipes.vit", "sweep")
DEVICES = 8
CHAIN = (
    "each array waits for the one before, so that the sweep holds no more nodes than --max-nodes"
)
PARTS = "arrays on the same number of nodes wait for each other: SLURM takes {} tasks in one"
ARRAYS = "arrays"  # in the folder of a sweep: JSON, the arrays that were last in the queue
# Values of a job that its options do not decide, or that may differ between arrays of a sweep.
NOT_OPTIONS = {
    *("name", "folder", "directory", "python", "on_gpus", "dependency", "array", "cells", "left"),
    *("shared", "max_array_tasks", "cluster"),
}
FORBIDS_EXCLUSIVE = re.compile("exclusive|whole|shared?", re.IGNORECASE)  # in a site's own words
REFUSED = "SLURM refuses this job"
JOB_VARIABLES = ("SBATCH_", "SLURM_", "SRUN_", "UNITRANSFORMER_JOB", "UNITRANSFORMER_RUN")

TEXT_OPTIONS = {
    "--time": "time limit, e.g. 2:00:00, 1-12:00:00, or UNLIMITED",
    "--partition": "one name, or several with commas",
    "--account": "account to charge",
    "--qos": "quality of service",
    "--constraint": "features of nodes, e.g. h200 or [rack1|rack2]",
    "--gpu-type": "e.g. h200",
    "--exclude": "nodes to avoid, e.g. node3 or node[3-5]",
    "--dependency": "e.g. afterok:1234 or singleton",
    "--array": "e.g. 0-9: runs the recipe once per task, with %a in its options replaced by the "
    "number of the task",
    "--name": "name of the job; default: from TARGET",
    "--cluster": "name of a table in --clusters",
}

# Options whose default a cluster may set.
OF_CLUSTERS = ("time", "partition", "account", "qos", "constraint", "gpu_type")
# Options of a recipe that a job sets itself -> what to do instead.
SET_BY_JOB = {
    "--devices": "give it before --, as it sets the shape of the job",
    "--num-nodes": "give --nodes before --, as it sets the shape of the job",
    "--resume": "leave it out; a job resumes by itself",
    "--rehearse": "it needs no job; run the recipe here",
    "--repeats": "a job runs its recipe once; give --array 0-4 before --",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, prints or submits a job; returns the exit code."""
    try:
        options, arguments = parse(sys.argv[1:] if argv is None else argv)
        jobs = build_jobs(options, arguments)
        if not jobs:
            print("every cell of this sweep is finished; nothing was submitted")
            return 0
        is_sweep = options.target == "sweep"
        if options.dry_run:
            comments = []
            if is_sweep:
                comments += [table_of(jobs), *_how_arrays_wait(jobs, options.max_nodes)]
                comments += find_short_arrays(jobs)
            if options.hardware is not None:  # before the script, as it may refuse
                comments.append(plan_on(options.hardware, jobs[0]))
            print("\n".join(render(job) for job in jobs), end="")
            for comment in comments:
                print("\n# " + "\n# ".join(comment.splitlines()))
            return 0
        queued = queued_arrays(jobs, options.max_nodes) if is_sweep else []
        missing = missing_arrays(jobs, queued)
        of_extra = option_of(jobs[0].cluster.extra, "--partition")
        rows = scheduler.list_partitions(of_extra or jobs[0].partition)
        notes = list(dict.fromkeys(filter(None, (check_types(job, rows) for job in missing))))
        notes += find_short_arrays(jobs) if is_sweep else []
        _test(missing, rows)
        closed = missing and scheduler.closed_partitions(rows)  # sbatch ignores them
        if options.test_only:
            but = f", but it would wait: {closed}" if closed else ""
            what = "this job" if len(missing) == 1 else f"these {len(missing)} arrays"
            accepted = f"SLURM accepts {what}{but}" if missing else "all cells are queued already"
            print("\n".join([f"{accepted}; nothing was submitted", *notes]))
            return 0
        only_reports()
        if is_sweep:
            lines = submit_sweep(jobs, rows, max_nodes=options.max_nodes)
        else:
            lines = submit(jobs[0], render(jobs[0]), rows)
        notes += [f"the job waits: {closed}"] if closed else []
        print("\n".join([lines, *(f"note    {note}" for note in notes)]))
        return 0
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error)), 2)
    except (ValueError, OSError, RuntimeError) as error:
        return fail(str(error), 2)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m slurm.submit",
        usage="python -m slurm.submit TARGET [STUDY] [options] -- [options of the recipe or sweep]",
        description="Submits a batch job, after checking its options here and with SLURM. Options "
        "that are not given have the value in --cluster, or SLURM's default.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("target", type=str, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    add("study", nargs="?", type=str, default=None, help="name or YAML file of a sweep")
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--devices", type=int | None, default=None, help=f"GPUs per node; {DEVICES} if not given")
    for flag, text in TEXT_OPTIONS.items():
        add(flag, type=str, default=None, help=text)
    add("--max-parallel", type=int, default=8, help="tasks of a sweep's array that run at once")
    add(
        "--max-nodes",
        type=int | None,
        default=None,
        help="nodes that a sweep holds at once; its arrays then run one after the other",
    )
    add(
        "--max-array-tasks",
        type=int | None,
        default=None,
        help="tasks of a sweep's array, each for several cells; 0 for one job without an array",
    )
    add("--folder", type=Path | None, default=None, help="new folder of the job; default: by name")
    add("--clusters", type=Path, default=CLUSTERS, help="TOML file with settings of clusters")
    add("--no-requeue", action="store_true", help="never requeue; print how to continue instead")
    add("--dry-run", action="store_true", help="print the batch script and exit")
    add(
        "--hardware",
        type=str,
        default=None,
        help="with --dry-run, add what the job needs on these nodes as comments, e.g. h200-sxm-8",
    )
    add("--test-only", action="store_true", help="let SLURM check the job and exit")
    return parser


def parse(argv: Sequence[str]) -> tuple[jsonargparse.Namespace, list[str]]:
    """Returns the options before `--`, and the arguments of the recipe or sweep after it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return build_parser().parse_args(list(argv[:end])), list(argv[end + 1 :])


def build_jobs(options: jsonargparse.Namespace, arguments: Sequence[str]) -> list[Job]:
    """Returns the jobs, checked as far as is possible without SLURM: one, or those of a sweep.

    Raises ValueError with the option, its value and the fix; RuntimeError if a recipe fails.
    """
    _check_arguments(options, arguments)
    if options.cluster is not None:
        cluster = load_cluster(options.cluster, options.clusters)
    elif options.clusters == CLUSTERS:
        cluster = NO_CLUSTER
    else:
        raise ValueError(f"clusters is {options.clusters}; choose a table of it with --cluster")
    if options.max_array_tasks is not None:
        cluster = replace(cluster, max_array_tasks=options.max_array_tasks)
    is_sweep = options.target == "sweep"
    recipe = options.target.removeprefix("recipes.")
    study = [] if options.study is None else [options.study]
    # A study may have any name. The name of a job is also part of paths.
    study_name = re.sub(r"[^\w.+]+", "-", Path(options.study or "").stem, flags=re.ASCII)
    study_name = study_name[:60].strip("-") or "sweep"
    name = options.name or (f"sweep-{study_name}" if is_sweep else recipe)
    folder = (options.folder or _new_folder(name)).absolute()
    job = Job(
        target=options.target,
        arguments=[*study, *arguments],
        name=name,
        folder=str(folder),
        directory=os.getcwd(),
        python=sys.executable if cluster.container or not cluster.python else cluster.python,
        nodes=options.nodes,
        devices=_first_given(options.devices, cluster.devices, DEVICES),
        on_gpus=option_of(arguments, "--accelerator") != "cpu",
        **{name: _first_given(options[name], getattr(cluster, name)) for name in OF_CLUSTERS},
        exclude=options.exclude,
        dependency=options.dependency,
        array=options.array,
        requeue=not options.no_requeue,
        cluster=cluster,
    )
    if not is_sweep:
        _check_folder(folder)
    time_s = seconds_of(job.time)
    if time_s is not None and time_s <= cluster.signal_ahead_s:
        raise ValueError(
            f"time is {job.time}, and the signal to save arrives {cluster.signal_ahead_s} s before "
            "its end; give a longer --time, or a cluster with a smaller signal_ahead_s"
        )
    if not is_sweep:
        check_recipe(job, recipe)
        return [job]
    jobs = sweep_jobs(job, max_parallel=options.max_parallel, max_nodes=options.max_nodes)
    for part in jobs:
        _check_folder(Path(part.folder))
    return jobs


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check_arguments(options: jsonargparse.Namespace, arguments: Sequence[str]) -> None:
    if options.target not in TARGETS:
        raise ValueError(f"target is {options.target}; {suggest(options.target, TARGETS)}")
    flags = flags_of(arguments)
    if options.hardware is not None and not options.dry_run:
        raise ValueError(f"hardware is {options.hardware}; it needs --dry-run")
    if "--hardware" in flags:
        raise ValueError("--hardware after --: give it before --, with --dry-run")
    if options.target == "sweep":
        for flag in ("--watch", "--list", "--dry-run"):
            if flag in flags:
                study = [] if options.study is None else [options.study]
                command = shlex.join(["python", "-m", "scaling", "sweep", *study, flag])
                raise ValueError(f"{flag} after --: it needs no job; run it here: {command}")
        return
    for name in ("max_nodes", "max_array_tasks"):
        if options[name] is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"{flag} is {options[name]}, which is for sweeps; leave it out")
    if options.study is not None:
        raise ValueError(
            f"{options.study} is before --; put options of the recipe after it: -- --seed 1"
        )
    for flag, fix in SET_BY_JOB.items():
        if flag in flags:
            raise ValueError(f"{flag} after --: {fix}")


def _check_folder(folder: Path) -> None:
    if list_attempts(folder) or (folder / SUBMITTED).exists():
        raise ValueError(
            f"folder {folder} belongs to another job; continue that job with sbatch "
            f"{shlex.quote(str(folder / SCRIPT))}, or choose another --folder"
        )
    if closed := why_not_writable(folder):
        parent, reason = closed
        raise ValueError(
            f"folder {folder}: {parent} cannot be written ({reason}); choose another --folder"
        )


def _new_folder(name: str) -> Path:
    """Returns a path that is unique even if several jobs are submitted in the same second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs/slurm") / f"{name}-{now}-{secrets.token_hex(2)}"


def _run_sbatch(options: Sequence[str], script: str) -> str:
    """Returns what sbatch prints.

    Raises Refusal if SLURM refuses the job, ValueError if it is not installed, RuntimeError if its
    controller does not answer.
    """
    # Inside a job, sbatch would take that job's variables for options of the new one.
    variables = {
        name: value
        for name, value in without_launcher(os.environ).items()
        if name == "SLURM_CONF" or not name.startswith(JOB_VARIABLES)
    }
    try:
        sbatch = subprocess.run(
            ["sbatch", *options],
            input=script,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=variables,
        )
    except FileNotFoundError:
        raise ValueError(
            "sbatch is not installed here; submit on a node that has SLURM, or add --dry-run"
        ) from None
    if sbatch.returncode:
        error = scheduler.error_of(sbatch)
        if scheduler.BUSY.search(sbatch.stderr):
            state = "the job was not submitted: try again when `scontrol ping` says UP"
            if "timed out" in error and "--test-only" not in options:  # the answer may be late
                state = "the job may be queued: look at `squeue --me` before you try again"
            raise RuntimeError(f"SLURM's controller does not answer ({error}); {state}")
        raise Refusal(reasons_of(sbatch.stderr) or error)
    return sbatch.stdout


def _explained(refusal: Refusal, job: Job, rows: Sequence[PartitionRow]) -> ValueError:
    """Returns the error for a refused job, with what to change where that can be guessed.

    `rows` are the nodes of the job's partitions.
    """
    hint = hint_of(str(refusal), job, rows)
    if "array spec" in str(refusal):
        hint = f"here an array may have {scheduler.max_array_tasks()} tasks, from 0 on"
    is_possible = job.is_exclusive and (hint is None or FORBIDS_EXCLUSIVE.search(str(refusal)))
    if is_possible and _is_accepted(render(job).replace(f"#SBATCH {EXCLUSIVE}\n", "")):
        hint = (
            "without --exclusive it accepts the job: set exclusive = false in the table of the "
            "cluster, and cpus_per_task, so that the ranks have cores"
        )
    return ValueError("; ".join(filter(None, (f"{REFUSED}: {refusal}", hint))))


def _is_accepted(script: str) -> bool:
    try:
        _run_sbatch(["--test-only"], script)
        return True
    except (ValueError, RuntimeError):
        return False


def _test(jobs: Sequence[Job], rows: Sequence[PartitionRow]) -> None:
    """Raises ValueError for jobs that SLURM refuses, with the first reason, or as `_run_sbatch`.

    Arrays on the same number of nodes differ in their tasks only, so that one is enough.
    """
    shapes = {job.nodes: job for job in reversed(jobs)}
    refused: dict[int, Refusal] = {}
    for nodes, job in sorted(shapes.items()):
        try:
            _run_sbatch(["--test-only"], render(job))
        except Refusal as refusal:
            refused[nodes] = refusal
    if not refused:
        return
    first = next(iter(refused))
    if len(refused) == len(shapes):  # the number of nodes is not why
        raise _explained(refused[first], shapes[first], rows)
    numbers = ", ".join(map(str, refused))
    cells = sum(job.left or 0 for job in jobs if job.nodes in refused)
    raise ValueError(
        f"{REFUSED}: {refused[first]}; so {format_count(cells, 'cell')} on {numbers} "
        f"{'node' if numbers == '1' else 'nodes'} could never run: choose another partition, or "
        "leave them out"
    )


@dataclass(frozen=True, kw_only=True)
class QueuedArray:
    """An array of a sweep in the queue."""

    job: str
    nodes: int  # of each task
    max_nodes: int | None = None  # that the sweep was to hold at once when the array was submitted
    folder: str | None = None  # of the job; None if an earlier version submitted it
    tasks: int = 0  # that have not ended
    is_held: bool = False  # all of them


def queued_arrays(jobs: Sequence[Job], max_nodes: int | None) -> list[QueuedArray]:
    """Returns the arrays of this sweep that are in the queue already, oldest first.

    Raises ValueError if they may hold more nodes at once than `max_nodes`, or have other options
    than `jobs`; or as `_read_arrays` and `scheduler.list_queue`.
    """
    path = Path(sweep_folder(jobs[0])) / ARRAYS
    arrays = _read_arrays(path)
    if not arrays:
        return []
    users = {os.getuid(), path.stat().st_uid}  # a colleague may have submitted them
    rows = scheduler.list_queue(users, is_each_task=True)
    tasks = Counter(row.array for row in rows)
    held = Counter(row.array for row in rows if row.is_held)
    queued = [
        replace(array, tasks=tasks[array.job], is_held=held[array.job] == tasks[array.job])
        for array in arrays
        if tasks[array.job]
    ]
    larger = [array for array in queued if (array.max_nodes or math.inf) > (max_nodes or math.inf)]
    if larger:
        few = larger[0].max_nodes
        raise ValueError(
            f"max-nodes is {max_nodes}, but {_format_names(larger)} in the queue for this sweep "
            f"with {'no limit' if few is None else f'--max-nodes {few}'}; cancel first: scancel "
            f"{' '.join(array.job for array in larger)}, or leave max-nodes out"
        )
    for array in queued:
        _check_options(array, jobs)
    return queued


def _read_arrays(path: Path) -> list[QueuedArray]:
    """Returns the arrays that were last in the queue.

    Raises ValueError if the file cannot be read, because its arrays would be queued twice.
    """
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_bytes())
        if "arrays" not in stored:  # an earlier version wrote the array for each number of nodes
            stored = {"arrays": [{"job": job, "nodes": int(n)} for n, job in stored.items()]}
        return [from_dict(QueuedArray, array, "arrays") for array in stored["arrays"]]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{path} does not say which arrays of this sweep are queued; delete it when `squeue` "
            "lists none of them"
        ) from None


def _check_options(array: QueuedArray, jobs: Sequence[Job]) -> None:
    """Raises ValueError if the array was submitted with other options than the job on its nodes."""
    job = next((job for job in jobs if job.nodes == array.nodes), None)
    submitted = read_json(Path(array.folder, SUBMITTED)) if array.folder is not None else {}
    if job is None or submitted.get("job") != array.job:
        return
    before, now = _options_of(submitted), _options_of(json.loads(json.dumps(asdict(job))))
    # The arguments last, because some of them follow from other options.
    for name in sorted(before.keys() & now.keys(), key=lambda name: (name == "arguments", name)):
        if before[name] != now[name]:
            raise ValueError(
                f"array {array.job} of this sweep is in the queue with {name} = {before[name]}, "
                f"not {now[name]}; give the same options, or cancel it first: scancel {array.job}"
            )


def _options_of(submitted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a submitted job, without the number of its cells."""
    values = {**submitted["cluster"], **submitted}
    values["arguments"] = re.sub(r" --max-cells \d+", "", shlex.join(values["arguments"]))
    return {
        name: "none" if value is None else value
        for name, value in values.items()
        if name not in NOT_OPTIONS
    }


def _format_names(arrays: Sequence[QueuedArray]) -> str:
    names = [array.job for array in arrays]
    return f"arrays {' and '.join(names)} are" if len(names) > 1 else f"array {names[0]} is"


def missing_arrays(jobs: Sequence[Job], queued: Sequence[QueuedArray]) -> list[Job]:
    """Returns the arrays without as many tasks as are in the queue for the same nodes."""
    tasks = Counter[int]()
    for array in queued:
        tasks[array.nodes] += array.tasks
    missing = []
    for job in reversed(jobs):  # so that the first arrays stay as large as they may be
        covered = min(tasks[job.nodes], count_tasks(job))
        tasks[job.nodes] -= covered
        if (rest := without_tasks(job, covered)) is not None:
            missing.append(rest)
    return missing[::-1]


def submit_sweep(
    jobs: Sequence[Job], rows: Sequence[PartitionRow], *, max_nodes: int | None
) -> str:
    """Queues the arrays of a sweep that are not in the queue; returns what to print.

    The folder of the sweep names its arrays, so that the same command submits only what is missing,
    also if two processes run it at once.

    Args:
        rows: the nodes of the job's partitions.
        max_nodes: that the sweep holds at once; then each array waits for the one before.

    Raises as `submit`; ValueError, with what is queued, if that is not the first array.
    """
    out = Path(sweep_folder(jobs[0]))
    is_new = not out.exists()
    prepare_sweep(jobs[0])
    with FileLock(out / f"{ARRAYS}.lock"):
        return _submit_missing(jobs, rows, out, max_nodes=max_nodes, is_new=is_new)


def _submit_missing(
    jobs: Sequence[Job],
    rows: Sequence[PartitionRow],
    out: Path,
    *,
    max_nodes: int | None,
    is_new: bool,
) -> str:
    """As `submit_sweep`, while no other process submits this sweep, whose folder is `out`."""
    arrays = queued_arrays(jobs, max_nodes)
    lines = [
        f"queued  {array.job} has {format_count(array.tasks, 'task')} on "
        f"{format_count(array.nodes, 'node')}"
        + (f", held: no array waits for it (scontrol release {array.job})" * array.is_held)
        for array in arrays
    ]
    missing = missing_arrays(jobs, arrays)
    if not missing:
        return "\n".join([*lines, "nothing was submitted: all cells are finished or queued"])
    for job in missing:
        _check_folder(Path(job.folder))
    for number, job in enumerate(missing):
        waits_for = [
            array.job
            for array in arrays
            if (max_nodes is not None or array.nodes == job.nodes) and not array.is_held
        ]
        if waits_for:
            waits = [job.dependency, f"afterany:{':'.join(waits_for)}"]
            job = replace(job, dependency=",".join(filter(None, waits)))
        try:
            printed = submit(job, render(job), rows)
        except (ValueError, RuntimeError) as error:
            if not arrays and is_new and isinstance(error, ValueError):
                _remove_unused(out)
            if not arrays:
                raise
            queued = format_count(sum(array.tasks for array in arrays), "task")
            others = format_count(sum(map(count_tasks, missing[number:])), "task")
            nodes = format_count(job.nodes, "node")
            nodes += " and more" if missing[-1].nodes > job.nodes else ""
            raise ValueError(
                f"{error}; of this sweep, {_format_names(arrays)} queued with {queued}; the same "
                f"command later submits the other {others} on {nodes}"
            ) from None
        name = printed.split()[1].rstrip(",")
        tasks = count_tasks(job)
        arrays.append(
            QueuedArray(
                job=name, nodes=job.nodes, max_nodes=max_nodes, folder=job.folder, tasks=tasks
            )
        )
        stored = [asdict(array) for array in arrays]
        write_atomically(out / ARRAYS, json.dumps({"arrays": stored}).encode())
        lines.append(printed)
        lines += [f"waits   for {' and '.join(waits_for)} to end"] if waits_for else []
    if len(missing) > 1:
        folder = shlex.quote(str(Path(missing[0].folder).parent))
        lines += [
            "",
            table_of(missing),
            *_how_arrays_wait(missing, max_nodes),
            "",
            f"all     python -m slurm.status {folder}",
            f"        scancel {' '.join(array.job for array in arrays)}",
        ]
    return "\n".join(lines)


def _how_arrays_wait(jobs: Sequence[Job], max_nodes: int | None) -> list[str]:
    if max_nodes is not None:
        return [CHAIN]
    has_parts = len({job.nodes for job in jobs}) < len(jobs)
    return [PARTS.format(max(map(count_tasks, jobs)))] if has_parts else []


def _remove_unused(folder: Path) -> None:
    """Removes the folder of a sweep that has only just been created."""
    if all(entry.name.startswith((STUDY, ARRAYS)) for entry in folder.iterdir()):
        shutil.rmtree(folder)


def submit(job: Job, script: str, rows: Sequence[PartitionRow]) -> str:
    """Queues the job; returns its id, log and the commands to follow it.

    Raises as `_run_sbatch`, with a hint if SLURM refuses the job, which then leaves no file behind.
    `rows` are the nodes of the job's partitions.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCRIPT, script.encode())
    try:
        number = _run_sbatch(["--parsable"], script).strip().split(";")[0]
    except ValueError as error:
        (folder / SCRIPT).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        if isinstance(error, Refusal):
            raise _explained(error, job, rows) from None
        raise
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    submitted = {"job": number, "submitted_at": now, **asdict(job)}
    write_atomically(folder / SUBMITTED, json.dumps(submitted, indent=1).encode())
    log = f"{job.name}-{number}{'_*' if job.array else ''}.log"
    quoted = shlex.quote(job.folder)
    return "\n".join(
        (
            f"job     {number}" + (f", tasks {job.array}" if job.array else ""),
            f"log     {folder / log}",
            f"follow  tail -F {quoted}/{log}",
            f"status  python -m slurm.status {quoted}",
            f"cancel  scancel {number}",
        )
    )


def _explain(message: str) -> str:
    explained = explain_parse_error(
        message, build_parser(), expected=lambda _: "--help describes what it takes"
    )
    if "is not an option" in explained:
        return f"{explained}; options of the recipe come after --"
    if "required" in explained and "target" in explained:
        return f"no target given; choose one of {', '.join(TARGETS)}"
    return explained


if __name__ == "__main__":
    sys.exit(run_main(main))

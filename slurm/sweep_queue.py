"""Compares the arrays of a sweep with those in the queue, and submits the missing ones."""

import json
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from slurm import scheduler
from slurm.batch_script import Job, render
from slurm.job_files import STUDY, SUBMITTED, check_free, read_json
from slurm.preflight import prepare_sweep, sweep_folder
from slurm.sbatch import submit
from slurm.scheduler import PartitionRow
from slurm.sweep_jobs import count_tasks, table_of, without_tasks
from unitransformer.config import from_dict
from unitransformer.files import write_atomically
from unitransformer.record.units import format_count

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
        check_free(Path(job.folder))
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
            *how_arrays_wait(missing, max_nodes),
            "",
            f"all     python -m slurm.status {folder}",
            f"        scancel {' '.join(array.job for array in arrays)}",
        ]
    return "\n".join(lines)


def how_arrays_wait(jobs: Sequence[Job], max_nodes: int | None) -> list[str]:
    if max_nodes is not None:
        return [CHAIN]
    has_parts = len({job.nodes for job in jobs}) < len(jobs)
    return [PARTS.format(max(map(count_tasks, jobs)))] if has_parts else []


def _remove_unused(folder: Path) -> None:
    """Removes the folder of a sweep that has only just been created."""
    if all(entry.name.startswith((STUDY, ARRAYS)) for entry in folder.iterdir()):
        shutil.rmtree(folder)

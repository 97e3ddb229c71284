"""Lets SLURM test or queue a job with sbatch, and explains why it refuses one."""

import datetime
import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slurm import scheduler
from slurm.batch_script import EXCLUSIVE, Job, render
from slurm.job_files import SCRIPT, SUBMITTED
from slurm.refusals import Refusal, hint_of, reasons_of
from slurm.scheduler import PartitionRow
from unitransformer.files import write_atomically
from unitransformer.launch.variables import without_launcher
from unitransformer.record.units import format_count

FORBIDS_EXCLUSIVE = re.compile("exclusive|whole|shared?", re.IGNORECASE)  # in a site's own words
REFUSED = "SLURM refuses this job"
JOB_VARIABLES = ("SBATCH_", "SLURM_", "SRUN_", "UNITRANSFORMER_JOB", "UNITRANSFORMER_RUN")


def check_with_slurm(jobs: Sequence[Job], rows: Sequence[PartitionRow]) -> None:
    """Raises ValueError for jobs that SLURM refuses, with the first reason, or as `run_sbatch`.

    Arrays on the same number of nodes differ in their tasks only, so that one is enough.
    """
    shapes = {job.nodes: job for job in reversed(jobs)}
    refused: dict[int, Refusal] = {}
    for nodes, job in sorted(shapes.items()):
        try:
            run_sbatch(["--test-only"], render(job))
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


def submit(job: Job, script: str, rows: Sequence[PartitionRow]) -> str:
    """Queues the job; returns its id, log and the commands to follow it.

    Raises as `run_sbatch`, with a hint if SLURM refuses the job, which then leaves no file behind.
    `rows` are the nodes of the job's partitions.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCRIPT, script.encode())
    try:
        number = run_sbatch(["--parsable"], script).strip().split(";")[0]
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


def run_sbatch(options: Sequence[str], script: str) -> str:
    """Returns what sbatch prints.

    Raises Refusal if SLURM refuses the job, ValueError if it is not installed or not configured,
    RuntimeError if its controller does not answer.
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
        if scheduler.UNCONFIGURED.search(sbatch.stderr):
            raise ValueError(
                f"SLURM is not configured here ({error}); submit on a node that is part of a "
                "cluster, or add --dry-run"
            )
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
        run_sbatch(["--test-only"], script)
        return True
    except (ValueError, RuntimeError):
        return False

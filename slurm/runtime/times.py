"""Writes when a job was queued, started and ended, where a report finds it. Does not need sacct."""

import contextlib
import datetime
import os
import re
from dataclasses import fields
from pathlib import Path

from slurm import scheduler
from slurm.job_files import RUN, STUDY, list_attempts
from slurm.runtime.allocation import Allocation, JobArgs, sweep_folder_of
from slurm.runtime.outcome import record_path
from unitransformer.record.slurm_job import JOBS, JobStart, SlurmJob, write_job

ANSWER_S = 5.0  # timeout


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def ask_queued_at(job: str) -> str | None:
    """Returns when SLURM queued this start of a job, first or again; None if it does not say.

    Asks once: the ranks wait for this.
    """
    # Seconds since 1970: SLURM's other formats have no time zone.
    command = ("env", "SLURM_TIME_FORMAT=%s", "scontrol", "--oneliner", "show", "job", job)
    with contextlib.suppress(ValueError, RuntimeError):
        answer = scheduler.call(*command, timeout_s=ANSWER_S).stdout
        if found := re.search(r"\bSubmitTime=(\d+)\b", answer):
            return datetime.datetime.fromtimestamp(int(found[1]), datetime.UTC).isoformat()
    return None


def write_times(allocation: Allocation, args: JobArgs) -> None:
    """Writes all starts of the job into the folder of its sweep, or beside the record of its run.

    Does nothing before that folder exists, and if it cannot be written: the run reports that.
    """
    record = None
    if args.target == "sweep":
        sweep = Path(sweep_folder_of(args.arguments, os.getcwd()))
        folder = sweep / JOBS if (sweep / STUDY).exists() else None
    else:
        record = record_path(args.folder / RUN)
        folder = None if record is None else record.parent
    if folder is None:
        return
    attempts = [past for past in list_attempts(args.folder) if past.job == allocation.job]
    names = [field.name for field in fields(JobStart)]
    starts = tuple(JobStart(**{n: getattr(past, n) for n in names}) for past in attempts)
    job = SlurmJob(
        job=allocation.job,
        name=allocation.name,
        record=None if record is None else record.name,
        starts=starts,
    )
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        write_job(job, folder)

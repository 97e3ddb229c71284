"""How long a SLURM job waited and ran, and how often it was requeued.

`slurm.job` writes one file per job, or per task of an array, when it starts and when it ends: into
the folder `jobs` of a sweep, otherwise beside the record of the run.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from unitransformer.files import write_atomically
from unitransformer.record.checksums import add_checksums, to_text, verify_checksums
from unitransformer.record.fields import Kinds, check_fields

SCHEMA = 1
KIND = "slurm-job"
JOBS = "jobs"  # folder in that of a sweep
FIELDS: dict[str, Kinds] = {
    **dict.fromkeys(("kind", "job", "name"), str),
    "schema": int,
    "record": (str, NoneType),
    "starts": list,
}
START_FIELDS: dict[str, Kinds] = {
    **dict.fromkeys(("nodes", "started_at", "outcome"), str),
    **dict.fromkeys(("queued_at", "ended_at"), (str, NoneType)),
    "restart": int,
}

JobOutcome = Literal["running", "done", "stopped", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """One start of a job. Times are in ISO 8601, with a zone."""

    restart: int  # 0: the first start; more: SLURM has requeued the job so often
    nodes: str
    started_at: str
    queued_at: str | None = None  # when SLURM queued this start; None: unknown
    # Of a start that was killed before it could report: when the job was requeued.
    ended_at: str | None = None  # None: it runs, or it is unknown when it ended
    outcome: JobOutcome = "running"


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The starts of one job, or of one task of an array."""

    job: str  # SLURM_JOB_ID
    name: str  # for SLURM's commands: 7, or 5_3 for a task of an array
    record: str | None  # name of the run record in the same folder; None: of a sweep, or none
    starts: tuple[JobStart, ...]  # oldest first, at least one


def waited_s(starts: Iterable[JobStart]) -> float | None:
    """Returns the seconds from queueing to starting, over all starts; None if one is unknown.

    They include waiting for other jobs (`--dependency`), and for tasks of the same array.
    """
    return _total([(start.queued_at, start.started_at) for start in starts])


def ran_s(starts: Iterable[JobStart]) -> float | None:
    """Returns the seconds from starting to ending, over all starts; None if one is unknown."""
    return _total([(start.started_at, start.ended_at) for start in starts])


def _total(spans: Sequence[tuple[str | None, str | None]]) -> float | None:
    known = [(begin, end) for begin, end in spans if begin is not None and end is not None]
    if len(known) < len(spans):
        return None
    # The clocks of the controller and of a node may differ.
    return sum(max(0.0, seconds_of(end) - seconds_of(begin)) for begin, end in known)


def seconds_of(instant: str) -> float:
    """Returns the clock time of an instant in ISO 8601."""
    return datetime.datetime.fromisoformat(instant).timestamp()


def write_job(job: SlurmJob, folder: Path) -> None:
    """Writes the file of a job atomically; raises OSError."""
    content = {"schema": SCHEMA, "kind": KIND, **asdict(job)}
    # No record has such a name: theirs end with a dash and the number of the repeat.
    write_atomically(folder / f"slurm_{job.job}.json", to_text(add_checksums(content)).encode())


def is_job(values: Any) -> bool:
    return isinstance(values, Mapping) and values.get("kind") == KIND


def read_job(values: Mapping[str, Any], where: str) -> SlurmJob:
    """Returns the job of a file.

    Raises:
        ValueError: names the first field that is missing, changed or of another type.
    """
    if values.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {values.get('schema')!r}; this version reads {SCHEMA}: read it "
            "with the version that wrote it"
        )
    verify_checksums(values, where)
    check_fields(values, FIELDS, where)
    if not values["starts"]:
        raise ValueError(f"{where}: starts is empty; a job that wrote it has started")
    return SlurmJob(
        job=values["job"],
        name=values["name"],
        record=values["record"],
        starts=tuple(
            _read_start(start, f"{where}: starts.{index}")
            for index, start in enumerate(values["starts"])
        ),
    )


def _read_start(values: Any, where: str) -> JobStart:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; it must be an object")
    check_fields(values, START_FIELDS, where)
    if values["outcome"] not in get_args(JobOutcome):
        raise ValueError(f"{where}: outcome is {values['outcome']!r}; it is unknown")
    for name in ("queued_at", "started_at", "ended_at"):
        if values[name] is not None:
            try:
                seconds_of(values[name])
            except ValueError as error:
                raise ValueError(f"{where}: {name}: {error}") from None
    return JobStart(**{field.name: values[field.name] for field in fields(JobStart)})

"""The page of SLURM jobs: how long each waited and ran, and how often it was requeued."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from scaling.markdown import escaped, link
from scaling.report.table_notes import draw
from scaling.store.reader import Store
from unitransformer.record.slurm_job import JOBS, SlurmJob, ran_s, waited_s
from unitransformer.record.units import format_count, format_duration

MOST_LINKED = 3  # runs of a job
ABOUT = (
    "One row per job, or per task of an array. It waited from its submission, and after each "
    "requeue, until it started; that includes waiting for other tasks of its array. It ran from "
    "its starts to their ends, of which training is only a part. A time is missing where SLURM "
    "killed the job before it could write it."
)


def jobs_page(store: Store) -> list[str]:
    """Returns nothing if no job of SLURM has written its file."""
    if not store.jobs:
        return []
    runs = _runs_by_job(store)
    rows = [
        _row(name, job, runs.get(name, []))
        for name, job in sorted(store.jobs.items(), key=lambda item: _place(*item))
    ]
    return [f"{jobs_summary(store)}.", ABOUT, *draw(rows, always=("job", "waited", "ran"))]


def jobs_summary(store: Store) -> str:
    """Returns a sentence on all jobs, without its full stop; empty if there are none."""
    jobs = store.jobs.values()
    if not jobs:
        return ""
    waited = [span for job in jobs if (span := waited_s(job.starts)) is not None]
    ran = [span for job in jobs if (span := ran_s(job.starts)) is not None]
    requeues = sum(map(_requeues, jobs))
    ends = dict.fromkeys(map(format_duration, (min(waited), max(waited)) if waited else ()))
    parts = [f"waited {' to '.join(ends)}"] if ends else []
    parts += (
        [f"ran {format_duration(sum(ran))}{' together' if len(ran) > 1 else ''}"] if ran else []
    )
    parts.append(f"{'was' if len(jobs) == 1 else 'were'} {_requeued(requeues)}")
    text = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return f"{format_count(len(jobs), 'SLURM job')} {text}"


def _requeued(number: int) -> str:
    times = {1: "once", 2: "twice"}.get(number, f"{number:,} times")
    return f"requeued {times}" if number else "never requeued"


def _requeues(job: SlurmJob) -> int:
    return max(start.restart for start in job.starts)


def _runs_by_job(store: Store) -> Mapping[str, Sequence[str]]:
    """Returns the files of the runs, or of cells without a record, by the file of their job."""
    files: dict[str, list[str]] = {}
    names = {(_folder(name), job.job): name for name, job in store.jobs.items()}
    for cell in store.cells:
        folder = str(PurePosixPath(cell.sweep) / JOBS)
        if (name := names.get((folder, cell.outcome.slurm_job or ""))) is not None:
            files.setdefault(name, []).append(cell.name if cell.run is None else cell.run.name)
    runs = {run.name for run in store.runs}
    for name, job in store.jobs.items():
        if job.record is not None:
            record = PurePosixPath(name).with_name(job.record).as_posix()
            files.setdefault(name, []).extend([record] * (record in runs))
    return files


def _place(name: str, job: SlurmJob) -> tuple[str, tuple[int, ...], str]:
    numbers = tuple(int(number) for number in job.name.split("_") if number.isdecimal())
    return _folder(name), numbers, name


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _row(name: str, job: SlurmJob, files: Sequence[str]) -> dict[str, str]:
    waited, ran, last = waited_s(job.starts), ran_s(job.starts), job.starts[-1]
    links = [link(file, str(number)) for number, file in enumerate(files[:MOST_LINKED], 1)]
    if len(files) > MOST_LINKED:
        links.append(f"{len(files) - MOST_LINKED} more")
    return {
        "job": link(name, job.name),
        "sweep": escaped(PurePosixPath(name).parent.parent.name) if job.record is None else "",
        "nodes": escaped(last.nodes),
        "waited": "" if waited is None else format_duration(waited),
        "ran": "" if ran is None else format_duration(ran),
        "requeues": str(_requeues(job)),
        "ended": last.outcome if last.ended_at is not None else "not yet, or killed",
        "runs": ", ".join(links),
    }

"""Builds the recipes of job tests, and waits for the outcome of jobs."""

import re
from pathlib import Path

from slurm import status
from slurm.job_files import last_attempt
from tests.distributed.launching import recipe_arguments
from tests.slurm.cluster import until

STEPS = 400  # of a job that is interrupted


def tiny(folder: Path, *options: str) -> list[str]:
    """Options of a tiny recipe without paths."""
    arguments = recipe_arguments("gpt", folder, "--batch-size", "4", *options)
    for flag in ("--out", "--record"):
        index = arguments.index(flag)
        del arguments[index : index + 2]
    return arguments


def log_of(folder: Path, ending: str = "") -> str:
    return "".join(path.read_text() for path in folder.glob(f"*{ending}.log"))


def wait_for_outcome(folder: Path, *outcomes: str, timeout_s: float = 120) -> None:
    def has_ended() -> bool:
        attempt = last_attempt(folder)
        return attempt is not None and attempt.outcome in outcomes

    until(has_ended, f"the job is {' or '.join(outcomes)}", timeout_s)


def wait_for_status(folder: Path, expected: str) -> None:
    until(lambda: re.search(expected, status.report(folder)) is not None, f"status says {expected}")

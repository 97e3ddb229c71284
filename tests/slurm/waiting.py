"""Builds the recipes of job tests, slows their first start, and waits for the outcome of jobs."""

import json
import re
from pathlib import Path

import pytest

from slurm import status
from slurm.job_files import last_attempt
from tests.distributed.launching import recipe_arguments
from tests.slurm.cluster import until

STEPS = 100  # of a job that is interrupted

# Python imports this before all else. An interrupted job would otherwise end before a busy machine
# has come to interrupt it; the start that resumes it runs at full speed.
SLOW_STEPS = """
import importlib.util, os, sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "unitransformer.training.module":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_slow(module):
            load(module)
            step = module.TrainingModule.training_step

            def slow_step(self, *arguments):
                time.sleep(0 if self.global_step < 12 else 3)
                return step(self, *arguments)

            module.TrainingModule.training_step = slow_step

        spec.loader.exec_module = load_slow
        return spec

is_slow = os.environ.get("SLURM_ARRAY_TASK_ID", "0") in os.environ["SLOW_TASKS"].split()
if is_slow and "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    sys.meta_path.insert(0, Slow())
"""


def slow_down_first_start(
    work: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tasks: str = "0",
    more: str = "",
) -> None:
    """Lets every step from the thirteenth last seconds, in all ranks of the first start of a job.

    Args:
        tasks: the tasks of an array to which this applies.
        more: what else each Python process of the job does first.
    """
    (work / "sitecustomize.py").write_text(SLOW_STEPS + more)
    monkeypatch.setenv("PYTHONPATH", f"{work}:{repository}")
    monkeypatch.setenv("SLOW_TASKS", tasks)


def tiny(folder: Path, *options: str) -> list[str]:
    """Options of a tiny recipe without paths."""
    arguments = recipe_arguments("gpt", folder, "--batch-size", "4", *options)
    for flag in ("--out", "--record"):
        index = arguments.index(flag)
        del arguments[index : index + 2]
    return arguments


def log_of(folder: Path, ending: str = "") -> str:
    return "".join(path.read_text() for path in folder.glob(f"*{ending}.log"))


def wait_for_outcome(folder: Path, *outcomes: str) -> None:
    def has_ended() -> bool:
        attempt = last_attempt(folder)
        return attempt is not None and attempt.outcome in outcomes

    until(has_ended, f"the job is {' or '.join(outcomes)}")


def wait_for_status(folder: Path, expected: str) -> None:
    until(lambda: re.search(expected, status.report(folder)) is not None, f"status says {expected}")


def statuses_of(work: Path) -> list[str]:
    """Returns the statuses of the cells that have ended."""
    paths = sorted((work / "swept").glob("cells/*/outcome.json"))
    return [json.loads(path.read_text())["status"] for path in paths]

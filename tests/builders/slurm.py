"""Builds what a SLURM job finds in its environment and folder."""

from collections.abc import Callable, Mapping

from slurm.job_files import Attempt
from slurm.runtime.allocation import JobArgs, read_allocation, read_args

VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


ATTEMPT = Attempt(
    job="7", array=None, restart=0, nodes="node[1-2]", started_at="2026-01-01T00:00:00+00:00"
)


# A stub of srun in a job whose GPUs SLURM has forgotten.
REFUSES_STEPS = """
why="Invalid generic resource (gres) specification"
echo "srun: error: Unable to create step for job 7: $why" >&2
exit 1
"""

# Replaces one of SLURM's commands: its name, and a shell script.
PutStub = Callable[[str, str], None]


def args_of(line: str, variables: Mapping[str, str] = VARIABLES) -> JobArgs:
    return read_args(line.split(), read_allocation(variables))

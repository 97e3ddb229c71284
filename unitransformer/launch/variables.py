"""Environment variables: those of this suite, and those by which launchers name a rank.

UNITRANSFORMER_CACHE is the only other one; `places` reads it.
"""

from collections.abc import Mapping

RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # where a recipe puts its run, on all of its ranks

LOCAL_DISK = "UNITRANSFORMER_LOCAL_DISK"  # folder of this job on the node's own disk

DATA_FOLDER = "UNITRANSFORMER_DATA"  # where calibrations are kept

JOB_FOLDER = "UNITRANSFORMER_JOB_FOLDER"  # of a SLURM job whose script does not name it

SWEEP_FILE = "UNITRANSFORMER_JOB_SWEEP"  # file in which a sweep reports progress to its job

ERRORS = "UNITRANSFORMER_ERRORS"  # folder in which ranks say why they failed

# By these `torchrun` and `srun` tell a process which rank it is.
NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)

GROUPS = ("TORCHELASTIC_", "SLURM_STEP")


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` of a process that is no rank of anything: what it starts are ranks of its own."""
    return {
        name: value
        for name, value in variables.items()
        if name not in NAMES and not name.startswith(GROUPS)
    }


PROGRESS = "progress"  # beside the record while a run goes on: JSON, and no record

CELL_LIMIT_S = 3600.0  # that a cell of a sweep may take where nobody says otherwise

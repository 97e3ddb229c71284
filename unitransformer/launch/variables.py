"""Variables by which `torchrun` and `srun` tell a process which rank it is."""

from collections.abc import Mapping

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


RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # tells the ranks that are started which folder to use

ERRORS = "UNITRANSFORMER_ERRORS"  # folder where ranks say why they failed

LOCAL_DISK = "UNITRANSFORMER_LOCAL_DISK"  # names a folder of this job on the node's own disk

PROGRESS = "progress"  # beside the record while a run goes on: JSON, and no record

CELL_LIMIT_S = 3600.0  # that a cell of a sweep may take where nobody says otherwise

SWEEP_FILE = "UNITRANSFORMER_JOB_SWEEP"  # names the file by which a sweep tells its job how it goes

"""Names the environment variables of the suite, and those by which launchers number a rank.

`files.cache_folder` reads the only other one, UNITRANSFORMER_CACHE.
"""

from collections.abc import Mapping

RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # where all ranks of a recipe put their run
LOCAL_DISK = "UNITRANSFORMER_LOCAL_DISK"  # folder of this job on the node's own disk
DATA_FOLDER = "UNITRANSFORMER_DATA"  # where calibrations are stored
JOB_FOLDER = "UNITRANSFORMER_JOB_FOLDER"  # of a SLURM job whose script does not name it
SWEEP_FILE = "UNITRANSFORMER_JOB_SWEEP"  # file in which a sweep reports progress to its job
RANKS_COMMAND = "UNITRANSFORMER_JOB_RANKS"  # JSON: command that starts a cell on all nodes of a job
SHARED_FILE = "UNITRANSFORMER_JOB_SHARED"  # file that all nodes of a job must see
ERRORS_FOLDER = "UNITRANSFORMER_ERRORS"  # folder in which ranks report their failures

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_STEP")

PROGRESS_FILE = "progress"  # JSON in the folder of a run that is under way
CELL_LIMIT_S = 3600.0  # default time limit of a cell of a sweep


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables for a process that is not a rank, and may launch ranks itself."""
    of_launcher = {*TORCHRUN_VARIABLES, *SRUN_VARIABLES, *MASTER_VARIABLES}
    return {
        name: value
        for name, value in variables.items()
        if name not in of_launcher and not name.startswith(LAUNCHER_PREFIXES)
    }

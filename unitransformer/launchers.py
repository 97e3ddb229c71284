"""Variables by which `torchrun` and `srun` tell a process which rank it is."""

from collections.abc import Mapping

NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
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

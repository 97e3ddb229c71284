"""Rank and world size from torchrun or srun."""

import os

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from unitransformer.config import ParallelConfig

FIRST_PORT = 15_000

PORTS = 17_729  # prime, and all below 32 768, from where on Linux gives them away

STEP_STRIDE = 128  # so many jobs in a row have 138 steps each at ports of their own


def adopt_launcher() -> None:
    """Let a task of `srun` find the variables that `torchrun` would have set.

    Raises:
        ValueError: a batch job of several tasks or nodes whose script has started this without
            `srun`, or nodes with unequal numbers of tasks.
    """
    if "RANK" in os.environ:
        return
    if not _is_srun_task():
        _check_batch_script()
        return
    if "," in os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise ValueError(
            f"srun has started {os.environ['SLURM_STEP_TASKS_PER_NODE']} tasks on the nodes; give "
            "each as many with --ntasks-per-node"
        )
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    nodes = os.environ["SLURM_STEP_NODELIST"]
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // int(os.environ["SLURM_STEP_NUM_NODES"])),
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(nodes),
        "MASTER_PORT": str(srun_port(job, step)),
        "TORCHELASTIC_RUN_ID": f"slurm-{job}.{step}",
    }
    os.environ |= {name: value for name, value in found.items() if name not in os.environ}


def _check_batch_script() -> None:
    """Raises ValueError where a batch script has started one process for what is to be several."""
    if "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ:
        return
    tasks, nodes = (
        int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
    )
    if tasks > 1:
        raise ValueError(
            f"the job has {tasks} tasks and this is none of them: start it with srun, or "
            "submit with --ntasks-per-node=1"
        )
    # The script has a rank; what a sweep starts in it has none, and is content with one node.
    if nodes > 1 and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"the job has {nodes} nodes and this is one process on one of them: start it with "
            "srun, or submit with --nodes=1"
        )


def srun_port(job: int, step: int) -> int:
    """Where the tasks of a step meet; none of them can ask the others.

    Jobs share nodes: those whose numbers are less than `PORTS` apart differ in it, if both are in
    the same step, and so do as many steps of a job. The system gives none of these away by itself.
    """
    return FIRST_PORT + (job + STEP_STRIDE * step) % PORTS


def _is_srun_task() -> bool:
    """One of several; the batch script of a job, which has a SLURM_PROCID too, is none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def launched_shape() -> tuple[int, int] | None:
    """Ranks on each node and nodes, where a launcher has started them; None if nobody has."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    world_size = int(os.environ["WORLD_SIZE"])
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return devices, world_size // devices


def check_launched(parallel: ParallelConfig) -> None:
    """Raises ValueError if a launcher has started other ranks than `parallel` says."""
    shape = launched_shape()
    if shape is not None and shape != (parallel.devices, parallel.num_nodes):
        raise ValueError(
            f"devices is {parallel.devices} and num-nodes {parallel.num_nodes}, and the launcher "
            f"has started {shape[0]} ranks on each of {shape[1]} nodes; leave both options out, or "
            "start as many"
        )


def process_rank() -> int:
    """Rank of this process over all nodes; 0 where no launcher has started it."""
    return int(os.environ.get("RANK", 0))

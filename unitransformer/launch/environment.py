"""Reads rank and world size from torchrun or srun, and refuses what needs another launcher."""

import datetime
import os
import shlex
import socket
from collections.abc import Callable, Sequence

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch._C._distributed_c10d import TCPStore

from unitransformer.config import ParallelConfig

FIRST_PORT = 15_000
NUM_PORTS = 17_729  # prime; all stay below 32768, where Linux's ephemeral ports begin
STEP_STRIDE = 128  # up to 128 consecutive jobs of 138 steps each use different ports
TORCHRUN_PORT = 29_500  # torch's default
FOLDER_WAIT = datetime.timedelta(minutes=10)  # until the ranks of other nodes have started

_open_stores: list[TCPStore] = []  # the other ranks need them until this process ends


def adopt_launcher() -> None:
    """Sets the variables of `torchrun` in a task of `srun`.

    Raises ValueError without `srun` in a batch script with several tasks or nodes, and for nodes
    with unequal numbers of tasks.
    """
    if "RANK" in os.environ:
        return
    # A batch script has a SLURM_PROCID too, but is not one of several tasks of a step.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks <= 1:
        _check_batch_script()
        return
    if "," in os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise ValueError(
            f"srun has started {os.environ['SLURM_STEP_TASKS_PER_NODE']} tasks on the nodes; give "
            "each as many with --ntasks-per-node"
        )
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    nodes = os.environ["SLURM_STEP_NODELIST"]
    variables = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // int(os.environ["SLURM_STEP_NUM_NODES"])),
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(nodes),
        "MASTER_PORT": str(srun_port(job, step)),
        "TORCHELASTIC_RUN_ID": f"slurm-{job}.{step}",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _check_batch_script() -> None:
    """Raises ValueError if a batch script started one process and the job has several tasks."""
    if "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ:
        return
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if tasks > 1:
        raise ValueError(
            f"the job has {tasks} tasks and this process is not one of them: start it with srun, "
            "or submit with --ntasks-per-node=1"
        )
    # A batch script has a SLURM_PROCID. The children of a sweep do not, and may use one node.
    if nodes > 1 and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"the job has {nodes} nodes and this is one process on one of them: start it with "
            "srun, or submit with --nodes=1"
        )


def srun_port(job: int, step: int) -> int:
    """Returns the rendezvous port of a step; every task computes the same without communication.

    Steps that share a node must differ: equal steps of jobs whose numbers are less than
    `NUM_PORTS` apart do, and so do that many steps of one job.
    """
    return FIRST_PORT + (job + STEP_STRIDE * step) % NUM_PORTS


def launched_shape() -> tuple[int, int] | None:
    """Returns ranks per node and nodes that a launcher started; None without a launcher."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return None
    world_size = int(os.environ["WORLD_SIZE"])
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return devices, world_size // devices


def check_launched(parallel: ParallelConfig) -> None:
    """Raises ValueError if a launcher has started other ranks than `parallel` has."""
    shape = launched_shape()
    if shape is not None and shape != (parallel.devices, parallel.num_nodes):
        raise ValueError(
            f"devices is {parallel.devices} and num-nodes {parallel.num_nodes}, and the launcher "
            f"has started {shape[0]} ranks on each of {shape[1]} nodes; leave both options out, or "
            "start as many"
        )


def process_rank() -> int:
    """Returns the rank of this process over all nodes; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def check_nodes(parallel: ParallelConfig, module: str, arguments: Sequence[str]) -> None:
    """Raises ValueError, with the `torchrun` command, for several nodes without a launcher.

    `python -m` has started `module` with `arguments`.
    """
    if parallel.num_nodes == 1 or launched_shape() is not None:
        return
    last = parallel.num_nodes - 1
    torchrun = (
        f"torchrun --nnodes {parallel.num_nodes} --node-rank 0 --nproc-per-node {parallel.devices} "
        f"--master-addr {socket.gethostname()} --master-port {TORCHRUN_PORT} "
    ) + shlex.join(["-m", module, *arguments])
    others = "1 on the other node" if last == 1 else f"1 to {last} on the other nodes"
    raise ValueError(
        f"num-nodes is {parallel.num_nodes} and this command starts ranks on one machine only; run "
        f"here, and with --node-rank {others}: {torchrun}"
    )


def agree_on_folder(choose: Callable[[], str]) -> str:
    """Returns, on every rank of `torchrun` or `srun`, the folder that the first rank chooses.

    torchrun runs a store at MASTER_ADDR and MASTER_PORT. srun does not: the first rank opens one
    there, which the process group uses as well. Raises RuntimeError if it does not answer.
    """
    is_first = process_rank() == 0
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_first and not has_store,
        wait_for_workers=False,
        timeout=FOLDER_WAIT,
    )
    _open_stores.append(store)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    key = f"unitransformer/folder/{os.environ.setdefault('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_first:
        store.set(key, choose())
    return store.get(key).decode()

"""Reads rank and world size from torchrun or srun, and refuses what needs another launcher."""

import datetime
import functools
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Sequence

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from unitransformer.config import ParallelConfig

FIRST_PORT = 15_000
NUM_PORTS = 17_729  # prime; all stay below 32768, where Linux's ephemeral ports begin
STEP_STRIDE = 128  # up to 128 consecutive jobs of 138 steps each use different ports
TORCHRUN_PORT = 29_500  # torch's default
START_WAIT = datetime.timedelta(minutes=10)  # until the ranks of other nodes have started
TORCHRUN_MARK = "TORCHELASTIC_MAX_RESTARTS"  # torchrun alone sets this variable
POLL_S = 0.01

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


def agree_on_folder(choose: Callable[[], str], *, resumes: bool) -> str:
    """Returns, on every rank of `torchrun` or `srun`, the folder that the first rank chooses.

    Ranks that torchrun has restarted get the folder of the ranks before them.

    Args:
        resumes: whether `choose` returns the folder of the newest checkpoint.

    Raises:
        ValueError: torchrun has restarted this rank, and has not kept the store.
    """
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not has_store and not resumes and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ValueError(
            "torchrun has restarted the ranks, which cannot find the folder of the run without "
            "torchrun's store; unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or give --resume auto"
        )
    store = _launcher_store()
    if process_rank() == 0 and not store.check(["folder"]):
        store.set("folder", choose())
    return store.get("folder").decode()


@functools.cache
def join_attempt() -> bool:
    """Gives ranks that torchrun has restarted a new store; every rank has to call this.

    torchrun keeps its store when it restarts the ranks, and a process group would connect to the
    addresses of dead ranks in it (torch 2.13). Nodes count restarts differently, so that the count
    cannot tell attempts apart. Instead rank 0 announces the port to all ranks of this attempt.

    Returns:
        Whether an earlier attempt has begun to train.
    """
    if TORCHRUN_MARK not in os.environ:
        return False
    store, rank, name = _launcher_store(), process_rank(), secrets.token_hex(8)
    if rank == 0:
        port = _open_store(port=0, is_server=True).port if store.check(["joined"]) else 0
        store.set("joined", "")
        answer = f"{name} {port} {store.check(['begun'])}"
        _answer_ranks(store, answer)
    else:
        store.set(f"rank/{rank}", name)
        answer = store.get(name).decode()
    attempt, new_port, has_begun = answer.split()
    store.set(f"{attempt}/{rank}", "")
    if new_port != "0":
        os.environ["MASTER_PORT"] = new_port
    return has_begun == "True"


def _answer_ranks(store: Store, answer: str) -> None:
    """Answers the other ranks until each has the answer; a dead rank may have asked as well."""
    attempt = answer.split()[0]
    missing = list(range(1, int(os.environ["WORLD_SIZE"])))
    deadline = time.monotonic() + START_WAIT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} did not start within {START_WAIT}")
        for rank in missing:
            if store.check([f"rank/{rank}"]):
                store.set(store.get(f"rank/{rank}").decode(), answer)
        time.sleep(POLL_S)
        missing = [rank for rank in missing if not store.check([f"{attempt}/{rank}"])]


def note_begin() -> None:
    """Notes for a later attempt that this one begins to train."""
    if TORCHRUN_MARK in os.environ and process_rank() == 0:
        _launcher_store().set("begun", "")


@functools.cache
def _launcher_store() -> Store:
    """Returns the store at the first MASTER_ADDR and MASTER_PORT; raises RuntimeError without one.

    torchrun runs it. srun does not: the first rank opens it, and the process group uses it as well.
    """
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = process_rank() == 0 and not has_store
    store = _open_store(port=int(os.environ["MASTER_PORT"]), is_server=is_server)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")  # some versions of torch read it then
    return PrefixStore("unitransformer", store)


def _open_store(*, port: int, is_server: bool) -> TCPStore:
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=is_server,
        wait_for_workers=False,
        timeout=START_WAIT,
    )
    _open_stores.append(store)
    return store

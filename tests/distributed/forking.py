"""Starts ranks, commands and workers as forks of this process, which has imported everything."""

import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.distributed import TCPStore

from recipes import train
from recipes.service import worker
from unitransformer.launch import environment
from unitransformer.launch.process_tree import die_with_parent
from unitransformer.launch.signals import STOP_SIGNALS
from unitransformer.measure import instruments
from unitransformer.parallel.deepspeed import prepare_deepspeed

for name in worker.HEAVY:
    importlib.import_module(name)
prepare_deepspeed("cpu")
FORK = torch.multiprocessing.get_context("fork")


def begin_fork(variables: Mapping[str, str], *, is_whole: bool = False) -> None:
    """Prepares a fork for its run.

    Args:
        is_whole: whether the run counts tensor bytes and shows results at its end. Both take as
            long as the training of a tiny model.
    """
    gc.freeze()  # inherited objects need no garbage collection
    torch._dynamo.reset()  # drop the compiled code of the parent
    torch._dynamo.utils.clear_compilation_metrics()
    torch._dynamo.utils.counters.clear()
    # What the parent, which torchrun did not start, has found out about its own launcher.
    environment.join_attempt.cache_clear()
    environment._launcher_store.cache_clear()
    os.environ |= variables
    if not is_whole:
        train._results = lambda *arguments: []
        instruments.find_quiet_step = lambda *arguments: None


def fork_ranks(
    be_rank: Callable[..., None], *arguments: Any, world_size: int, num_nodes: int = 1
) -> None:
    """Runs `be_rank(variables, *arguments)` in every rank, with the variables of torchrun.

    A single rank gets no variables. The store listens on a port that is already bound.

    Args:
        num_nodes: how many nodes the variables describe; all ranks run on this machine.
    """
    devices = world_size // num_nodes
    listener = socket.create_server(("127.0.0.1", 0))
    launcher = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(devices),
    }
    ranks = torch.multiprocessing.start_processes(
        _be_rank,
        args=(be_rank, launcher if world_size > 1 else {}, *arguments),
        nprocs=world_size,
        join=False,
        start_method="fork",
    )
    store = TCPStore(
        *("127.0.0.1", 0),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    while not ranks.join():
        pass
    del store


def _be_rank(
    rank: int, be_rank: Callable[..., None], launcher: Mapping[str, str], *arguments: Any
) -> None:
    variables = {}
    if launcher:
        node, local = divmod(rank, int(launcher["LOCAL_WORLD_SIZE"]))
        variables = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
    be_rank({**launcher, **variables}, *arguments)


def say_into(log: Path) -> None:
    """Redirects all output of this process to a file, also that of libraries."""
    with log.open("w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))


def fork_command(
    main: Callable[[], int], *, log: Path, variables: Mapping[str, str], is_whole: bool = False
) -> BaseProcess:
    """Runs `main` in a fork, which exits with the returned code."""
    process = FORK.Process(target=_be_command, args=(main, log, variables, is_whole))
    process.start()
    return process


def _be_command(
    main: Callable[[], int], log: Path, variables: Mapping[str, str], is_whole: bool
) -> None:
    begin_fork(variables, is_whole=is_whole)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say_into(log)
    sys.exit(main())


class ForkedWorker:
    """`python -m recipes.service.worker` as a fork, with the interface of a subprocess."""

    stderr = None

    def __init__(self, log: Path) -> None:
        (read_asked, asked), (answers, write_answer) = os.pipe(), os.pipe()
        self._process = FORK.Process(
            target=_be_worker,
            args=(log, (read_asked, write_answer), (asked, answers), os.getpid()),
        )
        self._process.start()
        for end in (read_asked, write_answer):
            os.close(end)
        self.pid = self._process.pid
        self.stdin, self.stdout = os.fdopen(asked, "w"), os.fdopen(answers)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _be_worker(log: Path, ends: tuple[int, int], others: tuple[int, int], parent: int) -> None:
    die_with_parent(parent)
    begin_fork({})
    for number in STOP_SIGNALS:  # the handlers of a new interpreter, not those of the sweep
        signal.signal(number, signal.SIG_DFL)
    say_into(log)
    for end in others:
        os.close(end)
    for stream, end in enumerate(ends):
        os.dup2(end, stream)
    sys.stdin = os.fdopen(0)
    sys.exit(worker.main())


def start_forked(self: Any) -> ForkedWorker:
    """Replaces `scaling.recipe_process._Worker._start`, which takes seconds."""
    return ForkedWorker(self.log)

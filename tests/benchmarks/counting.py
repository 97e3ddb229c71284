"""Counts the work of a small run in forked ranks."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.comparison.pytest_plugin import INCONCLUSIVE_EXIT_CODE
from scaling.comparison.sides import copied_revision, find_commit
from tests.distributed.forking import FORK, begin_fork, fork_ranks
from tests.distributed.launching import RECIPES
from unitransformer.config import Compile, Precision, RunConfig, Strategy
from unitransformer.config import ParallelConfig as Parallel
from unitransformer.launch.devices import set_up_process
from unitransformer.step_counters import count_run

# Operators depend on the torch version and on the vector instructions of the processor.
TORCH = ".".join(torch.__version__.split(".")[:2])
BASELINES = Path(__file__).parent / "baselines"
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
PROCESSOR = "avx" if CAPABILITY in ("avx2", "avx512") else CAPABILITY
HERE = BASELINES / f"torch-{TORCH}-{PROCESSOR}"
COUNTERS = "*-*.json"  # recipe and strategy; instructions.json lies beside them

COUNT_ALL = [
    *("-m", "pytest", "tests/benchmarks/test_counters.py", "--update-baseline"),
    *("-q", "-k", "equal_their_baseline", "-p", "no:cacheprovider"),
]

Counted = dict[str, dict[str, int]]
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
TEXT = SMALL | {"num_classes": 50, "num_positions": 8}
SHAPE: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "gpt": TEXT,
    "vit": SMALL | {"image_size": 16, "patch_size": 8},
}


def has_counters(folder: Path) -> bool:
    """Whether a folder of baselines holds any counters, and not instructions alone."""
    return any(folder.glob(COUNTERS))


def small_config(
    recipe: str,
    strategy: Strategy,
    *,
    mode: Compile = "off",
    precision: Precision = "32-true",
) -> RunConfig:
    """A config with four samples per rank; `single` has one rank, other strategies two."""
    shape = SHAPE[recipe]
    if mode != "off":
        # The shape of other tests, so that compiled code is shared; one layer compiles faster.
        shape = shape | {"num_layers": 1 if strategy == "single" else 2}
        shape |= {} if recipe == "vit" else {"num_classes": 300, "num_positions": 16}
    return RunConfig(
        recipe=recipe,  # type: ignore[arg-type]
        size="reference",
        model=RECIPES[recipe].PRESET.model_config("reference", **shape),
        batch_size=4,
        parallel=Parallel(
            accelerator="cpu",
            devices=1 if strategy == "single" else 2,
            strategy=strategy,
            compile=mode,
            precision=precision,
        ),
    )


def count(config: RunConfig, folder: Path, *, fault: Callable[[], None] | None = None) -> Counted:
    """The counters of rank 0.

    Args:
        fault: called in every rank before anything else, to inject a fault.
    """
    parallel = config.parallel
    fork_ranks(
        *(_count, config, folder, fault),
        world_size=parallel.world_size,
        num_nodes=parallel.num_nodes,
    )
    counted: Counted = json.loads((folder / "0.json").read_text())
    return counted


def _count(
    variables: Mapping[str, str],
    config: RunConfig,
    folder: Path,
    fault: Callable[[], None] | None,
) -> None:
    begin_fork(variables)
    if fault is not None:
        fault()
    set_up_process(config.parallel, "cpu")
    path = folder / f"{variables.get('RANK', 0)}.json"
    path.write_text(json.dumps(count_run(config, run_dir=folder)))


@contextlib.contextmanager
def counted_revision(revision: str, repository: Path) -> Iterator[Path]:
    """Yields a folder of baselines as the code of a revision counts them here.

    Cases that it cannot count are missing there. Ends pytest without a verdict, in one line, if it
    can count none.
    """
    try:
        commit = find_commit(revision, repository)
        with copied_revision(commit, repository) as code:
            done = subprocess.run(
                [sys.executable, *COUNT_ALL],
                cwd=code,
                env={**os.environ, "PYTHONPATH": str(code)},
                capture_output=True,
                text=True,
            )
            folder = code / HERE.relative_to(repository)
            if not has_counters(folder):
                last = (done.stdout + done.stderr).strip().splitlines()[-1:]
                raise RuntimeError(f"{revision} cannot be counted: {' '.join(last)}")
            yield folder
    except (ValueError, RuntimeError) as error:
        reason = f"no baseline in {HERE.name}, and {error}; name another: BASE=REVISION"
        pytest.exit(reason, INCONCLUSIVE_EXIT_CODE)


@contextlib.contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Keeps cores busy with processes that spin."""
    others = [FORK.Process(target=_spin) for _ in range(num_processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _spin() -> None:
    while True:
        pass

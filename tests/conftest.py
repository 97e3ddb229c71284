"""Settings and fixtures of every test."""

import gc
import os

# Tiny models gain nothing from more threads, and are slower when processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiler processes forked from a process with threads can deadlock.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Asks NVML whether there is a GPU: asking CUDA would break it in the ranks that tests fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import unitransformer  # noqa: F401  (repairs the import of torchvision beside a CPU torch, before lightning)
from tests.processes import failure_in_fork

FAST = ("unit", "contracts")  # folders
SLOW = (  # files of these folders with tests that take long
    *("test_html_page.py", "test_notebooks.py", "test_readme_commands.py", "test_module.py"),
    *("test_compile_ledger.py", "test_study.py", "test_killed_sweeps.py", "test_command.py"),
    *("test_reader.py", "test_torchvision_import.py", "test_calibration.py", "test_corpus.py"),
    *("test_command_line.py", "test_first_hour.py"),
)
PROVE = "--whole-proof"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        PROVE,
        action="store_true",
        help="run the long form of every proof: every count 20 times, every random kill 50 times",
    )


def pytest_collection() -> None:
    gc.disable()


@pytest.hookimpl(trylast=True)  # once those without the marks that are asked for have gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives every worker of pytest-xdist as many tests, its slow ones first, then its fast ones.

    The many fast tests fill up the time until the last worker ends. Tests of long proofs run only
    when these are asked for.
    """
    if not config.getoption(PROVE):
        proofs = [item for item in items if item.get_closest_marker("proof")]
        config.hook.pytest_deselected(items=proofs)
        items[:] = [item for item in items if item not in proofs]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    tests = Path(__file__).parent
    places = [item.path.relative_to(tests) for item in items]
    pairs = list(zip(items, places, strict=True))
    # Two workers begin with SLURM, each with its own cluster: such tests often wait.
    jobs = [item for item, place in pairs if place == Path("slurm/test_jobs.py")]
    sweeps = [item for item, place in pairs if place.parts[0] == "slurm" and item not in jobs]
    first = [jobs, sweeps] if workers > 1 else [jobs + sweeps]
    others = [(item, is_short(place)) for item, place in pairs if place.parts[0] != "slurm"]
    num_short = sum(is_short for _, is_short in others)
    num_long = len(items) - num_short
    short, long = (
        iter([item for item, it_is in others if it_is == kind]) for kind in (True, False)
    )
    items.clear()
    for worker in range(workers):
        begins = first[worker] if worker < len(first) else []
        more, fast = (
            number * (worker + 1) // workers - number * worker // workers
            for number in (num_long, num_short)
        )
        items += [*begins, *islice(long, max(0, more - len(begins))), *islice(short, fast)]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that compiles in a fork.

    With torch 2.14 for CUDA, a process that has compiled can fork no more process that trains, and
    other tests fork such processes.
    """
    if pyfuncitem.get_closest_marker("compiles") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    if failure := failure_in_fork(lambda: pyfuncitem.obj(**arguments)):
        pytest.fail(failure, pytrace=False)
    return True


def is_short(path: Path) -> bool:
    return path.parts[0] in FAST and path.name not in SLOW


def pytest_collection_finish() -> None:
    """Exempts imported objects from garbage collection, which would scan them every time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps a launcher's variables, and those that a tested run sets, from the next test."""
    before = dict(os.environ)
    for name in ("UNITRANSFORMER_RUN_FOLDER", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def is_whole_proof(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a proof is asked for."""
    return bool(request.config.getoption(PROVE))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent

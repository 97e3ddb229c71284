"""A second process computes meanwhile, and never changes what is computed."""

import subprocess
import sys

import pytest

from unitransformer.launch.background import start_in_background

# Without torch, whose threads a fork would lose.
PROGRAM = """
import os, signal
from unitransformer.launch.background import start_in_background

caller = os.getpid()
wait = start_in_background({function})
assert wait is not None
print(wait())
"""


def run(function: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(function=function)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
@pytest.mark.parametrize(
    ("function", "printed"),
    [
        ("lambda: os.getpid() != caller", "True"),
        ("lambda: [1, 2.5, 'text']", "[1, 2.5, 'text']"),
        # A fork that is killed, as for its memory, leaves the work to its caller.
        ("lambda: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != caller else 7", "7"),
    ],
)
def test_the_value_arrives_from_a_fork(function: str, printed: str) -> None:
    done = run(function)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{printed}\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_an_error_is_raised_once_and_where_the_value_is_awaited() -> None:
    done = run("lambda: int('twelve')")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "invalid literal for int() with base 10: 'twelve'" in done.stderr


def test_a_process_with_torch_does_not_fork() -> None:
    import torch  # noqa: F401

    assert start_in_background(lambda: 1) is None

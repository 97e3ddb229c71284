"""Modules of ours asked in a process of their own, where they may import what this one must not."""

import os
import subprocess
import sys
from collections.abc import Sequence

from unitransformer.process_tree import die_with_parent, end_process


def run_module(module: str, arguments: Sequence[str], *, limit_s: float, asked: str = "") -> str:
    """What a module of ours prints; it and all it has started are ended after `limit_s`,
    and with the process that asks.

    Args:
        asked: what it reads from its standard input.

    Raises:
        ValueError: it says that it was asked for something wrong.
        RuntimeError: it failed, in its own words; or it took too long.
    """
    parent = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: die_with_parent(parent),
    )
    try:
        printed, errors = process.communicate(asked, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} has not ended after {limit_s:.0f} s") from None
    finally:
        if process.returncode is None:
            end_process(process)
    if process.returncode == 0:
        return printed
    last = (errors.strip().splitlines() or [f"it ended with {process.returncode} and no word"])[-1]
    told = last.removeprefix("error: ")
    raise ValueError(told) if process.returncode == 2 else RuntimeError(told)

"""What ran: versions of packages, of what drives the devices, and of this code."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from unitransformer.launch.devices import gpu_software
from unitransformer.machine.host import driver_versions

PACKAGES = ("torch", "lightning", "torchvision", "tokenizers", "numpy")
OPTIONAL_PACKAGES = ("deepspeed",)
CODE_FILES = ("*.py", "*.toml", "constraints.txt")  # what decides what a run does


def describe_versions(accelerator: str) -> dict[str, str]:
    """Versions of what may have to do with a run on this kind of device."""
    told = {"python": platform.python_version()}
    told |= {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told[name] = importlib.metadata.version(name)
    if accelerator == "cuda":
        told |= gpu_software() | driver_versions()
    return told


def describe_code() -> dict[str, Any]:
    """Commit of the code that ran, and whether it was changed since; None outside a checkout.

    What runs write beside the code, records above all, does not change it.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed inside another project
        return {"commit": None, "is_dirty": None}
    status = git("status", "--porcelain", "--", *(f":(top){each}" for each in CODE_FILES))
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_dirty": None if status is None else bool(status),
    }

"""Reads the versions of packages, GPU software and this code."""

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
CODE_FILES = ("*.py", "*.toml", "constraints*.txt")  # these affect runs


def describe_versions(accelerator: str) -> dict[str, str]:
    """Returns the versions that may affect a run on this kind of device."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if accelerator == "cuda":
        versions |= gpu_software() | driver_versions()
    return versions


def describe_code() -> dict[str, Any]:
    """Returns the commit of this code and whether it was changed since; None outside a checkout.

    Files that runs write into the checkout, such as records, do not count as changes.
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

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed in another checkout
        return {"commit": None, "is_dirty": None}
    status = git("status", "--porcelain", "--", *(f":(top){pattern}" for pattern in CODE_FILES))
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_dirty": None if status is None else bool(status),
    }

"""Names of checkpoint folders, such as `step-00000100`."""

import re


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{8,}", name) is not None

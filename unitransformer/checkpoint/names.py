"""Names of checkpoint folders, such as `step-00000100`, and how many of them a run keeps."""

import re

NUM_KEPT = 2  # so that one is left if the newest is damaged


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{8,}", name) is not None


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))

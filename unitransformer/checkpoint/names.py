"""Names of checkpoint folders, such as `step-00000100`."""

import re

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None

"""Resolves command lines of recipes without running them: `python -m recipes.service.plan`.

Each line of standard input is a question in JSON, each line of standard output its answer.

{"recipe": "gpt", "arguments": ["--devices", "2"]} is answered by {"config": {...}}, the complete
config on this machine, by {"misread": "..."} for invalid arguments, or by {"refused": "..."} for
valid ones that cannot run. With "check": {"devices": 8, "num_nodes": 2} the answer is the config on
GPUs of another machine, on so many unless the arguments say otherwise; this does not import torch.
With "any_nodes": true a run on several nodes is not refused: the asker starts its ranks.

{"machine": true} is answered by {"fingerprint": "...", "host": {...}}: the fingerprint under which
calibrations are stored, and the processor, memory and GPUs of this machine.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from recipes import bert, gpt, vit
from recipes.command_line import resolve
from recipes.options import build_config, parse
from unitransformer.config import to_dict

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}


def main() -> int:
    """Answers until standard input ends; returns the exit code."""
    for line in sys.stdin:
        question = json.loads(line)
        answer = _machine() if "machine" in question else _answer(**question)
        print(json.dumps(answer), flush=True)
    return 0


def _machine() -> dict[str, Any]:
    import torch

    from unitransformer.calibrate import describe_this_machine

    machine = describe_this_machine()
    kinds = {
        (name, torch.cuda.get_device_properties(index).total_memory)
        for index, name in enumerate(machine.gpus)
    }
    host = {
        "cpu": machine.cpu,
        "memory_gib": machine.memory_gib,
        "gpus": [{"name": name, "memory_bytes": size} for name, size in sorted(kinds)],
    }
    return {"fingerprint": machine.fingerprint, "host": host}


def _answer(
    recipe: str,
    arguments: Sequence[str],
    check: Mapping[str, int] | None = None,
    any_nodes: bool = False,
) -> dict[str, Any]:
    try:
        command = parse(PRESETS[recipe], arguments)
    except ValueError as error:
        return {"misread": str(error)}
    try:
        if check is not None:
            counts = {"devices": 1, **check}
            config = build_config(command, defaults=command.preset.cuda, **counts)
        else:
            from unitransformer.launch.environment import check_nodes

            config = resolve(command).config
            if not any_nodes:
                check_nodes(config.parallel, f"recipes.{recipe}", arguments)
        return {"config": to_dict(config)}
    except ValueError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    sys.exit(main())

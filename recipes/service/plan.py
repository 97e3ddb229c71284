"""What command lines would run, without running them: `python -m recipes.service.plan`.

A line of JSON on standard input asks: {"recipe": "gpt", "arguments": ["--devices", "2"]}. A line on
standard output answers: {"config": {...}} with every field of the run on this machine, or why there
would be none: {"refused": "..."} by what the options ask for, {"misread": "..."} by how they are
written. With "check": {"devices": 8, "num_nodes": 2} the machine is not looked at, and nothing
heavy imported: the config is what it would be on GPUs, so many where the options leave it open.
{"machine": true} is answered by {"fingerprint": "...", "host": {...}}: under which calibrations are
kept, and whose memory it is.
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
    """Answer until nothing more is asked; returns the exit code."""
    for line in sys.stdin:
        question = json.loads(line)
        told = _machine() if "machine" in question else _answer(**question)
        print(json.dumps(told), flush=True)
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
    recipe: str, arguments: Sequence[str], check: Mapping[str, int] | None = None
) -> dict[str, Any]:
    try:
        request = parse(PRESETS[recipe], arguments)
    except ValueError as error:
        return {"misread": str(error)}
    try:
        if check is not None:
            config = build_config(
                request,
                defaults=PRESETS[recipe].cuda,
                devices=check.get("devices", 1),
                num_nodes=check.get("num_nodes", 1),
            )
            return {"config": to_dict(config)}
        from unitransformer.launch.environment import check_nodes

        config = resolve(request).config
        check_nodes(config.parallel, f"recipes.{recipe}", arguments)
        return {"config": to_dict(config)}
    except ValueError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    sys.exit(main())

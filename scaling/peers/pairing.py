"""Measures two networks in turn: a process each, of which one trains while the other waits."""

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from unitransformer.launch.subprocess_module import open_module

WORKER = "unitransformer.peers.worker"
WARMUP_STEPS = 2  # the first allocates and compiles; the second says how long a step takes
MIN_BLOCK_S = 0.25  # of the faster network, so that the clock and a short pause weigh little
MAX_BLOCK_STEPS = 50
NUM_LOSSES = 5  # of the first steps, to be compared
ANSWER_LIMIT_S = 3600.0  # for compilation, and for one block

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]  # sends a request to a worker


class SideFailed(Exception):
    """A network of a pair could not be trained; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a pair has been measured enough: at the first of two limits."""

    rounds: int
    seconds: float | None = None  # since its processes began; None: no limit


def measure_pair(
    requests: Mapping[str, Mapping[str, Any]], accelerator: str, limits: Limits, *, seed: str
) -> dict[str, Any]:
    """Returns the raw measurements of both sides, as a record stores them.

    Where a network could not be built or trained, `failure` says why and there are no sides.

    Args:
        requests: the first request of each worker, of the sides "ours" and "peer".
        seed: of the order; give every launch of every comparison its own.

    Raises:
        RuntimeError: a worker does not even start.
    """
    deadline_s = None if limits.seconds is None else time.monotonic() + limits.seconds
    with ExitStack() as stack:  # both import at the same time
        sends = {
            side: stack.enter_context(open_module(WORKER, limit_s=ANSWER_LIMIT_S))
            for side in requests
        }
        about: dict[str, Any] = json.loads(sends["ours"](json.dumps({"about": accelerator})))
        asks = {side: _asker(side, send) for side, send in sends.items()}
        try:
            started = {side: asks[side](request) for side, request in requests.items()}
            turns = take_turns(asks, limits.rounds, deadline_s=deadline_s, seed=seed)
        except SideFailed as error:
            return about | {"failure": str(error)}
    for side, answer in started.items():
        turns["sides"][side] |= answer
    return about | turns | {"failure": None}


def take_turns(
    asks: Mapping[str, Ask],
    rounds: int,
    *,
    deadline_s: float | None = None,
    seed: str,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Trains blocks of equally many steps in turn; of each two rounds, a random one is reversed.

    So each side is first equally often, but for the last of an odd number of rounds. At least one
    round is measured; another begins only if it can end before the deadline.
    """
    sides = turn = list(asks)
    warmup = {side: [asks[side]({"steps": 1}) for _ in range(WARMUP_STEPS)] for side in sides}
    fastest_s = min(answers[-1]["wall_s"] for answers in warmup.values())
    steps = block_steps(fastest_s)
    order, blocks = random.Random(seed), list[dict[str, dict[str, Any]]]()
    first: list[str] = []
    while len(blocks) < rounds:
        begin_s = clock()
        turn = turn[::-1] if len(blocks) % 2 else order.sample(sides, len(sides))
        answers = {side: asks[side]({"steps": steps}) for side in turn}
        blocks.append(answers)
        first.append(turn[0])
        if deadline_s is not None and 2 * clock() - begin_s > deadline_s:
            break
    return {
        "steps_per_block": steps,
        "first": first,
        "sides": {
            side: _summarize(warmup[side], [answers[side] for answers in blocks]) for side in sides
        },
    }


def block_steps(step_s: float) -> int:
    """Returns the steps of a block, given the seconds of a step of the faster network."""
    return max(1, min(MAX_BLOCK_STEPS, round(MIN_BLOCK_S / max(step_s, 1e-6))))


def _summarize(
    warmup: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    losses = [loss for answer in (*warmup, *blocks) for loss in answer["losses"]]
    return {
        "wall_s": [block["wall_s"] for block in blocks],
        "processor_s": [block["processor_s"] for block in blocks],
        "peak_bytes": max(block["peak_bytes"] for block in blocks),
        "first_losses": losses[:NUM_LOSSES],
    }


def _asker(side: str, send: Callable[[str], str]) -> Ask:
    def ask(request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(send(json.dumps(request)))
        except RuntimeError as error:
            raise SideFailed(f"{side}: {error}") from error
        if "failure" in answer:
            raise SideFailed(f"{side}: {answer['failure']}")
        for loss in answer.get("losses", ()):
            if not math.isfinite(loss):
                raise SideFailed(f"{side}: a loss is {loss}: it does not train at this setting")
        return answer

    return ask

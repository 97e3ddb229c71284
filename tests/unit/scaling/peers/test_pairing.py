"""Tests how two networks take turns."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from scaling.peers.pairing import block_steps, take_turns


class Sides:
    """Two networks whose steps take known seconds on a clock of their own."""

    def __init__(self, **step_s: float) -> None:
        self.now_s, self.turns = 0.0, list[tuple[str, int]]()
        self.asks = {side: self._ask(side, seconds) for side, seconds in step_s.items()}

    def _ask(self, side: str, step_s: float) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        def ask(request: Mapping[str, Any]) -> dict[str, Any]:
            steps = request["steps"]
            self.turns.append((side, steps))
            self.now_s += steps * step_s
            return {
                "wall_s": steps * step_s,
                "processor_s": steps * step_s,
                "losses": [float(len(self.turns))] * steps,
                "peak_bytes": len(self.turns),
            }

        return ask

    def clock(self) -> float:
        return self.now_s


def test_each_round_has_one_block_of_equally_many_steps_of_each() -> None:
    sides = Sides(ours=0.1, peer=0.2)
    measured = take_turns(sides.asks, 8, seed=1, clock=sides.clock)
    assert measured["steps_per_block"] == 2  # 0.25 s of the faster one
    rounds = [sides.turns[i : i + 2] for i in range(4, 20, 2)]
    assert all(sorted(turn) == [("ours", 2), ("peer", 2)] for turn in rounds)
    assert measured["first"] == [turn[0][0] for turn in rounds]
    assert set(measured["first"]) == {"ours", "peer"}
    assert measured["sides"]["peer"]["wall_s"] == [0.4] * 8
    # Two warm-up steps, then the first blocks.
    assert measured["sides"]["ours"]["first_losses"][:2] == [1.0, 2.0]
    assert len(measured["sides"]["ours"]["first_losses"]) == 5


def test_no_round_begins_that_would_end_after_the_deadline() -> None:
    sides = Sides(ours=1.0, peer=1.0)
    measured = take_turns(sides.asks, 100, deadline_s=11.0, seed=1, clock=sides.clock)
    assert len(measured["first"]) == 3  # warm-up until 4 s, then rounds of 2 s
    assert sides.now_s <= 11.0


def test_one_round_is_measured_whatever_the_deadline() -> None:
    sides = Sides(ours=1.0, peer=1.0)
    assert len(take_turns(sides.asks, 9, deadline_s=0.0, seed=1, clock=sides.clock)["first"]) == 1


@pytest.mark.parametrize(("step_s", "steps"), [(8.0, 1), (0.1, 2), (1e-9, 50)])
def test_a_block_has_enough_steps_for_the_clock(step_s: float, steps: int) -> None:
    assert block_steps(step_s) == steps

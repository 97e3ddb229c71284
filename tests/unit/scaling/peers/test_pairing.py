"""Tests how two networks take turns."""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from scaling.peers import pairing
from scaling.peers.pairing import Limits, block_steps, take_turns


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
    measured = take_turns(sides.asks, 8, seed="1", clock=sides.clock)
    assert measured["steps_per_block"] == 2  # 0.25 s of the faster one
    rounds = [sides.turns[i : i + 2] for i in range(4, 20, 2)]
    assert all(sorted(turn) == [("ours", 2), ("peer", 2)] for turn in rounds)
    assert measured["first"] == [turn[0][0] for turn in rounds]
    assert measured["first"].count("ours") == 4
    assert measured["sides"]["peer"]["wall_s"] == [0.4] * 8
    # Two warm-up steps, then the first blocks.
    assert measured["sides"]["ours"]["first_losses"][:2] == [1.0, 2.0]
    assert len(measured["sides"]["ours"]["first_losses"]) == 5


def test_no_round_begins_that_would_end_after_the_deadline() -> None:
    sides = Sides(ours=1.0, peer=1.0)
    measured = take_turns(sides.asks, 100, deadline_s=11.0, seed="1", clock=sides.clock)
    assert len(measured["first"]) == 3  # warm-up until 4 s, then rounds of 2 s
    assert sides.now_s <= 11.0


def test_one_round_is_measured_whatever_the_deadline() -> None:
    sides = Sides(ours=1.0, peer=1.0)
    assert len(take_turns(sides.asks, 9, deadline_s=0.0, seed="1", clock=sides.clock)["first"]) == 1


@pytest.mark.parametrize(("step_s", "steps"), [(8.0, 1), (0.1, 2), (1e-9, 50)])
def test_a_block_has_enough_steps_for_the_clock(step_s: float, steps: int) -> None:
    assert block_steps(step_s) == steps


def test_each_comparison_has_its_own_balanced_order() -> None:
    orders = set()
    for number in range(4):
        sides = Sides(ours=0.1, peer=0.2)
        first = take_turns(sides.asks, 20, seed=f"{number}", clock=sides.clock)["first"]
        assert [first[i : i + 2].count("ours") for i in range(0, 20, 2)] == [1] * 10
        orders.add(tuple(first))
    assert len(orders) == 4


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails_its_side_alone(
    loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = Sides(ours=0.1, peer=0.2)
    answered = {"num": 0}

    def peer(request: Mapping[str, Any]) -> dict[str, Any]:
        answered["num"] += 1
        answer = sides.asks["peer"](request)
        return answer | ({"losses": [5.0, loss]} if answered["num"] == 4 else {})

    def worker(module: str, *, limit_s: float) -> Any:
        opened["num"] += 1
        ask = sides.asks["ours"] if opened["num"] == 1 else peer

        def send(text: str) -> str:
            request = json.loads(text)
            return json.dumps(ask(request) if "steps" in request else {"base_bytes": 1})

        return contextlib.nullcontext(send)

    opened = {"num": 0}
    monkeypatch.setattr(pairing, "open_module", worker)
    measured = pairing.measure_pair(
        {"ours": {"peer": "ours"}, "peer": {"peer": "plain"}}, "cpu", Limits(rounds=8), seed="1"
    )
    assert measured["failure"] == f"peer: a loss is {loss}: it does not train at this setting"
    assert "sides" not in measured

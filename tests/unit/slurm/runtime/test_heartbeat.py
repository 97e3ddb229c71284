"""Tests heartbeats: which silent nodes are suspected of failure."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from slurm.runtime.node_health import CHECKS, ENDED, INTERVAL_S, SILENT_S, Heartbeats, beat
from slurm.runtime.rank import sends_heartbeat

SOON = max(CHECKS, int(SILENT_S / INTERVAL_S)) + 1  # checks until a node is suspected


def check(folder: Path, *, alive: Mapping[str, range], checks: int) -> list[list[str]]:
    """The nodes suspected at each check; `alive` gives the checks at which a node is alive."""
    heartbeats = Heartbeats(folder=folder, nodes=list(alive))
    suspected = []
    for number in range(checks):
        for name, lives in alive.items():
            if number in lives:
                beat(folder, name, str(number))
        suspected.append(heartbeats.suspects(number * INTERVAL_S))
    return suspected


def test_a_node_that_falls_silent_is_suspected_within_ten_seconds(tmp_path: Path) -> None:
    suspected = check(tmp_path, alive={"node1": range(99), "node2": range(10)}, checks=20)
    first = next(number for number, suspects in enumerate(suspected) if suspects)
    assert suspected[first] == ["node2"]
    assert SILENT_S <= (first - 9) * INTERVAL_S <= 10.0


def test_no_node_is_suspected_while_no_heartbeat_changes(tmp_path: Path) -> None:
    suspected = check(tmp_path, alive={"node1": range(10), "node2": range(10)}, checks=40)
    assert suspected == [[]] * 40


def test_a_node_that_dies_after_the_others_have_ended_is_suspected(tmp_path: Path) -> None:
    heartbeats = Heartbeats(folder=tmp_path, nodes=["node1", "node2"])
    beat(tmp_path, "node2", "0")
    suspected = []
    for number in range(2 * SOON):
        beat(tmp_path, "node1", str(number) if number < 2 else ENDED)
        suspected.append(heartbeats.suspects(number * INTERVAL_S))
    assert suspected == [[]] * (SOON - 1) + [["node2"]] * (SOON + 1)


def test_a_file_system_outage_raises_no_suspicion_afterwards(tmp_path: Path) -> None:
    """Checks hang as well: time has passed, but there were too few checks."""
    heartbeats = Heartbeats(folder=tmp_path, nodes=["node1", "node2"])
    for node in heartbeats.nodes:
        beat(tmp_path, node, "0")
    assert heartbeats.suspects(0.0) == []
    beat(tmp_path, "node1", "1")  # the other has not written again yet
    assert heartbeats.suspects(60.0) == []
    beat(tmp_path, "node1", "2")
    assert heartbeats.suspects(62.0) == []


def test_a_node_without_a_first_heartbeat_is_not_suspected(tmp_path: Path) -> None:
    suspected = check(tmp_path, alive={"node1": range(99), "node2": range(0)}, checks=20)
    assert suspected == [[]] * 20


def test_a_node_that_answered_a_probe_is_suspected_no_sooner(tmp_path: Path) -> None:
    heartbeats = Heartbeats(folder=tmp_path, nodes=["node1", "node2"])
    beat(tmp_path, "node2", "0")
    suspected = []
    for number in range(3 * SOON):
        beat(tmp_path, "node1", str(number))
        if suspects := heartbeats.suspects(number * INTERVAL_S):
            assert suspects == ["node2"]
            heartbeats.forget(suspects)
            suspected.append(number)
    assert suspected == [SOON - 1, 2 * SOON - 1, 3 * SOON - 1]


@pytest.mark.parametrize(("nodes", "local", "sends"), [(1, 0, False), (2, 0, True), (2, 1, False)])
def test_the_first_task_of_each_of_several_nodes_sends_its_heartbeat(
    nodes: int, local: int, sends: bool
) -> None:
    variables = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_LOCALID": str(local)}
    assert sends_heartbeat(variables) == sends

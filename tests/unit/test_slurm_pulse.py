"""Tests heartbeats: which silent nodes are suspected of failure."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from slurm.runtime.heartbeat import EACH_S, JOB, LOOKS, SILENT_S, Pulse
from slurm.runtime.rank import Watchman

SOON = max(LOOKS, int(SILENT_S / EACH_S)) + 1  # checks until a node is suspected


def look(folder: Path, *, alive: Mapping[str, range], looks: int) -> list[list[str]]:
    """The nodes suspected at each check; `alive` gives the checks at which a node is alive."""
    watcher = Pulse(folder=folder, own=JOB, others=list(alive))
    nodes = {name: Pulse(folder=folder, own=name, others=[]) for name in alive}
    found = []
    for number in range(looks):
        for name, pulse in nodes.items():
            if number in alive[name]:
                pulse.beat(number * EACH_S)
        found.append(watcher.beat(number * EACH_S))
    return found


def test_a_node_that_falls_silent_is_suspected_within_ten_seconds(tmp_path: Path) -> None:
    found = look(tmp_path, alive={"node1": range(99), "node2": range(10)}, looks=20)
    first = next(number for number, suspects in enumerate(found) if suspects)
    assert found[first] == ["node2"]
    assert SILENT_S <= (first - 9) * EACH_S <= 10.0


def test_no_node_is_suspected_while_no_heartbeat_changes(tmp_path: Path) -> None:
    found = look(tmp_path, alive={"node1": range(10), "node2": range(10)}, looks=40)
    assert found == [[]] * 40


def test_a_file_system_outage_raises_no_suspicion_afterwards(tmp_path: Path) -> None:
    """Checks hang as well: time has passed, but there were too few checks."""
    watcher = Pulse(folder=tmp_path, own=JOB, others=["node1", "node2"])
    nodes = [Pulse(folder=tmp_path, own=name, others=[]) for name in watcher.others]
    for pulse in (*nodes, watcher):
        pulse.beat(0.0)
    nodes[0].beat(60.0)  # the other node has not written again yet
    assert watcher.beat(60.0) == []
    nodes[0].beat(62.0)
    assert watcher.beat(62.0) == []


def test_a_node_without_a_first_heartbeat_is_not_suspected(tmp_path: Path) -> None:
    found = look(tmp_path, alive={"node1": range(99), "node2": range(0)}, looks=20)
    assert found == [[]] * 20


def test_a_node_that_answered_a_probe_is_suspected_no_sooner(tmp_path: Path) -> None:
    watcher = Pulse(folder=tmp_path, own=JOB, others=["node1", "node2"])
    node1, node2 = (Pulse(folder=tmp_path, own=name, others=[]) for name in watcher.others)
    node2.beat(0.0)
    found = []
    for number in range(3 * SOON):
        node1.beat(number * EACH_S)
        if suspects := watcher.beat(number * EACH_S):
            assert suspects == ["node2"]
            watcher.clear(suspects)
            found.append(number)
    assert found == [SOON - 1, 2 * SOON - 1, 3 * SOON - 1]


@pytest.mark.parametrize(
    ("nodes", "local", "node", "is_needed", "looks_at"),
    [
        (1, 0, 0, False, []),
        (2, 0, 0, True, []),  # it dies with the job
        (2, 0, 1, True, ["node2", JOB]),
        (2, 1, 1, False, ["node2", JOB]),
    ],
)
def test_one_task_of_each_node_but_the_first_watches_the_job(
    nodes: int, local: int, node: int, is_needed: bool, looks_at: list[str], tmp_path: Path
) -> None:
    variables = {
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": f"node{node + 1}",
    }
    watchman = Watchman(tmp_path, variables)
    assert watchman.is_needed == is_needed
    assert watchman._pulse.others == looks_at

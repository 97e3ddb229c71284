"""Tests how the report formats devices, nodes and networks of a run."""

from dataclasses import replace
from typing import Any

import pytest

from scaling.report.run_formatting import device_count, network
from tests.builders.records import make_config, make_record, make_run
from tests.builders.sweeps import make_record_of
from unitransformer.config import ParallelConfig

LOOPBACK = {"backend": "gloo", "interface": "lo", "interface_from": "MASTER_ADDR"}
INFINIBAND = {"backend": "nccl", "interface": "ib0", "interface_from": "NCCL_SOCKET_IFNAME"}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (None, ""),  # an older record
        ([None, None], ""),
        ("anything", ""),
        ([LOOPBACK, LOOPBACK], "gloo, interface lo (to the first rank)"),
        ([LOOPBACK, LOOPBACK | {"interface": "eth0"}], "gloo, interface eth0 (to the first rank)"),
        ([INFINIBAND | {"transport": "IB"}, None], "nccl over IB, interface ib0"),
        (
            [INFINIBAND, INFINIBAND | {"interface": "ib1"}],
            "nccl, interface ib0; nccl, interface ib1",
        ),
    ],
)
def test_the_network_of_a_run_is_that_of_its_ranks_as_far_as_it_was_read(
    ranks: Any, expected: str
) -> None:
    parallel = ParallelConfig(accelerator="cpu", strategy="ddp", devices=1, num_nodes=2)
    config = replace(make_config(), parallel=parallel)
    assert network(make_run(make_record_of(config) | {"network": ranks})) == expected
    assert network(make_run(make_record(network=ranks))) == ""  # of one device


def test_devices_on_several_nodes_are_counted_with_their_nodes() -> None:
    config = make_config()
    assert device_count(config) == "1"
    parallel = replace(config.parallel, strategy="ddp", devices=8, num_nodes=4)
    assert device_count(replace(config, parallel=parallel)) == "32 on 4 nodes"

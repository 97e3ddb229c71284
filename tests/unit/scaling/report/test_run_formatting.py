"""Tests how the report formats devices, nodes and networks of a run."""

from dataclasses import replace
from typing import Any

import pytest

from scaling.report.run_formatting import (
    command,
    device_count,
    explain_flags,
    flag_cell,
    flags,
    network,
    short_flags,
    without_folder,
)
from tests.builders.records import make_config, make_record, make_run
from tests.builders.sweeps import make_record_of
from unitransformer.config import ParallelConfig
from unitransformer.costs.mfu import Ceiling, build_mfu_report

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


def test_shares_of_the_ceiling_become_one_short_flag_with_an_explanation() -> None:
    above = "above the ceiling measured on this machine"
    shares = [{"6n": "1.104", "palm": "1.118"}, {"6n": "1.398", "palm": "1.118"}]
    runs = [
        make_run(
            make_record(
                flags=[
                    "the GPU was shared",
                    *(f"{name}: {above} ({n} of it)" for name, n in s.items()),
                ]
            )
        )
        for s in shares
    ]
    expected = ["6n 1.10 to 1.40, palm 1.12 x ceiling", "the GPU was shared"]
    assert short_flags(runs) == expected
    assert flag_cell(runs) == "; ".join(expected)
    assert "`6n`" in explain_flags([{"flags": flag_cell(runs)}])
    assert explain_flags([{"flags": "the GPU was shared"}]) == ""
    assert short_flags(runs[:0]) == []


@pytest.mark.parametrize(
    ("conventions", "text"),
    [
        (
            {"6n": "1.670"},
            "`6n` 1.67 times the measured ceiling: more is counted than was computed",
        ),
        (
            {"6n": "1.2", "matmul": "1.1"},
            "`6n` 1.20 times and with `matmul` 1.10 times the measured "
            "ceiling: the ceiling is too low",
        ),
    ],
)
def test_a_share_above_the_ceiling_says_what_it_means(
    conventions: dict[str, str], text: str
) -> None:
    above = "above the ceiling measured on this machine"
    found = [f"{name}: {above} ({n} of it)" for name, n in conventions.items()]
    run = make_run(make_record(flags=["the GPU was shared", *found]))
    assert flags([run]) == f"counted with {text}; the GPU was shared"


def test_the_flag_that_mfu_writes_is_shortened() -> None:
    (row,) = build_mfu_report(
        {"6n": 4e6},
        units_per_s=500.0,
        num_devices=1,
        device_name="cpu",
        precision="32-true",
        ceiling=Ceiling(dtype="float32", flops_per_s=1e9),
    )
    assert short_flags([make_run(make_record(flags=[f"6n: {row.flag}"]))]) == ["6n 2.00 x ceiling"]


@pytest.mark.parametrize(
    "out", [" --out runs/a", " --out=runs/a", " --out 'my runs'", " --out 'it'\"'\"'s mine'", ""]
)
def test_a_command_is_shown_without_the_folder_of_its_record(out: str) -> None:
    run = make_run(make_record(command=f"python -m recipes.gpt{out} --seed 3"))
    assert command(run) == "python -m recipes.gpt --seed 3"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("gpt --data 'x --out y'", "gpt --data 'x --out y'"),
        ("parity --out x -- gpt --out y", "parity -- gpt --out y"),
        ("gpt --data 'without an end", "gpt --data 'without an end"),
    ],
)
def test_only_the_folder_of_the_record_is_left_out_of_a_command(typed: str, shown: str) -> None:
    assert without_folder(typed) == shown

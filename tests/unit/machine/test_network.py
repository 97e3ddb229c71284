"""Tests the description of the network over which ranks communicate."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed

from unitransformer.machine import network


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (name for names in network.SETTINGS.values() for name in names):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("cpu:gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_run_without_a_process_group_has_no_network() -> None:
    assert network.describe_network("cpu") is None


def test_ranks_of_one_machine_use_its_loopback(group: None) -> None:
    assert network.describe_network("cpu") == {
        "backend": "gloo",
        "interface": "lo",
        "interface_from": "MASTER_ADDR",
        "transport": None,
        "settings": {},
    }


def test_the_setting_of_the_backend_names_the_interface(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    described = network.describe_network("cpu")
    assert described is not None
    assert (described["interface"], described["interface_from"]) == ("ib0", "GLOO_SOCKET_IFNAME")
    assert described["settings"] == {"GLOO_SOCKET_IFNAME": "ib0"}


def test_the_interface_to_another_machine_is_one_of_this_machine() -> None:
    names = [None, *(name for _, name in socket.if_nameindex())]
    assert network.find_interface("192.0.2.77") in names
    assert network.find_interface("no such host") is None


def test_the_transport_is_what_nccl_says_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert network.find_transport() is None
    monkeypatch.setenv("NCCL_DEBUG_FILE", str(tmp_path / "nccl.%h.%p"))
    path = tmp_path / f"nccl.{socket.gethostname()}.{os.getpid()}"
    path.write_text(
        "n1:7:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB ib0:10.0.0.1<0>\n"
        "n1:7:7 [0] NCCL INFO Using network IB\n"
    )
    assert network.find_transport() == "IB"

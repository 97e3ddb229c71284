"""Describes the network over which the ranks of a run communicate, as far as it can be read."""

import contextlib
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

import torch.distributed

from unitransformer.files import read_if_there

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Variables that choose the network, by backend; the first names its interfaces.
SETTINGS = {
    "gloo": ("GLOO_SOCKET_IFNAME",),
    "nccl": (
        *("NCCL_SOCKET_IFNAME", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_IB_HCA", "NCCL_IB_DISABLE"),
        *("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_CROSS_NIC", "NCCL_NET_GDR_LEVEL"),
    ),
}
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def describe_network(device: str) -> dict[str, Any] | None:
    """Returns how this rank communicates; None without a process group.

    `backend` is nccl or gloo. `interface` is what the setting of the backend names; without it, the
    interface on the way to the first rank, which gloo and NCCL need not use. `interface_from` names
    the variable that it follows from. `transport` is the network that NCCL reports, such as IB or
    Socket, in the file NCCL_DEBUG_FILE; None without one. `settings` are the variables that choose
    the network.

    Args:
        device: "cpu" or "cuda".
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    config = torch.distributed.get_backend_config()  # such as cpu:gloo,cuda:nccl
    backend = dict(pair.split(":") for pair in config.split(",")).get(device, config)
    names = SETTINGS.get(backend, ())
    # A plugin may be given by its path, which is nobody else's business.
    settings = {name: Path(os.environ[name]).name for name in names if os.environ.get(name)}
    source = names[0] if names and names[0] in settings else "MASTER_ADDR"
    return {
        "backend": backend,
        "interface": settings.get(source) or find_interface(os.environ.get("MASTER_ADDR", "")),
        "interface_from": source,
        "transport": find_transport() if backend == "nccl" else None,
        "settings": settings,
    }


def find_interface(host: str) -> str | None:
    """Returns the interface of this machine on the way to `host`; None if it is unknown."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address = probe.getsockname()[0]
        if address.startswith("127."):
            return "lo"
        for _, name in socket.if_nameindex():
            if _address_of(name, probe) == address:
                return name
    return None


def _address_of(interface: str, opened: socket.socket) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with contextlib.suppress(OSError, AttributeError):
        answer = fcntl.ioctl(opened.fileno(), SIOCGIFADDR, request)
        return socket.inet_ntoa(answer[20:24])
    return None


def find_transport() -> str | None:
    """Returns the network that NCCL says it uses, in the file to which it writes debug lines.

    NCCL names the file by NCCL_DEBUG_FILE, in which %h is the host and %p the process.
    """
    path = os.environ.get("NCCL_DEBUG_FILE", "")
    path = path.replace("%h", socket.gethostname()).replace("%p", str(os.getpid()))
    found = re.findall(r"Using network (\S+)", read_if_there(Path(path))) if path else []
    return found[-1] if found else None

"""Reads what a prediction needs to know of a machine: devices, memory, peaks and links.

A hardware file is TOML. Each group states its figures as text with a unit, and their sources:
title, date and address, or "assumption: ..." for a figure that nobody publishes:

    gpu = "H100 SXM"            # a name of unitransformer/costs/gpus.py, which has peaks and links
    devices_per_node = 8

    [memory]
    size = "80 GB"              # of one device
    context = "1 GiB"           # of it, what driver, libraries and communicators take
    source = ["size: Example 80 GB data sheet, 2026-01, https://...", "assumption: the context"]

    [intra_node]                # between the devices of a node; so is [inter_node] between nodes
    latency = "3.4 us"          # of one step of a ring
    bandwidth = "450 GB/s"      # of one device in one direction; by default half of the GPU's link
    source = "Example link manual, 2026-01, https://..."    # one text, or a list

A GPU that is not in the table also needs [peaks], such as `bfloat16 = "989 TFLOP/s"`, with
`memory_bandwidth = "3.35 TB/s"` and a source. [price] with `per_device_hour` in USD is optional.
"""

import errno
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaling.paths import why_missing
from unitransformer.cli import suggest
from unitransformer.costs.gpus import GPUS, Gpu, find_gpu
from unitransformer.machine.alpha_beta import Collective
from unitransformer.machine.calibration import Calibration
from unitransformer.machine.calibration_store import data_folder, read_calibration
from unitransformer.machine.host import Machine, describe_host, describe_machine

FOLDER = Path(__file__).with_name("hardware")
THIS_MACHINE = "this-machine"

_SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BYTES = {f"{prefix}B": scale for prefix, scale in _SI.items()}
_BYTES |= {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
_RATES = {f"{unit}/s": scale for unit, scale in _BYTES.items()}
_RATES |= {f"{prefix}bit/s": scale / 8 for prefix, scale in _SI.items()}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_FLOPS = {f"{prefix}FLOP/s": scale for prefix, scale in _SI.items()}
_DOLLARS = {"USD": 1.0}
# No device of today comes near these ends; beyond them a unit is wrong.
_PLAUSIBLE = {
    "memory.size": ("1 GB", "10 TB"),
    "memory.context": ("0 GB", "100 GB"),
    "peaks": ("100 GFLOP/s", "100 PFLOP/s"),
    "peaks.memory_bandwidth": ("1 GB/s", "100 TB/s"),
    "intra_node.latency": ("10 ns", "10 ms"),
    "inter_node.latency": ("10 ns", "10 ms"),
    "intra_node.bandwidth": ("10 MB/s", "10 TB/s"),
    "inter_node.bandwidth": ("10 MB/s", "1 TB/s"),
    "price.per_device_hour": ("0.001 USD", "1000 USD"),
}
MOST_PER_NODE = 1024


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one device sends: seconds per step of a ring, and bytes per second one way."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of node, of which a job has one or more."""

    name: str
    gpu: str | None  # its name in `unitransformer.costs.gpus`; None: a CPU, or not in the table
    devices_per_node: int
    memory_bytes: int  # of one device
    context_bytes: int  # of `memory_bytes`, taken before the first tensor
    peak_flops: Mapping[str, float]  # dtype -> dense FLOP/s of one device
    memory_bytes_per_s: float
    intra_node: Link
    inter_node: Link
    price_per_device_hour: float | None = None  # USD
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)  # group -> where it is from
    # Of a machine that was calibrated: fitted by collective, with `devices_per_node` ranks.
    collectives: Mapping[Collective, Link] = field(default_factory=dict)
    is_measured: bool = False  # peaks and links were reached in a calibration, not in data sheets

    @property
    def is_cpu(self) -> bool:
        return self.name == THIS_MACHINE and self.gpu is None

    def shared_by(self, num_ranks: int) -> "Hardware":
        """Returns what each of so many ranks of a node has: of a CPU more, the fewer there are.

        A calibration measures all its ranks at once. Fewer of them have as many threads and as much
        bandwidth and memory together.
        """
        if not self.is_cpu or num_ranks == self.devices_per_node:
            return self
        factor = self.devices_per_node / num_ranks
        return replace(
            self,
            devices_per_node=num_ranks,
            memory_bytes=int(factor * self.memory_bytes),
            peak_flops={dtype: factor * peak for dtype, peak in self.peak_flops.items()},
            memory_bytes_per_s=factor * self.memory_bytes_per_s,
        )


def list_hardware() -> list[str]:
    """Returns the names of all hardware files, and of this machine."""
    return [*sorted(path.stem for path in FOLDER.glob("*.toml")), THIS_MACHINE]


def load_hardware(name_or_path: str) -> Hardware:
    """Returns the hardware of a name in `list_hardware`, or of a file.

    Raises:
        ValueError: the name is unknown; a field of the file is missing, unknown, not positive or
            has the wrong unit; or this machine was not calibrated.
    """
    if name_or_path == THIS_MACHINE:
        return _from_calibration()
    path = Path(name_or_path)
    if path.suffix != ".toml" and "/" not in name_or_path:
        path = FOLDER / f"{name_or_path}.toml"
        if name_or_path not in list_hardware():
            # "h100" is closest to all names that hold it.
            near = [name for name in list_hardware() if name_or_path.lower() in name]
            hint = suggest(name_or_path, list_hardware())
            if name_or_path and near:
                hint = f"did you mean {' or '.join(near)}?"
            raise ValueError(f"hardware {name_or_path} is unknown; {hint}")
    return _File(path, _read_toml(path)).read()


def _read_toml(path: Path) -> dict[str, Any]:
    """Returns the values of a file; raises ValueError with what is wrong and the fix."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"hardware {path} is not text in UTF-8; save it as UTF-8") from error
    except OSError as error:
        is_missing = error.errno in (errno.ENOENT, errno.ELOOP)
        why = why_missing(path) if is_missing else f"cannot be read ({error.strerror})"
        raise ValueError(
            f"hardware {path} {why}; give a .toml file, or one of {', '.join(list_hardware())}"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"hardware {path} is not TOML{_place(str(error), text)}") from error


def _place(problem: str, text: str) -> str:
    """Returns the line of a TOML error, and the fix.

    tomllib calls a field that is given twice one that it cannot overwrite or declare.
    """
    found = re.search(r"at line (\d+)", problem)
    number = int(found[1]) if found else len(text.splitlines())  # "at end of document"
    line = text.split("\n")[number - 1].strip() if text else ""
    fix = "correct it"
    if re.search("overwrite|twice|already", problem):
        fix = "it, or its group, is given twice: leave one out"
    return f": line {number} is {line!r}; {fix}"


@dataclass(frozen=True)
class _File:
    """The values of a hardware file, whose errors name the file and the field."""

    path: Path
    values: Mapping[str, Any]

    def read(self) -> Hardware:
        if self.path.stem == THIS_MACHINE:
            raise ValueError(f"hardware {self.path} has the name of this machine; rename the file")
        known = ("gpu", "devices_per_node", "memory", "peaks", "intra_node", "inter_node", "price")
        self._check_names("", self.values, known)
        gpu = self._gpu()
        peaks, bandwidth = self._peaks(gpu)
        self._group("memory", ("size", "context", "source"))
        memory, context = (
            self._quantity("memory.size", _BYTES),
            self._quantity("memory.context", _BYTES),
        )
        if context >= memory:
            size = self._text("memory.size")
            raise self._error("memory.context", f"it must be less than memory.size, {size}")
        sources = {
            group: self._texts(f"{group}.source") for group in self.values if group in known[2:]
        }
        if gpu is not None:
            sources = {"gpu": [f"peaks and link: data sheet of {gpu.name}, {gpu.source}"]} | sources
        return Hardware(
            name=self.path.stem,
            gpu=None if gpu is None else gpu.name,
            devices_per_node=self._count("devices_per_node"),
            memory_bytes=int(memory),
            context_bytes=int(context),
            peak_flops=peaks,
            memory_bytes_per_s=bandwidth,
            intra_node=self._link("intra_node", None if gpu is None else gpu.link_bytes_per_s / 2),
            inter_node=self._link("inter_node", None),
            price_per_device_hour=self._price(),
            sources=sources,
        )

    def _gpu(self) -> Gpu | None:
        name = self._text("gpu")
        gpu = next((gpu for gpu in GPUS if gpu.name == name), None)
        if gpu is None and "peaks" not in self.values:
            hint = suggest(name, [gpu.name for gpu in GPUS])
            raise self._error("gpu", f"it has no data sheet here; give [peaks], or: {hint}")
        return gpu

    def _peaks(self, gpu: Gpu | None) -> tuple[Mapping[str, float], float]:
        """Returns the dense FLOP/s by dtype, and the bandwidth of the memory."""
        if "peaks" not in self.values:
            assert gpu is not None
            peaks = {str(dtype): peak for dtype, peak in gpu.dense_flops_per_s.items()}
            return peaks, gpu.memory_bytes_per_s
        dtypes = ("float32", "tf32", "float16", "bfloat16", "fp8")
        group = self._group("peaks", (*dtypes, "memory_bandwidth", "source"))
        peaks = {name: self._quantity(f"peaks.{name}", _FLOPS) for name in dtypes if name in group}
        if not peaks:
            raise self._error("peaks", f"it needs at least one of {', '.join(dtypes)}")
        return peaks, self._quantity("peaks.memory_bandwidth", _RATES)

    def _link(self, name: str, bytes_per_s: float | None) -> Link:
        group = self._group(name, ("latency", "bandwidth", "source"))
        if "bandwidth" in group or bytes_per_s is None:
            bytes_per_s = self._quantity(f"{name}.bandwidth", _RATES)
        return Link(latency_s=self._quantity(f"{name}.latency", _SECONDS), bytes_per_s=bytes_per_s)

    def _price(self) -> float | None:
        if "price" not in self.values:
            return None
        self._group("price", ("per_device_hour", "source"))
        return self._quantity("price.per_device_hour", _DOLLARS)

    def _group(self, name: str, known: Sequence[str]) -> Mapping[str, Any]:
        group = self._value(name)
        if not isinstance(group, dict):
            raise self._error(name, f"it must be a group, [{name}]")
        self._check_names(f"{name}.", group, known)
        return group

    def _check_names(self, prefix: str, group: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in group:
            if name not in known:
                raise ValueError(
                    f"{self.path}: {prefix}{name} is not a field; {suggest(name, known)}"
                )

    def _value(self, name: str) -> Any:
        value: Any = self.values
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"{self.path}: {name} is missing; a hardware file needs it")
            value = value[part]
        return value

    def _text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self._error(name, "it must be a line of text")
        return value

    def _texts(self, name: str) -> list[str]:
        value = self._value(name)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise self._error(name, "it must be text, or a list of texts")
        return texts

    def _count(self, name: str) -> int:
        value = self._value(name)
        if type(value) is not int or not 1 <= value <= MOST_PER_NODE:
            raise self._error(name, f"it must be an integer from 1 to {MOST_PER_NODE}")
        return value

    def _quantity(self, name: str, units: Mapping[str, float]) -> float:
        """Returns a quantity such as "80 GB" in the basic unit, if a device can have it."""
        value = self._value(name)
        text = value if isinstance(value, str) and value.isascii() and "_" not in value else ""
        number, _, unit = text.partition(" ")
        example = next(u for u in ("GB", "GB/s", "us", "TFLOP/s", "USD") if u in units)
        try:
            amount = float(number) * units[unit]
        except (ValueError, KeyError):
            raise self._error(
                name, f'it must be a number and a unit, as in "8 {example}"'
            ) from None
        ends = _PLAUSIBLE.get(name) or _PLAUSIBLE[name.partition(".")[0]]
        low, high = (float(end.split()[0]) * units[end.split()[1]] for end in ends)
        if not low <= amount <= high:  # nor is nan
            raise self._error(name, f"it must be {ends[0]} to {ends[1]}; check number and unit")
        return amount

    def _error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {name} is {self._value(name)!r}; {problem}")


def _from_calibration() -> Hardware:
    """Returns this machine by its newest calibration, with as many devices as that had ranks.

    One of several ranks is preferred, because it has collectives.
    """
    host = describe_machine()
    found = [read_calibration(path) for path in sorted(data_folder().glob("*/*.json"))]
    # GPUs have no name here: only torch and the driver know them.
    here = [c for c in found if _without_gpus(c.machine) == _without_gpus(host)]
    chosen = max(here, key=lambda c: (c.num_ranks > 1, c.made_at), default=None)
    if chosen is None:
        raise ValueError(
            f"hardware {THIS_MACHINE} was not calibrated; run python -m scaling calibrate "
            "--devices 2 first"
        )
    return from_calibration(chosen, describe_host()["memory_bytes"])


def _without_gpus(machine: Machine) -> Machine:
    return replace(machine, gpus=(), software={})


def from_calibration(calibration: Calibration, host_bytes: int | None) -> Hardware:
    """Returns the hardware that a calibration measured.

    A GPU's memory, and its links to other nodes, are those of the hardware file with this GPU.

    Args:
        host_bytes: memory of the machine, which its ranks share; None: unknown.

    Raises:
        ValueError: the collectives could not be fitted, or the memory is unknown.
    """
    metrics = calibration.metrics()
    links = {
        name: Link(latency_s=fit["alpha_s"], bytes_per_s=fit["bytes_per_s"])
        for name, fit in metrics["collectives"].items()
        if fit["bytes_per_s"] is not None
    }
    if calibration.num_ranks > 1 and "all_reduce" not in links:
        raise ValueError(f"hardware {THIS_MACHINE}: its all-reduce could not be fitted; run again")
    copy = metrics["copy_bytes_per_s"]
    # One rank sends nothing, so its link is never used.
    link = links.get("all_reduce", Link(latency_s=0.0, bytes_per_s=copy))
    file = None if calibration.device == "cpu" else _file_of_gpu(calibration)
    if file is None and host_bytes is None:
        raise ValueError(f"hardware {THIS_MACHINE}: the size of its memory is unknown")
    return Hardware(
        name=THIS_MACHINE,
        gpu=None if file is None else file.gpu,
        devices_per_node=calibration.num_ranks,
        memory_bytes=file.memory_bytes if file else (host_bytes or 0) // calibration.num_ranks,
        context_bytes=file.context_bytes if file else 0,
        peak_flops=metrics["matmul_flops_per_s"],
        memory_bytes_per_s=copy,
        intra_node=link,
        inter_node=file.inter_node if file else link,
        sources={"this machine": [f"python -m scaling calibrate, {calibration.made_at}"]},
        collectives=links,
        is_measured=True,
    )


def hardware_of_device(device: str) -> Hardware | None:
    """Returns the hardware file with the GPU that a driver calls `device`; None: there is none."""
    gpu = find_gpu(device)
    files = [load_hardware(path.stem) for path in sorted(FOLDER.glob("*.toml"))]
    return next((file for file in files if gpu is not None and file.gpu == gpu.name), None)


def _file_of_gpu(calibration: Calibration) -> Hardware:
    device = calibration.ranks[0][0].device
    found = hardware_of_device(device)
    if found is None:
        raise ValueError(
            f"hardware {THIS_MACHINE} has {device}, whose memory no hardware file states; write "
            "one and give its path"
        )
    return found

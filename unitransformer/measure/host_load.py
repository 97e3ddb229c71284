"""Who else used this machine's processors while a run was timed: plain counters of Linux.

/proc/stat and /proc/loadavg: https://man7.org/linux/man-pages/man5/proc.5.html; cpu.stat of a
control group: https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unitransformer.launch.process_tree import descendants

BUSY_CORES = 0.1  # of others, over the whole window, per core of this machine: worth a word
STOLEN = 0.01  # share of all cores' time that a hypervisor gave to other machines
CPU_COUNTERS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True, kw_only=True)
class HostSample:
    """Counters of the machine and of this process at one moment; None where nothing tells."""

    at_s: float  # monotonic clock
    own_cpu_s: float  # of this process and all that it has started
    busy_cpu_s: float | None  # of the whole machine, stolen time not included
    stolen_cpu_s: float | None  # ran on no core here: the hypervisor ran other machines
    throttled_s: float | None  # this control group had used up its share
    load_1min: float | None
    clock_hz: float | None  # mean over the cores, now


@dataclass(frozen=True, kw_only=True)
class HostLoad:
    """The time between two samples, on a machine of `num_cores`."""

    elapsed_s: float
    num_cores: int
    own_cpu_s: float
    others_cpu_s: float | None
    stolen_cpu_s: float | None
    throttled_s: float | None
    start: HostSample
    end: HostSample

    def flags(self) -> list[str]:
        """What makes the machine one that was not ours alone, in words."""
        available_s = self.elapsed_s * self.num_cores
        found = []
        if self.others_cpu_s is not None and self.others_cpu_s > BUSY_CORES * available_s:
            cores = self.others_cpu_s / self.elapsed_s
            found.append(f"other processes used {cores:.1f} of {self.num_cores} cores")
        if self.stolen_cpu_s is not None and self.stolen_cpu_s > STOLEN * available_s:
            share = self.stolen_cpu_s / available_s
            found.append(f"the hypervisor took {share:.0%} of the processors' time")
        if self.throttled_s:
            found.append(f"the control group was held back for {self.throttled_s:.2f} s")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data, both samples and the flags."""
        untold = {
            name: "this system does not tell" for name, v in asdict(self).items() if v is None
        }
        return {**asdict(self), "flags": self.flags(), "untold": untold}


def sample_host(
    root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic
) -> HostSample:
    """The counters now.

    Args:
        root: what stands before /proc and /sys; another one in tests.
    """
    own = os.times()
    cpu = _machine_seconds(root)
    loads = _words(root / "proc/loadavg")
    throttled = _pairs(root / "sys/fs/cgroup/cpu.stat").get("throttled_usec")
    clocks = [
        float(line.partition(":")[2]) * 1e6
        for line in _text(root / "proc/cpuinfo").splitlines()
        if line.startswith("cpu MHz")
    ]
    idle = ("idle", "iowait", "steal")
    return HostSample(
        at_s=clock(),
        own_cpu_s=own.user
        + own.system
        + own.children_user
        + own.children_system
        + sum(_process_seconds(root / f"proc/{child}") for child in descendants(os.getpid(), root)),
        busy_cpu_s=sum(s for name, s in cpu.items() if name not in idle) if cpu else None,
        stolen_cpu_s=cpu.get("steal"),
        throttled_s=None if throttled is None else int(throttled) / 1e6,
        load_1min=float(loads[0]) if loads else None,
        clock_hz=sum(clocks) / len(clocks) if clocks else None,
    )


def load_between(
    starts: Sequence[HostSample], ends: Sequence[HostSample], *, num_cores: int
) -> HostLoad:
    """The load while the ranks of one machine ran: what is not theirs is of others.

    Args:
        starts, ends: one of each for every rank of this job on this machine, in the same order,
            taken at about the same time.
        num_cores: of the machine, as /proc/stat counts them (`os.cpu_count()`).

    Raises:
        ValueError: no ranks, another number of ends than of starts, or an end before its start.
    """
    if not starts:
        raise ValueError("starts is empty; give the sample of at least one rank")
    own_s = sum(e.own_cpu_s - s.own_cpu_s for s, e in zip(starts, ends, strict=True))
    start, end = starts[0], ends[0]
    elapsed_s = end.at_s - start.at_s
    if elapsed_s <= 0:
        raise ValueError(f"ends[0] is {elapsed_s} s after starts[0]; it must be later")
    busy_s = _grown(start.busy_cpu_s, end.busy_cpu_s)
    return HostLoad(
        elapsed_s=elapsed_s,
        num_cores=num_cores,
        own_cpu_s=own_s,
        # The machine counts in hundredths of a second, a process more finely.
        others_cpu_s=None if busy_s is None else max(busy_s - own_s, 0.0),
        stolen_cpu_s=_grown(start.stolen_cpu_s, end.stolen_cpu_s),
        throttled_s=_grown(start.throttled_s, end.throttled_s),
        start=start,
        end=end,
    )


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _machine_seconds(root: Path) -> dict[str, float]:
    """Seconds of all cores together by what they did; empty where there is no /proc/stat."""
    name, *ticks = _words(root / "proc/stat")[: 1 + len(CPU_COUNTERS)] or [""]
    if name != "cpu":
        return {}
    per_second = os.sysconf("SC_CLK_TCK")
    return {key: int(tick) / per_second for key, tick in zip(CPU_COUNTERS, ticks, strict=True)}


def _process_seconds(place: Path) -> float:
    """Of one process and its ended children; 0 if it has ended."""
    # "pid (name) state ...": a name may hold blanks. utime, stime, cutime, cstime: 14 to 17.
    ticks = _text(place / "stat").rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _pairs(path: Path) -> dict[str, str]:
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # another system: the callers say None

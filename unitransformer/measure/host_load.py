"""Measures who else used this machine's processors during a run, with counters of Linux.

/proc/stat and /proc/loadavg: https://man7.org/linux/man-pages/man5/proc.5.html; cpu.stat of a
control group: https://docs.kernel.org/admin-guide/cgroup-v2.html.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unitransformer.files import read_if_there
from unitransformer.launch.process_tree import descendants

BUSY_CORES = 0.1  # flagged: cores used by other processes, per core of this machine
STOLEN_SHARE = 0.01  # flagged: share of all cores' time that went to other virtual machines
CPU_COUNTERS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
NOT_BUSY = ("idle", "iowait", "steal")


@dataclass(frozen=True, kw_only=True)
class HostSample:
    """Counters of the machine and of this process at one moment; None where unknown."""

    at_s: float  # monotonic clock
    run_cpu_s: float  # of this process and all that it has started
    busy_cpu_s: float | None  # of the whole machine, without stolen time
    stolen_cpu_s: float | None  # the hypervisor ran other virtual machines
    throttled_s: float | None  # this control group had exhausted its quota
    load_1min: float | None
    clock_hz: float | None  # current mean over the cores


@dataclass(frozen=True, kw_only=True)
class HostLoad:
    """Use of a machine with `num_cores` between two samples."""

    elapsed_s: float
    num_cores: int
    run_cpu_s: float
    other_processes_cpu_s: float | None
    stolen_cpu_s: float | None
    throttled_s: float | None
    start: HostSample
    end: HostSample

    def flags(self) -> list[str]:
        """Returns a sentence for each sign that the run did not have the machine to itself."""
        available_s = self.elapsed_s * self.num_cores
        others_s, stolen_s = self.other_processes_cpu_s or 0.0, self.stolen_cpu_s or 0.0
        flags = []
        if others_s > BUSY_CORES * available_s:
            cores = others_s / self.elapsed_s
            flags.append(f"other processes used {cores:.1f} of {self.num_cores} cores")
        if stolen_s > STOLEN_SHARE * available_s:
            share = stolen_s / available_s
            flags.append(f"the hypervisor took {share:.0%} of the processors' time")
        if self.throttled_s:
            flags.append(f"the control group was throttled for {self.throttled_s:.2f} s")
        return flags

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data with both samples and the flags."""
        values = asdict(self)
        missing = {n: "not available on this system" for n, v in values.items() if v is None}
        return {**values, "flags": self.flags(), "missing": missing}


def sample_host(
    root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic
) -> HostSample:
    """Returns the current counters below `root`, the folder that holds /proc and /sys."""
    children = [root / f"proc/{child}/stat" for child in descendants(os.getpid(), root)]
    cpu = _machine_seconds(root)
    loads = read_if_there(root / "proc/loadavg").split()
    # A name and a number per line.
    cpu_stat = read_if_there(root / "sys/fs/cgroup/cpu.stat").split()
    throttled = dict(zip(cpu_stat[::2], cpu_stat[1::2], strict=False)).get("throttled_usec")
    clocks = [
        float(line.partition(":")[2]) * 1e6
        for line in read_if_there(root / "proc/cpuinfo").splitlines()
        if line.startswith("cpu MHz")
    ]
    return HostSample(
        at_s=clock(),
        run_cpu_s=sum(os.times()[:4]) + sum(map(_process_seconds, children)),
        busy_cpu_s=sum(s for name, s in cpu.items() if name not in NOT_BUSY) if cpu else None,
        stolen_cpu_s=cpu.get("steal"),
        throttled_s=None if throttled is None else int(throttled) / 1e6,
        load_1min=float(loads[0]) if loads else None,
        clock_hz=sum(clocks) / len(clocks) if clocks else None,
    )


def load_between(
    starts: Sequence[HostSample], ends: Sequence[HostSample], *, num_cores: int
) -> HostLoad:
    """Returns the use of a machine while its ranks ran; time that is not theirs is others'.

    `starts` and `ends` hold one sample from every rank of this job on this machine, in the same
    order, taken at about the same time. /proc/stat counts `num_cores` (`os.cpu_count()`).

    Raises:
        ValueError: no ranks, a different number of starts and ends, or an end before its start.
    """
    if not starts:
        raise ValueError("starts is empty; give the sample of at least one rank")
    own_s = sum(e.run_cpu_s - s.run_cpu_s for s, e in zip(starts, ends, strict=True))
    start, end = starts[0], ends[0]
    elapsed_s = end.at_s - start.at_s
    if elapsed_s <= 0:
        raise ValueError(f"ends[0] is {elapsed_s} s after starts[0]; it must be later")
    busy_s = _difference(start.busy_cpu_s, end.busy_cpu_s)
    return HostLoad(
        elapsed_s=elapsed_s,
        num_cores=num_cores,
        run_cpu_s=own_s,
        # The machine counts in hundredths of a second, a process more finely.
        other_processes_cpu_s=None if busy_s is None else max(busy_s - own_s, 0.0),
        stolen_cpu_s=_difference(start.stolen_cpu_s, end.stolen_cpu_s),
        throttled_s=_difference(start.throttled_s, end.throttled_s),
        start=start,
        end=end,
    )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _machine_seconds(root: Path) -> dict[str, float]:
    """Returns seconds of all cores together by use; empty without /proc/stat."""
    name, *ticks = read_if_there(root / "proc/stat").split()[: 1 + len(CPU_COUNTERS)] or [""]
    if name != "cpu":
        return {}
    per_second = os.sysconf("SC_CLK_TCK")
    return {key: int(tick) / per_second for key, tick in zip(CPU_COUNTERS, ticks, strict=True)}


def _process_seconds(stat: Path) -> float:
    """Returns the processor time of a process and its ended children; 0 if it has ended."""
    # "pid (name) state ...": a name may hold blanks. utime, stime, cutime, cstime: 14 to 17.
    ticks = read_if_there(stat).rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

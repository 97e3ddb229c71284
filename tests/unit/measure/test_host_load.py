"""Tests processor use by other processes, with counters of a fake machine and of this one."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unitransformer.measure.host_load import HostSample, load_between, sample_host

START = HostSample(
    at_s=0,
    run_cpu_s=0,
    busy_cpu_s=0,
    stolen_cpu_s=0,
    throttled_s=0,
    load_1min=0.5,
    clock_hz=2e9,
)
END = replace(START, at_s=10, run_cpu_s=10, busy_cpu_s=10)  # one core used by us, for ten seconds


def test_processor_time_beyond_that_of_the_ranks_belongs_to_other_processes() -> None:
    load = load_between([START], [replace(END, busy_cpu_s=15)], num_cores=2)
    assert load.other_processes_cpu_s == 5
    assert load.flags() == ["other processes used 0.5 of 2 cores"]


def test_an_idle_machine_has_no_flags() -> None:
    assert load_between([START], [END], num_cores=2).flags() == []


def test_other_ranks_of_the_job_do_not_count_as_other_processes() -> None:
    load = load_between([START] * 2, [replace(END, busy_cpu_s=20)] * 2, num_cores=2)
    assert load.run_cpu_s == 20
    assert load.other_processes_cpu_s == 0


def test_time_stolen_by_the_hypervisor_is_flagged() -> None:
    load = load_between([START], [replace(END, stolen_cpu_s=4)], num_cores=2)
    assert load.flags() == ["the hypervisor took 20% of the processors' time"]


def test_a_throttled_control_group_is_flagged() -> None:
    load = load_between([START], [replace(END, throttled_s=0.25)], num_cores=2)
    assert load.flags() == ["the control group was throttled for 0.25 s"]


def test_counters_are_read_in_seconds(tmp_path: Path) -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    ticks = " ".join(str(seconds * hertz) for seconds in (1, 2, 3, 100, 50, 4, 5, 7, 9, 9))
    (tmp_path / "proc/stat").write_text(f"cpu  {ticks}\ncpu0 {ticks}\n")
    (tmp_path / "proc/loadavg").write_text("1.25 0.50 0.25 1/100 4242\n")
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2000.0\ncpu MHz\t\t: 3000.0\n")
    (tmp_path / "sys/fs/cgroup/cpu.stat").write_text("nr_throttled 2\nthrottled_usec 1500000\n")
    sample = sample_host(tmp_path)
    # user, nice, system, irq, softirq; guest time is part of user and nice
    assert sample.busy_cpu_s == 1 + 2 + 3 + 4 + 5
    assert sample.stolen_cpu_s == 7
    assert sample.throttled_s == 1.5
    assert sample.load_1min == 1.25
    assert sample.clock_hz == 2.5e9


def test_a_system_without_proc_files_reads_none_with_the_reason(tmp_path: Path) -> None:
    start = sample_host(tmp_path, clock=lambda: 0.0)
    end = sample_host(tmp_path, clock=lambda: 1.0)
    actual = load_between([start], [end], num_cores=1).as_dict()
    assert actual["other_processes_cpu_s"] is actual["stolen_cpu_s"] is None
    assert actual["flags"] == []
    assert set(actual["missing"]) == {"other_processes_cpu_s", "stolen_cpu_s", "throttled_s"}


def test_processor_time_of_this_process_grows_as_it_computes() -> None:
    start = sample_host()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    load = load_between([start], [sample_host()], num_cores=os.cpu_count() or 1)
    assert 0.18 <= load.run_cpu_s <= 0.3


def test_a_reading_that_ends_before_its_start_is_refused() -> None:
    with pytest.raises(ValueError, match="must be later"):
        load_between([END], [START], num_cores=1)


def test_a_rank_without_a_last_reading_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        load_between([START, START], [END], num_cores=1)
    with pytest.raises(ValueError, match="at least one rank"):
        load_between([], [], num_cores=1)

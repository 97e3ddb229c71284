"""Concurrent srun steps use different ports; restarted ranks need the store of torchrun."""

import datetime

import pytest
from torch._C._distributed_c10d import HashStore

from unitransformer.launch import environment
from unitransformer.launch.environment import NUM_PORTS, agree_on_folder, srun_port


def test_concurrent_jobs_use_different_ports() -> None:
    first = 4_000_000
    ports = {srun_port(job, 0) for job in range(first, first + NUM_PORTS)}
    assert len(ports) == NUM_PORTS
    assert min(ports) >= 15_000
    assert max(ports) < 32_768


def test_concurrent_steps_of_a_job_and_of_the_next_jobs_use_different_ports() -> None:
    steps = [(job, step) for job in range(1_000, 1_128) for step in range(138)]
    assert len({srun_port(*each) for each in steps}) == len(steps)


def test_restarted_ranks_without_the_store_of_torchrun_do_not_start_over_in_another_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match=r"cannot find the folder .*, or give --resume auto$"):
        agree_on_folder(lambda: "another", resumes=False)


def test_ranks_that_never_start_after_a_restart_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "START_WAIT", datetime.timedelta(seconds=0.1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    store = HashStore()
    store.set("name/2", "")  # rank 2 has its answer
    with pytest.raises(TimeoutError, match=r"ranks \[1, 3\] did not start within 0:00:00"):
        environment._answer_ranks(store, "name 0 False")

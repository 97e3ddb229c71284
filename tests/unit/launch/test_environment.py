"""Concurrent srun steps use different rendezvous ports."""

from unitransformer.launch.environment import NUM_PORTS, srun_port


def test_concurrent_jobs_use_different_ports() -> None:
    first = 4_000_000
    ports = {srun_port(job, 0) for job in range(first, first + NUM_PORTS)}
    assert len(ports) == NUM_PORTS
    assert min(ports) >= 15_000
    assert max(ports) < 32_768


def test_concurrent_steps_of_a_job_and_of_the_next_jobs_use_different_ports() -> None:
    steps = [(job, step) for job in range(1_000, 1_128) for step in range(138)]
    assert len({srun_port(*each) for each in steps}) == len(steps)

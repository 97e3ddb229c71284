"""Tests the times of a job: asking for one does not delay the ranks."""

from pathlib import Path

import pytest

from slurm.runtime import times
from tests.builders.slurm import PutStub


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo JobId=7 SubmitTime=0 Restarts=1", "1970-01-01T00:00:00+00:00"),
        ("echo JobId=7 SubmitTime=Unknown", None),
        ("echo 'scontrol: error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_the_time_of_queueing_is_asked_for_once(
    answer: str, expected: str | None, tmp_path: Path, put_stub: PutStub
) -> None:
    put_stub("scontrol", f"echo $SLURM_TIME_FORMAT >> {tmp_path}/asked\n{answer}\n")
    assert times.ask_queued_at("7") == expected
    assert (tmp_path / "asked").read_text() == "%s\n"


def test_a_controller_that_hangs_does_not_delay_the_ranks(
    put_stub: PutStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(times, "ANSWER_S", 0.1)
    put_stub("scontrol", "exec sleep 600\n")
    assert times.ask_queued_at("7") is None

"""Fixtures that several unit tests use."""

from pathlib import Path

import pytest

from tests.builders.slurm import PutStub


@pytest.fixture
def put_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PutStub:
    """Replaces one of SLURM's commands by a shell script: `put_stub("squeue", "echo 7")`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)

    return put

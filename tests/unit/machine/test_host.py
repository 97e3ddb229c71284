"""Tests readings of this machine and this process."""

import subprocess
import sys

import pytest

from unitransformer.machine.host import peak_resident_bytes

PRINT_PEAK = (
    "from unitransformer.machine.host import peak_resident_bytes; print(peak_resident_bytes())"
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_small_child_of_a_large_process_has_a_small_peak_memory() -> None:
    block = bytearray(b"x") * 2**28
    actual = subprocess.run(
        [sys.executable, "-c", PRINT_PEAK], capture_output=True, check=True, text=True
    )
    assert 0 < int(actual.stdout) < len(block) < peak_resident_bytes()

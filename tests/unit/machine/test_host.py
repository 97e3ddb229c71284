"""Tests readings of this machine and this process."""

import subprocess
import sys
from pathlib import Path

import pytest

from unitransformer.machine.host import describe_cpu, peak_resident_bytes

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


@pytest.mark.parametrize(
    ("cpuinfo", "cpu"),
    [
        ("model name : Xeon\nflags : fpu avx avx2 avx512f\n", "Xeon with AVX-512"),
        (
            "model name : Xeon\nflags : avx2 avx512f avx512_bf16 amx_tile\n",
            "Xeon with AVX-512, BF16, AMX",
        ),
        ("model name : Ryzen\nflags : avx avx2\nmodel name : Other\n", "Ryzen with AVX2"),
        ("model name : Neoverse\nFeatures : fp asimd sve bf16\n", "Neoverse with SVE, BF16"),
        ("model name : Old\nflags : fpu\n", "Old"),
    ],
)
def test_a_processor_is_named_with_its_instructions_for_matrix_products(
    cpuinfo: str, cpu: str, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert describe_cpu(tmp_path / "cpuinfo") == cpu

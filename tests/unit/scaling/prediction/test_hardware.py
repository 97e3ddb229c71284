"""Tests hardware files: figures with units and sources, and one clear error for a bad one."""

from pathlib import Path

import pytest

from scaling.prediction.hardware import (
    FOLDER,
    Hardware,
    from_calibration,
    list_hardware,
    load_hardware,
)
from tests.builders.machines import MACHINE
from unitransformer.costs.gpus import GPUS
from unitransformer.machine.alpha_beta import CollectiveTiming
from unitransformer.machine.calibration import Calibration, Ceiling, WorkSamples

GOOD = """
gpu = "H100 SXM"
devices_per_node = 8
[memory]
size = "80 GB"
context = "1 GiB"
source = "https://example.org/sheet"
[intra_node]
latency = "3 us"
source = "https://example.org/link"
[inter_node]
latency = "10 us"
bandwidth = "400 Gbit/s"
source = "https://example.org/network"
"""


def load(tmp_path: Path, text: str) -> Hardware:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_hardware(str(path))


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.toml"))])
def test_every_built_in_file_states_sources_and_plausible_figures(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.devices_per_node == 8
    assert all("https://" in source for source in hardware.sources.values())
    assert hardware.sources.keys() == {"peaks", "memory", "intra_node", "inter_node"}
    assert 30e9 < hardware.memory_bytes < 300e9
    assert hardware.intra_node.bytes_per_s > hardware.inter_node.bytes_per_s
    assert hardware.intra_node.latency_s < hardware.inter_node.latency_s < 1e-4
    assert hardware.peak_flops == next(g for g in GPUS if g.name == hardware.gpu).dense_flops_per_s


def test_units_are_converted(tmp_path: Path) -> None:
    hardware = load(tmp_path, GOOD)
    assert hardware.memory_bytes == 80 * 10**9
    assert hardware.context_bytes == 2**30
    assert hardware.inter_node.bytes_per_s == 50e9  # 400 Gbit/s
    assert hardware.intra_node.latency_s == pytest.approx(3e-6)
    assert hardware.intra_node.bytes_per_s == 450e9  # half of NVLink's two directions


def test_a_gpu_without_data_sheet_needs_its_peaks(tmp_path: Path) -> None:
    peaks = '[peaks]\nbfloat16 = "500 TFLOP/s"\nmemory_bandwidth = "3 TB/s"\nsource = "me"\n'
    text = GOOD.replace("H100 SXM", "Z1").replace('3 us"', '3 us"\nbandwidth = "100 GB/s"')
    hardware = load(tmp_path, text + peaks)
    assert (hardware.gpu, hardware.peak_flops) == (None, {"bfloat16": 500e12})
    assert hardware.memory_bytes_per_s == 3e12


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("80 GB", "80 GB/s", r"memory.size is '80 GB/s'; .* as in \"8 GB\""),
        ("80 GB", "-80 GB", "memory.size is '-80 GB'; it must be 1 GB to 10 TB; check number"),
        ("80 GB", "nan GB", "memory.size is 'nan GB'; it must be 1 GB to 10 TB"),
        ('"80 GB"', "80", "memory.size is 80; it must be a number and a unit"),
        ('size = "80 GB"\n', "", "memory.size is missing; a hardware file needs it"),
        ("1 GiB", "90 GB", "memory.context is '90 GB'; it must be less than memory.size"),
        ("H100 SXM", "H100 SMX", "gpu is 'H100 SMX'; .* did you mean H100 SXM"),
        ("= 8", "= 0", "devices_per_node is 0; it must be an integer from 1 to 1024"),
        ("= 8", "= 8.0", "devices_per_node is 8.0; it must be an integer"),
        ("400 Gbit/s", "400 Gbit", "inter_node.bandwidth is '400 Gbit'"),
        ("10 us", "10 GB", "inter_node.latency is '10 GB'; .* as in \"8 us\""),
        ("[inter_node]", "[between]", "between is not a field"),
        ('source = "https://example.org/link"\n', "", "intra_node.source is missing"),
        ("[memory]", '[price]\nper_device_hour = "-2 USD"\nsource = "x"\n[memory]', "0.001 USD to"),
        ("80 GB", "80 B", "memory.size is '80 B'; it must be 1 GB to 10 TB"),
        ("10 us", "1 s", "inter_node.latency is '1 s'; it must be 10 ns to 10 ms"),
        ("10 us", "-10 us", "inter_node.latency is '-10 us'; it must be 10 ns"),
        ("10 us", "0 us", "inter_node.latency is '0 us'; it must be 10 ns"),
        ("400 Gbit/s", "0 Gbit/s", "inter_node.bandwidth is '0 Gbit/s'; it must be 10 MB/s"),
        ("400 Gbit/s", "400 Tbit/s", "inter_node.bandwidth is '400 Tbit/s'; .* to 1 TB/s"),
        ('3 us"', '3 us"\nbandwidth = "450 TB/s"', "intra_node.bandwidth is .* to 10 TB/s"),
        ('3 us"', '3 us"\nbandwidth = "0.9 B/s"', "intra_node.bandwidth is '0.9 B/s'; it must be"),
        ("= 8", "= 4096", "devices_per_node is 4096; it must be an integer from 1 to 1024"),
        ("[memory]", "[memory", "cannot be read"),
    ],
)
def test_a_bad_file_is_one_error_that_names_file_field_and_value(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, GOOD.replace(before, after, 1))
    assert "mine.toml" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="h100-smx-8 is unknown; did you mean h100-sxm-8"):
        load_hardware("h100-smx-8")
    assert "this-machine" in list_hardware()


def test_this_machine_without_a_calibration_says_how_to_calibrate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNITRANSFORMER_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="run python -m scaling calibrate --devices 2"):
        load_hardware("this-machine")


def calibration(device: str = "cpu") -> Calibration:
    """Two ranks of 10 GFLOP/s and 5 GB/s; an all-reduce takes 1 ms and a second per GB."""
    driver_name = device if device == "cpu" else "NVIDIA H100 80GB HBM3"
    ceiling = Ceiling(
        device=driver_name,
        dtype="float32",
        threads=1 if device == "cpu" else None,
        matmul=(WorkSamples(name="512", work=10**10, seconds=(1.0, 1.1)),),
        copy=WorkSamples(name="copy", work=5 * 10**9, seconds=(1.0,)),
        elapsed_s=2.0,
    )
    sizes = [10**n for n in range(4, 10)]
    points = tuple(
        CollectiveTiming(size_bytes=n, calls=1, seconds=(1e-3 + n / 1e9,)) for n in sizes
    )
    return Calibration(
        machine=MACHINE,
        made_at="2026-03-04T05:06:07+00:00",
        command="python -m scaling calibrate --devices 2",
        device=device,
        num_ranks=2,
        left_out={},
        ranks=((ceiling,), (ceiling,)),
        collectives={"all_reduce": points},
        elapsed_s=4.5,
    )


def test_a_calibrated_machine_shares_its_memory_among_its_ranks() -> None:
    hardware = from_calibration(calibration(), 16 * 2**30)
    assert hardware.is_cpu
    assert hardware.is_measured
    assert (hardware.devices_per_node, hardware.memory_bytes) == (2, 8 * 2**30)
    assert hardware.peak_flops == {"float32": 10**10}
    # Two ranks take two steps and send the whole array once.
    assert hardware.collectives["all_reduce"].latency_s == pytest.approx(0.5e-3)
    assert hardware.intra_node.bytes_per_s == pytest.approx(1e9)


def test_a_calibrated_gpu_has_the_memory_of_its_hardware_file() -> None:
    hardware = from_calibration(calibration("cuda"), None)
    assert not hardware.is_cpu
    node = load_hardware("h100-sxm-8")
    assert (hardware.gpu, hardware.memory_bytes) == ("H100 SXM", node.memory_bytes)
    assert hardware.peak_flops == {"float32": 10**10}
    assert hardware.inter_node == node.inter_node


def test_a_calibrated_machine_of_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="the size of its memory is unknown"):
        from_calibration(calibration(), None)

"""Tests hardware files: figures with units and sources, and one clear error for a bad one."""

import re
from pathlib import Path

import pytest

from scaling.prediction.fit_file import default_model
from scaling.prediction.hardware import (
    FOLDER,
    Hardware,
    from_calibration,
    list_hardware,
    load_hardware,
)
from scaling.prediction.measured_rows import model_for
from scaling.prediction.options import build_configs
from scaling.prediction.predict import predict
from scaling.prediction.time import predict_time
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

# Memory in GB and the network in Gbit/s of the machines that the sources describe, the devices that
# share an adapter, and the bytes per second that a device sends to the others of its node: half of
# what data sheets count.
MACHINES = [
    ("a100-40-sxm-8", 40, 200, 1, 300e9),
    ("a100-80-sxm-8", 80, 200, 1, 300e9),
    ("h100-sxm-8", 80, 400, 1, 450e9),
    ("h200-sxm-8", 141, 400, 1, 450e9),
    ("b200-8", 180, 400, 1, 900e9),
    ("b300-8", 288, 800, 1, 900e9),
    ("l40s-8", 48, 400, 8, 32e9),
    ("l4-8", 24, 100, 8, 32e9),
    ("a10g-8", 24, 100, 8, 32e9),
    ("mi300x-8", 192, 400, 1, 448e9),  # seven links of 64 GB/s
    ("mi355x-8", 288, 400, 1, 537.5e9),
]


def load(tmp_path: Path, text: str) -> Hardware:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_hardware(str(path))


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.toml"))])
def test_every_built_in_file_states_sources_and_plausible_figures(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.devices_per_node == 8
    assert hardware.sources.keys() == {"gpu", "memory", "intra_node", "inter_node"}
    for sources in hardware.sources.values():
        published = [text for text in sources if not text.startswith("assumption: ")]
        assert published
        assert all(re.search(r"\w, https://\S+\w/?$", text) for text in published)  # after a title
    assert 20e9 < hardware.memory_bytes < 310e9
    assert hardware.intra_node.bytes_per_s > hardware.inter_node.bytes_per_s
    assert hardware.intra_node.latency_s < hardware.inter_node.latency_s < 1e-4
    assert hardware.peak_flops == next(g for g in GPUS if g.name == hardware.gpu).dense_flops_per_s


@pytest.mark.parametrize(
    ("name", "memory_gb", "network_gbit", "devices_per_adapter", "link_bytes_per_s"), MACHINES
)
def test_built_in_files_hold_what_the_machines_have(
    name: str,
    memory_gb: int,
    network_gbit: int,
    devices_per_adapter: int,
    link_bytes_per_s: float,
) -> None:
    hardware = load_hardware(name)
    # A driver keeps some; AMD and some NVIDIA sheets count GiB.
    assert 0.9 * memory_gb * 1e9 < hardware.memory_bytes <= memory_gb * 2**30
    assert hardware.inter_node.bytes_per_s == network_gbit * 1e9 / 8 / devices_per_adapter
    assert hardware.intra_node.bytes_per_s == link_bytes_per_s


def test_every_built_in_file_is_held_by_the_test_above_and_listed_in_the_manual() -> None:
    names = {path.stem for path in FOLDER.glob("*.toml")}
    assert {machine[0] for machine in MACHINES} == names
    manual = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in manual] == []


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


def test_a_file_with_the_name_of_a_gpu_of_the_fit_is_no_such_gpu(tmp_path: Path) -> None:
    peaks = '[peaks]\nbfloat16 = "500 TFLOP/s"\nmemory_bandwidth = "3 TB/s"\nsource = "me"\n'
    text = GOOD.replace("H100 SXM", "Z1").replace('3 us"', '3 us"\nbandwidth = "100 GB/s"')
    for name in default_model().ranges:  # a100, h100, ...
        path = tmp_path / f"{name}.toml"
        path.write_text(text + peaks)
        node = load_hardware(str(path))
        axes = {"size": ["6.7b"], "strategy": ["fsdp"], "batch-size": ["2"]}
        (config,), _ = build_configs("gpt", (8,), axes, node)
        time = predict(config, node, model_for(node)).time
        assert time.beyond == (f"the GPU of {name}, on which no run of the fit was",)
    path = tmp_path / "this-machine.toml"
    path.write_text(text + peaks)
    with pytest.raises(ValueError, match="has the name of this machine; rename"):
        load_hardware(str(path))


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
        ('source = "https://example.org/sheet"\n', "", "memory.source is missing"),
        ('source = "https://example.org/link"\n', "", "intra_node.source is missing"),
        ('source = "https://example.org/network"\n', "", "inter_node.source is missing"),
        (
            "[memory]",
            '[peaks]\nbfloat16 = "1 TFLOP/s"\nmemory_bandwidth = "1 TB/s"\n[memory]',
            "peaks.source is missing",
        ),
        ("[memory]", '[price]\nper_device_hour = "2 USD"\n[memory]', "price.source is missing"),
        ('"https://example.org/link"', "[]", r"intra_node.source is \[\]; it must be text, or a"),
        ('"https://example.org/link"', '["a", " "]', "intra_node.source is .* or a list of texts"),
        ('"https://example.org/link"', "3", "intra_node.source is 3; it must be text, or a list"),
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
        ("[memory]", "[memory", "is not TOML: line 4 is '\\[memory'; correct it"),
        ('size = "80 GB"', 'size = "80 GB"\nsize = "90 GB"', "line 6 is 'size = .90 GB.'; it, or"),
        ("[inter_node]", "[memory]", "line 11 is '.memory.'; it, or its group, is given twice"),
        ("[memory]", "[memory]\ncolor = 3", "memory.color is not a field; known: size"),
        ("[memory]", "memory = 3\n[price]", "memory is 3; it must be a group"),
        ("80 GB", "8_0 GB", "memory.size is '8_0 GB'; it must be a number and a unit"),
        ("80 GB", "\uff18 GB", "memory.size is '\uff18 GB'; it must be a number and a unit"),
        ("80 GB", "80 GB\\n", "memory.size is '80 GB..'; it must be a number and a unit"),
        ("H100 SXM", "H100\\nSXM", "gpu is 'H100..SXM'; it must be a line of text"),
        ('gpu = "H100 SXM"', "", "gpu is missing"),
    ],
)
def test_a_bad_file_is_one_error_that_names_file_field_and_value(
    before: str, after: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, GOOD.replace(before, after, 1))
    assert "mine.toml" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_that_no_one_can_read_is_one_error_with_a_fix(tmp_path: Path) -> None:
    latin, folder = tmp_path / "latin.toml", tmp_path / "folder.toml"
    latin.write_bytes(GOOD.replace("sheet", "Blätter").encode("latin-1"))
    folder.mkdir()
    long = "a" * 400
    for name, message in (
        (str(latin), "latin.toml is not text in UTF-8; save it as UTF-8"),
        (
            str(folder),
            r"folder.toml cannot be read \(Is a directory\); give a .toml file, or one of",
        ),
        (
            str(tmp_path / "none.toml"),
            "none.toml does not exist; give a .toml file, or one of a100",
        ),
        (f"./{long}", r"cannot be read \(File name too long\); give a .toml file"),
        (long, "is unknown; known: a100"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_hardware(name)
        assert len(str(raised.value).splitlines()) == 1


def test_a_file_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # as some editors on Windows write it
    assert load_hardware(str(path)).devices_per_node == 8


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("h100-smx-8", "h100-sxm-8"),
        ("b300", "b300-8"),
        ("a10", "a10g-8"),
        ("mi355-8", "mi355x-8"),
        ("l4", "l4-8 or l40s-8"),
        ("L40-8", "l40s-8"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is unknown; did you mean .*{nearest}"):
        load_hardware(name)
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


def test_fewer_ranks_of_a_cpu_share_the_same_machine() -> None:
    two = from_calibration(calibration(), host_bytes=2 * 10**9)
    one = two.shared_by(1)
    assert (two.memory_bytes, one.memory_bytes) == (10**9, 2 * 10**9)
    assert one.peak_flops["float32"] == 2 * two.peak_flops["float32"]
    assert one.memory_bytes_per_s == 2 * two.memory_bytes_per_s
    assert one.devices_per_node == 1
    assert two.shared_by(2) == two
    gpu = load_hardware("h100-sxm-8")
    assert gpu.shared_by(1) == gpu
    # One rank with all threads computes in half of the time.
    axes = {"strategy": ["single"], "precision": ["32-true"], "batch-size": ["64"]}
    (config,), _ = build_configs("gpt", (1,), axes, two)
    alone = predict(config, two, model_for(two))
    assert alone.hardware == one
    assert alone.memory.capacity == 2 * 10**9
    measured_alone = predict_time(config, one, model_for(one))
    assert alone.time == measured_alone
    assert alone.time.total_s < 0.6 * predict_time(config, two, model_for(two)).total_s

"""Tests calibrations: fingerprints, rates from samples, damaged files, the printed table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.__main__ import main
from scaling.calibrate import render
from tests.builders.machines import MACHINE
from tests.builders.modules import run_here
from unitransformer.calibrate import check_same_machine
from unitransformer.machine.alpha_beta import CollectiveTiming
from unitransformer.machine.calibration import Calibration, Ceiling, WorkSamples
from unitransformer.machine.calibration_store import (
    default_path,
    from_json,
    load_calibration,
    read_calibration,
    read_ceiling,
    to_json,
    write_calibration,
)
from unitransformer.machine.host import (
    cpu_quota,
    describe_machine,
    last_level_cache_bytes,
    nominal_gib,
)


def ceiling(*seconds: float, dtype: str = "float32") -> Ceiling:
    """A ceiling from products of 6 FLOP and copies of 8 bytes."""
    return Ceiling(
        device="cpu",
        dtype=dtype,
        threads=1,
        matmul=(WorkSamples(name="1 x 1 x 3, g W", work=6, seconds=seconds),),
        copy=WorkSamples(name="copy of 4 bytes", work=8, seconds=(4.0, 2.0)),
        elapsed_s=1.5,
    )


def calibration(**changes: Any) -> Calibration:
    points = tuple(
        CollectiveTiming(size_bytes=size, calls=1, seconds=(1 + size / 1000,) * 3)
        for size in (100, 200, 400, 800, 1600)
    )
    return replace(
        Calibration(
            machine=MACHINE,
            made_at="2026-03-04T05:06:07+00:00",
            command="python -m scaling calibrate --devices 2",
            device="cpu",
            num_ranks=2,
            left_out={"tf32": "a CPU has none"},
            ranks=((ceiling(3.0, 2.0),), (ceiling(6.0, 1.0, 2.0),)),
            collectives={"broadcast": points},
            elapsed_s=4.5,
        ),
        **changes,
    )


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNITRANSFORMER_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "calibrations"


# ---------------------------------------------------------------------------------- machines


def test_machines_that_differ_in_software_have_equal_fingerprints() -> None:
    assert MACHINE.fingerprint == replace(MACHINE, software={"torch": "2.11.0"}).fingerprint
    assert MACHINE.fingerprint == replace(MACHINE, gpus=[]).fingerprint
    assert describe_machine().fingerprint == describe_machine(software={"CUDA": "13"}).fingerprint
    assert len(MACHINE.fingerprint) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "Another processor"},
        {"cpu_cores": 4},
        {"cpu_quota": 1.5},
        {"memory_gib": 32.0},
        {"system": "Darwin"},
        {"architecture": "aarch64"},
        {"gpus": ("NVIDIA H200",)},
    ],
)
def test_another_machine_has_another_fingerprint(change: dict[str, Any]) -> None:
    assert replace(MACHINE, **change).fingerprint != MACHINE.fingerprint


def test_one_more_gpu_changes_the_fingerprint() -> None:
    one, two = (describe_machine(["NVIDIA H200"] * number) for number in (1, 2))
    assert one.fingerprint != two.fingerprint


def test_ranks_on_different_machines_cannot_calibrate_together() -> None:
    check_same_machine([MACHINE, replace(MACHINE, software={})])
    with pytest.raises(RuntimeError, match="different machines"):
        check_same_machine([MACHINE, replace(MACHINE, cpu_cores=4)])


def test_a_fingerprint_stays_the_same_between_versions_of_this_suite() -> None:
    assert MACHINE.fingerprint == "aeec6b22e342"


@pytest.mark.parametrize(
    ("gib", "nominal"), [(15.6, 16), (15.4, 16), (16, 16), (23.4, 24), (7.7, 8), (0.9, 1), (12, 12)]
)
def test_memory_size_is_rounded_to_its_nominal_size(gib: float, nominal: float) -> None:
    assert nominal_gib(int(gib * 2**30)) == nominal


def test_a_quota_of_three_halves_is_one_and_a_half_cores(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    assert cpu_quota(limit) is None
    limit.write_text("max 100000\n")
    assert cpu_quota(limit) is None
    limit.write_text("150000 100000\n")
    assert cpu_quota(limit) == 1.5


def test_last_level_caches_add_up_without_smaller_caches(tmp_path: Path) -> None:
    def write_cache(core: int, index: int, level: int, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in {"level": level, "size": size, "shared_cpu_list": shared}.items():
            (folder / name).write_text(f"{text}\n")

    assert last_level_cache_bytes(tmp_path) is None
    for core in range(4):
        write_cache(core, 0, 1, "32K", str(core))
        write_cache(core, 3, 3, "1024K", "0-1" if core < 2 else "2-3")
    assert last_level_cache_bytes(tmp_path) == 2 * 2**20


# ---------------------------------------------------------------------------------- figures


def test_the_ceiling_of_two_ranks_is_their_best_rate() -> None:
    made = calibration()
    assert made.matmul_flops_per_s("float32") == 6.0
    assert made.metrics()["copy_bytes_per_s"] == 4.0
    assert made.ranks[1][0].best_product.median_per_s == 3.0


def test_a_dtype_that_was_not_measured_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="tf32 was not measured: a CPU has none"):
        calibration().matmul_flops_per_s("tf32")
    with pytest.raises(ValueError, match="float16 was not measured: measured are float32"):
        calibration().matmul_flops_per_s("float16")


def test_ceilings_measured_before_and_after_merge_all_samples() -> None:
    joined = ceiling(3.0, 2.0).merge(ceiling(1.0, 4.0))
    assert joined.matmul_flops_per_s == 6.0
    assert [p.seconds for p in joined.matmul] == [(3.0, 2.0), (1.0, 4.0)]
    assert (joined.copy.seconds, joined.elapsed_s) == ((4.0, 2.0, 4.0, 2.0), 3.0)
    with pytest.raises(ValueError, match="dtype is float32 and bfloat16"):
        ceiling(1.0).merge(ceiling(1.0, dtype="bfloat16"))


@pytest.mark.parametrize("seconds", [(), (0.0,), (-1.0,), (float("nan"),), (float("inf"),)])
def test_impossible_seconds_are_refused(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="copy"):
        WorkSamples(name="copy", work=8, seconds=seconds)


def test_ranks_with_different_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks is 3 and ranks holds 2"):
        calibration(num_ranks=3)
    with pytest.raises(ValueError, match="the same dtypes"):
        calibration(ranks=((ceiling(1.0),), (ceiling(1.0, dtype="bfloat16"),)))


def test_a_collective_that_cannot_be_fitted_has_a_reason_in_place_of_a_fit() -> None:
    few = calibration().collectives["broadcast"][:4]
    figures = calibration(collectives={"broadcast": few}).metrics()["collectives"]["broadcast"]
    assert (figures["alpha_s"], figures["bytes_per_s"]) == (None, None)
    assert "4 sizes" in figures["reason"]


# ---------------------------------------------------------------------------------- files


def test_a_written_calibration_is_read_unchanged(data: Path) -> None:
    made = calibration()
    path = default_path(made)
    write_calibration(made, path)
    assert path == data / MACHINE.fingerprint / "20260304T050607Z-cpu-2.json"
    assert read_calibration(path) == replace(made, machine=replace(MACHINE, gpus=()))


def test_loading_returns_the_newest_calibration_of_this_machine_only(data: Path) -> None:
    assert load_calibration(MACHINE.fingerprint) is None
    older, newer = calibration(), calibration(made_at="2026-03-05T00:00:00+00:00")
    alone = calibration(
        made_at="2026-03-06T00:00:00+00:00", num_ranks=1, ranks=((ceiling(1.0),),), collectives={}
    )
    for made in (newer, older, alone):
        write_calibration(made, default_path(made))
    assert load_calibration(MACHINE.fingerprint) == alone
    assert load_calibration(MACHINE.fingerprint, num_ranks=2) == newer
    assert load_calibration(MACHINE.fingerprint, device="cuda") is None
    assert load_calibration("0" * 12) is None


def test_a_ceiling_survives_a_record_unchanged() -> None:
    actual = json.loads(json.dumps(ceiling(3.0, 2.0).as_dict()))
    assert actual["matmul_flops_per_s"] == 3.0
    assert read_ceiling(actual) == ceiling(3.0, 2.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("matmul_flops_per_s", 3.1, "matmul_flops_per_s is 3.1; its samples give 3.0"),
        ("copy_bytes_per_s", 5.0, "copy_bytes_per_s is 5.0"),
        ("matmul", [], "matmul is empty"),
        ("matmul", [{"name": "a", "work": 6}], "matmul.0.seconds is missing"),
        ("copy", {"name": "a", "work": 6, "seconds": ["1"]}, "copy.seconds.0 is '1'"),
        ("threads", "many", "threads is 'many'"),
        ("extra", 1, "extra is not a field"),
    ],
)
def test_a_ceiling_that_contradicts_its_samples_is_refused_with_the_field(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_ceiling(ceiling(3.0, 2.0).as_dict() | {field: value})


def test_every_changed_digit_is_noticed_in_its_field(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(calibration(), path)
    text = path.read_text()
    body = text[: text.index('"checksums"')]
    for place, letter in enumerate(body):
        if letter.isdigit():
            other = str((int(letter) + 1) % 10)
            path.write_text(text[:place] + other + text[place + 1 :])
            with pytest.raises(ValueError, match="calibration"):
                read_calibration(path)


@pytest.mark.parametrize("field", sorted(to_json(calibration())))
def test_a_missing_or_unknown_field_is_named(field: str) -> None:
    actual = to_json(calibration())
    with pytest.raises(ValueError, match=f"{field} is"):
        from_json({name: value for name, value in actual.items() if name != field})
    with pytest.raises(ValueError, match=f"{field} (is|was)"):
        from_json(actual | {field: "edited"})


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration_schema is 2; this version reads 1"):
        from_json(to_json(calibration()) | {"calibration_schema": 2})


def test_a_truncated_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(calibration(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"calibration\.json: not JSON as it was written"):
            read_calibration(path)


# ---------------------------------------------------------------------------------- the command


def test_the_table_shows_every_rate_with_unit_samples_and_spread() -> None:
    lines = render(calibration()).splitlines()
    row = next(line.split() for line in lines if line.startswith("matmul float32"))
    assert row[2:8] == ["6e-09", "2.7e-09", "GFLOP/s", "5", "1e-09", "to"]
    alpha = next(line for line in lines if line.startswith("broadcast alpha"))
    assert "1e+06     us" in alpha
    assert "error at held-out sizes: median 0%, largest 0%" in alpha
    assert "not measured: tf32: a CPU has none" in lines


def test_a_calibration_of_one_rank_explains_why_it_has_no_collectives() -> None:
    alone = calibration(num_ranks=1, ranks=((ceiling(1.0),),), collectives={})
    assert "collectives: one rank sends nothing; use --devices 2" in render(alone)


def test_the_command_measures_stores_and_prints(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--accelerator", "cpu", "--seconds", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    stored = load_calibration(printed[0].split()[1].rstrip(":"))
    assert stored is not None
    assert stored.dtypes == ("float32", "bfloat16")
    assert str(default_path(stored)) == printed[-1]
    assert stored.command == "python -m scaling calibrate --accelerator cpu --seconds 1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0.5"], "seconds is 0.5; it must be between 1 and 600"),
        (["--seconds", "nan"], "seconds"),
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--devices", "two"], "devices"),
        (["--accelerator", "tpu"], "accelerator"),
        (["--outt", "x"], "--outt is not an option; python -m scaling calibrate --help"),
        (["--out", "."], "is a folder"),
        (["--", "--size"], "calibrate passes nothing on"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert (error.count("\n"), error[:7]) == (1, "error: ")


def test_missing_gpus_are_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling.calibrate.run_module", run_here)
    assert main(["calibrate", "--accelerator", "cuda", "--devices", "64"]) == 2
    assert capsys.readouterr().err.startswith("error: devices is 64 and this machine has")

"""Tests the MFU report: printed, flagged and refused values."""

import json
from typing import Any

import pytest

from recipes import gpt
from unitransformer.config import RunConfig, from_dict, to_dict
from unitransformer.costs.flops import CONVENTIONS, count_flops
from unitransformer.costs.mfu import Ceiling, MfuRow, build_mfu_report

H200 = "NVIDIA H200"
GIGA = 1e9
RUN: dict[str, Any] = {
    # 1 GFLOP per token, 989,500 tokens per second on 2 devices: half of 989.5 TFLOP/s on each.
    "flops_per_unit": {"matmul": GIGA},
    "units_per_s": 989_500.0,
    "num_devices": 2,
    "device_name": H200,
    "precision": "bf16-mixed",
    "allows_tf32": False,
}
CEILING = Ceiling(flops_per_s=800e12, dtype="bfloat16")


def only_row(**changes: Any) -> MfuRow:
    (row,) = build_mfu_report(**(RUN | changes))
    return row


def test_a_rate_of_half_the_peak_is_an_mfu_of_a_half() -> None:
    row = only_row()
    assert row.units_per_s == 494_750
    assert row.flops_per_s == 494.75e12
    assert row.utilisation == 0.5
    assert (row.reason, row.flag, row.share_of_ceiling) == (None, None, None)


def test_a_row_names_its_peak_dtype_source_and_convention() -> None:
    row = only_row()
    assert row.peak_flops_per_s == 989.5e12
    assert row.dtype == "bfloat16"
    assert row.peak_source == "https://www.nvidia.com/en-us/data-center/h200/"
    assert row.definition == CONVENTIONS["matmul"]


def test_mfu_halves_when_as_many_tokens_take_twice_the_devices() -> None:
    assert only_row(num_devices=4).utilisation == 0.25


def test_recomputation_counts_for_hfu_and_not_for_mfu() -> None:
    config = RunConfig(recipe="gpt", size="reference", model=gpt.PRESET.model_config())
    rows = build_mfu_report(
        **(RUN | {"flops_per_unit": count_flops(config), "units_per_s": 1000.0})
    )
    kinds = {row.convention: row.kind for row in rows}
    assert list(kinds) == list(CONVENTIONS)
    assert [name for name, kind in kinds.items() if kind == "HFU"] == ["hardware"]


def test_a_row_shows_the_measured_ceiling_beside_the_peak() -> None:
    row = only_row(ceiling=Ceiling(flops_per_s=989.5e12, dtype="bfloat16"))
    assert row.share_of_ceiling == 0.5
    assert row.flag is None


def test_a_rate_above_the_measured_ceiling_is_flagged_and_printed() -> None:
    row = only_row(ceiling=Ceiling(flops_per_s=247.375e12, dtype="bfloat16"))
    assert (row.utilisation, row.share_of_ceiling) == (0.5, 2.0)
    assert row.flag == "above the ceiling measured on this machine (2.000 of it)"


def test_a_rate_at_the_peak_is_printed_and_above_it_refused() -> None:
    assert only_row(units_per_s=1_979_000.0).utilisation == 1.0
    row = only_row(units_per_s=1_979_002.0, ceiling=CEILING)
    assert row.utilisation is None
    assert row.share_of_ceiling is None
    assert row.reason is not None
    assert row.reason.startswith("above the peak (1.000 of it): this convention counts")


def test_one_convention_can_be_refused_alone() -> None:
    counts = {"6n": 3 * GIGA, "matmul": GIGA}
    refused, printed = build_mfu_report(**(RUN | {"flops_per_unit": counts}))
    assert refused.reason is not None
    assert refused.reason.startswith("above the peak (1.500 of it)")
    assert printed.utilisation == 0.5


def test_a_cpu_has_no_mfu_but_a_share_of_its_ceiling() -> None:
    row = only_row(
        device_name="cpu",
        precision="32-true",
        units_per_s=50.0,
        num_devices=1,
        ceiling=Ceiling(flops_per_s=100e9, dtype="float32"),
    )
    assert row.utilisation is None
    assert row.share_of_ceiling == 0.5


def test_a_ceiling_in_another_dtype_is_not_compared() -> None:
    row = only_row(ceiling=Ceiling(flops_per_s=50e12, dtype="float32"))
    assert row.share_of_ceiling is None
    assert row.flag == "the ceiling was measured in float32, the run computed in bfloat16"


REFUSALS: dict[str, dict[str, Any]] = {
    "unknown GPU": {"device_name": "NVIDIA H20"},
    "near miss": {"device_name": "NVIDIA A10G"},
    "slice of a GPU": {"device_name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb"},
    "laptop": {"device_name": "NVIDIA GeForce RTX 4090 Laptop GPU"},
    "one name of two GPUs": {"device_name": "AMD Instinct MI250X / MI250"},
    "CPU": {"device_name": "cpu"},
    "fp8 mix": {"precision": "transformer-engine"},
    "TF32 or not": {"precision": "32-true", "allows_tf32": None},
    "unclear format": {"precision": "64-true"},
    "format without a dense peak": {"device_name": "Tesla T4"},
    "no steady state": {"units_per_s": None},
    "above the peak": {"units_per_s": 2e6},
}


@pytest.mark.parametrize("changes", REFUSALS.values(), ids=REFUSALS.keys())
def test_an_mfu_that_would_be_a_guess_is_refused_with_a_reason(changes: dict[str, Any]) -> None:
    counts = dict.fromkeys(CONVENTIONS, GIGA)
    rows = build_mfu_report(**(RUN | {"flops_per_unit": counts} | changes))
    assert [row.utilisation for row in rows] == [None] * len(CONVENTIONS)
    assert all(row.reason for row in rows)


@pytest.mark.parametrize("changes", [{}, {"ceiling": CEILING}, *REFUSALS.values()])
def test_a_row_survives_json_unchanged(changes: dict[str, Any]) -> None:
    row = only_row(**changes)
    stored = json.loads(json.dumps(to_dict(row), allow_nan=False))
    assert from_dict(MfuRow, stored, "mfu") == row


@pytest.mark.parametrize(
    "field", ["flops_per_unit", "units_per_s", "flops_per_s", "utilisation", "share_of_ceiling"]
)
def test_a_changed_digit_is_noticed(field: str) -> None:
    stored = to_dict(only_row(ceiling=CEILING))
    with pytest.raises(ValueError, match="by the other values of its row"):
        from_dict(MfuRow, stored | {field: stored[field] * 1.001})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utilisation": None}, "utilisation is None and its reason is None"),
        ({"reason": "too slow"}, "give one of them"),
        ({"peak_flops_per_s": None}, "it is None"),
        ({"ceiling_flops_per_s": None}, "it is None"),
        ({"peak_flops_per_s": 494.75e12 / 2, "utilisation": 2.0}, "no device is faster"),
        ({"mfu": 0.5}, "mfu is not a field"),
    ],
)
def test_a_stored_row_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    stored = to_dict(only_row(ceiling=CEILING))
    with pytest.raises(ValueError, match=message):
        from_dict(MfuRow, stored | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_per_unit": {"chinchilla": 1.0}}, "chinchilla is not a FLOP convention"),
        ({"flops_per_unit": {"matmul": float("nan")}}, "flops_per_unit.matmul is nan"),
        ({"units_per_s": 0.0}, "units_per_s is 0.0"),
        ({"units_per_s": float("inf")}, "units_per_s is inf"),
        ({"num_devices": 0}, "num_devices is 0"),
    ],
)
def test_impossible_values_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mfu_report(**(RUN | changes))


def test_a_ceiling_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="flops_per_s is 0"):
        Ceiling(flops_per_s=0.0, dtype="float32")

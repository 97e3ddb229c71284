"""Tests the memory estimate of published runs, and how it is judged."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from scaling.prediction.memory import FREE_SHARE
from scaling.prediction.published_memory import (
    estimate_peak_bytes,
    judge_memory,
    plain_estimate,
)
from scaling.prediction.validation import table
from scaling.published.csv_rows import BUILTIN_ROWS, PublishedRow, load_rows

ROWS = load_rows()
FULL = next(row for row in ROWS if row.peak_bytes and row.activation_checkpointing == "full")
SMALL = replace(
    FULL,
    model="GPT",
    num_layers=3,
    width=10,
    num_heads=2,
    num_kv_heads=None,
    vocabulary=1000,
    sequence_length=20,
    micro_batch=1,
    num_gpus=1,
    strategy="FSDP2",
    is_compiled=True,
)


def estimate(row: PublishedRow) -> int:
    found = estimate_peak_bytes(row)
    assert found is not None
    return found


def test_the_estimate_is_a_sum_that_a_reader_can_do() -> None:
    layer, outer = 12 * 10 * 10, 1000 * 10
    parameters = 3 * layer + outer
    states, gathered = 12 * parameters, 2 * (outer + layer)
    inputs, logits = 3 * 20 * 2 * 10, 14 * 20 * 1000
    allocated = states + gathered + inputs + logits
    assert estimate(SMALL) == pytest.approx((1 + FREE_SHARE) * allocated, abs=1)
    assert plain_estimate(SMALL) == 16 * parameters + 2 * 3 * 20 * 10


def test_less_is_kept_by_more_checkpointing_more_devices_and_divided_positions() -> None:
    modes = ("none", "selective every 2nd layer", "selective", "full")
    sizes = [estimate(replace(SMALL, width=64, activation_checkpointing=mode)) for mode in modes]
    assert sizes == sorted(sizes, reverse=True)
    assert estimate(replace(SMALL, num_gpus=8)) < estimate(SMALL)
    assert estimate(replace(SMALL, strategy="FSDP1 CP2")) < estimate(SMALL)
    assert estimate(replace(SMALL, strategy="FSDP2 zero2", num_gpus=2)) > estimate(
        replace(SMALL, num_gpus=2)
    )


def test_a_compiled_loss_keeps_no_logits_in_float32() -> None:
    many = replace(SMALL, sequence_length=2000)
    compiled = replace(many, source="torchao", gpu="B200")
    head = 2 * 1000 * 10  # gathered alone; SMALL's embedding shares its matrix
    less = estimate(many) - estimate(compiled)
    assert less == pytest.approx((1 + FREE_SHARE) * (10 * 2000 * 1000 + head // 2), abs=2)
    assert estimate(replace(compiled, gpu="H100")) == estimate(many)
    assert estimate(replace(compiled, is_compiled=False)) > estimate(compiled)


def test_gradients_that_fit_no_freed_logits_need_memory_of_their_own() -> None:
    few = replace(SMALL, num_layers=1, sequence_length=1, vocabulary=10_000)
    parameters, outer = 1200 + 100_000, 100_000
    assert estimate(few) == pytest.approx((1 + FREE_SHARE) * (16 * parameters + 8 * outer), abs=1)
    # Ten positions have logits as large as the embedding of ten channels, nine have not.
    nine, ten = (estimate(replace(SMALL, sequence_length=length)) for length in (9, 10))
    assert nine > ten


def test_rows_that_divide_tensors_or_state_no_size_are_left_out() -> None:
    assert estimate_peak_bytes(replace(SMALL, strategy="TP2 PP1 DP4 CP1 ZeRO-1")) is None
    assert estimate_peak_bytes(replace(SMALL, micro_batch=None)) is None
    described = [row for row in ROWS if row.peak_bytes and estimate_peak_bytes(row)]
    assert len(described) == 36


def test_intervals_come_from_other_sources_alone() -> None:
    mine = [replace(SMALL, source="a", peak_bytes=estimate(SMALL) * 2)]
    exact = [replace(SMALL, source="b", peak_bytes=estimate(SMALL))]
    (judged,) = judge_memory(mine, [*mine, *exact])
    assert judged.error == pytest.approx(-0.5)
    assert not judged.is_inside
    assert judge_memory(mine, mine) == []  # no other source says how wide


def test_new_rows_with_memory_alone_are_judged(tmp_path: Path) -> None:
    with BUILTIN_ROWS.open(newline="") as file:
        reader = csv.DictReader(file)
        row = next(r for r in reader if r["peak_mem_gib"] and r["strategy"] == "FSDP2")
    new = row | {"source": "new", "tokens_per_s_per_gpu": "", "peak_mem_gib": "1000"}
    path = tmp_path / "new.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(new)
    error, inside = table(path)
    assert error.figure > 0.9
    assert (error.is_met, inside.figure, error.num_rows) == (False, 0.0, 1)

"""Tests the exported rows: which exist, their order, their values."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.parity.certificate_file import read_certificate
from scaling.report.rows import Row, rows
from scaling.store.outcome import CellOutcome, write_outcome
from scaling.store.reader import Store, load_store
from tests.builders.certificates import make_certificate
from tests.builders.records import (
    HOST,
    broken_variants,
    make_config,
    make_crashed,
    make_record,
    make_run,
)
from unitransformer.config import ParallelConfig, to_dict
from unitransformer.costs.flops import count_flops
from unitransformer.record.checksums import add_checksums
from unitransformer.record.schema import Record, write_record


def make_outcome(**changes: Any) -> CellOutcome:
    actual: dict[str, Any] = {
        "cell": "0123456789ab",
        "repeat": 2,
        "recipe": "gpt",
        "options": {"strategy": "ddp", "batch-size": "2"},
        "command": "python -m recipes.gpt --strategy ddp --batch-size 2",
        "status": "ok",
        "config": make_config(),
    }
    return CellOutcome(**(actual | changes))


def row_of(record: Record, name: str = "runs/a.json") -> Row:
    (row,) = rows(Store(runs=(make_run(record, name),), left_out=()))
    return row


def test_exported_values_come_from_the_samples() -> None:
    row = row_of(make_record(tokens_per_s=987.0, metrics={"median_step_s": 7.0}, mfu=[]))
    # 16 tokens in a tenth of a second.
    assert (row.median_step_s, row.units_per_s, row.unit) == (0.1, 160, "tokens")
    assert (row.num_steps, row.mean_units_per_s) == (12, pytest.approx(160))
    assert (row.low_units_per_s, row.high_units_per_s) == (None, None), "10 samples are too few"
    flops = count_flops(make_config())
    assert row.flops_per_unit_matmul == flops["matmul"]
    assert row.mfu_matmul is None, "a CPU has no published peak"
    assert row.share_of_ceiling_palm == pytest.approx(160 * flops["palm"] / 1e11)
    assert (row.status, row.reason, row.flags) == ("ok", None, "")


def test_an_interval_has_its_two_ends_in_seconds_and_in_rates() -> None:
    row = row_of(make_record(step_s=[0.5, 0.3] + [0.1, 0.2] * 26))
    assert row.low_step_s is not None
    assert row.high_step_s is not None
    assert row.low_units_per_s == 16 / row.high_step_s
    assert row.high_units_per_s == 16 / row.low_step_s


def test_a_row_has_the_rate_per_device_and_peaks_over_ranks() -> None:
    config = replace(make_config(), parallel=ParallelConfig(strategy="ddp", devices=2))
    record = make_record(
        config=to_dict(config),
        world_size=2,
        global_batch_size=4,
        peak_bytes=[300, 200],
        peak_resident_bytes=[None, 700],
    )
    row = row_of(record)
    assert (row.units_per_s, row.units_per_s_per_device) == (320, 160)
    assert (row.peak_bytes, row.least_peak_bytes, row.peak_resident_bytes) == (300, 200, 700)


def test_a_run_too_short_for_a_steady_state_has_a_reason() -> None:
    row = row_of(make_record(step_s=[0.1] * 5))
    assert (row.status, row.units_per_s) == ("ok", None)
    assert row.reason == "no steady state: 5 steps, needs 8"


def test_a_crashed_row_has_a_reason_and_no_values() -> None:
    error = {"type": "OSError", "message": "secret-node-7: /home/jane/a.txt is gone"}
    row = row_of(make_crashed(error=error))
    assert row.status == "crashed"
    assert row.reason == "OSError: (host): …/a.txt is gone"
    assert (row.units_per_s, row.peak_bytes, row.size) == (None, None, "tiny")


def test_rows_name_no_host_and_take_the_repeat_from_the_file_name() -> None:
    row = row_of(make_record(), "runs/0123456789ab-3.json")
    assert HOST["hostname"] not in str(row)
    assert (row.repeat, row.record) == (3, "runs/0123456789ab-3.json")
    assert row.hardware == (
        "1 rank on 1 machine: Example 9000, 2 cores, 4.00 GiB memory, Linux 6.1 x86_64, "
        "2 threads per rank"
    )
    assert (row.commit, row.is_dirty, row.torch) == ("0123456789abcdef", True, "2.13.0")


def test_a_row_describes_its_parity_proof() -> None:
    certificate = read_certificate(make_certificate(), "runs/parity.json")
    config = replace(make_config(), parallel=ParallelConfig(strategy="ddp", devices=2))
    record = make_record(config=to_dict(config), world_size=2, global_batch_size=4)
    store = Store(runs=(make_run(record),), left_out=(), certificates=(certificate,))
    assert rows(store)[0].parity == "equal on devices 2, runs/parity.json"
    assert row_of(record).parity == "none"


# ---------------------------------------------------------------------------------- sweeps


def test_a_cell_and_its_record_are_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "cells" / "0123456789ab-2"
    write_record(make_record(), folder / "record.json")
    write_outcome(make_outcome(record="record.json", started_at="2026-02-02"), folder)
    (row,) = rows(load_store([tmp_path], relative_to=tmp_path))
    assert (row.sweep, row.repeat, row.units_per_s) == ("sweep", 2, 160)
    assert row.record == "sweep/cells/0123456789ab-2/record.json"
    assert row.command == "python -m recipes.gpt --strategy ddp --batch-size 2"


def test_a_cell_without_a_record_keeps_its_status_and_config(tmp_path: Path) -> None:
    reason = "out of memory in /home/jane/model.py"
    write_outcome(make_outcome(status="oom", reason=reason), tmp_path / "s" / "cells" / "a-1")
    (row,) = rows(load_store([tmp_path], relative_to=tmp_path))
    assert (row.status, row.reason) == ("oom", "out of memory in …/model.py")
    assert (row.strategy, row.batch_size, row.record) == ("auto", 2, None)


def test_a_refused_cell_shows_what_was_asked_for(tmp_path: Path) -> None:
    options = {"strategy": "single", "devices": "2", "batch-size": "many"}
    refused = make_outcome(status="refused", reason="no", options=options, config=None)
    write_outcome(refused, tmp_path / "s" / "cells" / "a-1")
    (row,) = rows(load_store([tmp_path], relative_to=tmp_path))
    assert (row.strategy, row.devices, row.batch_size) == ("single", 2, None)


def test_a_cell_with_a_damaged_record_has_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "cells" / "a-1"
    write_outcome(make_outcome(record="record.json"), folder)
    store = load_store([tmp_path], relative_to=tmp_path)
    actual = "no figures, the record s/cells/a-1/record.json is not used: "
    assert rows(store)[0].reason == f"{actual}it is not there"
    (folder / "record.json").write_text(json.dumps(add_checksums(make_record() | {"schema": 99})))
    (row,) = rows(load_store([tmp_path], relative_to=tmp_path))
    assert (row.units_per_s, row.status) == (None, "ok")
    assert str(row.reason).startswith(f"{actual}record: schema is 99")


# ---------------------------------------------------------------------------------- all of them


def test_the_order_of_rows_depends_only_on_their_values() -> None:
    names = ("b.json", "a.json", "c.json", "d.json")
    records = (make_record("vit"), make_record("gpt"), make_record("bert"), make_crashed("gpt"))
    runs = tuple(make_run(record, name) for record, name in zip(records, names, strict=True))
    found = [rows(Store(runs=order, left_out=())) for order in (runs, runs[::-1])]
    assert found[0] == found[1]
    assert [row.record for row in found[0]] == ["c.json", "a.json", "d.json", "b.json"]


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="units_per_s is nan in a row; leave out"):
        Row(recipe="gpt", status="ok", unit="tokens", command="", units_per_s=float("nan"))


def test_a_crashed_record_with_any_broken_value_is_a_row_or_rejected(tmp_path: Path) -> None:
    for index, broken in enumerate(broken_variants(make_crashed())):
        (tmp_path / f"{index}.json").write_text(json.dumps(add_checksums(broken)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert len(rows(store)) == len(store.runs) > 100

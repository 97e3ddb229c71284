"""Tests the store: which files are records, which are rejected and why, metrics of raw samples."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaling.lint.contradictions import find_contradictions, find_recounts
from scaling.report.results_md import render_pages
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.outcome import CellOutcome, write_outcome
from scaling.store.reader import Store, load_store
from tests.builders.records import (
    CEILING,
    STEP_S,
    as_recorded,
    broken_variants,
    make_crashed,
    make_record,
    make_run,
)
from tests.builders.reports import OPTIONS
from unitransformer.record.checksums import add_checksums
from unitransformer.record.schema import load_record, validate, write_record


def with_samples(**more: Any) -> dict[str, Any]:
    samples: dict[str, Any] = make_record()["samples"] | more
    return samples


def nothing_done() -> dict[str, Any]:
    """The fields of a record without a step."""
    nothing = make_record(step_s=[])
    return {name: nothing[name] for name in ("loss", "learning_rate", "step_s", "samples")}


def reasons(store: Store) -> dict[str, tuple[str, str]]:
    return {file.name: (file.kind, file.reason) for file in store.left_out}


# ---------------------------------------------------------------------------------- files


def test_records_are_found_at_any_depth_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_record(make_record("vit"), tmp_path / "b" / "deep" / "x.json")
    write_record(make_record("gpt"), tmp_path / "b" / "a.json")
    write_record(make_record("bert"), tmp_path / "a" / "z.json")
    store = load_store([tmp_path / "b", tmp_path / "a"], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["a/z.json", "b/a.json", "b/deep/x.json"]
    assert store.left_out == ()


def test_run_names_are_relative_to_the_given_folder(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "runs" / "x.json")
    store = load_store([tmp_path / "runs"], relative_to=tmp_path / "docs" / "not-there-yet")
    assert [run.name for run in store.runs] == ["../../runs/x.json"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / ".hidden" / "x.json")
    write_record(make_record(), tmp_path / ".x.json")
    (tmp_path / "notes.txt").write_text("not JSON")
    assert load_store([tmp_path], relative_to=tmp_path) == Store(runs=(), left_out=())


def test_a_file_in_two_of_the_folders_counts_once(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "runs" / "x.json")
    store = load_store([tmp_path, tmp_path / "runs"], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["runs/x.json"]
    assert store.left_out == ()


def test_a_copy_of_a_record_is_rejected_and_names_the_first(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "a.json")
    (tmp_path / "b.json").write_text(
        json.dumps(add_checksums(make_record()), indent=4, sort_keys=True)
    )
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["a.json"]
    assert reasons(store) == {"b.json": ("duplicate", "the same as a.json")}


def test_records_share_the_values_of_fields_with_the_same_text(tmp_path: Path) -> None:
    for seed in range(2):
        write_record(make_record(seed=seed), tmp_path / f"{seed}.json")
    changed = (tmp_path / "1.json").read_text().replace('"world_size": 1', '"world_size": 2')
    (tmp_path / "2.json").write_text(changed)
    store = load_store([tmp_path], relative_to=tmp_path)
    first, second = (run.record for run in store.runs)
    assert first["step_s"] is second["step_s"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert (
        reasons(store)["2.json"][1]
        == "record: world_size was changed after it was written; measure again"
    )
    assert (
        load_record(tmp_path / "0.json")["step_s"] is not load_record(tmp_path / "0.json")["step_s"]
    )


def test_a_field_that_the_record_before_has_is_still_required(tmp_path: Path) -> None:
    record = make_record()
    assert record["no_steady_state_reason"] is None
    write_record(record, tmp_path / "a.json")
    for name in ("no_steady_state_reason", "ceiling", "gpu", "compile", "mfu"):
        lacking = {field: value for field, value in record.items() if field != name}
        write_record(lacking, tmp_path / f"b-{name}.json")
        broken = record | {name: "text", "loss": [1.0] * len(STEP_S)}
        write_record(broken, tmp_path / f"c-{name}.json")
    write_record(record | {"seed": 1}, tmp_path / "d.json")
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["a.json", "c-no_steady_state_reason.json", "d.json"]
    for name, (kind, reason) in reasons(store).items():
        assert kind == "damaged"
        assert name.split("-")[1].removesuffix(".json") in reason


def test_json_that_is_not_a_record_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    store = load_store([tmp_path], relative_to=tmp_path)
    assert {kind for kind, _ in reasons(store).values()} == {"foreign"}
    assert len(store.left_out) == 2


def test_other_files_that_the_suite_writes_are_not_left_out(tmp_path: Path) -> None:
    for name, content in (
        ("study.json", {"kind": "study", "schema": 1}),
        ("largest-batches.json", {"kind": "largest-batches", "version": 1}),
        ("calibration.json", {"calibration_schema": 1}),
        ("shares-rank0.json", {"rows": [], "head_by": None, "step_s": 0.1, "steps": [3]}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert store.left_out == ()
    assert len(store.own_files) == 4


def with_seconds(seconds: Any) -> dict[str, Any]:
    return CEILING | {"copy": CEILING["copy"] | {"seconds": seconds}}


@pytest.mark.parametrize("study", ['{"kind": "study", "schema": 1}', "damaged"])
def test_the_record_of_a_first_cell_that_still_runs_is_no_single_run(
    study: str, tmp_path: Path
) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "study.json").write_text(study)
    write_record(make_record(), tmp_path / "night" / "cells" / "0123456789ab-1" / "x.json")
    write_record(make_record("vit"), tmp_path / "cells" / "mine" / "x.json")
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["cells/mine/x.json"]
    _, reason = reasons(store)["night/cells/0123456789ab-1/x.json"]
    assert "without an outcome" in reason


METRICS = make_record()["metrics"]
MFU_ROW = make_record()["mfu"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 99}, "schema is 99"),
        (nothing_done(), "0 losses, 0 times"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"loss": [float("nan")] * 12}, "not a finite number"),
        ({"steady_from": 12}, "steady_from is 12"),
        ({"segment_starts": [0, 6]}, "steady_from is 2"),
        ({"step_s": [0.0] * 12}, "took no time"),
        ({"validation": {}}, "validation.loss is missing"),
        ({"hardware": []}, "hardware is empty"),
        ({"peak_bytes": ["much"]}, "peak_bytes is not a list of int or null"),
        ({"ceiling": [CEILING | {"dtype": None}]}, "ceiling.0: dtype is None"),
        ({"metrics": {}}, "metrics holds 0 fields, and steady_from is 2"),
        ({"metrics": METRICS | {"units_per_s": "1"}}, "metrics: units_per_s is '1'"),
        ({"metrics": METRICS | {"median_step_s": 0.0}}, "metrics.median_step_s is 0.0"),
        ({"mfu": []}, "mfu is empty"),
        ({"mfu": [{}]}, "mfu.0 must have exactly the fields convention, "),
        ({"mfu": [MFU_ROW | {"flops_per_s": 1.0}]}, "mfu.6n.flops_per_s is 1.0; by"),
        ({"mfu": [MFU_ROW | {"definition": None}]}, "mfu.0.definition is None"),
        ({"mfu": [MFU_ROW | {"convention": "x"}]}, "mfu.0.convention is 'x'; known: 6n, "),
        ({"mfu": [MFU_ROW | {"kind": "HFU"}]}, "mfu.0.kind is 'HFU'; 6n has MFU"),
        ({"mfu": [MFU_ROW, MFU_ROW]}, "mfu holds two rows of one convention"),
        ({"ceiling": [with_seconds(0)]}, "ceiling.0: copy.seconds is not a list"),
        ({"ceiling": [CEILING | {"matmul": [{"seconds": 0}]}]}, "matmul.0: seconds is not a list"),
        ({"ceiling": [CEILING | {"copy_bytes_per_s": 0}]}, "copy_bytes_per_s is 0; it must be"),
        ({"segment_starts": [-1]}, "segment_starts is [-1], not steps of 12 in order"),
        ({"samples": {}}, "samples.cpu_s is missing"),
        ({"samples": with_samples(communication_s=[0.1])}, "samples.communication_s and step_s"),
        (
            {"samples": with_samples(between_steps_s=[None, "1"] * 6)},
            "samples.between_steps_s holds",
        ),
        ({"samples_missing": []}, "samples_missing is []"),
        ({"excluded_steps": [{"step": 3}]}, "excluded_steps.0: reason is missing"),
        ({"num_parameters": 10**400}, "num_parameters"),
        ({"world_size": 2}, "world_size is 2; its config says 1"),
    ],
)
def test_a_damaged_record_is_rejected_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_record(make_record(), tmp_path / "good.json")
    (tmp_path / "bad.json").write_text(json.dumps(add_checksums(make_record() | changes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["good.json"]
    kind, actual = reasons(store)["bad.json"]
    assert kind == "damaged"
    assert reason in actual


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": "x"}, "recipe is 'x'; known: bert, gpt, vit"),
        ({"options": {"devices": [1]}}, "options.devices is [1]; it must be text or a number"),
        ({"options": {"devices": None}}, "options.devices is None"),
    ],
)
def test_a_damaged_outcome_is_left_out_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    outcome = CellOutcome(
        cell="a" * 12, repeat=1, recipe="gpt", options={}, command="python", status="refused"
    )
    write_outcome(replace(outcome, **changes), tmp_path)
    store = load_store([tmp_path], relative_to=tmp_path)
    assert store.cells == ()
    kind, actual = reasons(store)["outcome.json"]
    assert kind == "damaged"
    assert reason in actual


def test_files_that_cannot_be_read_as_json_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(json.dumps(make_record())[:100])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.json")
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [kind for kind, _ in reasons(store).values()] == ["damaged"] * 5
    assert str(tmp_path) not in str(store)


def test_links_to_nothing_and_files_that_are_none_are_left_out_by_their_own_names(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs"
    write_record(make_record(), folder / "good.json")
    os.symlink(tmp_path / "nowhere", folder / "dangling.json")
    os.symlink(folder / "loop.json", folder / "loop.json")
    os.symlink("/dev/zero", folder / "device.json")
    os.mkfifo(folder / "pipe.json")
    store = load_store([folder], relative_to=folder)
    assert [run.name for run in store.runs] == ["good.json"]
    missing = os.strerror(errno.ENOENT)
    assert reasons(store) == {
        "dangling.json": ("damaged", f"cannot be read: {missing}"),
        "device.json": ("damaged", "not a regular file"),
        "loop.json": ("damaged", f"cannot be read: {os.strerror(errno.ELOOP)}"),
        "pipe.json": ("damaged", "not a regular file"),
    }


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder"):
        load_store([tmp_path / "nowhere"], relative_to=tmp_path)
    write_record(make_record(), tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is a file; give the folder"):
        load_store([tmp_path / "x.json"], relative_to=tmp_path)


def test_a_record_with_any_broken_value_is_rejected_or_reported(
    is_whole_proof: bool, tmp_path: Path
) -> None:
    for recipe in ("gpt", "vit"):
        for index, broken in enumerate(broken_variants(make_record(recipe))):
            (tmp_path / f"{recipe}-{index}.json").write_text(json.dumps(add_checksums(broken)))
    for index, broken in enumerate(broken_variants(make_crashed())):
        (tmp_path / f"crashed-{index}.json").write_text(json.dumps(add_checksums(broken)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert len(store.left_out) > 300
    assert len(store.runs) > 100
    for run in store.runs[:: 1 if is_whole_proof else 25]:
        alone = Store(runs=(run,), left_out=())
        assert all(render_pages(StoreAnalysis(alone), OPTIONS).values())
    many = Store(runs=store.runs, left_out=store.left_out)
    assert all(render_pages(StoreAnalysis(many), OPTIONS).values())


# ------------------------------------------------------------------------------ metrics


def test_the_rate_follows_from_the_median_steady_step() -> None:
    run = make_run()
    assert run.metrics is not None
    assert run.metrics.step.count == 10
    assert run.units_per_s == 16 / 0.1


def test_an_unsteady_step_is_excluded() -> None:
    # A slow step among steady ones, during which torch compiled.
    step_s = [*STEP_S, 0.9, 0.1]
    unsteady = [{"step": 12, "reason": "compiled"}]
    run = make_run(make_record(step_s=step_s) | {"excluded_steps": unsteady})
    assert run.metrics is not None
    assert run.metrics.step.count == 11
    assert run.metrics.mean_units_per_s == pytest.approx(160)


def test_an_older_record_lacks_communication_and_time_between_steps() -> None:
    old, new = make_record(), make_record()
    new["samples"] |= {"communication_s": [0.0] * 12, "min_communication_s": [0.0] * 12}
    new["samples"] |= {"between_steps_s": [None] + [0.0] * 11}
    for record in (old, new):
        validate(add_checksums(record))
    assert find_contradictions(make_run(old)) == []
    metrics = make_run(new).metrics
    assert metrics is not None
    assert (metrics.between_steps_share, metrics.waiting_share) == (0.0, 0.0)


def test_an_image_counts_as_one_unit() -> None:
    assert make_run(make_record("vit")).units_per_s == 2 / 0.1


def test_a_run_too_short_to_be_steady_has_no_rate() -> None:
    run = make_run(make_record(step_s=[0.1] * 5))
    assert run.metrics is None
    assert run.units_per_s is None
    assert find_contradictions(run) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens_per_s": 160.0 * (1 + 1e-8)}, "tokens_per_s is 160.0000016"),
        ({"tokens_per_s": None}, "tokens_per_s is nothing"),
        ({"tokens_per_s": "fast"}, "tokens_per_s is 'fast'"),
        ({"num_parameters": 1}, "num_parameters is 1"),
        ({"step_s": [0.5, 0.3] + [0.2] * 10}, "tokens_per_s is 160.0 in the record, 80.0 by"),
        ({"metrics": {}}, "metrics.median_step_s is nothing in the record"),
        ({"ceiling": [CEILING | {"matmul_flops_per_s": 2e11}]}, "ceiling.0.matmul_flops_per_s is"),
    ],
)
def test_an_edited_field_contradicts_the_samples(changes: dict[str, Any], field: str) -> None:
    found = find_contradictions(as_recorded(make_record() | changes))
    assert any(line.startswith(field) for line in found)


def test_a_rate_that_differs_by_rounding_is_accepted() -> None:
    assert find_contradictions(as_recorded(make_record(tokens_per_s=160.0 * (1 + 1e-12)))) == []


def test_an_edited_perplexity_contradicts_the_validation_loss() -> None:
    record = make_record()
    record["validation"]["value"] = 1.5
    (found,) = find_contradictions(as_recorded(record))
    assert found.startswith("validation.value is 1.5 in the record, 7.38905")


def test_energy_that_differs_from_its_gpu_readings_is_a_contradiction() -> None:
    quiet = {"sm_clock_hz": None, "memory_clock_hz": None, "power_w": None, "temperature_c": None}
    gpu = {"missing": {}, "joules": 80.0, "joules_num_steps": 8} | {
        "samples": [
            quiet | {"step": step, "energy_j": 10.0 * step, "clock_reasons": None}
            for step in (0, 4, 12)
        ]
    }
    assert find_contradictions(as_recorded(make_record(gpu=[gpu]))) == []
    (found,) = find_contradictions(as_recorded(make_record(gpu=[gpu | {"joules": 120.0}])))
    assert found == "gpu.0.joules is 120.0 in the record, 80.0 by its samples and config"


def test_flops_by_another_count_are_a_recount_and_not_a_contradiction() -> None:
    record = make_record()
    record["flops_per_token"] = record["flops_per_token"] | {"palm": 1.0}
    assert find_contradictions(as_recorded(record)) == []
    (found,) = find_recounts(as_recorded(record))
    assert found.startswith("flops_per_token.palm is 1.0 in the record, ")

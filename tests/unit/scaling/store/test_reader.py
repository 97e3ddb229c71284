"""The store: what counts as a record, what is left out and why, what raw samples say."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scaling.lint.contradictions import find_contradictions, find_recounts
from scaling.report.results_md import render_pages
from scaling.store.reader import Store, load_store
from scaling.store.run import Run
from unitransformer.config import DataConfig, ModelConfig, Recipe, RunConfig, to_dict
from unitransformer.costs.flops import count_flops, count_parameters
from unitransformer.machine.calibration import Ceiling, Samples
from unitransformer.measure.compile_ledger import CompileLedger
from unitransformer.record.metrics import passport_of, read_out, recorded_steady
from unitransformer.record.schema import SCHEMA, Record, config_of, validate, write_record
from unitransformer.record.seals import seal
from unitransformer.stats.steady_state import Steady

# 16 tokens or 2 pictures a step; two slow steps, then ten of a tenth of a second.
STEP_S = [0.5, 0.3] + [0.1] * 10
HOST = {
    "hostname": "secret-node-7",
    "cpu": "Example 9000",
    "cpu_cores": 2,
    "memory_bytes": 4 * 2**30,
    "system": "Linux 6.1",
    "machine": "x86_64",
    "device": "cpu",
    "threads": 2,
    "float32_matmul_precision": "highest",
}
# 1 GFLOP in 10 ms, 1 GB in 0.1 s.
CEILING = Ceiling(
    device="cpu",
    dtype="float32",
    threads=2,
    matmul=(Samples(name="x W^T 8x8x8", work=10**9, seconds=(0.02, 0.01)),),
    copy=Samples(name="copy", work=10**9, seconds=(0.1,)),
    elapsed_s=0.2,
).as_dict()


def make_config(recipe: Recipe = "gpt", *, num_steps: int = len(STEP_S)) -> RunConfig:
    pictures = {"image_size": 8, "patch_size": 4, "num_positions": 5, "num_classes": 3}
    shape = pictures if recipe == "vit" else {"num_positions": 8, "num_classes": 50}
    model = ModelConfig(
        width=16, num_layers=2, num_heads=4, feedforward_width=32, causal=recipe == "gpt", **shape
    )
    return RunConfig(
        recipe=recipe,
        size="tiny",
        model=model,
        data=DataConfig(),
        batch_size=2,
        max_steps=num_steps,
    )


def make_record(
    recipe: Recipe = "gpt", *, step_s: list[float] | None = None, status: str = "ok", **changes: Any
) -> Record:
    """A record that is valid and agrees with itself; `changes` replace top-level fields."""
    step_s = STEP_S if step_s is None else step_s
    config = make_config(recipe, num_steps=max(1, len(step_s)))
    unit = "image" if recipe == "vit" else "token"
    per_step = config.global_batch_size * config.tokens_per_sample
    steps = len(step_s)
    first = 2 if steps >= 8 else None
    samples = {
        "cpu_s": [2 * s for s in step_s],
        "data_s": [0.1 * s for s in step_s],
        "forward_backward_s": [0.6 * s for s in step_s],
        "optimizer_s": [0.3 * s for s in step_s],
        "slowest_rank": [0] * steps,
    }
    steady = Steady(start=first, reason=None if first else f"{steps} steps, needs 8")
    readout = read_out(step_s, samples, steady, launches=[0], units_per_step=per_step)
    rate = None if readout is None else readout.units_per_s
    baseline = {"name": "unigram entropy", "loss": 2.5, "accuracy": None}
    by_accuracy = {"name": "majority class 1", "loss": None, "accuracy": 0.25}
    return {
        "schema": SCHEMA,
        "status": status,
        "recipe": recipe,
        "size": "tiny",
        "config": to_dict(config),
        "world_size": 1,
        "global_batch_size": config.global_batch_size,
        "num_parameters": count_parameters(config.model),
        "command": f"python -m recipes.{recipe} --max-steps {steps}",
        "code": {"commit": "0123456789abcdef", "is_dirty": True},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": [HOST],
        "data": {"description": "a small text", "sha256": "ab" * 32},
        "launches": [0],
        "loss": [3.0 - 0.1 * step for step in range(steps)],
        "learning_rate": [1e-3] * steps,
        "step_s": step_s,
        "samples": samples,
        "unsteady": [],
        "steady_from": first,
        "steady_method": steady.method,
        "steady_reason": steady.reason,
        "figures": {} if readout is None else readout.as_dict(),
        f"{unit}s_per_s": rate,
        "passport": [asdict(row) for row in passport_of(config, rate, [HOST], [CEILING])],
        "flags": [],
        "host_load": [],
        "gpu": [None],
        "ceiling": [CEILING],
        "compile": [CompileLedger("off").as_dict()],
        "trace": [None],
        "tensor_bytes": [{"bytes": 2**30}],
        "peak_bytes": [2**30],
        "peak_bytes_kind": "tensors",
        "peak_reserved_bytes": [None],
        "peak_resident_bytes": [3 * 2**29],
        f"flops_per_{unit}": count_flops(config),
        "validation": {
            "history": [{"step": max(1, steps), "val_loss": 2.0, "val_accuracy": 0.5}],
            "loss": 2.0,
            "metric": {"gpt": "perplexity", "bert": "masked accuracy", "vit": "top-1"}[recipe],
            "value": 7.38905609893065 if recipe == "gpt" else 0.5,
            "baseline": baseline if recipe == "gpt" else by_accuracy,
        },
        "summary": f"0 | embedding of {recipe} | Embeddings | 800",
        "log": [f"step {step}/{steps} | loss 2.0" for step in range(1, steps + 1)],
        "error": None,
        "started_at": "2026-01-01T00:00:00+00:00",
    } | changes


def with_samples(**more: Any) -> dict[str, Any]:
    samples: dict[str, Any] = make_record()["samples"] | more
    return samples


def nothing_done() -> dict[str, Any]:
    """What a record without a step holds."""
    nothing = make_record(step_s=[])
    return {name: nothing[name] for name in ("loss", "learning_rate", "step_s", "samples")}


def make_crashed(recipe: Recipe = "gpt", **changes: Any) -> Record:
    error = {"type": "RuntimeError", "message": "it broke", "rank": 0, "last_lines": []}
    return make_record(recipe, status="crashed") | {"validation": {}, "error": error} | changes


def with_figures(record: Record) -> Record:
    """The record with the figures that its samples, config and machine give."""
    config = config_of(record)
    readout = read_out(
        record["step_s"],
        record["samples"],
        recorded_steady(record),
        launches=record["launches"],
        units_per_step=config.global_batch_size * config.tokens_per_sample,
    )
    rate = None if readout is None else readout.units_per_s
    rows = passport_of(config, rate, record["hardware"], record["ceiling"])
    return record | {
        "figures": {} if readout is None else readout.as_dict(),
        f"{'image' if config.recipe == 'vit' else 'token'}s_per_s": rate,
        "passport": [asdict(row) for row in rows],
    }


def make_run(record: Record | None = None, name: str = "runs/a.json") -> Run:
    """A run whose figures are those of its samples."""
    return as_recorded(with_figures(make_record() if record is None else record), name)


def as_recorded(record: Record, name: str = "runs/a.json") -> Run:
    """A run with the figures that its record holds, whatever its samples say."""
    return Run(name=name, record=record, config=config_of(record))


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


def test_names_lead_from_the_folder_that_is_asked_for(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "runs" / "x.json")
    store = load_store([tmp_path / "runs"], relative_to=tmp_path / "docs" / "not-there-yet")
    assert [run.name for run in store.runs] == ["../../runs/x.json"]


def test_hidden_files_and_folders_are_not_looked_at(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / ".hidden" / "x.json")
    write_record(make_record(), tmp_path / ".x.json")
    (tmp_path / "notes.txt").write_text("not JSON")
    assert load_store([tmp_path], relative_to=tmp_path) == Store(runs=(), left_out=())


def test_a_file_below_two_of_the_folders_counts_once(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "runs" / "x.json")
    store = load_store([tmp_path, tmp_path / "runs"], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["runs/x.json"]
    assert store.left_out == ()


def test_a_copy_of_a_record_is_left_out_and_names_the_first(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(seal(make_record()), indent=4, sort_keys=True))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["a.json"]
    assert reasons(store) == {"b.json": ("duplicate", "the same as a.json")}


def test_json_that_is_something_else_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    store = load_store([tmp_path], relative_to=tmp_path)
    assert {kind for kind, _ in reasons(store).values()} == {"foreign"}
    assert len(store.left_out) == 2


FIGURES = make_record()["figures"]
PASSPORT = make_record()["passport"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 99}, "schema is 99"),
        (nothing_done(), "0 losses, 0 times"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"loss": [float("nan")] * 12}, "not a finite number"),
        ({"steady_from": 12}, "steady_from is 12"),
        ({"launches": [0, 6]}, "steady_from is 2"),
        ({"step_s": [0.0] * 12}, "took no time"),
        ({"validation": {}}, "validation.loss is missing"),
        ({"hardware": []}, "hardware is empty"),
        ({"peak_bytes": ["much"]}, "peak_bytes is not a list of int or null"),
        ({"ceiling": [CEILING | {"dtype": None}]}, "ceiling.0: dtype is None"),
        ({"figures": {}}, "figures holds 0 fields, and steady_from is 2"),
        ({"figures": FIGURES | {"units_per_s": "1"}}, "figures: units_per_s is '1'"),
        ({"figures": FIGURES | {"median_step_s": 0.0}}, "figures.median_step_s is 0.0"),
        ({"passport": []}, "passport is empty"),
        ({"passport": [{}]}, "passport.0 does not have exactly the fields convention, "),
        ({"passport": [PASSPORT | {"flops_per_s": 1.0}]}, "passport.6n.flops_per_s is 1.0; by"),
        ({"passport": [PASSPORT | {"counts": None}]}, "passport.0.counts is None"),
        ({"samples": {}}, "samples.cpu_s is missing"),
        ({"samples": with_samples(communication_s=[0.1])}, "samples.communication_s and step_s"),
        ({"samples": with_samples(between_s=[None, "1"] * 6)}, "samples.between_s holds"),
        ({"samples_untold": []}, "samples_untold is list"),
        ({"unsteady": [{"step": 3}]}, "unsteady.0: reason is missing"),
        ({"num_parameters": 10**400}, "num_parameters"),
        ({"world_size": 2}, "world_size is 2; its config says 1"),
    ],
)
def test_a_damaged_record_is_left_out_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_record(make_record(), tmp_path / "good.json")
    (tmp_path / "bad.json").write_text(json.dumps(seal(make_record() | changes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [run.name for run in store.runs] == ["good.json"]
    kind, told = reasons(store)["bad.json"]
    assert kind == "damaged"
    assert reason in told


def test_files_that_cannot_be_read_as_json_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(json.dumps(make_record())[:100])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.json")
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [kind for kind, _ in reasons(store).values()] == ["damaged"] * 5
    assert str(tmp_path) not in str(store)


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder"):
        load_store([tmp_path / "nowhere"], relative_to=tmp_path)
    write_record(make_record(), tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is a file; give the folder"):
        load_store([tmp_path / "x.json"], relative_to=tmp_path)


def test_whatever_is_broken_in_a_record_it_is_left_out_or_reported(tmp_path: Path) -> None:
    for recipe in ("gpt", "vit"):
        for index, broken in enumerate(broken_variants(make_record(recipe))):
            (tmp_path / f"{recipe}-{index}.json").write_text(json.dumps(seal(broken)))
    for index, broken in enumerate(broken_variants(make_crashed())):
        (tmp_path / f"crashed-{index}.json").write_text(json.dumps(seal(broken)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert len(store.left_out) > 300
    assert len(store.runs) > 100
    for run in store.runs:
        alone = Store(runs=(run,), left_out=())
        assert all(render_pages(alone, command="", plots="plots").values())
    many = Store(runs=store.runs, left_out=store.left_out)
    assert all(render_pages(many, command="", plots="plots").values())


def broken_variants(record: Record) -> Iterator[Record]:
    """`record` with each of its values replaced by things it cannot or could be."""
    for path in list(_paths(record)):
        for value in (None, "x|y", -1, 10**400, [], {}, [None]):
            broken = copy.deepcopy(record)
            place: Any = broken
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield broken


def _paths(values: Any) -> Iterator[tuple[Any, ...]]:
    keys = values if isinstance(values, dict) else range(min(1, len(values)))
    for key in keys:
        yield (key,)
        if isinstance(values[key], dict | list):
            yield from ((key, *rest) for rest in _paths(values[key]))


# ---------------------------------------------------------------------------------- figures


def test_the_rate_is_that_of_the_median_steady_step() -> None:
    run = make_run()
    assert run.readout is not None
    assert run.readout.step.count == 10
    assert run.units_per_s == 16 / 0.1


def test_a_step_that_was_measured_otherwise_is_left_out() -> None:
    # A slow one amid the steady ones, that the compiler held up.
    step_s = [*STEP_S, 0.9, 0.1]
    unsteady = [{"step": 12, "reason": "compiled"}]
    run = make_run(make_record(step_s=step_s) | {"unsteady": unsteady})
    assert run.readout is not None
    assert run.readout.step.count == 11
    assert run.readout.mean_units_per_s == pytest.approx(160)


def test_a_record_of_before_tells_neither_communication_nor_what_lay_between_steps() -> None:
    old, new = make_record(), make_record()
    new["samples"] |= {"communication_s": [0.0] * 12, "least_communication_s": [0.0] * 12}
    new["samples"] |= {"between_s": [None] + [0.0] * 11}
    for record in (old, new):
        validate(seal(record))
    assert find_contradictions(make_run(old)) == []
    told = make_run(new).readout
    assert told is not None
    assert (told.between_share, told.waiting_share) == (0.0, 0.0)


def test_a_picture_counts_as_one() -> None:
    assert make_run(make_record("vit")).units_per_s == 2 / 0.1


def test_a_run_too_short_to_be_steady_has_no_rate() -> None:
    run = make_run(make_record(step_s=[0.1] * 5))
    assert run.readout is None
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
        ({"figures": {}}, "figures.median_step_s is nothing in the record"),
        ({"ceiling": [CEILING | {"matmul_flops_per_s": 2e11}]}, "ceiling.0.matmul_flops_per_s is"),
    ],
)
def test_an_edited_field_contradicts_the_samples(changes: dict[str, Any], field: str) -> None:
    found = find_contradictions(as_recorded(make_record() | changes))
    assert any(told.startswith(field) for told in found)


def test_a_rate_that_is_off_by_rounding_is_believed() -> None:
    assert find_contradictions(as_recorded(make_record(tokens_per_s=160.0 * (1 + 1e-12)))) == []


def test_an_edited_perplexity_contradicts_the_validation_loss() -> None:
    record = make_record()
    record["validation"]["value"] = 1.5
    (found,) = find_contradictions(as_recorded(record))
    assert found.startswith("validation.value is 1.5 in the record, 7.38905")


def test_joules_that_the_looks_at_the_gpu_do_not_say_are_a_contradiction() -> None:
    quiet = {"sm_clock_hz": None, "memory_clock_hz": None, "power_w": None, "temperature_c": None}
    gpu = {"untold": {}, "joules": 80.0, "joules_of_steps": 8} | {
        "samples": [
            quiet | {"step": step, "energy_j": 10.0 * step, "clock_reasons": None}
            for step in (0, 4, 12)
        ]
    }
    assert find_contradictions(as_recorded(make_record(gpu=[gpu]))) == []
    (found,) = find_contradictions(as_recorded(make_record(gpu=[gpu | {"joules": 120.0}])))
    assert found == "gpu.0.joules is 120.0 in the record, 80.0 by its samples and config"


def test_flops_counted_otherwise_are_a_recount_and_no_contradiction() -> None:
    record = make_record()
    record["flops_per_token"] = record["flops_per_token"] | {"palm": 1.0}
    assert find_contradictions(as_recorded(record)) == []
    (found,) = find_recounts(as_recorded(record))
    assert found.startswith("flops_per_token.palm is 1.0 in the record, ")

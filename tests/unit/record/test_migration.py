"""Records of schema 2 are read with the names and phrases of today's schema."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from scaling.store.reader import load_store
from unitransformer.record.checksums import add_checksums
from unitransformer.record.migration import CHANGED, NAMES, OLD_CHECKSUMS, OLD_SCHEMA, migrate
from unitransformer.record.schema import SCHEMA, Record, load_record, write_record

Pair = tuple[dict[str, Any], Record]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Returns the raw JSON of a record of schema 2 and the record that is read from it."""
    path = Path(__file__).parent / "schema_2.json"
    old = json.loads(path.read_text())
    assert old["schema"] == OLD_SCHEMA
    return old, load_record(path)


def test_a_record_of_schema_2_is_read_with_the_same_values(pair: Pair) -> None:
    old, record = pair
    assert record["schema"] == SCHEMA
    for name in ("config", "loss", "step_s", "command", "validation", "ceiling", "hardware"):
        assert record[name] == old[name]
    assert record["segment_starts"] == old["launches"]
    new_samples, old_samples = record["samples"], old["samples"]
    assert new_samples["min_communication_s"] == old_samples["least_communication_s"]
    assert new_samples["between_steps_s"] == old_samples["between_s"]
    steps = [[item["step"] for item in old["unsteady"]], old["steady_from"]]
    assert [[item["step"] for item in record["excluded_steps"]], record["steady_from"]] == steps
    for name in set(old["figures"]) - {"interval", "between_share"}:
        assert record["metrics"][name] == old["figures"][name]
    definitions = [row["counts"] for row in old["passport"]]
    assert [row["definition"] for row in record["mfu"]] == definitions
    (new_load,), (old_load,) = record["host_load"], old["host_load"]
    assert new_load["other_processes_cpu_s"] == old_load["others_cpu_s"]
    assert new_load["end"]["run_cpu_s"] == old_load["end"]["own_cpu_s"]
    assert record["gpu"][0]["missing"]["all"] == old["gpu"][0]["untold"]["all"]


def test_no_name_of_schema_2_is_left(pair: Pair) -> None:
    assert not names_in(pair[1] | {"checksums": {}}) & NAMES.keys()


def names_in(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return set(value).union(*map(names_in, value.values())) if isinstance(value, dict) else set()


def test_no_stored_file_is_damaged(repository: Path) -> None:
    store = load_store([repository / "scaling/results"], relative_to=repository)
    assert [file for file in store.left_out if file.kind == "damaged"] == []
    assert all(cell.run is not None for cell in store.cells if cell.outcome.status == "ok")


def test_a_migrated_record_is_written_with_the_schema_of_today(pair: Pair, tmp_path: Path) -> None:
    record = write_record(pair[1], tmp_path / "new.json")
    assert load_record(tmp_path / "new.json") == record
    assert record["schema"] == SCHEMA
    assert OLD_CHECKSUMS not in record


def test_checksums_of_schema_2_are_those_of_its_own_names(pair: Pair, tmp_path: Path) -> None:
    old, path = pair[0], tmp_path / "a.json"
    path.write_text(json.dumps(old | {"launches": [0, 1]}))
    with pytest.raises(ValueError, match="launches was changed after it was written"):
        load_record(path)
    renamed = {NAMES[name] if name == "launches" else name: value for name, value in old.items()}
    path.write_text(json.dumps(renamed))
    with pytest.raises(ValueError, match="launches is missing"):
        load_record(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "no interval: 98 samples that hang together over 24 of them, an interval needs 120",
            "no interval: autocorrelated over 24 steps; needs 120 samples",
        ),
        (
            "GPU clock held down by software power cap at 3 looks, first at step 9 (rank 0)",
            "GPU clock limited by software power cap in 3 samples, first at step 9 (rank 0)",
        ),
        (
            "on a GPU zero1 waits on streams of its own; --trace tells communication apart",
            "zero1 waits on its own GPU streams; use --trace instead",
        ),
        ("digits, 1797 pictures of 8 x 8", "digits, 1797 images of 8 x 8"),
        ("12 samples, an interval needs 50", "12 samples, an interval needs 50"),
    ],
)
def test_stored_phrases_become_those_of_today(old: str, new: str) -> None:
    record = {"figures": {"interval": old}, "flags": [old], "gpu": [{"untold": {"all": old}}]}
    assert migrate(record, SCHEMA) == {
        "schema": SCHEMA,
        "metrics": {"interval": new},
        "flags": [new],
        "gpu": [{"missing": {"all": new}}],
    }


@pytest.mark.parametrize("broken", [None, 3, "x", [], {}, [None], {"untold": None}])
def test_a_broken_value_of_schema_2_is_read_or_refused(
    broken: Any, pair: Pair, tmp_path: Path
) -> None:
    old, path = pair[0], tmp_path / "a.json"
    for name in (name for name in old if NAMES.get(name, name) in CHANGED):
        path.write_text(json.dumps(add_checksums(old | {name: broken})))
        with contextlib.suppress(ValueError):
            assert load_record(path)["schema"] == SCHEMA
        load_store([tmp_path], relative_to=tmp_path)

"""Tests how a run chooses the blocks of its loss, and that it measures them once."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes import bert, gpt, vit
from unitransformer.config import ParallelConfig, RunConfig
from unitransformer.costs.memory import LOSS_ROWS
from unitransformer.files import CACHE_FOLDER
from unitransformer.machine import loss_blocks
from unitransformer.machine.loss_blocks import LossBlocks, choose_loss_blocks, measure_columns

LARGE = RunConfig(
    recipe="gpt",
    size="reference",
    model=gpt.PRESET.model_config("reference"),
    batch_size=32,
    parallel=ParallelConfig(accelerator="cpu", strategy="single"),
)


@pytest.fixture(autouse=True)
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Measurements that were made, each of which finds 2,048 columns the fastest."""
    made: list[tuple[int, ...]] = []

    def measure(*shape: int) -> dict[int, float]:
        made.append(shape)
        return {512: 1.2, 1024: 1.021, 2048: 1.0, 4096: 1.001}

    monkeypatch.setenv(CACHE_FOLDER, str(tmp_path))
    monkeypatch.setattr(loss_blocks, "measure_columns", measure)
    return made


def test_a_large_head_is_measured_once(measurements: list[tuple[int, ...]]) -> None:
    first, second = choose_loss_blocks(LARGE), choose_loss_blocks(LARGE)
    assert measurements == [(LOSS_ROWS, 768, 30_522)]
    assert (first.rows, first.columns, first.reason) == (LOSS_ROWS, 2048, "measured")
    assert second == replace(first, reason="measured before")


def test_a_damaged_file_is_measured_again(
    measurements: list[tuple[int, ...]], tmp_path: Path
) -> None:
    choose_loss_blocks(LARGE)
    for number, content in enumerate(("", "{", "[]", '{"columns": 7}'), 2):
        next(tmp_path.rglob("*.json")).write_text(content)
        assert choose_loss_blocks(LARGE).columns == 2048
        assert len(measurements) == number


def test_another_shape_or_given_rows_are_measured_for_themselves(
    measurements: list[tuple[int, ...]],
) -> None:
    choose_loss_blocks(LARGE)
    assert choose_loss_blocks(replace(LARGE, loss_chunk=256)).rows == 256
    choose_loss_blocks(replace(LARGE, pad_vocabulary=128))
    assert measurements == [(1024, 768, 30_522), (256, 768, 30_522), (1024, 768, 30_592)]


def test_a_resumed_run_keeps_what_was_measured_and_not_what_was_given(
    measurements: list[tuple[int, ...]],
) -> None:
    before = LossBlocks(rows=LOSS_ROWS, columns=8192, reason="measured")
    assert choose_loss_blocks(LARGE, before).columns == 8192
    twice = choose_loss_blocks(LARGE, choose_loss_blocks(LARGE, before))
    assert (twice.columns, twice.reason) == (8192, "measured before the run was resumed")
    assert measurements == []
    assert choose_loss_blocks(replace(LARGE, loss_block=100), before).columns == 100
    assert choose_loss_blocks(LARGE, replace(before, reason="given")).columns == 2048
    assert choose_loss_blocks(LARGE, replace(before, columns=0)).columns == 2048
    assert choose_loss_blocks(replace(LARGE, loss_chunk=256), before).columns == 2048


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_FOLDER, str(tmp_path / "file"))
    blocks = choose_loss_blocks(LARGE)
    assert blocks.columns == 2048
    assert "measured, not kept: " in blocks.reason


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(LARGE, loss_block=100), (0, 100, "given")),
        (replace(LARGE, loss_chunk=64, loss_block=0), (64, 0, "given")),
        (replace(LARGE, batch_size=1), (0, 0, "all logits at once")),
        (replace(LARGE, batch_size=1, loss_chunk=8), (8, 0, "rows given")),
        *(
            (
                replace(LARGE, parallel=replace(LARGE.parallel, **other)),
                (0, 0, "all logits at once"),
            )
            for other in (
                {"accelerator": "cuda"},
                {"compile": "default"},
                {"precision": "bf16-mixed"},
                {"precision": "16-mixed"},
            )
        ),
    ],
)
def test_nothing_is_measured_where_sizes_are_given_or_blocks_do_not_pay(
    config: RunConfig, expected: tuple[int, int, str], measurements: list[tuple[int, ...]]
) -> None:
    blocks = choose_loss_blocks(config)
    assert (blocks.rows, blocks.columns, blocks.reason) == expected
    assert measurements == []


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_a_default_run_on_images_or_of_few_rows_is_not_measured(
    preset: object, measurements: list[tuple[int, ...]]
) -> None:
    model = preset.model_config("reference")  # type: ignore[attr-defined]
    config = replace(LARGE, recipe=preset.recipe, model=model, batch_size=1)  # type: ignore[attr-defined]
    choose_loss_blocks(config)
    assert measurements == []


def test_a_measurement_times_every_candidate_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_blocks, "BUDGET_S", 0.0)
    monkeypatch.setattr(loss_blocks, "CANDIDATES", (8, 16, 32))
    seconds = measure_columns(16, 4, 20)
    assert list(seconds) == [8, 16]
    assert all(0 < value < 60 for value in seconds.values())

"""Tests the CSV file of published rows, and refused files."""

from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.published.conventions import SOURCES, source_of
from scaling.published.csv_rows import BUILTIN_ROWS, COLUMNS, load_rows

ROWS = load_rows()


def test_every_row_has_a_described_source_and_a_public_page() -> None:
    assert len(ROWS) == 388
    assert all(row.url.startswith("https://") and source_of(row) for row in ROWS)
    described = {source.name for row in ROWS if (source := source_of(row))}
    assert described == {source.name for source in SOURCES}


def test_a_value_missing_from_the_source_is_none() -> None:
    row = next(row for row in ROWS if row.source.startswith("vTrain"))
    assert (row.mfu, row.flops_per_s, row.peak_bytes, row.precision) == (None, None, None, None)
    assert row.tokens_per_s is not None


def test_a_cell_with_two_head_counts_is_read_as_both() -> None:
    row = next(row for row in ROWS if row.model == "Llama-3.1-8B")
    assert (row.num_heads, row.num_kv_heads) == (32, 8)


def test_memory_is_stored_in_bytes() -> None:
    row = next(row for row in ROWS if row.source == "torchtitan 2024-12")
    assert row.peak_bytes == round(82.4 * 2**30)


@pytest.mark.parametrize(
    ("cell", "text", "message"),
    [
        ("mfu", "41.3", "line 2: mfu is '41.3'; it is a share of the peak"),
        ("gpus", "many", "line 2: gpus is 'many'; it must be a whole number"),
        ("gpus", "", "line 2: gpus is ''; every row needs it"),
        ("tokens_per_s_per_gpu", "nan", "line 2: tokens_per_s_per_gpu is 'nan'; it must be a"),
        ("tokens_per_s_per_gpu", "1.2.3", "line 2: tokens_per_s_per_gpu is '1.2.3'"),
        ("heads", "32/8", "line 2: heads is '32/8'; write it as 32, or as 32 (8 kv)"),
        ("params", "7 billion", "line 2: params is '7 billion'; it must be a whole number"),
        ("compile", "perhaps", "line 2: compile is 'perhaps'; it must be yes or no"),
        ("url", "https://example.org/a,b", "line 2: more cells than columns; quote cells"),
    ],
)
def test_a_cell_that_cannot_be_read_is_refused_with_its_line_and_name(
    cell: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actual = dict.fromkeys(COLUMNS, "") | {
        "source": "vTrain",
        "model": "GPT",
        "url": "https://example.org",
        "gpus": "8",
        "gpu_type": "A100",
    }
    path = tmp_path / "rows.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{','.join((actual | {cell: text}).values())}\n")
    assert main(["published", "--rows", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "rows.csv: " in error


def test_a_file_without_a_column_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(BUILTIN_ROWS.read_text().replace(",url\n", ",page\n", 1))
    assert main(["published", "--rows", str(path)]) == 2
    assert (
        "column url is missing; the first line has to be source,model," in capsys.readouterr().err
    )


def test_a_file_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    assert main(["published", "--rows", str(path)]) == 2
    assert "no row below the header" in capsys.readouterr().err

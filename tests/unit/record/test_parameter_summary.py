"""Parameter summaries of the reference sizes equal the stored copies."""

from pathlib import Path

import pytest
import torch

from recipes import bert, gpt, vit
from unitransformer.record.parameter_summary import human_count, render_summary, summarize
from unitransformer.transformer import Transformer

RECIPES = {"bert": bert, "gpt": gpt, "vit": vit}
EXPECTED = Path(__file__).parent / "summaries"


def cells(text: str) -> list[list[str]]:
    """Rows and totals of a summary as stripped cells; rules are left out."""
    lines = [line for line in text.splitlines() if not line.startswith("---")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_row_and_total_equals_the_reference_summary(recipe: str) -> None:
    with torch.device("meta"):
        network = Transformer(RECIPES[recipe].model_config("reference"))
    ours = cells(render_summary(summarize(network)))
    expected = cells((EXPECTED / f"{recipe}.txt").read_text())
    for row, wanted in zip(ours, expected, strict=True):
        assert row == wanted


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (256, "256"), (1536, "1.5 K"), (66_048, "66.0 K"), (198_272, "198 K")]
    + [(89_439_546, "89.4 M"), (1_311_528_960, "1.3 B"), (174_579_093_504, "174 B")],
)
def test_counts_are_shown_with_one_decimal_below_a_hundred(number: int, shown: str) -> None:
    assert human_count(number) == shown


def test_a_shared_matrix_counts_once_in_the_total() -> None:
    config = gpt.model_config("124m", width=8, num_layers=1, num_heads=2, feedforward_width=16)
    with torch.device("meta"):
        tied = summarize(Transformer(config))
    row = {row.name: row.num_parameters for row in tied.rows}
    assert row["embedding.lut"] == row["lm_head"] == 8 * 50_257
    assert tied.total == sum(row[name] for name in ("embedding", "transformer_layers")) + 16


def test_a_frozen_parameter_moves_to_the_other_total() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    summary = summarize(layer)
    assert (summary.trainable, summary.frozen, summary.size_mb) == (6, 2, 8 * 4 / 1e6)

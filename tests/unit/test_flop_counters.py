"""The FLOP counters of other packages print what the table of unitransformer/README.md says."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.version import Version

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from recipes.presets import Preset
from unitransformer import flop_counters
from unitransformer.config import RunConfig
from unitransformer.costs.flops import flops_per_sample
from unitransformer.flop_counters import COUNTERS, NETWORKS, Counter, count, count_all, with_torch

README = Path(__file__).parent.parent.parent / "unitransformer" / "README.md"
PRESETS = {"GPT": gpt.PRESET, "BERT": bert.PRESET, "ViT": vit.PRESET}
COLUMNS = [(network, name) for network in NETWORKS for name in PRESETS]
EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())


class Row(NamedTuple):
    name: str
    package: str
    version: str
    shares: list[str]
    reason: str


def read_rows() -> list[Row]:
    """The rows of the table that name a counter, and its package with a version."""
    rows = []
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 + len(COLUMNS) and re.match(r"[\w-]+ \d", cells[1]):
            package, version = cells[1].split()
            rows.append(Row(cells[0].strip("`"), package, version, cells[2:-1], cells[-1]))
    return rows


def config_of(preset: Preset, *arguments: str) -> RunConfig:
    return build_config(parse(preset, arguments), defaults=preset.cpu, devices=1)


@functools.cache
def true_flops(network: str, name: str) -> float:
    return count(with_torch, config_of(PRESETS[name]), network, "meta")


def share(counted: float, unit: str, true: float) -> str:
    return f"{counted * (2 if unit == 'MAC' else 1) / true:.1%}"


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: f"{row.package}-{row.name}")
def test_a_counter_prints_the_share_in_the_readme(row: Row) -> None:
    (counter,) = [c for c in COUNTERS if (c.name, c.package) == (row.name, row.package)]
    assert row.reason == counter.reason
    installed = flop_counters.installed_version(row.package)
    if installed is None or Version(installed).public != row.version:
        pytest.skip(f"{row.package} {row.version} is not installed (found: {installed})")
    shares = []
    for network, name in COLUMNS:
        config = config_of(PRESETS[name])
        try:
            counted = count(counter.run, config, network, counter.device)
        except ModuleNotFoundError as error:
            pytest.skip(f"{row.package} needs {error.name}, which is not installed")
        shares.append(share(counted, counter.unit, true_flops(network, name)))
    assert shares == row.shares


def test_the_readme_has_a_row_for_every_counter() -> None:
    rows = [(row.name, row.package) for row in read_rows()]
    assert rows == [(counter.name, counter.package) for counter in COUNTERS]


@EVERY_PRESET
def test_the_plain_network_has_the_flops_of_the_formula(preset: Preset) -> None:
    model = config_of(preset).model
    positions, width = model.num_positions, model.width
    layer = positions * (4 * width**2 + 2 * width * model.feedforward_width)
    layer += 2 * positions**2 * width
    head = width * model.num_classes * (1 if model.reads_images else positions)
    patches = 0
    if model.patch_size is not None:
        patches = (positions - 1) * model.num_channels * model.patch_size**2 * width
    true = count(with_torch, config_of(preset), "plain", "meta")
    assert true == 2 * (model.num_layers * layer + head + patches)


def test_a_training_step_of_gpt_is_three_forward_passes() -> None:
    config = config_of(gpt.PRESET)
    counted = count(with_torch, config, "suite", "meta")
    assert 3 * counted == flops_per_sample(config, causal=False)


def test_a_counter_that_is_missing_or_fails_leaves_the_other_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("injected\nwith a second line")

    absent = Counter("a", "no-such-package", "MAC", fail, "meta", "")
    broken = Counter("b", "torch", "MAC", fail, "meta", "")
    monkeypatch.setattr(flop_counters, "COUNTERS", (absent, broken, COUNTERS[0]))
    rows: list[dict[str, Any]] = count_all(config_of(bert.PRESET))["rows"]
    assert [row["package"] for row in rows] == ["this suite", "no-such-package", "torch", "torch"]
    assert rows[1]["version"] is None
    assert rows[2]["error"] == "RuntimeError: injected"
    assert rows[3]["counted"].keys() == NETWORKS.keys()


def test_the_largest_size_is_counted_without_its_memory() -> None:
    config = config_of(gpt.PRESET, "--size", "175b")
    on_meta = count(with_torch, config, "suite", "meta")
    assert 3 * on_meta == flops_per_sample(config, causal=False)
    assert 0.9 < count(with_torch, config, "suite", "cpu") / on_meta < 1

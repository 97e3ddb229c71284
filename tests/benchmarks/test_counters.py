"""Counters of one step of each recipe under each strategy equal their baselines exactly.

`pytest tests/benchmarks --update-baseline --whole-proof` rewrites the baselines; review the diff.
`pytest tests/benchmarks/test_counters.py --whole-proof` counts everything 20 times.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from scaling.comparison.counters import NAMES, differences, load_counters, write_counters
from scaling.comparison.pytest_plugin import Inconclusive
from tests.benchmarks.conftest import BASE, UPDATE
from tests.benchmarks.counting import (
    BASELINES,
    COUNTERS,
    HERE,
    TORCH,
    Counted,
    busy,
    count,
    counted_revision,
    has_counters,
    small_config,
)
from unitransformer.config import Strategy
from unitransformer.costs.flops import count_parameters as parameters_of
from unitransformer.costs.flops import flops_per_sample
from unitransformer.training.module import TrainingModule
from unitransformer.transformer import Linear, PositionwiseFeedForward, Transformer

# Counters that are equal on all processors.
OF_ANY_PROCESSOR = (
    *("parameters", "flops", "collective_calls", "collective_bytes"),
    *("graphs", "graph_breaks", "recompiles"),
)
STRATEGIES = [name for name in get_args(Strategy) if name != "auto"]
CASES = [(recipe, strategy, "off") for recipe in ("bert", "gpt", "vit") for strategy in STRATEGIES]
CASES += [("gpt", "single", "default"), ("gpt", "fsdp", "default")]
# `test_module` finds a graph break of these without building kernels.
PROVEN = [(recipe, "single", "default") for recipe in ("bert", "vit")]
PROOF = 20  # repetitions with `--whole-proof`
# Counted a second time without it, on a busy machine: gloo's threads free what collectives used.
TWICE = [("gpt", "fsdp", "off"), ("gpt", "zero2", "off")]
NUM_BUSY = 2
NO_BASELINE = "count a revision instead: make counters-check BASE=REVISION"


def name_of(recipe: str, strategy: str, mode: str) -> str:
    return f"{recipe}-{strategy}" + ("" if mode == "off" else "-compiled") + ".json"


@pytest.fixture(scope="session", autouse=True)
def baseline(request: pytest.FixtureRequest, repository: Path) -> Iterator[None]:
    """Where this torch or processor has no baseline, that of the revision after `--base`."""
    revision = request.config.getoption(BASE, default=None)
    if has_counters(HERE) or not revision or request.config.getoption(UPDATE):
        yield
        return
    with pytest.MonkeyPatch.context() as patch, counted_revision(revision, repository) as folder:
        patch.setattr(sys.modules[__name__], "HERE", folder)
        yield


@pytest.fixture(autouse=True)
def _has_baseline(updates_baseline: bool, without_baseline: Callable[[str], None]) -> None:
    if not (
        updates_baseline or has_counters(HERE) or any(BASELINES.glob(f"torch-{TORCH}-*/{COUNTERS}"))
    ):
        without_baseline(f"no baseline for torch {TORCH}; {NO_BASELINE}")


def stored(recipe: str, strategy: str, mode: str = "off") -> Counted:
    """The baseline for this torch and processor; without one, the portable part of another."""
    name = name_of(recipe, strategy, mode)
    others = sorted(path.parent for path in BASELINES.glob(f"torch-{TORCH}-*/{name}"))
    folder = HERE if has_counters(HERE) or not others else others[0]
    try:
        counters = load_counters(folder / name)
        return only(counters, NAMES if folder == HERE else OF_ANY_PROCESSOR)
    except FileNotFoundError:
        where = "restore it, or --update-baseline"
        if not folder.is_relative_to(BASELINES):
            where = f"the code of {BASE} cannot count it here"
        raise Inconclusive(f"{folder / name} is missing; {where}") from None
    except KeyError as error:
        raise Inconclusive(f"{folder / name} has no {error}; restore it") from None
    except ValueError as error:
        raise Inconclusive(f"{error}; restore it, or --update-baseline") from None


def test_instructions_alone_are_no_baseline_of_counters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "baselines" / f"torch-{TORCH}-other"
    write_counters({key: {"here": 1} for key in NAMES}, folder / name_of("gpt", "single", "off"))
    here = tmp_path / "baselines" / f"torch-{TORCH}-here"
    here.mkdir()
    (here / "instructions.json").write_text("{}")
    monkeypatch.setattr(sys.modules[__name__], "BASELINES", folder.parent)
    monkeypatch.setattr(sys.modules[__name__], "HERE", here)
    assert set(stored("gpt", "single")) == set(OF_ANY_PROCESSOR)


def only(counted: Counted, names: Collection[str]) -> Counted:
    return {name: counted[name] for name in names}


@pytest.mark.parametrize(
    ("recipe", "strategy", "mode"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.proof) for case in PROVEN)],
)
def test_counters_of_a_step_equal_their_baseline(
    recipe: str,
    strategy: Any,
    mode: Any,
    updates_baseline: bool,
    without_baseline: Callable[[str], None],
    is_whole_proof: bool,
    tmp_path: Path,
) -> None:
    config = small_config(recipe, strategy, mode=mode)
    first = count(config, tmp_path)
    if updates_baseline:
        write_counters(first, HERE / name_of(recipe, strategy, mode))
        return
    before = stored(recipe, strategy, mode)
    assert differences(before, only(first, before)) == []
    often = PROOF if is_whole_proof else 1 + ((recipe, strategy, mode) in TWICE)
    for number in range(2, often + 1):
        with busy(NUM_BUSY if 2 * number > often else 0):
            actual = differences(first, count(config, tmp_path))
        assert actual == [], f"run {number} of {often}"
    print(f"{often} of {often} runs alike")
    if set(before) < set(first):
        without_baseline(
            f"{', '.join(before)} are those of another processor's baseline; the rest has none "
            f"in {HERE.name}; {NO_BASELINE}"
        )


@pytest.mark.parametrize("recipe", ["bert", "gpt", "vit"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_and_flops_equal_the_formulas(recipe: str, strategy: Any) -> None:
    config = small_config(recipe, strategy)
    counted = stored(recipe, strategy)
    assert sum(counted["parameters"].values()) == parameters_of(config.model)
    per_rank = config.batch_size * flops_per_sample(config, causal=False)
    assert sum(counted["flops"].values()) == per_rank


PARAMETERS = parameters_of(small_config("gpt", "single").model)  # 6,098, of which a layer has 2,224
LAYER = 2224
OUTER = PARAMETERS - 2 * LAYER  # 1,650: token embedding and head


def sent(counted: Counted, kind: str) -> int:
    """Bytes that one kind of collective sent."""
    sizes = counted["collective_bytes"]
    return sum(size for place, size in sizes.items() if place.startswith(kind))


def test_one_device_sends_nothing() -> None:
    assert stored("gpt", "single")["collective_bytes"] == {}


def test_ddp_reduces_each_gradient_once() -> None:
    assert sent(stored("gpt", "ddp"), "all_reduce") == 4 * PARAMETERS


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp1", "hsdp"])
def test_fsdp_gathers_each_layer_twice_and_embedding_and_head_once(strategy: str) -> None:
    # The root group is needed at the start of the backward pass, so it is never resharded.
    counted = stored("gpt", strategy)
    assert sent(counted, "all_gather") == 4 * (2 * 2 * LAYER + OUTER)
    assert sent(counted, "reduce_scatter") == 4 * PARAMETERS


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_gathers_weights_once_and_reduces_gradients_once(strategy: str) -> None:
    counted = stored("gpt", strategy)
    # Each of the two parameter groups is padded to a multiple of four numbers.
    assert 0 <= sent(counted, "all_gather") - 4 * PARAMETERS <= 2 * 16
    assert 0 <= sent(counted, "all_reduce") - 4 * PARAMETERS <= 2 * 16


def test_zero3_reduces_gradients_to_shares() -> None:
    assert sent(stored("gpt", "zero3"), "reduce_scatter") == 4 * PARAMETERS


def test_fsdp_in_bf16_gathers_half_the_bytes_and_reduces_in_float32(tmp_path: Path) -> None:
    whole = stored("gpt", "fsdp")
    half = count(small_config("gpt", "fsdp", precision="bf16-mixed"), tmp_path)
    assert 2 * sent(half, "all_gather") == sent(whole, "all_gather")
    assert sent(half, "reduce_scatter") == sent(whole, "reduce_scatter")


def extra_linear() -> None:
    build, states = Transformer._build, Transformer.states

    def built(self: Transformer, config: Any) -> None:
        build(self, config)
        self.extra = Linear(config.width, config.width)

    Transformer._build = built  # type: ignore[method-assign]
    Transformer.states = lambda self, *args: self.extra(states(self, *args))  # type: ignore


def extra_all_reduce() -> None:
    clip = TrainingModule.configure_gradient_clipping

    def clipped(self: TrainingModule, *args: Any, **kwargs: Any) -> None:
        torch.distributed.all_reduce(torch.zeros(10))
        clip(self, *args, **kwargs)

    TrainingModule.configure_gradient_clipping = clipped  # type: ignore[method-assign]


def extra_activation() -> None:
    forward = PositionwiseFeedForward.forward

    def kept(self: PositionwiseFeedForward, x_BTD: Tensor) -> Tensor:
        # Two layers; together a hundredth of the 100 kB beside weights and optimizer states.
        self.kept = torch.empty(500, dtype=torch.uint8)
        return forward(self, x_BTD)

    PositionwiseFeedForward.forward = kept  # type: ignore[method-assign]


def graph_break() -> None:
    forward, compile_module = PositionwiseFeedForward.forward, nn.Module.compile

    def broken(self: PositionwiseFeedForward, x_BTD: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(self, x_BTD)

    def compiled(self: nn.Module, **options: Any) -> None:
        # It counts the graphs and their breaks, and builds no kernels.
        compile_module(self, **options | {"fullgraph": False, "backend": "aot_eager"})

    PositionwiseFeedForward.forward = broken  # type: ignore[method-assign]
    nn.Module.compile = compiled  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("fault", "strategy", "mode", "expected"),
    [
        # Of 6 x 32 x 16 x 16 FLOPs.
        (extra_linear, "fsdp", "off", ["flops grew", "network.extra +49,152"]),
        (extra_linear, "single", "off", ["parameters grew", "+272", "network.extra +272"]),
        (extra_all_reduce, "ddp", "off", ["collective_calls grew", "all_reduce in optimizer +1"]),
        (extra_all_reduce, "fsdp", "off", ["collective_bytes grew", "in optimizer +40"]),
        (extra_activation, "single", "off", ["peak_bytes grew", "+1,000", "layers.1.feed"]),
        (extra_activation, "zero1", "off", ["peak_bytes grew", "+1,000", "layers.0.feedforward"]),
        (graph_break, "single", "default", ["graph_breaks grew", "graphs grew", "transformer"]),
    ],
)
def test_a_grown_counter_is_reported_with_its_location(
    fault: Callable[[], None],
    strategy: Any,
    mode: Any,
    expected: list[str],
    is_whole_proof: bool,
    tmp_path: Path,
) -> None:
    config = small_config("gpt", strategy, mode=mode)
    before = stored("gpt", strategy, mode)
    if "peak_bytes" not in before:
        before = count(config, tmp_path)
    often = PROOF if is_whole_proof else 1
    for number in range(1, often + 1):
        message = "\n".join(differences(before, count(config, tmp_path, fault=fault)))
        missing = [words for words in expected if words not in message]
        assert missing == [], f"run {number} of {often}: {message}"
    print(f"caught {often} of {often} times: {message}")

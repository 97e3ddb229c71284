"""The compile ledger finds injected graph breaks, recompiles and cache hits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from tests.distributed.forking import fork_command
from tests.processes import PATIENCE_S
from unitransformer.measure.compile_ledger import CompileLedger, short_path
from unitransformer.stats.comparisons import pays_off_at

HERE = Path(__file__).name
pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def follow(step: Callable[[int], object], steps: int) -> dict[str, Any]:
    ledger = CompileLedger("default")
    ledger.start()
    for number in range(steps):
        ledger.at_step(number)
        step(number)
    ledger.stop()
    return ledger.as_dict()


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.endswith(text))
    return number


def test_three_seconds_of_compiling_are_paid_after_thirty_steps_that_save_a_tenth() -> None:
    assert pays_off_at(3.0, 0.3, 0.2) == 30


def test_compiling_that_saves_nothing_never_pays() -> None:
    assert pays_off_at(3.0, 0.2, 0.2) is None
    assert pays_off_at(3.0, 0.2, 0.3) is None


def test_compiling_that_took_no_time_pays_at_once() -> None:
    assert pays_off_at(0.0, 0.3, 0.2) == 0


def test_a_fraction_of_a_step_rounds_up_to_a_step() -> None:
    assert pays_off_at(1.0, 0.75, 0.25) == 2
    assert pays_off_at(1.1, 0.75, 0.25) == 3


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_an_invalid_time_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="eager_step_s is"):
        pays_off_at(1.0, bad, 0.5)


def test_a_graph_break_is_named_with_its_line() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()  # injected
        return 2 * x

    compiled = torch.compile(double, backend="eager")
    ledger = follow(lambda step: compiled(torch.ones(3)), 3)
    (event,) = ledger["graph_breaks"]
    assert event["step"] == 0
    assert event["where"].endswith(f"{HERE}:{line_of('# injected')}")
    assert "graph_break()" in event["reason"]


def test_a_function_that_the_compiler_skips_is_a_graph_break() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = 2 * x
            torch._dynamo.graph_break()  # injected in a loop
        return x

    compiled = torch.compile(twice, backend="eager")
    ledger = follow(lambda step: compiled(torch.ones(3)), 2)
    (event,) = ledger["graph_breaks"]
    assert event["where"].endswith(f"{HERE}:{line_of('# injected in a loop')}")


def test_a_recompile_is_recorded_at_its_step_with_function_and_reason() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:  # double begins here
        return 2 * x

    compiled = torch.compile(double, backend="eager")
    ledger = follow(lambda step: compiled(torch.ones(3 if step < 4 else 5)), 8)
    (event,) = ledger["recompiles"]
    assert event["step"] == 4
    assert event["function"].startswith("double (")
    assert f"{HERE}:{line_of('# double begins here')}" in event["function"]
    assert "expected 3, actual 5" in event["reason"]
    assert [step for step, _ in ledger["compiled_at"]] == [0, 4]
    assert ledger["graphs"] == 2
    assert ledger["steps"] == [0, 4]


def test_seconds_of_all_compilations_add_up() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    ledger = follow(lambda step: compiled(torch.ones(2 + step, 4)), 2)
    assert ledger["compile_s"] == sum(seconds for _, seconds in ledger["compiled_at"]) > 0


def test_compilation_outside_steps_belongs_to_no_step() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    ledger = CompileLedger("default")
    ledger.start()
    ledger.at_step(0)
    ledger.at_step(None)
    compiled(torch.ones(2, 4))
    ledger.at_step(1)
    ledger.stop()
    assert [step for step, _ in ledger.as_dict()["compiled_at"]] == [None]
    assert ledger.as_dict()["steps"] == []


def test_cache_state_is_missing_without_a_compile_cache() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    ledger = follow(lambda step: compiled(torch.ones(2, 4)), 1)
    assert ledger["start"] is None
    assert "caches are off" in ledger["missing"]["start"]


def test_compile_seconds_are_missing_after_a_compiler_reset() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager")

    def step(number: int) -> None:
        if number == 1:
            torch._dynamo.reset()
        compiled(torch.ones(2, 4))

    ledger = follow(step, 3)
    assert ledger["compile_s"] is None
    assert "reset" in ledger["missing"]["compile_s"]
    assert [step for step in ledger["steps"] if 1 <= step < 3] == [1]


def test_counters_that_this_torch_lacks_are_none_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.utils import CompilationMetrics

    compiled = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    ledger = CompileLedger("default")
    ledger.start()
    ledger.at_step(0)
    compiled(torch.ones(2, 4))
    ledger.stop()
    for _, record in ledger._records:
        del record.inductor_fx_local_cache_hit_count
    monkeypatch.delattr(CompilationMetrics, "inductor_fx_local_cache_hit_count")
    actual = ledger.as_dict()
    assert actual["caches"]["inductor"]["hit"] is None
    assert actual["start"] is None
    assert "inductor_fx_local_cache_hit_count" in actual["missing"]["start"]


def test_the_ledger_of_an_uncompiled_run_reads_nothing() -> None:
    ledger = CompileLedger("off")
    ledger.start()
    ledger.at_step(0)
    ledger.stop()
    actual = ledger.as_dict()
    assert actual["compile_s"] is actual["graphs"] is actual["start"] is None
    assert actual["missing"] == {"all": "compile is off"}


def test_a_second_process_with_the_same_cache_starts_warm(tmp_path: Path) -> None:
    def compile_once(answer: Path) -> int:
        # With an empty cache folder the compiler has to prepare a lot.
        torch._inductor.config.cpp.vec_isa_ok = False
        torch._inductor.config.cpp_cache_precompile_headers = False
        layer = torch.compile(torch.nn.Linear(4, 4))
        answer.write_text(
            json.dumps(follow(lambda step: layer(torch.ones(2, 4)).sum().backward(), 3))
        )
        return 0

    def launch(name: str) -> dict[str, Any]:
        answer, log = tmp_path / name, tmp_path / f"{name}.log"
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        process = fork_command(lambda: compile_once(answer), log=log, variables=variables)
        process.join(PATIENCE_S)
        assert process.exitcode == 0, log.read_text()
        actual: dict[str, Any] = json.loads(answer.read_text())
        return actual

    cold, warm = launch("cold"), launch("warm")
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    # The cache is asked for a forward and a backward graph; AOTAutograd stores both as one.
    assert cold["caches"]["inductor"] == {"hit": 0, "miss": 2}
    assert warm["caches"]["inductor"] == {"hit": 2, "miss": 0}
    assert warm["caches"]["aot_autograd"] == {"hit": 1, "miss": 0}
    assert cold["graphs"] == warm["graphs"] == 1
    assert {step for step, _ in cold["compiled_at"]} == {0}


def test_a_source_file_is_named_relative_to_its_import_folder() -> None:
    assert short_path(torch.nn.functional.__file__) == "torch/nn/functional.py"
    assert short_path("/nowhere/at/all.py") == "/nowhere/at/all.py"

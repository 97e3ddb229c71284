"""Every strategy trains the same model, and the parity study detects injected faults."""

import functools
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from scaling.__main__ import main
from scaling.parity import command, recipe_runs
from scaling.parity.cases import BOUNDS, STRATEGIES, Curves, compare
from scaling.parity.recipe_runs import run_on_nodes
from scaling.recipe_process import ProcessResult, _Worker, start_worker
from scaling.store.reader import load_store
from tests.distributed.forking import start_forked
from tests.distributed.launching import begin, fork_torchrun, load
from tests.processes import PATIENCE_S
from unitransformer.data.sampler import TrainSampler
from unitransformer.parallel import fsdp1, strategies
from unitransformer.parallel.deepspeed import ZeroStrategy
from unitransformer.parallel.materialize import Materializer
from unitransformer.training import module
from unitransformer.training.module import TrainingModule

BOUND = BOUNDS["32-true"]
# Clipping at every step hides a wrong gradient scale from the loss.
STEPS = ("--max-steps", "24", "--validate-every", "24", "--optimizer.clip-norm", "0.5")
TWO = ("--devices", "2", "--batch-size", "4")


@pytest.fixture
def forked_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Worker, "_start", start_forked)


@pytest.mark.usefixtures("forked_worker")
@pytest.mark.parametrize(
    ("recipe", "chosen"),
    [
        ("gpt", STRATEGIES),
        # `test_strategies` trains the third family, ddp with bert and fsdp with vit.
        ("bert", ("fsdp", "zero3")),
        ("vit", ("ddp", "zero3")),
        pytest.param("bert", STRATEGIES, marks=pytest.mark.proof),
        pytest.param("vit", STRATEGIES, marks=pytest.mark.proof),
    ],
)
def test_every_strategy_on_two_ranks_trains_the_same_float32_model_as_one_process(
    recipe: str, chosen: Sequence[str], tmp_path: Path
) -> None:
    options = ["--recipe", recipe, "--devices", "2", "--precisions", "32-true"]
    options += ["--strategies", ",".join(chosen)]
    fewer = ["--quick", "--compile", "off", "--activation-checkpointing", "off"]
    assert main(["parity", *options, *fewer, "--accelerator", "cpu", "--out", str(tmp_path)]) == 0
    (certificate,) = load_store([tmp_path], relative_to=tmp_path).certificates
    assert {result.case.strategy for result in certificate.results} == set(chosen)
    assert {certificate.verdict(result) for result in certificate.results} == {"equal"}
    assert len(certificate.reference.loss) == 24
    assert certificate.reference.loss[-1] < 0.95 * certificate.reference.loss[0], "it learns"


def run_on_forked_nodes(
    recipe: str, arguments: Sequence[str], *, devices: int, num_nodes: int, log: Path, **_: Any
) -> ProcessResult:
    """Replaces `run_on_nodes`, which would start twelve interpreters for two cases."""
    started_s = time.monotonic()
    with socket.create_server((recipe_runs.ADDRESS, 0)) as probe:
        port = int(probe.getsockname()[1])
    nodes = [
        fork_torchrun(
            [
                *recipe_runs.torchrun_options(num_nodes, node, devices, port),
                *("-m", f"recipes.{recipe}", *arguments),
            ],
            log=log.with_name(f"{log.name}-{node}"),
            variables={},
        )
        for node in range(num_nodes)
    ]
    for process in nodes:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in nodes]
    log.write_text("".join(log.with_name(f"{log.name}-{n}").read_text() for n in range(num_nodes)))
    assert codes == [0] * num_nodes, log.read_text()
    return ProcessResult(exit_code=0, elapsed_s=time.monotonic() - started_s)


@pytest.mark.usefixtures("forked_worker", "_no_orphans")
def test_hsdp_is_certified_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_on_nodes", run_on_forked_nodes)
    options = ["--recipe", "gpt", "--devices", "4", "--strategies", "hsdp", "--compile", "off"]
    fewer = ["--precisions", "32-true", "--activation-checkpointing", "off", "--steps", "20"]
    assert main(["parity", *options, *fewer, "--accelerator", "cpu", "--out", str(tmp_path)]) == 0
    (certificate,) = load_store([tmp_path], relative_to=tmp_path).certificates
    found = [(r.case.num_nodes, r.case.devices, r.case.accumulate) for r in certificate.results]
    assert found == [(2, 4, 1), (2, 4, 2)]
    assert {certificate.verdict(result) for result in certificate.results} == {"equal"}
    printed = certificate.results[0].command
    assert printed.startswith("for node in 0 1; do torchrun --nnodes 2 --node-rank $node ")


@pytest.mark.usefixtures("_no_orphans")
def test_what_ranks_of_two_nodes_refuse_is_refused_with_their_reason(tmp_path: Path) -> None:
    ended = run_on_nodes(
        *("gpt", ["--num-nodes", "2", "--init-from", "nowhere", "--out", str(tmp_path)]),
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        log=tmp_path / "log",
        limit_s=120.0,
    )
    assert ended.exit_code == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last == "error: init-from nowhere does not exist; check the path"


@pytest.mark.usefixtures("forked_worker", "_no_orphans")
def test_a_run_over_its_time_limit_is_ended_with_its_ranks(tmp_path: Path) -> None:
    folder = ["--out", str(tmp_path), "--accelerator", "cpu", "--devices", "2"]
    endless = [*folder, "--max-steps", "1000000"]
    with start_worker(tmp_path / "worker.log") as run:
        ended = run("vit", endless, log=tmp_path / "log", limit_s=4.0)
        assert ended.exit_code is None
        assert ended.elapsed_s >= 4.0
        ended = run("vit", ["--devices", "0"], log=tmp_path / "log", limit_s=60.0)
        assert ended.exit_code == 2
        assert (tmp_path / "log").read_text().startswith("error: devices is 0")


# ---------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Curves]:
    """The curves of a run without a fault by its options, trained once."""
    return functools.cache(
        lambda *options: train(tmp_path_factory.mktemp("sound") / "run", *options)
    )


@pytest.fixture
def reference(sound: Callable[..., Curves]) -> Curves:
    return sound("--batch-size", "8")


def train(folder: Path, *options: str, fault: Callable[[], None] | None = None) -> Curves:
    process = begin("gpt", folder, *STEPS, *options, fault=fault)
    process.join()
    assert process.exitcode == 0, (folder / "output.log").read_text()
    record = load(folder)
    return Curves(loss=tuple(record["loss"]), gradient_norm=tuple(record["gradient_norm"]))


def leave_rank_1_with_its_own_gradients() -> None:
    class Deaf(DDPStrategy):
        def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
            wrapped = super()._setup_model(model)
            wrapped.register_comm_hook(None, hear_nothing)
            return wrapped

    def hear_nothing(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        local = bucket.buffer().clone()
        is_deaf = torch.distributed.get_rank() == 1
        reduced = allreduce_hook(None, bucket)  # type: ignore[arg-type]
        return reduced.then(lambda done: local if is_deaf else done.value())

    strategies.DDPStrategy = Deaf  # type: ignore[attr-defined]


def add_up_the_loss_of_all_ranks() -> None:
    score = TrainingModule.training_step

    def training_step(self: TrainingModule, *arguments: Any) -> Tensor:
        return score(self, *arguments) * self.trainer.world_size

    TrainingModule.training_step = training_step  # type: ignore[method-assign]


def divide_by_the_micro_batches_twice() -> None:
    del ZeroStrategy.backward  # Lightning's own lets DeepSpeed divide a second time


def give_every_rank_the_samples_of_the_first() -> None:
    begin_order = TrainSampler.__init__

    def same(self: TrainSampler, *arguments: Any, **options: Any) -> None:
        begin_order(self, *arguments, **options | {"rank": 0})

    TrainSampler.__init__ = same  # type: ignore[method-assign]


def leave_a_matrix_whole() -> None:
    # FSDP2 would not clip: its norm accepts no mix of gradient types.
    name = "embedding.lut"
    make = Materializer._make

    def make_the_others(self: Materializer, parameter: Tensor) -> nn.Parameter:
        return make(self, parameter) if parameter.is_meta else parameter

    class Leaky(fsdp1.FSDP1Strategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            assert isinstance(model, TrainingModule)
            table = cast(nn.Embedding, model.network.get_submodule(name))
            table.weight = nn.Parameter(model.initial_weights(f"{name}.weight", table.weight))
            self.kwargs["ignored_states"] = [table.weight]
            return super()._setup_model(model)

    Materializer._make = make_the_others  # type: ignore[assignment,method-assign]
    strategies.FSDP1Strategy = Leaky  # type: ignore[misc]
    # No showcase at the end, which gathers sharded parameters only.
    module.gather_network = lambda model, network, parallel: network


FAULTS = {
    "a rank that skips its reduction": ("ddp", (), leave_rank_1_with_its_own_gradients),
    "a loss that is added up": ("ddp", (), add_up_the_loss_of_all_ranks),
    "a loss that is divided twice": (
        "zero2",
        ("--accumulate", "2", "--batch-size", "2"),
        divide_by_the_micro_batches_twice,
    ),
    "a sampler that repeats": ("fsdp", (), give_every_rank_the_samples_of_the_first),
    "a parameter that is not divided": ("fsdp1", (), leave_a_matrix_whole),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault_is_judged_different(
    name: str, reference: Curves, sound: Callable[..., Curves], tmp_path: Path
) -> None:
    strategy, options, fault = FAULTS[name]
    options = (*TWO, "--strategy", strategy, *options)
    assert compare(reference, sound(*options)).verdict(BOUND) == "equal"
    found = compare(reference, train(tmp_path / "faulty", *options, fault=fault))
    assert found.verdict(BOUND) == "different"


def test_a_wrong_gradient_scale_shows_in_the_gradient_norm_but_not_in_the_loss(
    reference: Curves, tmp_path: Path
) -> None:
    doubled = train(tmp_path / "run", *TWO, fault=add_up_the_loss_of_all_ranks)
    found = compare(reference, doubled)
    assert found.loss_difference <= BOUND.loss, "clipping makes it good again"
    assert found.gradient_norm_difference == pytest.approx(1.0, rel=1e-5)

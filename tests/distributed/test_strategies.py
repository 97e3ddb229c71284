"""Every strategy trains the same model as one plain process, however it was started."""

import contextlib
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import recipes.train
from recipes import gpt
from recipes.command_line import run_recipe
from scaling.parity.cases import Case
from scaling.parity.certificate import find_inactive_feature, work_of
from tests.distributed.launching import (
    begin,
    environment,
    fork_torchrun,
    load,
    recipe_arguments,
    recipe_command,
    train,
)
from tests.processes import PATIENCE_S
from unitransformer.checkpoint.reader import check_files
from unitransformer.config import ParallelConfig, RunConfig, Strategy
from unitransformer.export import export
from unitransformer.launch.devices import has_float16
from unitransformer.machine.host import peak_resident_bytes
from unitransformer.parallel.strategies import build_strategy, count_unbucketed_steps, shard
from unitransformer.training import module as training
from unitransformer.training.module import TrainingModule

STRATEGIES = ("ddp", "fsdp", "fsdp1", "hsdp", "zero1", "zero2", "zero3")
# Each shares its code with `fsdp` or `zero2`, and `test_parity` compares its losses.
LIKE_OTHERS = ("hsdp", "zero1")
# Steps proportional to the gradient: those of Adam would hide its scale.
PROPORTIONAL = ("--optimizer.epsilon", "1", "--optimizer.learning-rate", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The record of one plain process by recipe and options, trained once."""
    folder = tmp_path_factory.mktemp("alone")
    records: dict[tuple[str, ...], dict[str, Any]] = {}

    def record_of(recipe: str, *options: str) -> dict[str, Any]:
        key = (recipe, *options)
        if key not in records:
            place = folder / str(len(records))
            records[key] = train(recipe, place, "--batch-size", "8", *options)
        return records[key]

    return record_of


def two(strategy: str) -> tuple[str, ...]:
    return ("--batch-size", "4", "--devices", "2", "--strategy", strategy)


def assert_same(record: dict[str, Any], reference: dict[str, Any], rel: float = 1e-5) -> None:
    assert record["loss"] == pytest.approx(reference["loss"], rel=rel)
    assert record["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=10 * rel)
    measured, expected = (r["validation"]["loss"] for r in (record, reference))
    assert measured == pytest.approx(expected, rel=rel)


def unless_like_others(strategy: str, *more: str) -> Any:
    """A case; of a strategy that shares its code with another, one of a long proof."""
    marks = [pytest.mark.proof] if strategy in LIKE_OTHERS else []
    return pytest.param(strategy, *more, marks=marks)


# `test_parity` certifies each strategy with gpt, and the other families with bert and vit.
WITH_FIGURES = [unless_like_others(strategy, "gpt") for strategy in STRATEGIES]
WITH_FIGURES += [("ddp", "bert"), ("fsdp", "vit")]


@pytest.mark.parametrize(("strategy", "recipe"), WITH_FIGURES)
def test_two_ranks_train_the_same_model_as_one(
    strategy: str, recipe: str, alone: Any, tmp_path: Path
) -> None:
    record = train(recipe, tmp_path / "two", *two(strategy), is_whole=True)
    assert record["config"]["parallel"]["strategy"] == strategy
    assert record["world_size"] == 2
    assert record["global_batch_size"] == alone(recipe)["global_batch_size"] == 8
    assert len(record["peak_bytes"]) == len(record["hardware"]) == 2
    assert record["summary"] == alone(recipe)["summary"]
    assert record["versions"]["deepspeed"] == importlib.metadata.version("deepspeed")
    assert_same(record, alone(recipe))


@pytest.mark.parametrize("strategy", [unless_like_others(name) for name in STRATEGIES])
def test_micro_batches_accumulate_a_gradient_that_is_clipped_by_its_norm_over_all_ranks(
    strategy: str, alone: Any, tmp_path: Path
) -> None:
    """Clipping hides the scale of the accumulated gradient from the losses, not from its norm."""
    clipped = (*PROPORTIONAL, "--optimizer.clip-norm", "0.1")
    halves = ("--accumulate", "2", "--batch-size", "2", "--validation-batches", "2")
    record = train("gpt", tmp_path / "two", *two(strategy), *clipped, *halves)
    assert min(record["gradient_norm"]) > 0.1
    assert_same(record, alone("gpt", *clipped))
    assert record["loss"] != pytest.approx(alone("gpt", *PROPORTIONAL)["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        *((strategy, "full") for strategy in STRATEGIES),
        *((strategy, "selective") for strategy in ("ddp", "fsdp", "fsdp1", "zero3")),
        *(
            pytest.param(strategy, "selective", marks=pytest.mark.proof)
            for strategy in ("hsdp", "zero1", "zero2")  # `full` shows that they recompute
        ),
    ],
)
def test_activation_checkpointing_changes_no_loss(
    strategy: str, mode: str, alone: Any, tmp_path: Path
) -> None:
    options = ("--activation-checkpointing", mode)
    record = train("gpt", tmp_path / "two", *two(strategy), *options)
    assert record["recomputed_layers"] == [2, 2]
    assert alone("gpt")["recomputed_layers"] == [0]
    assert_same(record, alone("gpt"))


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", pytest.param("fsdp1", marks=pytest.mark.proof), "zero3"]
)
def test_compiling_changes_no_loss(strategy: str, alone: Any, tmp_path: Path) -> None:
    # Only ddp compiles the whole network; one layer takes half as long.
    num_layers = 1 if strategy == "ddp" else 2
    shape = ("--model.num-layers", str(num_layers))
    record = train("gpt", tmp_path / "two", *two(strategy), *shape, "--compile", "default")
    case = Case(strategy="ddp", compile="default")
    assert find_inactive_feature(case, work_of(record), num_layers) is None
    assert_same(record, alone("gpt", *shape))


@pytest.mark.parametrize(
    ("strategy", "chunk"), [("ddp", "0"), ("fsdp", "7"), ("fsdp1", "7"), ("zero3", "7")]
)
def test_a_padded_vocabulary_and_a_chunked_loss_train_the_same_model_on_two_ranks(
    strategy: str, chunk: str, alone: Any, tmp_path: Path
) -> None:
    options = ("--pad-vocabulary", "128", "--loss-chunk", chunk)
    record = train("gpt", tmp_path / "two", *two(strategy), *options)
    assert (record["config"]["pad_vocabulary"], record["config"]["loss_chunk"]) == (128, int(chunk))
    assert record["num_parameters"] == alone("gpt")["num_parameters"]
    assert_same(record, alone("gpt"))


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        *(unless_like_others(strategy, "bf16-mixed") for strategy in STRATEGIES),
        *(unless_like_others(name, "bf16-true") for name in ("ddp", "fsdp", "fsdp1", "hsdp")),
    ],
)
def test_bf16_losses_stay_near_those_of_float32(
    strategy: str, precision: str, alone: Any, tmp_path: Path
) -> None:
    record = train("gpt", tmp_path / "two", *two(strategy), "--precision", precision)
    assert_same(record, alone("gpt"), rel=1e-3)
    assert record["loss"] != alone("gpt")["loss"]


@pytest.mark.parametrize(
    "strategy",
    [unless_like_others(s) for s in ("single", "ddp", "fsdp1", "zero1", "zero2", "zero3")],
)
def test_float16_losses_stay_nearer_to_float32_and_skip_no_step(
    strategy: str, alone: Any, tmp_path: Path
) -> None:
    if strategy.startswith("zero") and not has_float16():
        pytest.skip("DeepSpeed wants a CPU that multiplies float16")
    spread = ("--batch-size", "8") if strategy == "single" else two(strategy)
    options = ("--strategy", strategy, "--precision", "16-mixed")
    record = train("gpt", tmp_path / "run", *spread, *options)
    assert_same(record, alone("gpt"), rel=1e-4)
    assert record["loss"] != alone("gpt")["loss"]


def test_hsdp_replicates_between_two_nodes_what_each_node_shards(
    alone: Any, tmp_path: Path
) -> None:
    options = ("--batch-size", "2", "--devices", "2", "--num-nodes", "2", "--strategy", "hsdp")
    together = train("gpt", tmp_path / "run", *options)
    assert together["world_size"] == 4
    assert together["config"]["parallel"]["num_nodes"] == 2
    assert_same(together, alone("gpt"))
    check_one_checkpoint(tmp_path)


def check_one_checkpoint(folder: Path) -> None:
    """Asserts that all ranks wrote to the folder chosen by the first, and that it is complete."""
    (checkpoint,) = folder.rglob("step-*")
    assert not list(folder.rglob(".step-*"))
    check_files(checkpoint)
    export(checkpoint, folder / "exported.safetensors")


@pytest.mark.proof
@pytest.mark.parametrize("recipe", ["gpt"])
def test_a_recipe_runs_under_torchrun(
    recipe: str, alone: Any, tmp_path: Path, repository: Path
) -> None:
    python, *arguments = recipe_command(
        recipe, tmp_path / "two", "--batch-size", "4", "--strategy", "fsdp"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [python, *torchrun, *arguments],
        cwd=repository,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation  loss") == 1
    record = load(tmp_path / "two")
    assert record["world_size"] == 2
    assert_same(record, alone(recipe))
    check_one_checkpoint(tmp_path)


def test_the_printed_torchrun_command_trains_on_two_nodes(
    alone: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("", 0)) as probe:
        monkeypatch.setattr(
            "unitransformer.launch.environment.TORCHRUN_PORT", probe.getsockname()[1]
        )
    folder = tmp_path / "two"
    arguments = recipe_arguments("gpt", folder, "--batch-size", "4", "--num-nodes", "2")
    assert run_recipe(gpt.PRESET, gpt.show, arguments) == 2
    printed = capsys.readouterr().err
    assert "and with --node-rank 1 on the other node: torchrun --nnodes 2" in printed
    command = shlex.split(printed[printed.index("torchrun --nnodes") :])
    assert command[3:5] == ["--node-rank", "0"]
    nodes = [
        fork_torchrun(
            [*command[1:4], node, *command[5:]],
            log=tmp_path / f"node-{node}.log",
            variables=environment(tmp_path),
        )
        for node in ("0", "1")
    ]
    for process in nodes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in nodes] == [0, 0]
    record = load(folder)
    assert (record["world_size"], record["config"]["parallel"]["num_nodes"]) == (2, 2)
    assert_same(record, alone("gpt"))
    check_one_checkpoint(tmp_path)


def spawn_ranks() -> None:
    """A fault: spawns the ranks, as on GPUs, where forking is not safe."""
    launch = recipes.train.launch

    def launch_spawned(*arguments: Any, **options: Any) -> Any:
        return launch(*arguments, **{**options, "fork": False})

    recipes.train.launch = launch_spawned


def test_spawned_ranks_train_the_same_model_as_forked_ranks(alone: Any, tmp_path: Path) -> None:
    process = begin("gpt", tmp_path / "two", *two("fsdp"), fault=spawn_ranks)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert_same(load(tmp_path / "two"), alone("gpt"))


def test_tasks_of_srun_form_one_process_group(alone: Any, tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # determines the port
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
    }
    tasks = [
        begin(
            "gpt",
            tmp_path / str(task),
            *("--batch-size", "4", "--strategy", "zero2"),
            variables=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]
    for process in tasks:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in tasks] == [0, 0]
    assert_same(load(tmp_path / "0"), alone("gpt"))
    check_one_checkpoint(tmp_path)


@pytest.mark.parametrize(("tasks", "code"), [(1, 0), (2, 2)])
def test_a_recipe_in_a_batch_script_without_srun_runs_as_one_process_or_is_refused(
    tasks: int, code: int, tmp_path: Path
) -> None:
    script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0"}
    process = begin("gpt", tmp_path / "run", variables=script)
    process.join(PATIENCE_S)
    assert process.exitcode == code
    if code == 0:
        assert load(tmp_path / "run")["world_size"] == 1
    else:
        said = (tmp_path / "run/output.log").read_text()
        assert "2 tasks and this process is not one of them" in said


def weigh() -> None:
    """A fault: every rank writes how many bytes of weights and moments it holds at the end."""
    on_train_end = TrainingModule.on_train_end

    def weighed(self: TrainingModule) -> None:
        optimizer = self.trainer.optimizers[0]
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        parameters = [getattr(p, "ds_tensor", p) for p in self.network.parameters()]
        held = {
            "weights": sum(local_shard(p).numel() for p in parameters),
            "moments": sum(local_shard(state["exp_avg"]).numel() for state in states),
        }
        path = Path(os.environ["UNITRANSFORMER_CACHE"]).parent / f"held-{self.global_rank}.json"
        path.write_text(json.dumps(held))
        on_train_end(self)

    TrainingModule.on_train_end = weighed  # type: ignore[method-assign]


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("strategy", "weights", "moments"),
    [
        ("ddp", 1, 1),
        ("fsdp", 2, 2),
        ("fsdp1", 2, 2),
        ("hsdp", 2, 2),
        ("zero1", 1, 2),
        ("zero2", 1, 2),
        ("zero3", 2, 2),
    ],
)
def test_a_rank_holds_only_its_shard(
    strategy: str, weights: int, moments: int, tmp_path: Path
) -> None:
    # DeepSpeed would not shard small parameters.
    process = begin("gpt", tmp_path / "two", *two(strategy), *WIDE, fault=weigh)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    total = load(tmp_path / "two")["num_parameters"]
    for rank in range(2):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert held["weights"] == pytest.approx(total / weights, rel=0.03)
        assert held["moments"] == pytest.approx(total / moments, rel=0.03)


def test_a_large_sharded_network_is_not_gathered_for_the_showcase(tmp_path: Path) -> None:
    def make_large() -> None:
        training.MAX_GATHERED_BYTES = 0

    process = begin("gpt", tmp_path / "two", *two("fsdp"), fault=make_large, is_whole=True)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert (
        "predictions none: the sharded network is too large"
        in (tmp_path / "two/output.log").read_text()
    )


WIDE = ("--model.width", "64", "--model.feedforward-width", "256")


M_MMAP_THRESHOLD = -3  # malloc.h


def start_large(strategy: Strategy, queue: "SimpleQueue[tuple[int, int, int]]") -> None:
    """Initializes a network as rank 0 of 8; sends the peak memory that this takes."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)  # freed memory is returned
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    nodes = {"devices": 4, "num_nodes": 2} if strategy == "hsdp" else {"devices": 8}
    parallel = ParallelConfig(**nodes, strategy=strategy, accelerator="cpu")
    shape = {"width": 1024, "num_layers": 8, "num_heads": 8, "feedforward_width": 4096}
    model = gpt.model_config("774m", **shape)
    config = RunConfig(recipe="gpt", size="774m", model=model, parallel=parallel)
    module = TrainingModule(config)
    sizes = [p.numel() * p.element_size() for p in module.parameters()]
    spread: Any = build_strategy(config, "cpu")
    spread.parallel_devices = [torch.device("cpu")]
    spread.cluster_environment = LightningEnvironment()
    if strategy == "fsdp1":
        spread.kwargs["device_mesh"] = init_device_mesh("cpu", (8,))
    if strategy == "zero3":
        deepspeed.comm.init_distributed("gloo", dist_init_required=False)
        spread._init_config_if_needed()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = peak_resident_bytes()
    if strategy == "fsdp1":
        spread._setup_model(module)
    else:
        shard(module.objective, parallel, spread, module.initial_weights)
    queue.put((peak_resident_bytes() - before, max(sizes), sum(sizes)))


@pytest.mark.parametrize(
    ("strategy", "shares", "matrices"),
    [
        ("fsdp", 8, 1),
        ("hsdp", 4, 1),
        # FSDP1 gathers the parameters outside of layers, here one matrix, before it shards.
        ("fsdp1", 8, 2),
        ("zero3", 8, 1),
    ],
)
def test_while_sharding_a_rank_holds_its_shard_and_one_module_at_most(
    strategy: str, shares: int, matrices: int
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=start_large, args=(strategy, queue))
    process.start()
    peak, matrix, whole = queue.get()
    process.join(PATIENCE_S)
    assert matrix > whole / 4, "more than a layer"
    assert peak < whole / shares + matrices * matrix + 32 * 2**20
    assert peak < whole


def count_buckets(accumulate: int, queue: "SimpleQueue[tuple[int, list[int]]]") -> None:
    """Counts the buckets of gradients that DDP reduces in each step."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel = ParallelConfig(devices=2, strategy="ddp", accelerator="cpu")
    model = gpt.model_config()
    config = RunConfig(
        recipe="gpt", size="reference", model=model, parallel=parallel, accumulate=accumulate
    )
    options = build_strategy(config, "cpu")._ddp_kwargs  # type: ignore[attr-defined]
    network = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))  # 4 MiB
    ddp = torch.nn.parallel.DistributedDataParallel(network, **options)
    counts: list[int] = []

    def count(
        state: None, bucket: torch.distributed.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        counts[-1] += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    ddp.register_comm_hook(None, count)
    for _ in range(5):
        counts.append(0)
        for batch in range(accumulate):
            with ddp.no_sync() if batch < accumulate - 1 else contextlib.nullcontext():
                ddp(torch.ones(1, 512)).sum().backward()
    queue.put((count_unbucketed_steps(config), counts))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2), (3, 1)])
def test_ddp_reduces_one_bucket_in_the_steps_that_are_excluded(accumulate: int, steps: int) -> None:
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[tuple[int, list[int]]] = context.SimpleQueue()
    process = context.Process(target=count_buckets, args=(accumulate, queue))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    excluded, counts = queue.get()
    assert excluded == steps
    assert counts[:steps] == [1] * steps
    assert min(counts[steps:]) > 1

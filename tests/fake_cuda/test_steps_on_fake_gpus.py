"""Whole training steps on GPUs that a fake driver reports, with fake tensors: what a step does.

Needs torch's CUDA build and a C compiler: `make test TORCH=next` has them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = torch.version.cuda or ""
pytestmark = pytest.mark.skipif(
    not CUDA.startswith("13") or shutil.which("cc") is None,
    reason="needs torch built for CUDA 13 and a C compiler; this torch aborts in the backward pass "
    "of fake CUDA tensors: make test TORCH=next",
)
H200: dict[str, str] = {}  # the driver's default
A100 = {"FAKE_GPU_NAME": "NVIDIA A100-SXM4-80GB", "FAKE_GPU_CAPABILITY": "80"}
T4 = {"FAKE_GPU_NAME": "Tesla T4", "FAKE_GPU_CAPABILITY": "75", "FAKE_GPU_GIB": "15"}
SMALL = [
    *("--model.width", "128", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.feedforward-width", "256"),
]


def case(recipe: str, *options: str, world_size: int = 1, gpu: dict[str, str] = H200) -> Any:
    shape = [] if "--size" in options else SMALL
    return {
        "recipe": recipe,
        "options": [*shape, *options],
        "world_size": world_size,
        "gpu": gpu,
    }


# Fake tensors do not suit DDP, whose reducer reads their memory, DeepSpeed, which knows parameters
# by identity, and FSDP1 with offload, which moves its parameters in place.
CASES = {
    "bert": case("bert"),
    "gpt": case("gpt"),
    "vit": case("vit"),
    "gpt-fsdp": case("gpt", "--strategy", "fsdp", world_size=4),
    "gpt-hsdp": case("gpt", "--strategy", "hsdp", world_size=4),
    "gpt-fsdp1": case("gpt", "--strategy", "fsdp1", world_size=4),
    "gpt-offload": case("gpt", "--strategy", "fsdp", "--cpu-offload"),
    "gpt-offload-hsdp": case("gpt", "--strategy", "hsdp", "--cpu-offload", world_size=4),
    "gpt-loss-chunk": case("gpt", "--loss-chunk", "512"),
    "gpt-accumulate": case("gpt", "--accumulate", "2"),
    "gpt-a100": case("gpt", gpu=A100),
    "gpt-t4": case("gpt", gpu=T4),
    "vit-s": case("vit", "--size", "s"),
}
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
MIG = {"FAKE_GPU_NAME": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "FAKE_GPU_GIB": "10"}
V100 = {"FAKE_GPU_NAME": "Tesla V100-SXM2-32GB", "FAKE_GPU_CAPABILITY": "70"}
PLANS: dict[str, dict[str, Any]] = {  # variables of the machine, options
    "eight": {"gpu": {"FAKE_GPUS": "8"}, "options": []},
    "none": {"gpu": {"FAKE_GPUS": "0"}, "options": []},
    "none-wanted": {"gpu": {"FAKE_GPUS": "0"}, "options": ["--accelerator", "cuda"]},
    "cpu-wanted": {"gpu": {"FAKE_GPUS": "8"}, "options": ["--accelerator", "cpu"]},
    "one-of-eight": {"gpu": {"FAKE_GPUS": "1", **RANKS}, "options": []},
    "mig": {"gpu": MIG, "options": ["--size", "350m"]},
    "mig-of-eight": {"gpu": {**MIG, "FAKE_GPUS": "7"}, "options": ["--size", "774m"]},
    "t4": {"gpu": T4, "options": []},
    "t4-bf16": {"gpu": T4, "options": ["--precision", "bf16-mixed"]},
    "v100": {"gpu": V100, "options": []},
}
# Kernels per step, views not counted. A change that is meant to be changes these numbers too.
OPERATORS = {
    "bert": {"forward_backward": 162, "optimizer": 13},
    "gpt": {"forward_backward": 139, "optimizer": 13},
    "vit": {"forward_backward": 173, "optimizer": 13},
    "gpt-fsdp": {"forward_backward": 164, "optimizer": 13},
    "gpt-hsdp": {"forward_backward": 167, "optimizer": 13},
    "gpt-fsdp1": {"forward_backward": 157, "optimizer": 18},
    "gpt-loss-chunk": {"forward_backward": 471, "optimizer": 13},
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, Any]:
    """What a step of each case did."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    library, cases = folder / "libcuda.so.1", folder / "cases.txt"
    build = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*build, str(Path(__file__).with_name("driver.c"))], check=True)
    plans = {name: {"recipe": "gpt", **plan} for name, plan in PLANS.items()}
    cases.write_text(json.dumps(CASES | plans))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.training", str(folder), str(cases)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONWARNINGS": "ignore"},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eight", "1 x 8 cuda, ddp, bf16-mixed, compile off"),
        ("none", "no GPU found: using 1 CPU process"),
        ("cpu-wanted", "1 x 1 cpu, single, 32-true, compile off"),
        ("mig", "1 x 1 cuda, single, bf16-mixed, compile off"),
        ("mig-of-eight", "1 x 7 cuda, fsdp, bf16-mixed, compile off"),
        ("t4", "1 x 1 cuda, single, 16-mixed, compile off"),
    ],
)
def test_a_plan_fits_the_machine(name: str, expected: str, steps: dict[str, Any]) -> None:
    assert steps[name]["exit_code"] == 0, steps[name]["errors"]
    assert expected in steps[name]["printed"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none-wanted", "devices is 1 and this machine has 0 GPUs; use --accelerator cpu"),
        ("one-of-eight", "this rank sees 1 of its GPUs"),
        ("t4-bf16", "precision bf16-mixed: Tesla T4 has no bf16; use 16-mixed"),
        ("v100", "Tesla V100-SXM2-32GB is of architecture sm_70"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_in_one_line(
    name: str, expected: str, steps: dict[str, Any]
) -> None:
    plan = steps[name]
    assert plan["exit_code"] == 2, plan
    assert expected in plan["errors"]
    assert plan["errors"].count("\n") == 1


@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_well_on_the_gpu_that_the_driver_names(name: str, steps: dict[str, Any]) -> None:
    assert "error" not in steps[name], steps[name]["error"]
    record = steps[name]["record"]
    assert record["status"] == "ok"
    assert record["config"]["parallel"]["accelerator"] == "cuda"
    gpu = CASES[name]["gpu"].get("FAKE_GPU_NAME", "NVIDIA H200")
    assert {rank["device"] for rank in record["hardware"]} == {gpu}
    assert record["peak_bytes_kind"] == "allocated"
    assert "NVML does not start" in record["gpu"][0]["missing"]["all"]  # it has no fake


@pytest.mark.parametrize("name", CASES)
def test_no_timed_step_reads_a_value_back(name: str, steps: dict[str, Any]) -> None:
    expected = set()
    if name == "gpt-t4":  # float16: the loss scaler has to know whether a gradient overflowed
        expected = {"_local_scalar_dense in module.py:optimizer_step"}
    elif "offload" in name:  # FSDP2 copies the gradients, without waiting
        expected = {"_to_copy in a library"}
    assert set(steps[name]["reads"]) == expected


@pytest.mark.parametrize("name", CASES)
def test_products_are_in_half_precision_and_loss_and_optimizer_in_float32(
    name: str, steps: dict[str, Any]
) -> None:
    dtypes, half = steps[name]["dtypes"], "torch.float16" if name == "gpt-t4" else "torch.bfloat16"
    assert dtypes["mm"] == [half]
    assert dtypes["addmm"] == [half]
    if name != "gpt-loss-chunk":  # there the gradient of the logits is written by hand
        assert dtypes["_log_softmax"] == ["torch.float32"]
    assert {d for name in dtypes if "ad" in name and "mm" not in name for d in dtypes[name]} == {
        "torch.float32"
    }


@pytest.mark.parametrize("name", [name for name in CASES if "offload" not in name])
def test_only_indices_and_numbers_of_the_optimizer_stay_on_the_cpu(
    name: str, steps: dict[str, Any]
) -> None:
    devices = steps[name]["devices"]
    assert set(devices) <= {"cpu", "cuda:0"}
    # The copy of the samples' indices to the device, for each micro-batch.
    assert devices.get("cpu", 0) <= (6 if name == "gpt-accumulate" else 3)


@pytest.mark.parametrize("name", CASES)
def test_attention_has_a_fused_kernel(name: str, steps: dict[str, Any]) -> None:
    kernel = {"gpt-a100": "flash", "gpt-t4": "efficient"}.get(name, "cudnn")
    found = steps[name]["attention"]
    assert found == [
        f"_scaled_dot_product_{kernel}_attention",
        f"_scaled_dot_product_{kernel}_attention_backward",
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_a_step_equal_their_baseline(name: str, steps: dict[str, Any]) -> None:
    found = {part: steps[name]["operators"][part] for part in OPERATORS[name]}
    assert found == OPERATORS[name], steps[name]["names"]


@pytest.mark.parametrize("name", CASES)
def test_adamw_takes_its_fused_or_foreach_kernels(name: str, steps: dict[str, Any]) -> None:
    kernels = {name for name in steps[name]["dtypes"] if "adam" in name or "addcdiv" in name}
    assert kernels == {"_foreach_addcdiv_" if name == "gpt-t4" else "_fused_adamw_"}


@pytest.mark.parametrize(
    ("name", "quantity"),
    [("bert", "bytes"), ("gpt", "bytes"), ("vit-s", "bytes"), ("vit-s", "operators")],
)
def test_synthetic_data_costs_at_most_a_hundredth_of_a_step(
    name: str, quantity: str, steps: dict[str, Any]
) -> None:
    counted = steps[name][quantity]
    assert counted["data"] <= 0.01 * sum(counted.values())

"""Trains recipes on fake CUDA tensors and counts what one step does; tensors hold no numbers.

    LD_PRELOAD=libcuda.so.1 python -m tests.fake_cuda.training OUT CASES

`driver.c`, preloaded, says that there are GPUs. CASES is a JSON file: case name -> arguments of
`count_step`, or of `plan` without `world_size`. Each case runs in a fork and writes
OUT/<case>.json.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.optim import optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unitransformer.run
from recipes import bert, gpt, vit
from recipes.command_line import configure, run_recipe
from unitransformer.measure.clock import StepClock
from unitransformer.parallel import fsdp1, strategies
from unitransformer.rehearsal.fake_tensors import apply_to_fakes, outside_modes

RECIPES = {"bert": bert, "gpt": gpt, "vit": vit}
STEPS, COUNTED = 4, 2  # validation follows the last step
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
aten = torch.ops.aten


class StepCounter(TorchDispatchMode):
    """Counts the operators of the step `COUNTED`, and notes all reads of values in timed steps."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.is_timed = -1, False
        self.operators: dict[str, Counter[str]] = {}
        self.pending: list[tuple[str, int]] = []  # belong to the part that ends next
        self.reads: list[str] = []
        self.new_reads: list[str] = []  # of this step, which a validation may restart
        self.attention: set[str] = set()
        self.devices: Counter[str] = Counter()
        self.dtypes: dict[str, set[str]] = {}
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if function is aten._pin_memory.default:
            return args[0]  # fake tensors have none
        if self.is_timed and self._reads_value(name, args, kwargs or {}):
            self.new_reads.append(f"{name} in {_caller()}")
        if function is aten._local_scalar_dense.default:
            # AdamW's step and a validation's sums divide; no gradient overflows, no rank stops.
            is_zero = args[0].is_cuda and args[0].dtype is torch.float32
            return 0.0 if is_zero else float(args[0].is_floating_point())
        result = function(*args, **kwargs or {})
        is_view = function.is_view or function.namespace == "prim"
        if self.is_timed and self.step == COUNTED and not is_view:
            self._count(name, [*tree_leaves((args, kwargs)), *tree_leaves(result)], result)
        return result

    def _reads_value(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether values go from the device to the host."""
        if name == "copy_":
            return args[1].is_cuda and not args[0].is_cuda
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or args[0].device)
            return args[0].is_cuda and target.type == "cpu"
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        is_mask = name in ("index", "index_put_", "index_put") and any(
            tensor.dtype is torch.bool for tensor in tensors[1:]
        )
        return on_gpu and (name in READS or is_mask)

    def _count(self, name: str, leaves: Sequence[Any], result: Any) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.is_cuda for tensor in tensors):
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in written)
            self.pending.append((name, size))
        self.devices.update({str(tensor.device) for tensor in tensors if tensor.dim()})
        if "attention" in name:
            self.attention.add(name)
        if name in ("mm", "addmm", "bmm", "_log_softmax") or "adam" in name or "addcdiv" in name:
            floats = {str(t.dtype) for t in tensors if t.is_floating_point() and t.dim()}
            self.dtypes.setdefault(name, set()).update(floats)

    def end_part(self, part: str) -> None:
        counts = self.operators.setdefault(part, Counter())
        for name, size in self.pending:
            counts[name] += 1
            self.bytes[part] += size
        self.pending.clear()

    def as_dict(self) -> dict[str, Any]:
        return {
            "operators": {part: sum(counts.values()) for part, counts in self.operators.items()},
            "names": {part: dict(counts) for part, counts in self.operators.items()},
            "bytes": dict(self.bytes),
            "reads": self.reads,
            "attention": sorted(self.attention),
            "devices": dict(self.devices),
            "dtypes": {name: sorted(dtypes) for name, dtypes in self.dtypes.items()},
        }


def _caller() -> str:
    ours = [f for f in traceback.extract_stack() if "/unitransformer/" in f.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "a library"


def follow_clock(counter: StepCounter) -> None:
    """Makes the counter see where timed steps and their parts begin and end."""
    start, mark, stop = StepClock.start, StepClock.mark, StepClock.stop

    def started(self: StepClock, **options: Any) -> None:
        is_new, again = not self._marks, options.get("again", False)
        start(self, **options)
        counter.step += is_new
        counter.is_timed = True
        if is_new or again:
            counter.new_reads.clear()
            counter.pending.clear()

    def marked(self: StepClock, part: Any) -> None:
        mark(self, part)
        if part != "communication":  # a wait lies within another part
            counter.end_part(part)

    def stopped(self: StepClock) -> None:
        stop(self)
        counter.is_timed = False
        counter.reads += counter.new_reads

    StepClock.start, StepClock.mark, StepClock.stop = started, marked, stopped  # type: ignore[method-assign]


def _all_alike(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


def count_step(
    recipe: str, *, options: Sequence[str], world_size: int, gpu: Mapping[str, str]
) -> dict[str, Any]:
    """Trains with the options of a command line as rank 0 of `world_size`.

    Args:
        gpu: variables of `driver.c`.
    """
    os.environ |= {"FAKE_GPUS": str(world_size), **gpu}
    if "--strategy" in options:
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", **dict.fromkeys(names, str(world_size))}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=world_size
        )
    fixed = (
        "--max-steps",
        str(STEPS),
        "--validate-every",
        str(STEPS),
        "--no-checkpoint",
        "--ceiling-s",
        "0",
        "--data",
        "synthetic",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*fixed, "--out", folder, *options]
        config, paths = configure(RECIPES[recipe].PRESET, arguments)
        for module in (optimizer, _foreach_utils):  # torch looks for its exact types
            module._foreach_supported_types += [FakeTensor, nn.Parameter]
        counter = StepCounter()
        follow_clock(counter)
        nn.Module._apply = apply_to_fakes  # type: ignore[method-assign,assignment]
        new_group = torch.distributed.new_group
        torch.distributed.new_group = lambda *ranks, **options: new_group(*ranks, backend="fake")
        torch.distributed.all_gather_object = _all_alike
        for module in (device_mesh, fsdp1, strategies):
            module.init_device_mesh = outside_modes(module.init_device_mesh)  # type: ignore
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            outcome = unitransformer.run.run(
                config, paths, command="a test", print_line=lambda line: None
            )
    record = outcome.record
    assert record is not None
    kept = ("status", "config", "hardware", "gpu", "versions", "peak_bytes_kind", "mfu")
    return {**counter.as_dict(), "record": {name: record.get(name) for name in kept}}


def plan(recipe: str, *, options: Sequence[str], gpu: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the command line prints that would run, and its exit code."""
    os.environ |= gpu
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        preset = RECIPES[recipe].PRESET
        code = run_recipe(preset, lambda outcome, folder: [], ["--dry-run", *options])
    return {"exit_code": code, "printed": printed.getvalue(), "errors": errors.getvalue()}


def main(out: Path, cases: dict[str, Any]) -> None:
    for name, case in cases.items():
        if (pid := os.fork()) == 0:
            try:
                result = plan(**case) if "world_size" not in case else count_step(**case)
            except BaseException as error:
                result = {"error": f"{type(error).__name__}: {error}"[:2000]}
                traceback.print_exc()
            (out / f"{name}.json").write_text(json.dumps(result, default=str))
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

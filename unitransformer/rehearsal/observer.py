"""Follows memory and collectives of training steps with torch's memory tracker.

Two equal steps are followed. The first one finds at which operator the memory is largest; the
second one stops there to see which tensors are in memory.
"""

import gc
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

# Operators of torch.distributed: kind, and whether the full tensor is their first argument.
_COLLECTIVES = {
    "allreduce_": ("all-reduce", True),
    "allreduce_coalesced_": ("all-reduce", True),
    "all_reduce": ("all-reduce", True),
    "all_reduce_": ("all-reduce", True),
    "_allgather_base_": ("all-gather", True),
    "allgather_": ("all-gather", True),
    "_reduce_scatter_base_": ("reduce-scatter", False),
    "broadcast_": ("broadcast", True),
    "barrier": ("barrier", True),
}
_SCALARS_OF_FAKES = torch.ops.aten._local_scalar_dense.default
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer state",
    "gathered weights",
    "communication buffers",
    "activations",
    "temporaries",
    "batch and tables",
)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call of a collective."""

    kind: str
    ranks: tuple[int, ...]  # of the group
    dtype: str
    num_bytes: int  # of the full tensor: reduced, gathered, or to be scattered
    num_elements: int


class StepObserver(MemTracker):  # type: ignore[no-untyped-call]
    """Counts the peak memory and the collectives of a step; a context manager.

    Call `begin_step` and `end_step` around each optimizer step. The step that `end_step` ends may
    be `searched` for its peak, or `classified` at the peak that the step before had.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.peak_place = ""
        self.categories: dict[str, int] = {}
        self.collectives: list[Collective] = []
        self._model = model
        self._batch: list[Tensor] = []
        self._optimizers: Iterable[Any] = ()
        self._index = 0  # of the operator within the step
        self._peak_index = 0
        self._task = ""

    def begin_step(self, task: str, batch: Any, optimizers: Iterable[Any]) -> None:
        """Begins a step.

        Args:
            task: "search" for the peak, "classify" what is in memory then, or "" for neither.
        """
        # Tensors in cycles are freed when the garbage collector runs: not at arbitrary moments.
        gc.collect()
        self._task, self._index, self._optimizers = task, 0, optimizers
        self._batch = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self.track_external(self._model, *self._batch)
        if task == "search":
            self.peak_bytes = 0
            self.collectives.clear()

    def begin_update(self) -> None:
        """Marks the end of the backward pass; gradients are clipped next."""
        self._in_opt = True

    def _register_global_optimizer_hook(self) -> None:
        """Not as the tracker does: Lightning runs the backward pass inside the optimizer's step."""

    def end_step(self) -> None:
        self._in_opt = False
        self._task, self._batch, self._optimizers = "", [], ()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is _SCALARS_OF_FAKES and isinstance(args[0], FakeTensor):
            return 0.0  # the loss scaler asks whether a gradient overflowed: none did
        result = super().__torch_dispatch__(  # type: ignore[no-untyped-call]
            function, types, args, kwargs
        )
        if result is not NotImplemented and "c10d" in function.namespace:
            self._note(function, args)
        return result

    def _note(self, function: Any, args: Any) -> None:
        name = function.overloadpacket.__name__
        if name == "wait_tensor":
            return
        kind, is_first = _COLLECTIVES.get(name, (name, True))
        tensors = [t for t in tree_leaves(args[0 if is_first else 1]) if isinstance(t, Tensor)]
        if "functional" not in function.namespace:  # buffers that a strategy has allocated
            for tensor in (t for t in tree_leaves(args[:2]) if isinstance(t, Tensor)):
                self._update_and_maybe_create_winfos(tensor, _MemRefType.OTH)
        if self._task == "search":
            self.collectives.append(
                Collective(
                    kind=kind,
                    ranks=tuple(get_process_group_ranks(_group_of(args))),
                    dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
                    num_bytes=sum(t.numel() * t.element_size() for t in tensors),
                    num_elements=sum(t.numel() for t in tensors),
                )
            )

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Runs after every operator."""
        self._index += 1
        if self._task == "search":
            now = self.live_bytes()
            if now > self.peak_bytes:
                self.peak_bytes, self._peak_index = now, self._index
                self.peak_place = self._place()
        elif self._task == "classify" and self._index == self._peak_index:
            self.categories = self._classify()

    def live_bytes(self) -> int:
        return sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())

    def _place(self) -> str:
        if self._in_opt:
            return "in the optimizer step"
        direction = "backward" if self._mod_tracker.is_bw else "forward"
        deepest = max(self._mod_tracker.parents, key=len)
        layer = re.search(r"transformer_layers\.(\d+)", deepest)
        if layer is not None:
            return f"in the {direction} pass of layer {int(layer[1]) + 1}"
        if deepest.endswith((".embedding", ".lut", ".linear_mapper", ".embedding_dropout", ".pe")):
            return f"in the {direction} pass of the embedding"
        return f"in the {direction} pass of the loss"

    def _classify(self) -> dict[str, int]:
        known = {
            storage: category
            for category, tensors in self._known_tensors()
            for storage in map(_storage_of, tensors)
        }
        bytes_of = dict.fromkeys(CATEGORIES, 0)
        for storage, (info, _) in list(self._WINFO.items()):  # type: ignore[no-untyped-call]
            by_phase = {
                _MemRefType.GRAD: "gradients",  # buckets of DDP, also before they are filled
                _MemRefType.OTH: "communication buffers",
                _MemRefType.ACT: "activations",
                _MemRefType.BUFFER: "batch and tables",
            }.get(info.reftype, "temporaries")
            bytes_of[known.get(storage._cdata, by_phase)] += info.mem_consumed
        return bytes_of

    def _known_tensors(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yields tensors by category; of a storage with several, the last counts."""
        yield "batch and tables", self._batch
        gathered: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for module in self._model.modules():
            for group in fsdp_groups(module):
                for parameter in group.fsdp_params:
                    gathered += parameter.all_gather_outputs
                    gradients.append(parameter.unsharded_accumulated_grad)
                    if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                        gathered.append(unsharded)
                        gradients.append(unsharded.grad)
        yield "gathered weights", gathered
        parameters = list(sharded_parameters(self._model))
        gradients += [parameter.grad for parameter in parameters]
        yield "gradients", [gradient for gradient in gradients if gradient is not None]
        states = [getattr(o, "optimizer", o).state.values() for o in self._optimizers]
        yield (
            "optimizer state",
            [value for group in states for state in group for value in state.values()],
        )
        yield "parameters", parameters

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if self._mod_tracker.is_bw and not self._in_ac:  # a layer is recomputed
            vars(self).update(_ac_mod=module, _in_ac=True)

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if vars(self)["_ac_mod"] is module:
            vars(self).update(_ac_mod=None, _in_ac=False)

    def _pre_bw_hook(self, module: nn.Module, args: Any) -> None:
        pass

    def _post_bw_hook(self, module: nn.Module, args: Any) -> None:
        pass


def fsdp_groups(module: nn.Module) -> list[Any]:
    """Returns the groups of parameters that FSDP2 gathers for a module; most have none or one."""
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def sharded_parameters(model: nn.Module) -> list[Tensor]:
    """Returns what this rank keeps of each parameter between steps."""
    groups = [group for module in model.modules() for group in fsdp_groups(module)]
    if not groups:
        return list(model.parameters())
    return [parameter.sharded_param for group in groups for parameter in group.fsdp_params]


def _storage_of(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return int(local.untyped_storage()._cdata)


def _group_of(args: Any) -> ProcessGroup:
    """Returns the group that an operator of torch.distributed communicates in."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return ProcessGroup.unbox(leaf)
    name = next(leaf for leaf in reversed(tree_leaves(args)) if isinstance(leaf, str))
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: ProcessGroup = resolve(name)
    return group

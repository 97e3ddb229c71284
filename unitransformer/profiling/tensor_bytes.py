"""Counts the peak bytes of tensors during one step on a CPU, exactly and without timing.

Counted: every block that torch's CPU allocator gives to the thread that runs the step, for Python,
C++, compiled code, or buffers of DDP and DeepSpeed, as requested and not as rounded up; and blocks
from before the step that a Python object or a parameter's gradient refers to.

Not counted: memory from elsewhere (gloo, the C++ library, Python objects), buffers of gloo's
threads for what they send, and earlier tensors that nothing in Python refers to.
"""

import contextlib
import ctypes
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from unitransformer.profiling.collective_waits import wait_for_release
from unitransformer.profiling.step_events import BEGIN, StepEvent, StepTrace

Blocks = dict[int, tuple[int, str]]  # address -> bytes, kind or location


class PeakTensorBytes:
    """Measures a step, and better also the one before it; `begin` separates them.

        with PeakTensorBytes(module=module, optimizers=[optimizer]) as peak:
            step()
            peak.begin()
            step()
        peak.bytes

    The allocator reports that a block is freed only if it was allocated inside. The measured step
    frees what the step before it allocated (gradients), so without that one the peak is an upper
    bound.

    Garbage is collected before the step and not during it, where the collector would run at
    arbitrary moments. Only one profiler of torch can run at a time, including this one.

    Args:
        module, optimizers: identify parameters, gradients and optimizer states.
        trace: records the step; a subclass of `StepTrace` gives `by_location` its locations.
        ignored: earlier tensors that do not belong to this step.
    """

    def __init__(
        self,
        *,
        module: nn.Module | None = None,
        optimizers: Sequence[Any] = (),
        trace: StepTrace | None = None,
        ignored: Sequence[Tensor] = (),
    ) -> None:
        self._module, self._optimizers, self._ignored = module, optimizers, ignored
        self._trace = trace or StepTrace()
        self._stack = contextlib.ExitStack()
        self._before: Blocks | None = None  # live when the measured step begins
        self.bytes = 0
        self.by_kind: dict[str, int] = {}  # parameters, gradients, optimizer, other
        self.by_location: dict[str, int] = {}  # earlier blocks by kind
        self.events: list[StepEvent] = []  # of the measured step

    def __enter__(self) -> Self:
        self._stack.enter_context(_without_warnings())
        if gc.isenabled():
            self._stack.callback(gc.enable)
        gc.collect()
        self._stack.enter_context(wait_for_release())
        self._trace.start()
        return self

    def begin(self) -> None:
        """Begins the measured step."""
        if self._before is not None:
            raise ValueError("begin was called twice; one PeakTensorBytes measures one step")
        gc.collect()
        gc.disable()
        self._before = self._scan()
        self._trace.mark()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._trace.stop()
        self._stack.close()
        if kind is not None:
            return
        if self._before is None:
            raise ValueError("begin was never called; call it where the measured step starts")
        after = self._scan()
        events = _add_hidden_frees(self._trace.events(), after)
        start = next(index for index, event in enumerate(events) if event.name == BEGIN)
        self.events = events[start + 1 :]
        at_peak = _peak(self._before | _replay({}, events[:start]), self.events)
        self.bytes = sum(size for size, _ in at_peak.values())
        self.by_location = _sums(at_peak.values())
        kinds = {address: kind for address, (_, kind) in (self._before | after).items()}
        self.by_kind = _sums(
            (size, kinds.get(address, "other")) for address, (size, _) in at_peak.items()
        )

    def _scan(self) -> Blocks:
        """Returns the memory of CPU tensors that Python objects refer to, with its kind."""
        blocks: Blocks = {}
        for parameter in () if self._module is None else self._module.parameters():
            _add(blocks, parameter, "parameters")
            if parameter.grad is not None:
                _add(blocks, parameter.grad, "gradients")
        for optimizer in self._optimizers:
            for states in getattr(optimizer, "optimizer", optimizer).state.values():
                for state in states.values() if isinstance(states, dict) else ():
                    if isinstance(state, Tensor):
                        _add(blocks, state, "optimizer")
        for tensor in find_live_tensors():
            _add(blocks, tensor, "other")
            if tensor.is_leaf and tensor.grad is not None:
                _add(blocks, tensor.grad, "other")
        for tensor in self._ignored:
            blocks.pop(_address(tensor), None)
        return blocks


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences the allocator, which warns of blocks from before; `_scan` finds them."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL("libc10.so"), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # another build of torch: the line is printed
        yield
        return
    before, level.value = level.value, 2  # errors and worse
    try:
        yield
    finally:
        level.value = before


def find_live_tensors() -> list[Tensor]:
    """Returns all tensors in Python."""
    objects = gc.get_objects()
    # Not isinstance, which resolves proxies; and one check per class is faster.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
    return [item for item in objects if type(item) in kinds]


def _add(blocks: Blocks, tensor: Tensor, kind: str) -> None:
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    address = _address(tensor)
    if address:
        blocks.setdefault(address, (tensor.untyped_storage().nbytes(), kind))


def _address(tensor: Tensor) -> int:
    """Returns the address of a tensor's memory on the CPU; 0 if it has none."""
    # The compiler's tensors have no storage.
    if isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor):
        return 0
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return 0
    storage = tensor.untyped_storage()
    return storage.data_ptr() if storage.nbytes() else 0


def _add_hidden_frees(events: list[StepEvent], after: Blocks) -> list[StepEvent]:
    """Adds that a gloo thread freed a block as its last owner, which the profiler does not see.

    Such a block was an argument of a collective, was never freed, and nothing in Python refers to
    it in the end. It belongs to DDP, which waits in C++, where `wait_for_release` has no hook.
    """
    unfreed = _replay({}, events).keys() - after.keys()
    last_use = {
        address: index
        for index, event in enumerate(events)
        if event.name.startswith("c10d::")
        for address in unfreed & _addresses(event.inputs)
    }
    frees: dict[int, list[StepEvent]] = {}
    for address, index in last_use.items():
        location = events[index].location
        freed = StepEvent(name="memory", location=location, address=address, num_bytes=-1)
        frees.setdefault(index, []).append(freed)
    return [item for index, event in enumerate(events) for item in (event, *frees.get(index, ()))]


def _addresses(inputs: Any) -> set[int]:
    if isinstance(inputs, list | tuple):
        return {address for item in inputs for address in _addresses(item)}
    address = getattr(inputs, "storage_data_ptr", None)
    return set() if address is None else {address}


def _replay(live: Blocks, events: Iterable[StepEvent]) -> Blocks:
    """Applies allocations and frees to `live` and returns it."""
    for event in events:
        if event.num_bytes > 0:
            live[event.address] = (event.num_bytes, event.location)
        elif event.num_bytes < 0:
            live.pop(event.address, None)
    return live


def _peak(live: Blocks, events: Iterable[StepEvent]) -> Blocks:
    """Returns the blocks that are alive when the bytes first reach their maximum."""
    changes = [event for event in events if event.num_bytes]
    replayed = dict(live)
    now = most = sum(size for size, _ in live.values())
    num_until_peak = 0
    for number, event in enumerate(changes, start=1):
        was, _ = replayed.get(event.address, (0, ""))
        _replay(replayed, [event])
        now += replayed.get(event.address, (0, ""))[0] - was
        if now > most:
            most, num_until_peak = now, number
    return _replay(dict(live), changes[:num_until_peak])


def _sums(blocks: Iterable[tuple[int, str]]) -> dict[str, int]:
    sums = Counter[str]()
    for size, name in blocks:
        sums[name] += size
    return dict(sorted(sums.items()))

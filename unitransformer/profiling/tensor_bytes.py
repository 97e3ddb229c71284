"""Most bytes of tensors that were alive at once during one step on a CPU. Never the clock's doing.

Counted: every block that torch's CPU allocator gives to the thread that runs the step, whoever
asked for it (Python, C++, compiled code, buffers of DDP and DeepSpeed), as asked for, not as
rounded up by the allocator; and what was alive before, as far as a Python object or a
parameter's gradient leads to it.

Not counted: memory from elsewhere (gloo's, the C++ library's, Python's own objects), buffers that
gloo's threads make for what they send, and tensors from before that nothing in Python leads to.
"""

import contextlib
import ctypes
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from unitransformer.profiling.collective_waits import wait_for_release
from unitransformer.profiling.step_events import BEGIN, StepEvent, StepTrace

Live = dict[int, tuple[int, str]]  # address -> bytes, kind


class PeakTensorBytes:
    """Around a step and, better, the one before it, of which `begin` marks the end.

        with PeakTensorBytes(module=module, optimizers=[optimizer]) as peak:
            step()
            peak.begin()
            step()
        peak.bytes

    The allocator tells that a block is given back only if it was taken in here. What the step
    before has taken (gradients) is given back in the one that is measured, so without that one the
    peak is an upper bound: at most `uncertain_bytes` too high, which is 0 where the peak is exact.

    Cyclic garbage is collected before and left alone within, where the collector would come at
    moments of its own choice. Two of these, or any other profiler of torch, cannot run at once.

    Args:
        module: what is trained; tells parameters and gradients from the rest.
        optimizers: their states are told from the rest.
        by_module: whether `by_location` names modules of `module`; not for compiled ones.
        ignored: tensors from before that are none of this step's.
    """

    def __init__(
        self,
        *,
        module: nn.Module | None = None,
        optimizers: Sequence[Any] = (),
        by_module: bool = False,
        ignored: Sequence[Tensor] = (),
    ) -> None:
        self._module, self._optimizers, self._ignored = module, optimizers, ignored
        self._trace = StepTrace(module if by_module else None)
        self._release_waits = wait_for_release()
        self._quiet = _without_warnings()
        self._has_begun = False
        self._before: Live = {}
        self._was_collecting = True
        self.bytes = 0
        self.by_kind: dict[str, int] = {}  # parameters, gradients, optimizer, other
        self.by_location: dict[
            str, int
        ] = {}  # module that took them, or the kind of what was before
        self.uncertain_bytes = 0
        self.events: list[StepEvent] = []  # of the measured step

    def __enter__(self) -> Self:
        self._quiet.__enter__()
        self._was_collecting = gc.isenabled()
        gc.collect()
        self._release_waits.__enter__()
        self._trace.start()
        return self

    def begin(self) -> None:
        """The measured step starts here."""
        if self._has_begun:
            raise ValueError("begin was called twice; one PeakTensorBytes measures one step")
        self._has_begun = True
        gc.collect()
        gc.disable()
        self._before = self._scan()
        self._trace.mark()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trace.stop()
        self._release_waits.__exit__(kind, error, traceback)
        self._quiet.__exit__(kind, error, traceback)
        if self._was_collecting:
            gc.enable()
        if kind is not None:
            return
        if not self._has_begun:
            raise ValueError("begin was never called; call it where the measured step starts")
        self._read(self._scan())

    def _scan(self) -> Live:
        found = find_live_storages(self._module, self._optimizers)
        for tensor in self._ignored:
            found.pop(_address(tensor), None)
        return found

    def _read(self, after: Live) -> None:
        events = _with_lost(self._trace.events(), after)
        start = next(index for index, event in enumerate(events) if event.name == BEGIN)
        self.events = events[start + 1 :]
        live = _replay({}, events[:start])
        known = set(live)
        live |= {
            address: (size, kind)
            for address, (size, kind) in self._before.items()
            if address not in live
        }
        at_peak = _peak(live, self.events)
        self.bytes = sum(size for size, _ in at_peak.values())
        self.by_location = _sums(at_peak.values())
        kinds = {address: kind for address, (_, kind) in (self._before | after).items()}
        self.by_kind = _sums(
            (size, kinds.get(address, "other")) for address, (size, _) in at_peak.items()
        )
        reused = {event.address for event in self.events if event.num_bytes > 0}
        self.uncertain_bytes = sum(
            size
            for address, (size, _) in self._before.items()
            if address not in known and (address not in after or address in reused)
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The allocator warns that it does not know what was there before; the scan does."""
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


def find_live_storages(module: nn.Module | None = None, optimizers: Sequence[Any] = ()) -> Live:
    """Memory of the CPU tensors that Python leads to: address -> bytes, kind.

    Kinds are `parameters` and `gradients` of `module`, states of the `optimizer`, and `other`.
    """
    found: Live = {}
    parameters = [] if module is None else list(module.parameters())
    for parameter in parameters:
        _add(found, parameter, "parameters")
        if parameter.grad is not None:
            _add(found, parameter.grad, "gradients")
    for optimizer in optimizers:
        for states in getattr(optimizer, "optimizer", optimizer).state.values():
            for state in states.values() if isinstance(states, dict) else ():
                if isinstance(state, Tensor):
                    _add(found, state, "optimizer")
    for tensor in find_live_tensors():
        _add(found, tensor, "other")
        if tensor.is_leaf and tensor.grad is not None:
            _add(found, tensor.grad, "other")
    return found


def find_live_tensors() -> list[Tensor]:
    """All there are in Python."""
    objects = gc.get_objects()
    # Not isinstance, which asks proxies for what they stand for; and a class is asked only once.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
    return [each for each in objects if type(each) in kinds]


def _add(found: Live, tensor: Tensor, kind: str) -> None:
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    address = _address(tensor)
    if address:
        found.setdefault(address, (tensor.untyped_storage().nbytes(), kind))


def _address(tensor: Tensor) -> int:
    """Where its memory on the CPU begins; 0 if it has none."""
    # The compiler's tensors have a shape and nothing else.
    if isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor):
        return 0
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return 0
    storage = tensor.untyped_storage()
    return storage.data_ptr() if storage.nbytes() else 0


def _with_lost(events: list[StepEvent], after: Live) -> list[StepEvent]:
    """`events`, and that blocks are given back which a thread of gloo's was the last to hold.

    The profiler does not see that. They are those that a collective has had, that nothing in
    Python leads to in the end, and that were never given back; DDP's own, which it waits for in
    C++, where no waiting for gloo's threads can be put.
    """
    lost = _replay({}, events).keys() - after.keys()
    last = {
        address: index
        for index, event in enumerate(events)
        if event.name.startswith("c10d::")
        for address in lost & _addresses(event.inputs)
    }
    returned: dict[int, list[StepEvent]] = {}
    for address, index in last.items():
        given_back = StepEvent(
            name="memory", location=events[index].location, address=address, num_bytes=-1
        )
        returned.setdefault(index, []).append(given_back)
    return [
        each for index, event in enumerate(events) for each in (event, *returned.get(index, ()))
    ]


def _addresses(inputs: Any) -> set[int]:
    if isinstance(inputs, list | tuple):
        return {address for each in inputs for address in _addresses(each)}
    address = getattr(inputs, "storage_data_ptr", None)
    return set() if address is None else {address}


def _replay(live: Live, events: Iterable[StepEvent]) -> Live:
    for event in events:
        if event.num_bytes > 0:
            live[event.address] = (event.num_bytes, event.location)
        elif event.num_bytes < 0:
            live.pop(event.address, None)
    return live


def _peak(live: Live, events: Iterable[StepEvent]) -> Live:
    """What is alive when the most bytes are, for the first time."""
    blocks = [event for event in events if event.num_bytes]
    replayed = dict(live)
    now = most = sum(size for size, _ in live.values())
    num_until_peak = 0
    for number, event in enumerate(blocks, start=1):
        was, _ = replayed.get(event.address, (0, ""))
        _replay(replayed, [event])
        now += replayed.get(event.address, (0, ""))[0] - was
        if now > most:
            most, num_until_peak = now, number
    return _replay(dict(live), blocks[:num_until_peak])


def _sums(blocks: Iterable[tuple[int, str]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for size, name in blocks:
        sums[name] += size
    return dict(sorted(sums.items()))

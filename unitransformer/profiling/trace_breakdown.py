"""A profiler's trace in, the share of the step that each part of the work takes out. Plain.

The trace is the JSON that `torch.profiler` exports; its format is Chrome's
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). All times in it
are microseconds.

- On a CPU an operator counts for itself, without those it calls. What the main thread does counts
  first, then a backward thread of its own, then the threads of the communication; the rest of the
  step, Python between the operators among it, is idle.
- On a GPU kernels count, under the operator that launched them. Communication counts only where
  nothing else runs: it is the exposed part.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WorkKind = Literal[
    "matrix multiply",
    "attention",
    "head and loss",
    "optimizer",
    "communication",
    "data",
    "other",
    "idle",
]
WORK_KINDS: tuple[WorkKind, ...] = WorkKind.__args__  # type: ignore[attr-defined]

# Ranges that `trace` puts around what is measured, and around what no operator's name tells.
WINDOW = "unitransformer: traced steps"
NETWORK = "unitransformer: network"
HEAD = "unitransformer: head and loss"
BACKWARD = "unitransformer: backward"
STEP = "unitransformer: step "

NODE = "autograd::engine::evaluate_function: "  # torch's own

_NEUTRAL = re.compile("|".join((WINDOW, NETWORK, BACKWARD, STEP)))
_RANGES: tuple[tuple[re.Pattern[str], WorkKind], ...] = (
    (re.compile(re.escape(HEAD)), "head and loss"),
    (re.compile(r"Optimizer\.(step|zero_grad)#"), "optimizer"),
    (re.compile(r"enumerate\(DataLoader\)"), "data"),
)
# FSDP2's own ranges and operators: gathering, packing, and the wait for it.
_COMMUNICATION = re.compile(
    r"c10d::|_c10d_functional|nccl|gloo:|record_param_comms|fsdp::", re.IGNORECASE
)
_OPERATORS: tuple[tuple[re.Pattern[str], WorkKind], ...] = (
    (re.compile(r"scaled_dot_product|flash_attention|efficient_attention"), "attention"),
    (
        re.compile(
            r"aten::(mm|addmm|bmm|baddbmm|mv|addmv|_addmm_activation|_scaled_mm|_int_mm)(\.\w+)?$"
            r"|mkldnn.*linear|mkl::_mkl_linear"
        ),
        "matrix multiply",
    ),
)
# Names of kernels, where no operator tells: those of a compiled graph or of a CUDA graph.
_KERNELS: tuple[tuple[re.Pattern[str], WorkKind], ...] = (
    (re.compile(r"nccl", re.I), "communication"),
    (re.compile(r"flash|fmha|attention|sdpa", re.I), "attention"),
    (re.compile(r"nll_loss|log_softmax|cross_entropy", re.I), "head and loss"),
    (re.compile(r"gemm|cutlass|cublas|nvjet|xmma|triton_tem_fused", re.I), "matrix multiply"),
    (re.compile(r"multi_tensor_apply|adam", re.I), "optimizer"),
    (re.compile(r"memcpy htod", re.I), "data"),
)

Interval = tuple[float, float]
Segment = tuple[float, float, WorkKind]


@dataclass(kw_only=True)
class _Open:
    """An operator or a range under way."""

    end: float
    part: WorkKind | None  # None: nothing is said of what runs inside
    counts: bool  # its own time is work
    free_from: float  # where its time is its own again


@dataclass(kw_only=True)
class _Thread:
    stack: list[_Open] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    runs_backward: bool = False

    def close(self, until: float) -> None:
        """End all that ends before `until`."""
        while self.stack and self.stack[-1].end <= until:
            ended = self.stack.pop()
            self._own(ended, ended.end)
            if self.stack:
                self.stack[-1].free_from = ended.end

    def open(self, entry: _Open, start: float) -> None:
        if self.stack:
            self._own(self.stack[-1], start)
            # Rounded times may let a called operator end after its caller.
            entry.end = min(entry.end, self.stack[-1].end)
        self.stack.append(entry)

    def _own(self, entry: _Open, until: float) -> None:
        if entry.counts and until > entry.free_from:
            self.segments.append((entry.free_from, until, entry.part or "other"))


def time_shares(
    trace: Mapping[str, Any], *, on_gpu: bool = False, num_classes: int | None = None
) -> dict[WorkKind, float]:
    """Share of each part in the traced steps; they add up to 1.

    Args:
        trace: the exported JSON, with the ranges named above.
        num_classes: V, where no range could be put around the head (it is compiled into one graph
            with the rest): a matrix multiply with a side of V is the head's.

    Raises:
        ValueError: a trace without the range around the traced steps.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    windows = [_interval(event) for event in events if _is_range(event, WINDOW)]
    if not windows:
        raise ValueError(f"the trace has no range {WINDOW!r}: it was not made by --trace")
    threads, parts = _walk(trace["traceEvents"], num_classes)
    if on_gpu:
        lanes = _kernel_lanes(events, parts)
    else:
        main = next(_thread_of(event) for event in events if _is_range(event, WINDOW))
        lanes = _cpu_lanes(threads, main)
    seconds = _fill(windows, lanes)
    total = sum(end - start for start, end in windows)
    return {part: seconds[part] / total for part in WORK_KINDS}


def _walk(
    events: Sequence[Mapping[str, Any]], num_classes: int | None
) -> tuple[dict[Any, _Thread], dict[int, WorkKind | None]]:
    """Every thread's own times, and the part of every operator by its "External id"."""
    threads: dict[Any, _Thread] = {}
    parts: dict[int, WorkKind | None] = {}
    places: dict[tuple[Any, float], WorkKind | None] = {}  # (thread, start)
    causes = _backward_causes(events)
    cpu = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    for event in sorted(cpu, key=lambda event: (event["ts"], -event["dur"])):
        place = (_thread_of(event), event["ts"])
        thread = threads.setdefault(place[0], _Thread())
        start, end = _interval(event)
        thread.close(start)
        inherited = thread.stack[-1].part if thread.stack else None
        name = event["name"]
        part: WorkKind | None
        thread.runs_backward |= name.startswith(NODE)
        if (cause := causes.get(_node_of(event))) is not None:
            # A multiply's backward holds more than multiplies: those inside say it themselves.
            part = places.get(cause)
            part = part if part in ("head and loss", "attention") else None
        else:
            part = _part_of(event, inherited, num_classes)
        places[place] = part
        parts[event["args"].get("External id", -1)] = part
        counts = _NEUTRAL.match(name) is None and name != HEAD
        thread.open(_Open(end=end, part=part, counts=counts, free_from=start), start)
    for thread in threads.values():
        thread.close(float("inf"))
    return threads, parts


def _backward_causes(events: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[Any, float]]:
    """Node of a backward pass -> thread and time at which the forward operator of it began."""
    places = {
        (event["id"], event["ph"]): (_thread_of(event), event["ts"])
        for event in events
        if event.get("cat") == "fwdbwd"
    }
    asked = {
        place: places[number, "s"]
        for (number, kind), place in places.items()
        if kind == "f" and (number, "s") in places
    }
    # The arrow points at the operator inside of the engine's; both are of one node.
    backward = [event for event in events if event.get("cat") == "cpu_op"]
    return {
        _node_of(event): asked[place]
        for event in backward
        if (place := (_thread_of(event), event["ts"])) in asked and _node_of(event) is not None
    }


def _node_of(event: Mapping[str, Any]) -> tuple[Any, int, int] | None:
    """What tells nodes of the backward pass apart; None for all that is not in one."""
    arguments = event["args"]
    forward_thread = arguments.get("Fwd thread id", 0)
    if not forward_thread or "Sequence number" not in arguments:
        return None
    return _thread_of(event), forward_thread, arguments["Sequence number"]


def _part_of(
    event: Mapping[str, Any], inherited: WorkKind | None, num_classes: int | None
) -> WorkKind | None:
    name = event["name"]
    if _NEUTRAL.match(name):
        return None
    part = _first(_RANGES, name)
    if part is not None:
        return part
    if _COMMUNICATION.search(name):
        return "communication"
    if inherited is not None:
        return inherited
    part = _first(_OPERATORS, name)
    if part == "matrix multiply" and num_classes is not None:
        sides = itertools.chain(*(d for d in event["args"].get("Input Dims", []) if d))
        return "head and loss" if num_classes in sides else part
    return part


def _kernel_lanes(
    events: Iterable[Mapping[str, Any]], parts: Mapping[int, WorkKind | None]
) -> list[list[Segment]]:
    work: list[Segment] = []
    communication: list[Segment] = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        told = parts.get(event["args"].get("External id", -1))
        part = told or _first(_KERNELS, event["name"]) or "other"
        lane = communication if part == "communication" else work
        lane.append((*_interval(event), part))
    return [work, communication]


def _cpu_lanes(threads: Mapping[Any, _Thread], main: Any) -> list[list[Segment]]:
    others = [thread for place, thread in threads.items() if place != main]
    backward = [thread.segments for thread in others if thread.runs_backward]
    waited = [
        segment
        for thread in others
        if not thread.runs_backward
        for segment in thread.segments
        if segment[2] == "communication"
    ]
    return [threads[main].segments, *backward, waited]


def _fill(windows: Sequence[Interval], lanes: Iterable[Sequence[Segment]]) -> dict[WorkKind, float]:
    """Time of each part: a lane takes what the lanes before it have left free."""
    taken = dict.fromkeys(WORK_KINDS, 0.0)
    free = sorted(windows)
    for lane in lanes:
        left: list[Interval] = []
        segments = sorted(lane)
        first = 0
        for start, end in free:
            while first < len(segments) and segments[first][1] <= start:
                first += 1
            number = first
            while number < len(segments) and segments[number][0] < end:
                begins, ends, part = segments[number]
                number += 1
                if min(ends, end) <= start:
                    continue
                if begins > start:
                    left.append((start, begins))
                taken[part] += min(ends, end) - max(begins, start)
                start = min(ends, end)
            if start < end:
                left.append((start, end))
        free = left
    taken["idle"] = sum(end - start for start, end in free)
    return taken


def _first(rules: Iterable[tuple[re.Pattern[str], WorkKind]], name: str) -> WorkKind | None:
    return next((part for pattern, part in rules if pattern.search(name)), None)


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _thread_of(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event["pid"], event["tid"]


def _is_range(event: Mapping[str, Any], name: str) -> bool:
    return bool(event["name"] == name and event.get("cat") == "user_annotation")

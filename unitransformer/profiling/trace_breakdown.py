"""Splits the time of traced steps by kind of work, given the trace of a profiler.

The trace is the JSON that `torch.profiler` exports in Chrome's format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), with times in
microseconds.

- On a CPU an operator counts without the operators it calls. The main thread has priority, then a
  separate backward thread, then communication threads. The rest of the step, such as Python
  between operators, is idle.
- On a GPU kernels count under the operator that launched them. Communication counts only while
  nothing else runs, that is, where it is exposed.
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

# Ranges that `TraceCallback` adds, for the window and for work that operator names do not reveal.
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
# Names of kernels without an operator: those of a compiled graph or of a CUDA graph.
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
class _OpenEvent:  # an operator or a range that has begun
    end: float
    kind: WorkKind | None  # None: does not classify what it calls
    counts: bool  # whether its own time is work
    own_from: float  # when its last callee ended


@dataclass(kw_only=True)
class _Thread:
    stack: list[_OpenEvent] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    runs_backward: bool = False

    def close(self, until: float) -> None:
        """Ends all events that end before `until`."""
        while self.stack and self.stack[-1].end <= until:
            ended = self.stack.pop()
            self._add_segment(ended, ended.end)
            if self.stack:
                self.stack[-1].own_from = ended.end

    def open(self, event: _OpenEvent, start: float) -> None:
        if self.stack:
            self._add_segment(self.stack[-1], start)
            # Due to rounding, a called operator may seem to end after its caller.
            event.end = min(event.end, self.stack[-1].end)
        self.stack.append(event)

    def _add_segment(self, event: _OpenEvent, until: float) -> None:
        if event.counts and until > event.own_from:
            self.segments.append((event.own_from, until, event.kind or "other"))


def time_shares(
    trace: Mapping[str, Any], *, on_gpu: bool = False, num_classes: int | None = None
) -> dict[WorkKind, float]:
    """Returns the share of each kind of work in the traced steps; the shares add up to 1.

    `num_classes` is V if head and network are one compiled graph, in which no range can separate
    them: a matrix multiply with a side of V is the head's. It is None otherwise.

    Raises:
        ValueError: the trace has no range around the traced steps, or no GPU work in it `on_gpu`.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges = _window_ranges(events)
    if not ranges:
        raise ValueError(f"the trace has no range {WINDOW!r}: it was not made by --trace")
    threads, kinds = _classify(trace["traceEvents"], num_classes)
    main = _thread_of(ranges[0])
    lanes = _kernel_lanes(events, kinds) if on_gpu else _cpu_lanes(threads, main)
    windows = [_interval(event) for event in ranges]
    seconds = _fill(windows, lanes)
    total = sum(end - start for start, end in windows)
    if on_gpu and seconds["idle"] == total:
        raise ValueError(
            "the trace has no GPU kernel in the traced steps: CUPTI, which records kernels, is "
            "used by another profiler (nsys, ncu, dcgm) or not allowed here; stop that profiler, "
            "or ask the administrator"
        )
    return {kind: seconds[kind] / total for kind in WORK_KINDS}


def window_seconds(trace: Mapping[str, Any]) -> float:
    """Returns the length of all traced steps."""
    return float(sum(event["dur"] for event in _window_ranges(trace["traceEvents"]))) / 1e6


def _window_ranges(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # On a GPU kineto repeats each range for each stream, in the category gpu_user_annotation.
    return [e for e in events if e.get("name") == WINDOW and e.get("cat") == "user_annotation"]


def _classify(
    events: Sequence[Mapping[str, Any]], num_classes: int | None
) -> tuple[dict[Any, _Thread], dict[int, WorkKind | None]]:
    """Returns the segments of every thread, and the kind of every operator by "External id"."""
    threads: dict[Any, _Thread] = {}
    kinds: dict[int, WorkKind | None] = {}
    forward_kinds: dict[tuple[Any, float], WorkKind | None] = {}  # by thread and start
    origins = _forward_origins(events)
    cpu = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]
    for event in sorted(cpu, key=lambda event: (event["ts"], -event["dur"])):
        thread = threads.setdefault(_thread_of(event), _Thread())
        start, end = _interval(event)
        thread.close(start)
        name = event["name"]
        thread.runs_backward |= name.startswith(NODE)
        kind: WorkKind | None
        if (origin := origins.get(_node_of(event))) is not None:
            # The backward of a multiply is not all multiplies: operators inside classify it.
            kind = forward_kinds.get(origin)
            kind = kind if kind in ("head and loss", "attention") else None
        else:
            inherited = thread.stack[-1].kind if thread.stack else None
            kind = _kind_of(event, inherited, num_classes)
        forward_kinds[_thread_of(event), start] = kind
        kinds[event["args"].get("External id", -1)] = kind
        counts = _NEUTRAL.match(name) is None and name != HEAD
        thread.open(_OpenEvent(end=end, kind=kind, counts=counts, own_from=start), start)
    for thread in threads.values():
        thread.close(float("inf"))
    return threads, kinds


def _forward_origins(events: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[Any, float]]:
    """Returns, for each node of a backward pass, thread and start of its forward operator."""
    arrows = {
        (event["id"], event["ph"]): (_thread_of(event), event["ts"])
        for event in events
        if event.get("cat") == "fwdbwd"
    }
    origins = {
        end: arrows[number, "s"]
        for (number, phase), end in arrows.items()
        if phase == "f" and (number, "s") in arrows
    }
    # The arrow ends at the operator that the engine's node calls; both have the same numbers.
    return {
        node: origins[_thread_of(event), event["ts"]]
        for event in events
        if event.get("cat") == "cpu_op"
        and (_thread_of(event), event["ts"]) in origins
        and (node := _node_of(event)) is not None
    }


def _node_of(event: Mapping[str, Any]) -> tuple[Any, int, int] | None:
    """Returns what identifies a node of the backward pass; None for events outside of any."""
    arguments = event["args"]
    forward_thread = arguments.get("Fwd thread id", 0)
    if not forward_thread or "Sequence number" not in arguments:
        return None
    return _thread_of(event), forward_thread, arguments["Sequence number"]


def _kind_of(
    event: Mapping[str, Any], inherited: WorkKind | None, num_classes: int | None
) -> WorkKind | None:
    name = event["name"]
    if _NEUTRAL.match(name):
        return None
    if (kind := _first(_RANGES, name)) is not None:
        return kind
    if _COMMUNICATION.search(name):
        return "communication"
    if inherited is not None:
        return inherited
    kind = _first(_OPERATORS, name)
    sides = itertools.chain(*(d for d in event["args"].get("Input Dims", []) if d))
    return "head and loss" if kind == "matrix multiply" and num_classes in sides else kind


def _kernel_lanes(
    events: Iterable[Mapping[str, Any]], kinds: Mapping[int, WorkKind | None]
) -> list[list[Segment]]:
    work: list[Segment] = []
    communication: list[Segment] = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launched_by = kinds.get(event["args"].get("External id", -1))
        kind = launched_by or _first(_KERNELS, event["name"]) or "other"
        lane = communication if kind == "communication" else work
        lane.append((*_interval(event), kind))
    return [work, communication]


def _cpu_lanes(threads: Mapping[Any, _Thread], main: Any) -> list[list[Segment]]:
    others = [thread for key, thread in threads.items() if key != main]
    backward = [thread.segments for thread in others if thread.runs_backward]
    rest = [segment for thread in others if not thread.runs_backward for segment in thread.segments]
    communication = [segment for segment in rest if segment[2] == "communication"]
    return [threads[main].segments, *backward, communication]


def _fill(windows: Sequence[Interval], lanes: Iterable[Sequence[Segment]]) -> dict[WorkKind, float]:
    """Returns the time of each kind; a lane gets only what the lanes before it left free."""
    times = dict.fromkeys(WORK_KINDS, 0.0)
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
                begins, ends, kind = segments[number]
                number += 1
                if min(ends, end) <= start:
                    continue
                if begins > start:
                    left.append((start, begins))
                times[kind] += min(ends, end) - max(begins, start)
                start = min(ends, end)
            if start < end:
                left.append((start, end))
        free = left
    times["idle"] = sum(end - start for start, end in free)
    return times


def _first(rules: Iterable[tuple[re.Pattern[str], WorkKind]], name: str) -> WorkKind | None:
    return next((kind for pattern, kind in rules if pattern.search(name)), None)


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _thread_of(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event["pid"], event["tid"]

"""What `torch.compile` did in a run: seconds, graphs, breaks, recompiles and caches, by step.

The compiler keeps the books itself (`CompilationMetrics`, one record a compilation, and
`graph_break_reasons` in torch/_dynamo/utils.py; `callback_handler` in torch/_dynamo/callback.py):
they are read when a step begins, so nothing is paid inside a step that compiles nothing.
"""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unitransformer.config import Compile

MOST_RECORDS = 4096  # the compiler keeps 64 by itself: a large network has more graphs
CACHES = {
    "inductor": ("inductor_fx_local_cache", "inductor_fx_remote_cache"),
    "aot_autograd": ("aotautograd_local_cache", "aotautograd_remote_cache"),
}


@dataclass(frozen=True, kw_only=True)
class GraphBreak:
    """A place in Python at which a graph had to end."""

    step: int | None  # None: outside of every step
    where: str  # file:line, from the folder that Python imports from
    reason: str


@dataclass(frozen=True, kw_only=True)
class Recompile:
    """A function that was compiled before and had to be compiled again."""

    step: int | None
    function: str  # name (file:line)
    reason: str | None  # the guard that failed; None: this torch does not tell


class CompileLedger:
    """Follows one run: `start`, `at_step` at the beginning of every step, `stop`, `as_dict`.

    With `mode` "off" it looks at nothing.
    """

    def __init__(self, mode: Compile) -> None:
        self.mode = mode
        self.step: int | None = None
        self._records: list[tuple[int | None, Any]] = []  # (step, CompilationMetrics)
        self._breaks: list[GraphBreak] = []
        self._spans: list[tuple[int | None, float]] = []
        self._num_read = self._num_breaks_read = 0
        self._began_s: float | None = None
        self._untold: dict[str, str] = {}
        self._is_on = False

    def start(self) -> None:
        """From here on; before the first compilation."""
        if self.mode == "off":
            return
        from torch._dynamo import callback, utils

        self._is_on = True
        self._books: Any = utils
        self._handler: Any = callback.callback_handler
        utils.set_compilation_metrics_limit(MOST_RECORDS)
        self._num_read = len(utils.get_compilation_metrics())
        self._num_breaks_read = len(utils.graph_break_reasons)
        self._listen()

    def at_step(self, step: int | None) -> None:
        """Step `step` begins, counted from 0; None: what follows is no step (validation)."""
        if self._is_on:
            self._read()
        self.step = step

    def stop(self) -> None:
        """The last step has ended."""
        if not self._is_on:
            return
        self._read()
        self._is_on = False
        self._handler.remove_start_callback(self._begin)
        self._handler.remove_end_callback(self._end)

    def as_dict(self) -> dict[str, Any]:
        """Plain data. What is not known is None and `untold` says why.

        - `start`: "cold" (nothing came from a cache), "warm" (everything did), "mixed"
        - `compile_s`: wall clock of all compilations; `compiled_at`: [step, seconds] of each;
          `steps`: those in which anything was compiled
        - `graphs`: compiled graphs with at least one operation, recompiled ones included
        - `graph_breaks`, `recompiles`: see `GraphBreak` and `Recompile`
        - `caches`: hits and misses of inductor's and of AOTAutograd's cache
        """
        untold = dict(self._untold)
        if self.mode == "off":
            nothing: dict[str, Any] = dict.fromkeys(("start", "compile_s", "graphs", "caches"))
            untold["all"] = "compile is off"
            lists: dict[str, list[Any]] = {
                name: [] for name in ("steps", "compiled_at", "graph_breaks", "recompiles")
            }
            return {"mode": self.mode, **nothing, **lists, "untold": untold}
        records = [record for _, record in self._records]
        caches = {
            cache: {kind: _total(records, names, kind, untold) for kind in ("hit", "miss")}
            for cache, names in CACHES.items()
        }
        told = "compile_s" not in untold
        return {
            "mode": self.mode,
            "start": _temperature(caches["inductor"], untold),
            "compile_s": sum(seconds for _, seconds in self._spans) if told else None,
            "steps": self._steps(),
            "compiled_at": [list(span) for span in self._spans],
            "graphs": sum(_is_graph(record) for record in records),
            "graph_breaks": [asdict(found) for found in self._breaks],
            "recompiles": [asdict(found) for found in self._recompiles()],
            "caches": caches,
            "untold": untold,
        }

    def _steps(self) -> list[int]:
        # Either may miss one: a reset drops the callbacks, a CUDA graph leaves no record.
        compiled = {step for step, _ in [*self._spans, *self._records]}
        return sorted(step for step in compiled if step is not None)

    def _listen(self) -> None:
        self._handler.register_start_callback(self._begin)
        self._handler.register_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._began_s = time.perf_counter()

    def _end(self, _: object) -> None:
        if self._began_s is not None:  # None: we began to listen in the middle of it
            self._spans.append((self.step, time.perf_counter() - self._began_s))
        self._began_s = None

    def _read(self) -> None:
        if self._begin not in self._handler.start_callbacks:
            self._untold["compile_s"] = "torch._dynamo.reset() was called: some seconds are missing"
            self._listen()
        records = self._books.get_compilation_metrics()
        # Shorter than it was: somebody has emptied it, and all of it is new.
        new = records[self._num_read if len(records) >= self._num_read else 0 :]
        self._num_read = len(records)
        if len(records) >= MOST_RECORDS:
            self._untold["graphs"] = f"more than {MOST_RECORDS} compilations: the rest are missing"
        self._records += [(self.step, record) for record in new]
        reasons = self._books.graph_break_reasons
        fresh = reasons[self._num_breaks_read if len(reasons) >= self._num_breaks_read else 0 :]
        self._num_breaks_read = len(reasons)
        self._breaks += [self._break_at(reason.user_stack, reason.reason) for reason in fresh]
        self._breaks += [self._break_of(record) for record in new if _has_given_up(record)]

    def _break_at(self, stack: Sequence[Any], reason: str) -> GraphBreak:
        place = stack[-1] if stack else None
        where = f"{short_path(place.filename)}:{place.lineno}" if place else "not told"
        return GraphBreak(step=self.step, where=where, reason=_first_line(reason))

    def _break_of(self, record: Any) -> GraphBreak:
        """Of a function that was given up altogether and runs eagerly."""
        file, line = record.fail_user_frame_filename, record.fail_user_frame_lineno
        if file is None:
            file, line = record.co_filename, record.co_firstlineno
        where = f"{short_path(file)}:{line}"
        return GraphBreak(step=self.step, where=where, reason=_first_line(record.fail_reason))

    def _recompiles(self) -> list[Recompile]:
        return [
            Recompile(step=step, function=_function(record), reason=_reason(record))
            for step, record in self._records
            if _is_recompile(record)
        ]


def short_path(file: str | None) -> str:
    """A source file as seen from the folder that Python imports it from."""
    if file is None:
        return "not told"
    roots = [Path(entry).resolve() for entry in sys.path]
    inside = [root for root in roots if Path(file).is_relative_to(root)]
    root = max(inside, key=lambda root: len(root.parts), default=None)
    return file if root is None else Path(file).relative_to(root).as_posix()


def _first_line(reason: object) -> str:
    # What follows are hints at length, and a link.
    return str(reason).strip().partition("\n")[0]


def _is_forward(record: Any) -> bool:
    return bool(record.is_forward) and not record.is_runtime


def _is_graph(record: Any) -> bool:
    return _is_forward(record) and bool(record.graph_op_count) and record.fail_type is None


def _has_given_up(record: Any) -> bool:
    return _is_forward(record) and record.fail_type is not None


def _is_recompile(record: Any) -> bool:
    # "frame/times it was compiled before"; a restart of the same compilation adds "_attempt".
    numbers = re.search(r"(\d+)/(\d+)", str(record.compile_id))
    return numbers is not None and int(numbers[2]) > 0 and _is_forward(record)


def _function(record: Any) -> str:
    return f"{record.co_name} ({short_path(record.co_filename)}:{record.co_firstlineno})"


def _reason(record: Any) -> str | None:
    reason = getattr(record, "recompile_reason", None)
    return None if reason is None else str(reason)


def _total(
    records: Sequence[Any], caches: Sequence[str], kind: str, untold: dict[str, str]
) -> int | None:
    names = [f"{cache}_{kind}_count" for cache in caches]
    missing = [name for name in names if any(not hasattr(record, name) for record in records)]
    if missing:
        untold["caches"] = f"torch {torch.__version__} does not tell {', '.join(missing)}"
        return None
    return sum(getattr(record, name) or 0 for record in records for name in names)


def _temperature(cache: Mapping[str, int | None], untold: dict[str, str]) -> str | None:
    hits, misses = cache["hit"], cache["miss"]
    if hits is None or misses is None:
        untold["start"] = untold["caches"]
        return None
    if hits + misses == 0:
        untold["start"] = "no graph was looked for in a cache: nothing compiled, or caches are off"
        return None
    return "mixed" if hits and misses else "warm" if hits else "cold"

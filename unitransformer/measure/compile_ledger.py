"""Records what `torch.compile` did in a run: seconds, graphs, graph breaks, recompiles, cache hits.

The compiler itself counts them (`CompilationMetrics`, one record per compilation, and
`graph_break_reasons` in torch/_dynamo/utils.py; `callback_handler` in torch/_dynamo/callback.py).
They are read when a step begins, so a step that compiles nothing pays nothing.
"""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unitransformer.config import Compile

MAX_RECORDS = 4096  # the compiler's default of 64 is too small for the graphs of a large network
CACHES = {
    "inductor": ("inductor_fx_local_cache", "inductor_fx_remote_cache"),
    "aot_autograd": ("aotautograd_local_cache", "aotautograd_remote_cache"),
}


class CompileLedger:
    """Follows one run: `start`, `at_step` at the beginning of every step, `stop`, `as_dict`.

    With `mode` "off" it records nothing.
    """

    def __init__(self, mode: Compile) -> None:
        self.mode = mode
        self.step: int | None = None
        self._records: list[tuple[int | None, Any]] = []  # (step, CompilationMetrics)
        self._breaks: list[dict[str, Any]] = []
        self._spans: list[tuple[int | None, float]] = []  # (step, seconds)
        self._num_read = self._num_breaks_read = 0
        self._began_s: float | None = None
        self._missing: dict[str, str] = {}
        self._is_on = False

    def start(self) -> None:
        """Starts recording; must precede the first compilation."""
        if self.mode == "off":
            return
        from torch._dynamo import callback, utils

        self._is_on = True
        self._dynamo_utils: Any = utils
        self._handler: Any = callback.callback_handler
        utils.set_compilation_metrics_limit(MAX_RECORDS)
        self._num_read = len(utils.get_compilation_metrics())
        self._num_breaks_read = len(utils.graph_break_reasons)
        self._register_callbacks()

    def at_step(self, step: int | None) -> None:
        """Begins step `step`, counted from 0; None: what follows is not a step (validation)."""
        if self._is_on:
            self._read()
        self.step = step

    def stop(self) -> None:
        """Ends recording, after the last step."""
        if not self._is_on:
            return
        self._read()
        self._is_on = False
        self._handler.remove_start_callback(self._begin)
        self._handler.remove_end_callback(self._end)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data. Unknown values are None, with a reason in `missing`.

        - `start`: "cold" (nothing came from a cache), "warm" (everything did), "mixed"
        - `compile_s`: wall time of all compilations; `compiled_at`: [step, seconds] of each;
          `steps`: those in which anything was compiled
        - `graphs`: compiled graphs with at least one operation, including recompiled ones
        - `graph_breaks`: places in Python at which a graph had to end: step (None outside of
          steps), where (file:line, relative to the folder of imports), reason
        - `recompiles`: functions that were compiled before: step, function (name and place),
          reason (the guard that failed; None if this torch version does not record it)
        - `caches`: hits and misses of Inductor's and of AOTAutograd's cache
        """
        missing = dict(self._missing)
        records = [record for _, record in self._records]
        caches = {
            cache: {kind: _total(records, names, kind, missing) for kind in ("hit", "miss")}
            for cache, names in CACHES.items()
        }
        # Either list may miss one: a reset drops the callbacks, a CUDA graph leaves no record.
        compiled = {step for step, _ in [*self._spans, *self._records]}
        seconds = None if "compile_s" in missing else sum(seconds for _, seconds in self._spans)
        ledger = {
            "mode": self.mode,
            "start": _cache_state(caches["inductor"], missing),
            "compile_s": seconds,
            "steps": sorted(step for step in compiled if step is not None),
            "compiled_at": [list(span) for span in self._spans],
            "graphs": sum(
                _is_forward(record) and bool(record.graph_op_count) and record.fail_type is None
                for record in records
            ),
            "graph_breaks": list(self._breaks),
            "recompiles": self._recompiles(),
            "caches": caches,
            "missing": missing,
        }
        if self.mode == "off":
            ledger |= dict.fromkeys(("start", "compile_s", "graphs", "caches"))
            ledger["missing"] = {"all": "compile is off"}
        return ledger

    def _register_callbacks(self) -> None:
        self._handler.register_start_callback(self._begin)
        self._handler.register_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._began_s = time.perf_counter()

    def _end(self, _: object) -> None:
        if self._began_s is not None:  # None: registered during a compilation
            self._spans.append((self.step, time.perf_counter() - self._began_s))
        self._began_s = None

    def _read(self) -> None:
        if self._begin not in self._handler.start_callbacks:
            reason = "torch._dynamo.reset() was called: some seconds are missing"
            self._missing["compile_s"] = reason
            self._register_callbacks()
        records = self._dynamo_utils.get_compilation_metrics()
        # A list shorter than before was cleared meanwhile: all of it is new.
        new = records[self._num_read if len(records) >= self._num_read else 0 :]
        self._num_read = len(records)
        if len(records) >= MAX_RECORDS:
            self._missing["graphs"] = f"more than {MAX_RECORDS} compilations: the rest are missing"
        self._records += [(self.step, record) for record in new]
        reasons = self._dynamo_utils.graph_break_reasons
        is_longer = len(reasons) >= self._num_breaks_read
        for reason in reasons[self._num_breaks_read if is_longer else 0 :]:
            frame = reason.user_stack[-1] if reason.user_stack else None
            where = f"{short_path(frame.filename)}:{frame.lineno}" if frame else "unknown"
            self._add_break(where, reason.reason)
        self._num_breaks_read = len(reasons)
        for record in new:
            if _is_forward(record) and record.fail_type is not None:  # the function runs eagerly
                file, line = record.fail_user_frame_filename, record.fail_user_frame_lineno
                if file is None:
                    file, line = record.co_filename, record.co_firstlineno
                self._add_break(f"{short_path(file)}:{line}", record.fail_reason)

    def _add_break(self, where: str, reason: object) -> None:
        # The first line; hints and a link follow.
        first_line = str(reason).strip().partition("\n")[0]
        self._breaks.append({"step": self.step, "where": where, "reason": first_line})

    def _recompiles(self) -> list[dict[str, Any]]:
        recompiles = []
        for step, record in self._records:
            # "frame/earlier compilations"; a restart of the same compilation adds "_attempt".
            numbers = re.search(r"(\d+)/(\d+)", str(record.compile_id))
            if numbers is not None and int(numbers[2]) > 0 and _is_forward(record):
                where = f"{short_path(record.co_filename)}:{record.co_firstlineno}"
                reason = getattr(record, "recompile_reason", None)
                reason = None if reason is None else str(reason)
                function = f"{record.co_name} ({where})"
                recompiles.append({"step": step, "function": function, "reason": reason})
        return recompiles


def short_path(file: str | None) -> str:
    """Returns the path of a source file relative to the folder that Python imports it from."""
    if file is None:
        return "unknown"
    roots = [Path(entry).resolve() for entry in sys.path]
    inside = [root for root in roots if Path(file).is_relative_to(root)]
    root = max(inside, key=lambda root: len(root.parts), default=None)
    return file if root is None else Path(file).relative_to(root).as_posix()


def _is_forward(record: Any) -> bool:
    return bool(record.is_forward) and not record.is_runtime


def _total(
    records: Sequence[Any], caches: Sequence[str], kind: str, missing: dict[str, str]
) -> int | None:
    names = [f"{cache}_{kind}_count" for cache in caches]
    absent = [name for name in names if any(not hasattr(record, name) for record in records)]
    if absent:
        missing["caches"] = f"torch {torch.__version__} does not record {', '.join(absent)}"
        return None
    return sum(getattr(record, name) or 0 for record in records for name in names)


def _cache_state(cache: Mapping[str, int | None], missing: dict[str, str]) -> str | None:
    hits, misses = cache["hit"], cache["miss"]
    if hits is None or misses is None:
        missing["start"] = missing["caches"]
        return None
    if hits + misses == 0:
        missing["start"] = "no graph was looked up in a cache: nothing compiled, or caches are off"
        return None
    return "mixed" if hits and misses else "warm" if hits else "cold"

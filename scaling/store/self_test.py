"""Reads the record of `compare --self-test`: raw times of steps, and what each rule says of them.

The results are stored with checksums. `scaling lint` derives them again from the times, which are
packed: 500 trials have 720,000 of them.
"""

import base64
import json
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from unitransformer.record.checksums import verify_checksums
from unitransformer.record.fields import NUMBER, Kinds, check_fields, check_lists

SCHEMA, KIND = 2, "compare-self-test"
LISTS_SCHEMA = 1  # its times are plain lists
REQUIRED_FIELDS: dict[str, Kinds] = {
    "command": str,
    "started_at": str,
    "elapsed_s": NUMBER,
    "machine.cpu": (str, NoneType),
    "machine.cpu_cores": (int, NoneType),
    "code.commit": (str, NoneType),
    "busy_processes": int,
    "num_trials": int,
    "pairs_per_trial": int,
    "steps_per_stored_time": int,
    "stored_times": int,
    "processor_us": dict,
    "wall_us": dict,
}
LISTS: dict[str, Kinds] = {"promises": dict, "rules": dict}
PROMISE_FIELDS: dict[str, Kinds] = {
    "name": str,
    "kept": int,
    "num_trials": int,
    "least": int,
    "pairs": (*NUMBER, NoneType),
}
RULE_FIELDS: dict[str, Kinds] = {
    "name": str,
    "false_alarms": int,
    "found_2_percent": int,
    "found_5_percent": int,
    "inconclusive": (int, NoneType),  # of all three; null: the rule always decides
}


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """A record whose fields were checked."""

    name: str  # of its file
    content: Mapping[str, Any]

    @property
    def num_trials(self) -> int:
        return int(self.content["num_trials"])

    @property
    def broken_promises(self) -> list[Mapping[str, Any]]:
        return [row for row in self.content["promises"] if row["kept"] < row["least"]]

    def step_ms(self, clock: str) -> float:
        """Returns the median time of a step of the base; `clock` is processor or wall."""
        times = [us for trial in self.content[f"{clock}_us"]["base"] for us in trial]
        steps = 1 if clock == "processor" else self.content["steps_per_stored_time"]
        return float(statistics.median(times)) / 1000 / int(steps)

    def rule_rows(self) -> list[dict[str, str]]:
        """Returns the cells of a table with a row for each rule, ours first."""
        trials = self.num_trials
        return [
            {
                "rule": rule["name"],
                "false alarms": f"{rule['false_alarms']} of {trials}",
                "5 % caught": f"{rule['found_5_percent']} of {trials}",
                "2 % caught": f"{rule['found_2_percent']} of {trials}",
                "inconclusive": "never"
                if rule["inconclusive"] is None
                else f"{rule['inconclusive']} of {3 * trials}",
            }
            for rule in self.content["rules"]
        ]

    def explain(self) -> list[str]:
        """Says how the trials were formed, and what they prove."""
        content, trials = self.content, self.num_trials
        step = {clock: f"{self.step_ms(clock):.2f} ms" for clock in ("processor", "wall")}
        alarms = content["rules"][0]["false_alarms"]
        return [
            f"A trial is a stretch of {content['pairs_per_trial']} rounds, which no other trial "
            "uses. A round times four steps in random order: the base, an equal one, and ones with "
            "2 % and 5 % more matrix products. A step takes "
            f"{step['processor']} of processor time and {step['wall']} of wall time, beside "
            f"{content['busy_processes']} busy processes.",
            "Ours judges processor time as compare does, at 80, 160 and 320 pairs; every 20 "
            "count as a start. But all run in one process, which is never started again: how much "
            "processes of equal code differ is not tested here.",
            f"The other rules compare {content['stored_times']} wall times of one trial, stored, "
            f"with those of another, half the series away; each is that of "
            f"{content['steps_per_stored_time']} steps.",
            f"{alarms} false alarms in {trials} trials: with 95 % confidence their rate is below "
            f"{upper_bound(alarms, trials):.1%}.",
        ]


def upper_bound(found: int, trials: int) -> float:
    """Returns the one-sided 95 % bound of a rate (Clopper & Pearson 1934)."""
    low, high = found / trials, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        at_most = sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(found + 1)
        )
        low, high = (rate, high) if at_most > 0.05 else (low, rate)
    return high


def pack(trials: Sequence[Sequence[float]]) -> str:
    """Returns times as text: their JSON, deflated, in base 85."""
    text = json.dumps(trials, separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpack(text: Any) -> Any:
    """Returns what was packed; None if nothing was."""
    try:
        return json.loads(zlib.decompress(base64.b85decode(text)))
    except (TypeError, ValueError, zlib.error):
        return None


def is_self_test(content: Any) -> bool:
    """Whether JSON claims to be the record of a self-test, valid or not."""
    return isinstance(content, Mapping) and content.get("kind") == KIND


def read_self_test(content: Mapping[str, Any], name: str, *, checksums_hold: bool) -> SelfTest:
    """Raises ValueError for a field that is missing, has another type or was changed."""
    if not is_self_test(content) or content.get("schema") not in (LISTS_SCHEMA, SCHEMA):
        raise ValueError(
            f"self-test: schema is {content.get('schema')!r}; this version reads {LISTS_SCHEMA} "
            f"and {SCHEMA}: run it again, or read it with the version that wrote it"
        )
    if not checksums_hold:
        verify_checksums(content, "self-test")
    check_fields(content, REQUIRED_FIELDS, "self-test")
    check_lists(content, LISTS, "self-test")
    for field in ("num_trials", "steps_per_stored_time"):
        if content[field] < 1:
            raise ValueError(f"self-test: {field} is {content[field]}; it must be at least 1")
    if not content["rules"]:
        raise ValueError("self-test: rules is empty")
    for promise in content["promises"]:
        check_fields(promise, PROMISE_FIELDS, "self-test: promises")
    for rule in content["rules"]:
        check_fields(rule, RULE_FIELDS, "self-test: rules")
        if not 0 <= rule["false_alarms"] <= content["num_trials"]:
            raise ValueError(
                f"self-test: false_alarms is {rule['false_alarms']} in "
                f"{content['num_trials']} trials"
            )
    if content["schema"] == SCHEMA:
        content = {**content}
        for field in ("processor_us", "wall_us"):
            content[field] = {arm: unpack(text) for arm, text in content[field].items()}
    for clock, length in (("processor", "pairs_per_trial"), ("wall", "stored_times")):
        for arm in ("base", "equal", "2 %", "5 %"):
            trials = content[f"{clock}_us"].get(arm)
            is_whole = isinstance(trials, list) and len(trials) == content["num_trials"]
            if not is_whole or any(not _are_times(trial, content[length]) for trial in trials):
                raise ValueError(
                    f"self-test: {clock}_us.{arm} is not {content[length]} times above 0 for each "
                    f"of {content['num_trials']} trials"
                )
    return SelfTest(name=name, content=content)


def _are_times(times: Any, count: int) -> bool:
    return (
        isinstance(times, list)
        and len(times) == count > 0
        and {type(time) for time in times} <= {int, float}
        and min(times) > 0
    )

"""What was recorded and what came of running it again in; whether it was reproduced out.

Three things are compared: how it ended, the loss curve, and the median steady step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from scaling.analysis.efficiency import Estimate, pooled_rate, ratio
from scaling.parity.cases import BOUNDS, relative_difference
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import flat_dict
from unitransformer.record.schema import Record, config_of
from unitransformer.record.units import count, ms

Word = Literal["reproduced", "not reproduced", "inconclusive"]
EXIT_CODES: Mapping[Word, int] = MappingProxyType(
    {"reproduced": 0, "not reproduced": 1, "inconclusive": 3}
)
DAY_S = 24 * 60 * 60.0


@dataclass(frozen=True, kw_only=True)
class ReplayVerdict:
    """Whether it came out the same, and why, in lines for people."""

    word: Word
    lines: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.word]


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """What is to be reproduced."""

    command: str
    status: str
    record: Record | None  # of a run that left one
    exit_code: int | None = None  # None: not told, or it passed a limit
    limit_s: float = DAY_S
    memory_limit_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReplayLaunch:
    """How a launch ended."""

    status: str
    record: Record | None
    last_words: str
    exit_code: int | None = None


def compare(original: OriginalRun, launches: Sequence[ReplayLaunch], *, tolerance: float) -> ReplayVerdict:
    """Compare what is there: no run is started.

    Raises:
        ValueError: a launch that is another run.
    """
    last = launches[-1]
    if not original.status == last.status == "ok":
        return _judge_failure(original, last)
    assert original.record is not None
    records = [launch.record for launch in launches if launch.record is not None]
    for record in records:
        _check_same(original.record, record)
    loss_word, loss = compare_losses(original.record, records)
    step_word, step = compare_steps(original.record, records, tolerance=tolerance)
    apart = [f"conditions: {line}" for line in _conditions(original.record, records)]
    word = loss_word if loss_word == "not reproduced" else step_word
    return ReplayVerdict(word=word, lines=(loss, step, *apart))


def _judge_failure(original: OriginalRun, last: ReplayLaunch) -> ReplayVerdict:
    then, now = _end(original), _end(last)
    told = f"status: {then} then, {now} now: {last.last_words}"
    if last.status == "preempted":
        return ReplayVerdict(word="inconclusive", lines=(told, "it was stopped from outside; try again"))
    is_same = original.status.removesuffix("-inferred") == last.status
    if is_same and last.status == "crashed":
        is_same = then == now
    return ReplayVerdict(word="reproduced" if is_same else "not reproduced", lines=(told,))


def _end(run: OriginalRun | ReplayLaunch) -> str:
    """The status, and of a crash what it was: the exception, or else the exit code."""
    if run.status != "crashed":
        return run.status
    error = None if run.record is None else run.record["error"]
    if error is not None:
        return f"crashed by {error['type']}"
    return "crashed" if run.exit_code is None else f"crashed with exit code {run.exit_code}"


def _check_same(then: Record, now: Record) -> None:
    own, others = config_of(then), config_of(now)
    if own == others:
        return
    before, after = flat_dict(own), flat_dict(others)
    told = [f"{n} is {after[n]!r}, was {before[n]!r}" for n in before if before[n] != after[n]]
    raise ValueError(
        f"config: {'; '.join(told)}; the command comes to another run on this machine, replay it "
        "where it was measured or name these options"
    )


def _conditions(then: Record, records: Sequence[Record]) -> list[str]:
    """Record 1 is the original."""
    found = differences([then, *records])
    data = {record["data"].get("sha256") for record in (then, *records)}
    return [*found, "data differ: their sha256 is not the same"] if len(data) > 1 else found


def compare_losses(then: Record, records: Sequence[Record]) -> tuple[Word, str]:
    """The curves of the launches against the original's, at the steps that all have: a run that
    stops by its interval stops where it likes."""
    bound = BOUNDS[config_of(then).parallel.precision].loss
    steps = min(len(record["loss"]) for record in (then, *records))
    other = None if config_of(then).until_interval else _other_length(then, records)
    if other is not None:
        return "not reproduced", f"loss: {other} steps now, {len(then['loss'])} then"
    largest, step = max(
        (relative_difference(before, after), number)
        for record in records
        for number, (before, after) in enumerate(
            zip(then["loss"][:steps], record["loss"][:steps], strict=True), 1
        )
    )
    told = f"over {count(steps, 'step')}"
    if largest == 0:
        return "reproduced", f"loss: equal to the last digit {told}"
    apart = f"{largest:.1e} apart at step {step}"
    if largest <= bound:
        return "reproduced", f"loss: within the parity bound of {bound:g} {told}, {apart}"
    return "not reproduced", f"loss: different, {apart}; the parity bound is {bound:g}"


def _other_length(then: Record, records: Sequence[Record]) -> int | None:
    lengths = (len(record["loss"]) for record in records)
    return next((length for length in lengths if length != len(then["loss"])), None)


def compare_steps(then: Record, records: Sequence[Record], *, tolerance: float) -> tuple[Word, str]:
    """The median steady step now over then, with its interval."""
    runs = [Run(name="", record=record, config=config_of(record)) for record in (then, *records)]
    untold = next((run for run in runs if run.metrics is None), None)
    if untold is not None:
        when = "then" if untold is runs[0] else "now"
        return (
            "inconclusive",
            f"step: no steady state {when}: {untold.record['no_steady_state_reason']}",
        )
    before, now = pooled_rate(runs[:1]), pooled_rate(runs[1:])
    found = ratio(before, now)  # of rates; the steps' is its inverse
    per_step = runs[0].units_per_step
    told = (
        f"step: {_step(now, per_step)} now over {count(len(records), 'launch', 'launches')}, "
        f"{_step(before, per_step)} then; ratio {found.value:.3f}"
    )
    if found.low is None or found.high is None:
        return "inconclusive", f"{told}, no interval: {found.reason}"
    told += f" ({found.low:.3f} to {found.high:.3f}); asked: within {tolerance:.0%} of 1"
    return _place(found.low, found.high, tolerance), told


def _place(low: float, high: float, tolerance: float) -> Word:
    if 1 - tolerance <= low and high <= 1 + tolerance:
        return "reproduced"
    return "not reproduced" if high < 1 - tolerance or low > 1 + tolerance else "inconclusive"


def _step(rate: Estimate, units_per_step: int) -> str:
    """Seconds of a step with their interval, from a rate."""
    middle = ms(units_per_step / rate.value)
    if rate.low is None or rate.high is None:
        return f"{middle} (no interval: {rate.reason})"
    return f"{middle} ({ms(units_per_step / rate.high)} to {ms(units_per_step / rate.low)})"

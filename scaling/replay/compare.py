"""Compares a recorded run with its replays: status, loss curve and median steady step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scaling.analysis.efficiency import Estimate, pooled_rate, ratio
from scaling.parity.cases import BOUND_STEPS, BOUNDS, relative_difference
from scaling.store.conditions import differences
from scaling.store.run import Run
from unitransformer.config import flat_dict
from unitransformer.record.schema import Record, config_of
from unitransformer.record.units import format_count, format_ms

Word = Literal["reproduced", "not reproduced", "inconclusive"]
EXIT_CODES: dict[Word, int] = {"reproduced": 0, "not reproduced": 1, "inconclusive": 3}
DAY_S = 24 * 60 * 60.0


@dataclass(frozen=True, kw_only=True)
class ReplayVerdict:
    """Whether the run was reproduced, and lines that explain why."""

    word: Word
    lines: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.word]


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """The recorded run that a replay has to reproduce."""

    command: str
    status: str
    record: Record | None  # None: it left none
    exit_code: int | None = None  # None: not recorded, or killed at a limit
    limit_s: float = DAY_S
    memory_limit_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReplayLaunch:
    """How one launch of the replay ended."""

    status: str
    record: Record | None
    last_line: str
    exit_code: int | None = None


def compare(
    original: OriginalRun, launches: Sequence[ReplayLaunch], *, tolerance: float
) -> ReplayVerdict:
    """Returns the verdict; raises ValueError if a launch has another config."""
    last = launches[-1]
    if not original.status == last.status == "ok":
        return _judge_failure(original, last)
    assert original.record is not None
    records = [launch.record for launch in launches if launch.record is not None]
    for record in records:
        _check_config(original.record, record)
    loss_word, loss = compare_losses(original.record, records)
    step_word, step = compare_steps(original.record, records, tolerance=tolerance)
    conditions = differences([original.record, *records])  # record 1 is the original
    if len({record["data"].get("sha256") for record in (original.record, *records)}) > 1:
        conditions.append("data differ: their sha256 is not the same")
    words = (loss_word, step_word)
    order: tuple[Word, ...] = ("not reproduced", "inconclusive", "reproduced")
    word = next(word for word in order if word in words)
    lines = (loss, step, *(f"conditions: {line}" for line in conditions))
    return ReplayVerdict(word=word, lines=lines)


def _judge_failure(original: OriginalRun, last: ReplayLaunch) -> ReplayVerdict:
    then, now = _end(original), _end(last)
    line = f"status: {then} then, {now} now: {last.last_line}"
    if last.status == "preempted":
        reason = "the launch was stopped by a signal; try again"
        return ReplayVerdict(word="inconclusive", lines=(line, reason))
    is_same = original.status.removesuffix("-inferred") == last.status
    if last.status == "crashed":
        is_same = then == now
    return ReplayVerdict(word="reproduced" if is_same else "not reproduced", lines=(line,))


def _end(run: OriginalRun | ReplayLaunch) -> str:
    """The status, and for a crash its exception, or else its exit code."""
    if run.status != "crashed":
        return run.status
    error = None if run.record is None else run.record["error"]
    if error is not None:
        return f"crashed by {error['type']}"
    return "crashed" if run.exit_code is None else f"crashed with exit code {run.exit_code}"


def measured_loss_blocks(record: Record) -> dict[str, int]:
    """Returns the sizes of the loss blocks that a run measured, as fields of the config.

    A replay is given them: measured again, they could be others, and the losses with them.
    """
    blocks = (record.get("loss_blocks") or [None])[0]  # those of rank 0, which all ranks use
    if not blocks or not blocks["columns"] or config_of(record).loss_block is not None:
        return {}
    return {"loss_chunk": blocks["rows"], "loss_block": blocks["columns"]}


def _check_config(then: Record, now: Record) -> None:
    before, after = flat_dict(config_of(then)), flat_dict(config_of(now))
    before |= measured_loss_blocks(then)
    changes = [f"{n} is {after[n]!r}, was {before[n]!r}" for n in before if before[n] != after[n]]
    if changes:
        raise ValueError(
            f"config: {'; '.join(changes)}; the command resolves to another config on this machine:"
            " replay it where it was measured, or set these options"
        )


def compare_losses(then: Record, records: Sequence[Record]) -> tuple[Word, str]:
    """Compares the loss curves at the steps that all runs have.

    Only runs that stop at an interval may differ in their number of steps. A difference that
    exceeds the parity bound after more steps than that was measured with is inconclusive: rounding
    alone, of kernels that add in any order, grows to some size.
    """
    config, recorded = config_of(then), then["loss"]
    curves = [record["loss"] for record in records]
    other = next((len(curve) for curve in curves if len(curve) != len(recorded)), None)
    if other is not None and not config.until_interval:
        return "not reproduced", f"loss: {other} steps now, {len(recorded)} then"
    steps = min(len(curve) for curve in (recorded, *curves))
    found = [
        (relative_difference(before, after), number)
        for curve in curves
        for number, (before, after) in enumerate(
            zip(recorded[:steps], curve[:steps], strict=True), 1
        )
    ]
    largest, step = max(found)
    if largest == 0:
        return "reproduced", f"loss: equal to the last digit over {format_count(steps, 'step')}"
    bound = BOUNDS[config.parallel.precision].loss
    difference = f"relative difference {largest:.1e} at step {step}"
    if largest <= bound:
        within = f"within the parity bound of {bound:g} over {format_count(steps, 'step')}"
        return "reproduced", f"loss: {within}, {difference}"
    text = f"loss: different, {difference}; the parity bound is {bound:g}"
    if all(size <= bound for size, number in found if number <= BOUND_STEPS):
        held = f"holds for the {BOUND_STEPS} steps that it was measured with; rounding grows later"
        return "inconclusive", f"{text}, and {held}"
    return "not reproduced", text


def compare_steps(then: Record, records: Sequence[Record], *, tolerance: float) -> tuple[Word, str]:
    """Compares the median steady step, now over then, with its interval."""
    runs = [Run(name="", record=record, config=config_of(record)) for record in (then, *records)]
    for run in runs:
        if run.metrics is None:
            when, reason = "then" if run is runs[0] else "now", run.record["no_steady_state_reason"]
            return "inconclusive", f"step: no steady state {when}: {reason}"
    before, now = pooled_rate(runs[:1]), pooled_rate(runs[1:])
    steps = ratio(before, now)  # of rates, thus the inverse of that of step times
    per_step = runs[0].units_per_step
    line = (
        f"step: {_step(now, per_step)} now over "
        f"{format_count(len(records), 'launch', 'launches')}, "
        f"{_step(before, per_step)} then; ratio {steps.value:.3f}"
    )
    low, high = steps.low, steps.high
    if low is None or high is None:
        return "inconclusive", f"{line}, no interval: {steps.reason}"
    line += f" ({low:.3f} to {high:.3f}); asked: within {tolerance:.0%} of 1"
    if 1 - tolerance <= low and high <= 1 + tolerance:
        return "reproduced", line
    is_outside = high < 1 - tolerance or low > 1 + tolerance
    return "not reproduced" if is_outside else "inconclusive", line


def _step(rate: Estimate, units_per_step: int) -> str:
    middle = format_ms(units_per_step / rate.value)
    if rate.low is None or rate.high is None:
        return f"{middle} (no interval: {rate.reason})"
    low, high = units_per_step / rate.high, units_per_step / rate.low
    return f"{middle} ({format_ms(low)} to {format_ms(high)})"

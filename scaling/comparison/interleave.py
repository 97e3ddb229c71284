"""Runs two sides in turn, a process each, and collects pairs of times until they decide.

Both sides hold their memory all the time. Within each pair the order is random. Processes of equal
code differ by chance, in where their memory lies for example: pairs are spread over many starts,
and the interval allows for how much the starts differ.
"""

import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from scaling.comparison.paired_calls import Clock
from scaling.comparison.verdict import (
    LOOKS,
    STOP_FASTER,
    THRESHOLD,
    Judgement,
    Verdict,
    conclude,
    inconclusive,
    judge,
)
from unitransformer.config import Recipe
from unitransformer.launch.subprocess_module import open_command
from unitransformer.record.units import format_count
from unitransformer.stats.intervals import t_quantile

WORKER = Path(__file__).parents[2] / "recipes/service/paired_worker.py"
WARM_UP_BLOCKS = 3  # of each start; the first step allocates and compiles
MIN_BLOCK_S = 0.1  # starting both sides takes longer than 20 pairs of such blocks
ANSWER_LIMIT_S = 3600.0  # for the start with compilation, and for one block
PAIRS_PER_START = 20
MIN_STARTS = 4  # of a verdict: fewer do not show how much starts differ
# Of the starts: strict while they are few, so that an early look rarely ends with a false alarm. Of
# 1,500 simulated comparisons of equal code, 0 to 4 were called slower where starts differ by up to
# 1 % (standard deviation), 9 where they differ by 2 %.
START_CONFIDENCE = 0.999
MANY_STARTS, MANY_STARTS_CONFIDENCE = 16, 0.99
NO_END = 1_000_000  # steps: the comparison ends before

SideName = Literal["base", "candidate"]
SIDES: tuple[SideName, ...] = get_args(SideName)
Answer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is compared: how its recipe is started."""

    label: str  # as the user named it
    recipe: Recipe
    arguments: tuple[str, ...]  # of the recipe
    code: Path  # folder that holds the packages
    python: Path  # interpreter, with the packages that the code needs
    commit: str | None = None
    is_dirty: bool | None = None


@dataclass(kw_only=True)
class Blocks:
    """What one side measured in one start, warm-up left out; seconds are those of one block."""

    processor_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    gpu_s: list[float] = field(default_factory=list)  # empty without a GPU
    losses: list[float] = field(default_factory=list)  # of every step from the first on
    peak_bytes: int = 0

    def add(self, steps: Sequence[Answer]) -> None:
        """Adds a block of steps."""
        self.processor_s.append(math.fsum(step["processor_s"] for step in steps))
        self.wall_s.append(math.fsum(step["wall_s"] for step in steps))
        if steps[0]["gpu_s"] is not None:
            self.gpu_s.append(math.fsum(step["gpu_s"] for step in steps))

    def seconds(self, clock: Clock) -> list[float]:
        return {"processor": self.processor_s, "wall": self.wall_s, "gpu": self.gpu_s}[clock]


@dataclass(frozen=True, kw_only=True)
class Start:
    """The pairs of one start of both sides."""

    steps_per_block: int
    first: tuple[SideName, ...]  # the side that began each pair
    base: Blocks
    candidate: Blocks
    about: Mapping[SideName, Mapping[str, Any]]  # versions, device and clock of each side

    def pairs(self, clock: Clock) -> tuple[list[float], list[float]]:
        return self.base.seconds(clock), self.candidate.seconds(clock)

    @property
    def deciding_clock(self) -> Clock:
        """CUDA events on a GPU, or else processor time, which other processes do not add to."""
        return "gpu" if self.about["base"]["clock"] == "gpu" else "processor"


def describe_builds(start: Start) -> str | None:
    """Says that both sides have torch in builds for other devices; None if they do not."""
    before, after = (start.about[side]["versions"] for side in SIDES)
    build, other = (versions.get("torch build") for versions in (before, after))
    if build == other:
        return None
    return (
        f"torch {before['torch']} is a {build} build, {after['torch']} a {other} build: the ratio "
        "is that of both the versions and the builds"
    )


class SideFailed(RuntimeError):
    """A side could not be trained; the message says which and why."""


def judge_starts(
    starts: Sequence[Start],
    clock: Clock | None = None,
    *,
    threshold: float = THRESHOLD,
    stop_faster: float = STOP_FASTER,
) -> Judgement:
    """Judges all pairs of all starts, by the clock that decides unless another is named.

    The interval reaches on each side to the wider of two: that of `judge`, which knows only the
    noise of pairs, and Student's t of the starts' middle log-ratios, which also holds where
    processes of equal code differ by chance.
    """
    devices = {side: starts[0].about[side]["device"] for side in SIDES}
    if len(set(devices.values())) > 1:
        return inconclusive(
            f"the conditions differ: device: {devices['base']} and {devices['candidate']}"
        )
    clock = clock or starts[0].deciding_clock
    base = [seconds for start in starts for seconds in start.pairs(clock)[0]]
    candidate = [seconds for start in starts for seconds in start.pairs(clock)[1]]
    judgement = judge(
        base,
        candidate,
        threshold=threshold,
        stop_faster=stop_faster,
        starts=[len(start.first) for start in starts],
    )
    if judgement.ratio is None or judgement.low is None or judgement.high is None:
        return judgement
    if len(starts) < MIN_STARTS:
        return replace(
            judgement,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"only {format_count(len(starts), 'start')}, and a verdict takes {MIN_STARTS}",
            detectable=None,
            pairs_needed=max(2 * LOOKS[0], 2 * judgement.pairs),
        )
    low, high = _interval_of_starts([_middle_log(start, clock) for start in starts])
    return conclude(
        min(math.log(judgement.low), low),
        math.log(judgement.ratio),
        max(math.log(judgement.high), high),
        pairs=judgement.pairs,
        threshold=threshold,
        stop_faster=stop_faster,
        reach=1.6 * (1 + 1 / (len(starts) - 1)),  # few starts estimate their deviation less well
    )


def _interval_of_starts(logs: Sequence[float]) -> tuple[float, float]:
    """Returns the interval of the mean of the starts, from Student's t."""
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    confidence = MANY_STARTS_CONFIDENCE if len(logs) >= MANY_STARTS else START_CONFIDENCE
    half = t_quantile((1 + confidence) / 2, len(logs) - 1) * error
    mean = statistics.fmean(logs)
    return mean - half, mean + half


def split_into_starts(pairs: int) -> list[int]:
    """Returns how many of these pairs each start measures: `PAIRS_PER_START` or a few more."""
    count = max(1, pairs // PAIRS_PER_START)
    return [pairs * (i + 1) // count - pairs * i // count for i in range(count)]


def _middle_log(start: Start, clock: Clock) -> float:
    """The mean of the middle half of the log-ratios: of few pairs it varies less than a median."""
    base, candidate = start.pairs(clock)
    logs = sorted(math.log(b / a) for a, b in zip(base, candidate, strict=True))
    quarter = len(logs) // 4
    return statistics.fmean(logs[quarter : len(logs) - quarter])


def compare_sides(
    sides: Mapping[SideName, Side],
    looks: Sequence[int],
    *,
    threshold: float = THRESHOLD,
    stop_faster: float = STOP_FASTER,
    seed: int = 0,
    clock: Clock | None = None,
    print_line: Callable[[str], None],
) -> tuple[list[Start], Judgement]:
    """Measures pairs until they decide, at most `looks[-1]`; returns them and the judgement.

    Raises:
        ValueError: a recipe refuses its options, or the side its comparison.
        SideFailed: a side does not train, or no longer.
    """
    starts = list[Start]()

    def judge_more(pairs: int) -> Judgement:
        for size in split_into_starts(pairs):
            starts.append(run_start(sides, size, seed=seed + len(starts), clock=clock))
        judgement = judge_starts(starts, clock, threshold=threshold, stop_faster=stop_faster)
        measured = sum(len(start.first) for start in starts)
        print_line(f"{measured} of at most {looks[-1]} pairs: {judgement.verdict.value}")
        return judgement

    return starts, look_until_decided(judge_more, looks)


def look_until_decided(judge_more: Callable[[int], Judgement], looks: Sequence[int]) -> Judgement:
    """Returns the first judgement that decides, or that no more pairs can change; or the last.

    Args:
        judge_more: measures so many further pairs, and judges all.
        looks: numbers of pairs at which they are judged, rising.
    """
    measured = 0
    for look in looks:
        judgement = judge_more(look - measured)
        measured = look
        if judgement.verdict is not Verdict.INCONCLUSIVE or judgement.pairs == 0:
            break
    return judgement


def run_start(
    sides: Mapping[SideName, Side], pairs: int, *, seed: int, clock: Clock | None = None
) -> Start:
    """Starts both sides, warms them up and measures that many pairs; both have ended afterwards.

    Raises as `compare_sides` does.
    """
    with (
        tempfile.TemporaryDirectory(prefix="compare-") as folder,
        ThreadPoolExecutor(len(SIDES)) as pool,
        ExitStack() as stack,  # left first: once a side has ended, nobody waits for its answer
    ):
        asks = {
            name: _asker(
                sides[name].label, stack.enter_context(_open(sides[name], Path(folder, name)))
            )
            for name in SIDES
        }
        # Both import at the same time.
        answers = pool.map(lambda name: asks[name]({"about": True, "start": seed}), SIDES)
        about = dict(zip(SIDES, answers, strict=True))
        for name in SIDES:
            if clock == "gpu" and about[name]["clock"] != "gpu":
                device = about[name]["device"]
                raise ValueError(
                    f"clock is gpu, but {name} trains on {device}; choose processor, or auto"
                )
        return take_pairs(asks, pairs, about, seed=seed)


def take_pairs(
    asks: Mapping[SideName, Callable[[Answer], Answer]],
    pairs: int,
    about: Mapping[SideName, Mapping[str, Any]],
    *,
    seed: int,
) -> Start:
    """Measures blocks of equally many steps of both sides.

    Within a pair the sides take turns after each step, in random order each time: the shorter the
    turns, the more alike the machine is for both.
    """
    blocks = {name: Blocks() for name in SIDES}

    def take(name: SideName) -> Answer:
        answer = asks[name]({"steps": 1})
        blocks[name].losses += answer["losses"]
        blocks[name].peak_bytes = max(blocks[name].peak_bytes, answer["peak_bytes"])
        return answer

    warm_up = [[take(name) for name in SIDES] for _ in range(WARM_UP_BLOCKS)]
    # Other processes prolong wall time, but the processor's does not say how long a GPU works.
    fastest_s = min(
        answer["gpu_s"] or answer["processor_s"] for answers in warm_up[1:] for answer in answers
    )
    steps = max(1, math.ceil(MIN_BLOCK_S / fastest_s))
    order, first = random.Random(seed), list[SideName]()
    for _ in range(pairs):
        turns = [order.sample(SIDES, 2) for _ in range(steps)]
        first.append(turns[0][0])
        answers = [(name, take(name)) for turn in turns for name in turn]
        for name in SIDES:
            blocks[name].add([answer for side, answer in answers if side == name])
    return Start(
        steps_per_block=steps,
        first=tuple(first),
        base=blocks["base"],
        candidate=blocks["candidate"],
        about=about,
    )


def _open(side: Side, folder: Path) -> Any:
    # Those of the side come later and win. Nobody reads the ceilings of the machine.
    arguments = ["--ceiling-s", "0", "--optimizer.schedule-steps", str(NO_END), *side.arguments]
    arguments += ["--out", str(folder), "--record", str(folder / "record.json")]
    # Validation and checkpoints would fall between two steps of a block.
    arguments += ["--max-steps", str(NO_END), "--validate-every", str(NO_END), "--no-checkpoint"]
    # A thread that waits for another one spins, and so counts as busy, unless it shall sleep.
    wait = os.environ.get("OMP_WAIT_POLICY", "passive")
    return open_command(
        f"recipes.{side.recipe}",
        [str(side.python), "-P", str(WORKER), side.recipe, *arguments],
        limit_s=ANSWER_LIMIT_S,
        variables={"OMP_WAIT_POLICY": wait, "PYTHONPATH": str(side.code)},
    )


def _asker(label: str, send: Callable[[str], str]) -> Callable[[Answer], Answer]:
    def ask(request: Answer) -> Answer:
        try:
            answer: Answer = json.loads(send(json.dumps(request)))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        except RuntimeError as error:
            raise SideFailed(f"{label}: {error}") from error
        return answer

    return ask


def to_json(start: Start) -> dict[str, Any]:
    """Returns the fields of a start. Losses that are no numbers, which JSON lacks, become text."""
    values = asdict(start)
    for side in SIDES:
        losses = values[side]["losses"]
        values[side]["losses"] = [x if math.isfinite(x) else str(x) for x in losses]
    return values


def from_json(values: Mapping[str, Any]) -> Start:
    """Reads a start of a record; raises KeyError, TypeError or ValueError for a malformed one."""
    start = Start(
        steps_per_block=values["steps_per_block"],
        first=tuple(values["first"]),
        base=_blocks(values["base"]),
        candidate=_blocks(values["candidate"]),
        about=values["about"],
    )
    counts = {len(start.first), *(len(side) for side in start.pairs("processor"))}
    counts |= {len(side) for side in start.pairs("wall")}
    if len(counts) != 1:
        raise ValueError("its times are not pairs")
    return start


def _blocks(values: Mapping[str, Any]) -> Blocks:
    return Blocks(**{**values, "losses": [float(loss) for loss in values["losses"]]})

"""Tests replays: when a run counts as reproduced, and a recipe that runs twice."""

import os
import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes import gpt
from recipes.command_line import run_recipe
from scaling.parity.cases import BOUND_STEPS
from scaling.recipe_process import ProcessResult, run_alone
from scaling.replay.command import load_original, read_command, replay
from scaling.replay.compare import ReplayVerdict, measured_loss_blocks
from scaling.store.outcome import CellOutcome, write_outcome
from tests.builders.records import make_config, make_crashed, make_record
from tests.distributed.forking import fork_command
from tests.processes import PATIENCE_S
from unitransformer.config import Recipe
from unitransformer.record.metrics import compute_metrics, find_last_steady_state
from unitransformer.record.schema import Record, load_record, write_record
from unitransformer.record.slurm_job import JobStart, SlurmJob, write_job

STEPS = 100


def noisy(step_s: float, *, seed: int, scatter: float = 0.01, count: int = STEPS) -> Record:
    """A record of noisy steps, by a clean commit."""
    drawn = random.Random(seed)
    seconds = [step_s * drawn.lognormvariate(0, scatter) for _ in range(count)]
    config = make_config(num_steps=count)
    record = make_record(step_s=seconds, code={"commit": "a" * 40, "is_dirty": False})
    steady = find_last_steady_state(seconds, segment_starts=[0], excluded_steps=[])
    metrics = compute_metrics(
        seconds,
        record["samples"],
        steady,
        segment_starts=[0],
        units_per_step=config.global_batch_size * config.tokens_per_sample,
    )
    assert metrics is not None
    return record | {
        "steady_from": steady.start,
        "metrics": metrics.as_dict(),
        "tokens_per_s": metrics.units_per_s,
    }


class Fake:
    """A fake runner that writes the given records in turn, and remembers its requests."""

    def __init__(self, *records: Record, exit_code: int | None = 0, **result: Any) -> None:
        self.records = list(records)
        self.result = ProcessResult(exit_code=exit_code, elapsed_s=1.0, **result)
        self.calls: list[tuple[Recipe, Sequence[str], Mapping[str, Any]]] = []

    def __call__(
        self, recipe: Recipe, arguments: Sequence[str], *, log: Path, **given: Any
    ) -> ProcessResult:
        self.calls.append((recipe, arguments, given))
        log.write_text("error: no memory left\n")
        if self.records:
            place = Path(arguments[list(arguments).index("--record") + 1])
            write_record(self.records.pop(0), place)
        return self.result


def play(original: Record, tmp_path: Path, *again: Record, **options: Any) -> ReplayVerdict:
    write_record(original, tmp_path / "record.json")
    runner = Fake(*again)
    return replay(tmp_path / "record.json", runner=runner, print_line=lambda line: None, **options)


# ------------------------------------------------------------------------------ the verdict


def test_a_replay_with_equal_losses_and_steps_within_tolerance_is_reproduced(
    tmp_path: Path,
) -> None:
    verdict = play(noisy(0.1, seed=1), tmp_path, noisy(0.1, seed=2))
    assert (verdict.word, verdict.exit_code) == ("reproduced", 0)
    loss, step = verdict.lines
    assert loss == "loss: equal to the last digit over 100 steps"
    assert step.count(" to ") == 3, "both intervals and that of the ratio"
    assert "asked: within 5% of 1" in step


def test_a_replay_whose_interval_is_slower_is_not_reproduced(tmp_path: Path) -> None:
    verdict = play(noisy(0.1, seed=1), tmp_path, noisy(0.12, seed=2))
    assert (verdict.word, verdict.exit_code) == ("not reproduced", 1)
    assert "ratio 1.2" in verdict.lines[1] or "ratio 1.19" in verdict.lines[1]


def test_a_replay_whose_interval_crosses_the_tolerance_is_inconclusive(tmp_path: Path) -> None:
    verdict = play(noisy(0.1, seed=1), tmp_path, noisy(0.1, seed=2), tolerance=0.001)
    assert (verdict.word, verdict.exit_code) == ("inconclusive", 3)
    short = play(make_record(), tmp_path / "short", make_record())
    assert short.word == "inconclusive"
    assert "no interval: 10 samples, an interval needs 50" in short.lines[1]


def test_launches_that_scatter_widen_the_interval(tmp_path: Path) -> None:
    again = [noisy(step_s, seed=seed) for seed, step_s in enumerate((0.097, 0.103), 2)]
    verdict = play(noisy(0.1, seed=1), tmp_path, *again, repeats=2)
    assert verdict.word == "inconclusive", "two launches are too few"
    assert "now over 2 launches" in verdict.lines[1]


def test_another_loss_curve_is_not_reproduced_at_any_speed(tmp_path: Path) -> None:
    again = noisy(0.1, seed=2)
    again["loss"] = [*again["loss"][:-1], again["loss"][-1] * (1 + 1e-6)]
    within = play(noisy(0.1, seed=1), tmp_path / "within", again)
    assert within.word == "reproduced"
    assert (
        "within the parity bound of 1e-05 over 100 steps, relative difference 1.0e-06 at step 100"
        in (within.lines[0])
    )
    again["loss"][BOUND_STEPS - 1] *= 1.01
    different = play(noisy(0.1, seed=1), tmp_path / "different", again)
    assert different.word == "not reproduced"
    assert different.lines[0].startswith("loss: different, relative difference 1.0e-02 at step 24")


def test_losses_that_differ_after_the_steps_of_the_bound_are_inconclusive(tmp_path: Path) -> None:
    again = noisy(0.1, seed=2)
    again["loss"][BOUND_STEPS] *= 1.01
    verdict = play(noisy(0.1, seed=1), tmp_path, again)
    assert (verdict.word, verdict.exit_code) == ("inconclusive", 3)
    assert "relative difference 1.0e-02 at step 25" in verdict.lines[0]
    assert "holds for the 24 steps" in verdict.lines[0]
    slower = noisy(0.12, seed=2) | {"loss": again["loss"]}
    assert play(noisy(0.1, seed=1), tmp_path / "slower", slower).word == "not reproduced"


def test_differing_conditions_are_reported(tmp_path: Path) -> None:
    again = noisy(0.1, seed=2) | {"code": {"commit": "b" * 40, "is_dirty": False}}
    again["versions"] = {"python": "3.11.7", "torch": "2.14.0"}
    verdict = play(noisy(0.1, seed=1), tmp_path, again)
    assert verdict.word == "reproduced"
    assert [line.split(" differ")[0] for line in verdict.lines[2:]] == [
        "conditions: versions of torch",
        "conditions: commit",
    ]


def test_another_config_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    again = noisy(0.1, seed=2)
    again["config"]["seed"] = 7
    with pytest.raises(
        ValueError, match=r"config: seed is 7, was 0; the command resolves to another"
    ):
        play(noisy(0.1, seed=1), tmp_path, again)


def test_a_replay_gets_the_loss_blocks_that_the_run_measured(tmp_path: Path) -> None:
    blocks = {"rows": 1024, "columns": 2048, "reason": "measured"}
    original, again = noisy(0.1, seed=1), noisy(0.1, seed=2)
    write_record(original | {"loss_blocks": [blocks]}, tmp_path / "record.json")
    again["config"] |= {"loss_chunk": 1024, "loss_block": 2048}
    runner = Fake(again)
    replay(tmp_path / "record.json", runner=runner, print_line=lambda line: None)
    assert "--loss-chunk 1024 --loss-block 2048" in shlex.join(runner.calls[0][1])
    again["config"]["loss_block"] = 512
    with pytest.raises(ValueError, match="config: loss_block is 512, was 2048"):
        replay(tmp_path / "record.json", runner=Fake(again), print_line=lambda line: None)


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        (None, [None]),
        (None, [{"rows": 0, "columns": 0, "reason": "all logits at once"}]),
        (2048, [{"rows": 0, "columns": 2048, "reason": "given"}]),
    ],
)
def test_loss_blocks_that_were_not_measured_are_no_options(
    given: int | None, blocks: list[Any]
) -> None:
    record = make_record(loss_blocks=blocks)
    record["config"]["loss_block"] = given
    assert measured_loss_blocks(record) == {}


# ------------------------------------------------------------------------------ failures


def fail(tmp_path: Path, runner: Fake, **changes: Any) -> ReplayVerdict:
    outcome = CellOutcome(
        **{"cell": "0" * 12, "repeat": 1, "recipe": "gpt", "options": {}, "status": "oom"}
        | {"command": "python -m recipes.gpt --seed 1", "memory_limit_bytes": 10**9}
        | changes
    )
    write_outcome(outcome, tmp_path)
    return replay(tmp_path, runner=runner, print_line=lambda line: None)


def test_a_failed_cell_is_reproduced_by_the_same_failure(tmp_path: Path) -> None:
    runner = Fake(exit_code=None, ending="oom")
    assert fail(tmp_path, runner).lines == ("status: oom then, oom now: error: no memory left",)
    assert runner.calls[0][2]["memory_limit_bytes"] == 10**9
    assert fail(tmp_path, runner, status="oom-inferred").word == "reproduced"
    assert fail(tmp_path, Fake(exit_code=2)).word == "not reproduced"
    assert fail(tmp_path, Fake(exit_code=2), status="refused").word == "reproduced"
    assert fail(tmp_path, Fake(make_record())).word == "not reproduced"


def test_a_crash_is_reproduced_by_the_same_exception_alone(tmp_path: Path) -> None:
    def crash(kind: str) -> Record:
        crashed = make_crashed()
        return crashed | {"error": {**crashed["error"], "type": kind}}

    assert play(crash("KeyError"), tmp_path / "a", crash("KeyError")).word == "reproduced"
    other = play(crash("KeyError"), tmp_path / "b", crash("OSError"))
    assert other.word == "not reproduced"
    assert other.lines[0].startswith("status: crashed by KeyError then, crashed by OSError now")
    silent = {"status": "crashed", "memory_limit_bytes": None}
    assert fail(tmp_path / "c", Fake(exit_code=3), exit_code=3, **silent).word == "reproduced"
    assert fail(tmp_path / "d", Fake(exit_code=-11), exit_code=3, **silent).word == "not reproduced"


def test_a_launch_that_the_system_kills_for_its_memory_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([7, 8, 8, 8])
    monkeypatch.setattr("scaling.replay.command.count_oom_kills", lambda: next(kills))
    assert fail(tmp_path / "oom", Fake(exit_code=-9)).word == "reproduced"
    assert fail(tmp_path / "killed", Fake(exit_code=-9)).word == "not reproduced"


@pytest.mark.parametrize("exit_code", [75, -15])
def test_a_replay_stopped_by_a_signal_is_inconclusive(tmp_path: Path, exit_code: int) -> None:
    stopped = fail(tmp_path, Fake(exit_code=exit_code), status="crashed", exit_code=1)
    assert (stopped.word, stopped.exit_code) == ("inconclusive", 3)
    assert "the launch was stopped by a signal" in stopped.lines[1]


def test_a_cell_that_timed_out_is_replayed_with_the_same_limit(tmp_path: Path) -> None:
    runner = Fake(exit_code=None, ending="timeout")
    assert fail(tmp_path, runner, status="timeout", elapsed_s=3.5).word == "reproduced"
    assert runner.calls[0][2]["limit_s"] == 3.5


def test_a_run_that_fails_now_ends_the_launches(tmp_path: Path) -> None:
    crashed = make_crashed()
    verdict = play(make_record(), tmp_path, crashed, repeats=3)
    assert verdict.word == "not reproduced"
    assert verdict.lines[0].startswith("status: ok then, crashed by RuntimeError now")


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (4, "no steady state: 4 steps, needs 8"),
        (12, "no interval: 10 samples, an interval needs 50"),
        (100, None),
    ],
)
def test_a_replay_says_before_it_trains_that_the_speed_cannot_be_compared(
    steps: int, reason: str | None, tmp_path: Path
) -> None:
    record = noisy(0.1, seed=1) if reason is None else make_record(step_s=[0.1] * steps)
    write_record(record, tmp_path / "record.json")
    runner, lines = Fake(record), list[str]()

    def note(line: str) -> None:
        assert runner.calls == []
        lines.append(line)

    verdict = replay(tmp_path / "record.json", runner=runner, print_line=note)
    notes = [line for line in lines if line.startswith("only losses can be compared")]
    assert [line.partition(": then ")[2] for line in notes] == ([] if reason is None else [reason])
    assert verdict.word == ("reproduced" if reason is None else "inconclusive")


# ------------------------------------------------------------------------------ command and cell


def test_options_that_name_paths_are_left_out_of_the_replay() -> None:
    command = "python -m recipes.vit --seed 3 --out a --record=b --repeats 4 --trace c --size tiny"
    assert read_command(command) == ("vit", ["--seed", "3", "--size", "tiny"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make all", "must be `python -m recipes.X options`"),
        ("python -m recipes.t5", "must be `python -m recipes.X options`"),
        ("python -m recipes.gpt --resume", "resumes another run"),
    ],
)
def test_a_command_that_cannot_be_run_again_is_refused(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_command(command)


def test_other_files_beside_a_record_are_no_records(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "gpt-1.json")
    start = JobStart(restart=0, nodes="node1", started_at="2026-01-01T00:00:00+00:00")
    write_job(SlurmJob(job="7", name="7", record="gpt-1.json", starts=(start,)), tmp_path)
    (tmp_path / "self-test.json").write_text('{"kind": "compare-self-test", "schema": 2}')
    os.mkfifo(tmp_path / "pipe.json")
    assert load_original(tmp_path).record == load_record(tmp_path / "gpt-1.json")
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(ValueError, match="holds 2 possible records; name the record itself"):
        load_original(tmp_path)
    (tmp_path / "gpt-1.json").unlink()
    with pytest.raises(ValueError, match=r"damaged\.json: "):
        load_original(tmp_path)
    (tmp_path / "damaged.json").unlink()
    with pytest.raises(ValueError, match="holds 0 possible records; name the record itself"):
        load_original(tmp_path)
    with pytest.raises(ValueError, match=r"self-test\.json is not a run record; name a record"):
        load_original(tmp_path / "self-test.json")


def test_a_path_that_is_not_a_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; give a record"):
        replay(tmp_path / "nowhere", runner=Fake(), print_line=print)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop is a symbolic link that leads back to itself; give"):
        replay(tmp_path / "loop", runner=Fake(), print_line=print)
    with pytest.raises(ValueError, match="holds 0 possible records; name the record itself"):
        replay(tmp_path, runner=Fake(), print_line=print)
    with pytest.raises(ValueError, match="a signal stopped this run"):
        fail(tmp_path, Fake(), status="preempted")
    with pytest.raises(ValueError, match="tolerance is 5; give a share"):
        replay(tmp_path, runner=Fake(), print_line=print, tolerance=5)


# ------------------------------------------------------------------------------ a real run


def test_a_replayed_recipe_has_the_same_loss_to_the_last_digit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    record = tmp_path / "runs" / "record.json"
    command = (
        "--model.width 16 --model.num-layers 1 --model.num-heads 2 --model.feedforward-width 32 "
        "--model.num-classes 300 --model.num-positions 16 --data synthetic --batch-size 2 "
        "--max-steps 12 --validate-every 12 --validation-batches 1 --accelerator cpu "
        f"--ceiling-s 0 --no-checkpoint --out {tmp_path / 'runs'} --record {record}"
    )
    first = fork_command(
        lambda: run_recipe(gpt.PRESET, gpt.show, shlex.split(command)),
        log=tmp_path / "log",
        variables={},
    )
    first.join(PATIENCE_S)
    assert first.exitcode == 0, (tmp_path / "log").read_text()
    actual: list[str] = []
    verdict = replay(record, runner=run_alone, print_line=actual.append, out=tmp_path / "again")
    assert verdict.lines[0] == "loss: equal to the last digit over 12 steps"
    assert verdict.lines[1].startswith("step: ")
    assert verdict.word == "inconclusive", "12 steps are too few for an interval"
    warning, *launches = actual
    assert warning.startswith("only losses can be compared")
    assert launches == [f"launch 1 of 1: {load_record(record)['command']}"]
    assert (tmp_path / "again" / "launch-1" / "record.json").is_file()
    with pytest.raises(ValueError, match="holds launches of a replay; choose another"):
        replay(record, runner=run_alone, print_line=actual.append, out=tmp_path / "again")

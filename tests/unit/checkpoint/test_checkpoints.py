"""Checkpoint folders are listed, pruned, written from a copy, and read without executing code."""

import errno
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from unitransformer.checkpoint import callbacks, writer
from unitransformer.checkpoint.callbacks import CheckpointError, SaveCheckpoints
from unitransformer.checkpoint.names import checkpoint_name
from unitransformer.checkpoint.reader import (
    CheckpointReader,
    RunState,
    check_files,
    list_checkpoints,
    newest_checkpoint,
    read_run_state,
    read_tensors,
)
from unitransformer.checkpoint.state import count_updates
from unitransformer.checkpoint.writer import (
    CheckpointWriter,
    remove_leftovers,
    set_newer_aside,
    start_saving,
)
from unitransformer.launch.variables import LOCAL_DISK

State = dict[str, Tensor]


def run_state_at(step: int) -> RunState:
    return {"config": {}, "loss": [1.0] * step, "num_updates": step, "loss_scaler": {}}


def write(folder: Path, step: int, state: State, *, keep: int = 1) -> Path:
    target = CheckpointWriter(folder, step, run_state_at(step), keep=keep)
    start_saving(state, target, None, wait=True).result()
    return folder / checkpoint_name(step)


def read(path: Path) -> State:
    reader = CheckpointReader(path)
    tensors = reader.metadata.state_dict_metadata
    state = {name: torch.zeros(tensor.size) for name, tensor in tensors.items()}
    read_tensors(reader, state)
    return state


# ---- listed


def test_checkpoints_are_listed_by_step_without_leftovers(tmp_path: Path) -> None:
    steps = (100_000_000, 9, 10)
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
    for name in (".step-00000011.partial", ".step-00000012.old", "step-11", "last", "step-x"):
        (tmp_path / name).mkdir()
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == [checkpoint_name(step) for step in sorted(steps)]
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_only_leftovers_are_deleted(tmp_path: Path) -> None:
    for name in (".step-00000003.partial", ".step-00000001.old", "step-00000002", ".step-3.mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", ".step-3.mine"}
    remove_leftovers(tmp_path / "nowhere")


# ---- written


def test_a_written_checkpoint_is_read_unchanged_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(7).bfloat16(), "c": torch.tensor(2.0)}
    write(tmp_path, 1, {"a": torch.zeros(1)})
    (tmp_path / "step-00000000").write_text("not ours")
    path = write(tmp_path, 2, state)
    assert {other.name for other in tmp_path.iterdir()} == {"step-00000000", path.name}
    check_files(path)
    assert read_run_state(path) == run_state_at(2)
    found = read(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].float()) for name in state)
    assert sorted(json.loads((path / "sums.json").read_text())) == sorted(
        other.name for other in path.iterdir() if other.name != "sums.json"
    )


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_newest_checkpoints_are_kept(keep: int, kept: list[int], tmp_path: Path) -> None:
    (tmp_path / "step-00000000").write_text("not ours")
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"a": torch.zeros(1)}, keep=keep)
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-00000000", *map(checkpoint_name, kept)]


def test_checkpoints_after_the_step_to_which_a_run_goes_back_are_set_aside(tmp_path: Path) -> None:
    write(tmp_path, 1, {"a": torch.zeros(1)}, keep=3)
    for _ in range(2):  # the second time, others of the same names are there
        for step in (2, 3):
            write(tmp_path, step, {"a": torch.zeros(1)}, keep=3)
        set_newer_aside(tmp_path, 1)
        assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(1)]
        aside = list_checkpoints(tmp_path / "set-aside")
        assert [path.name for path in aside] == [checkpoint_name(2), checkpoint_name(3)]
        for path in aside:
            check_files(path)


@pytest.mark.parametrize("name", ["run.json", "sums.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_offers_the_newest_sound_one_before_it(
    name: str, tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"a": torch.randn(3)}, keep=4)
    for step in (4, 3):
        damaged = tmp_path / checkpoint_name(step) / name
        damaged.write_bytes(damaged.read_bytes()[:-3])
    sound = tmp_path / checkpoint_name(2)
    fix = re.escape(f"give that one (--resume {sound}), or delete the damaged one")
    said = f"is damaged .*; {sound} is sound: {fix}$"
    with pytest.raises(ValueError, match=said):
        check_whole(tmp_path / checkpoint_name(4))
    for step in (1, 2):
        damaged = tmp_path / checkpoint_name(step) / name
        damaged.write_bytes(damaged.read_bytes()[:-3])
    said = f"; delete all in {tmp_path} and start again without --resume$"
    with pytest.raises(ValueError, match=said):
        check_whole(tmp_path / checkpoint_name(4))


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_left_of_a_checkpoint_offers_the_sound_one_before_it(
    is_folder: bool, tmp_path: Path
) -> None:
    sound = write(tmp_path, 1, {"a": torch.zeros(1)})
    newest = tmp_path / checkpoint_name(2)
    if is_folder:
        newest.mkdir()
    else:
        newest.touch()
    said = rf"{newest} is damaged .sums.json is missing.; {sound} is sound: give that one"
    with pytest.raises(ValueError, match=said):
        check_whole(newest)


def check_whole(path: Path) -> None:
    read_run_state(path)
    check_files(path)


def test_a_checkpoint_taken_during_training_is_a_copy_of_the_changing_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data = CheckpointWriter.write_data
    monkeypatch.setattr(
        CheckpointWriter,
        "write_data",
        lambda *arguments: [time.sleep(0.1), write_data(*arguments)][1],
    )
    values = torch.ones(1000)
    target = CheckpointWriter(tmp_path, 1, run_state_at(1))
    done = start_saving({"a": values}, target, None, wait=False)
    values.zero_()
    assert not done.done()
    done.result()
    assert torch.equal(read(tmp_path / checkpoint_name(1))["a"], torch.ones(1000))


@pytest.mark.parametrize("is_initialized", [True, False])
def test_the_thread_that_saves_uses_the_gpu_of_its_rank(
    is_initialized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's current device belongs to a thread; of a new one it is GPU 0 on every rank."""
    here, calls = threading.local(), []
    here.gpu = 3

    def set_device(gpu: int) -> None:
        here.gpu = gpu

    def save(*arguments: Any, **options: Any) -> None:
        calls.append((threading.current_thread().name, getattr(here, "gpu", 0)))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here.gpu)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(writer, "save", save)
    target = CheckpointWriter(tmp_path, 1, run_state_at(1))
    start_saving({"a": torch.ones(1)}, target, None, wait=False).result()
    assert calls == [("checkpoint", 3 if is_initialized else 0)]


def test_the_number_of_updates_is_read_once_and_not_for_every_parameter() -> None:
    reads: list[int] = []

    class Step:
        def __int__(self) -> int:
            reads.append(1)
            return 7

    states = {"no gradient": {}, **{str(number): {"step": Step()} for number in range(100)}}
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(state=states)])
    assert count_updates(trainer) == 7
    assert len(reads) == 1


def test_a_checkpoint_is_staged_on_the_node_local_disk_which_is_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, state = tmp_path / "disk", {"w": torch.arange(1000.0)}
    straight = write(tmp_path / "straight", 1, state)
    monkeypatch.setenv(LOCAL_DISK, str(disk))
    copied: list[Path] = []
    original = writer._copy_to_shared
    monkeypatch.setattr(
        writer, "_copy_to_shared", lambda *paths: (copied.append(paths[0]), original(*paths))
    )
    staged = write(tmp_path / "staged", 1, state)
    assert [file.parent.parent for file in copied] == [disk]
    assert list(disk.iterdir()) == []
    files = {path.name: path.read_bytes() for path in straight.glob("*.distcp")}
    assert files == {path.name: path.read_bytes() for path in staged.glob("*.distcp")}
    check_files(staged)
    assert torch.equal(read(staged)["w"], state["w"])


def test_a_full_node_local_disk_is_skipped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_text("no folder")
    monkeypatch.setenv(LOCAL_DISK, str(tmp_path / "disk"))
    with pytest.warns(UserWarning, match=r"cannot stage checkpoints on .*File exists.*directly"):
        path = write(tmp_path / "checkpoints", 1, {"w": torch.ones(3)})
    assert torch.equal(read(path)["w"], torch.ones(3))


def test_a_full_shared_folder_is_not_blamed_on_the_node_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(_: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setenv(LOCAL_DISK, str(tmp_path / "disk"))
    monkeypatch.setattr(writer, "_copy_to_shared", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/checkpoints"):
        write(tmp_path / "checkpoints", 1, {"w": torch.ones(3)})
    assert not [warning for warning in recwarn if "cannot stage" in str(warning.message)]


def test_an_overflowed_gradient_norm_is_recorded_as_none(tmp_path: Path) -> None:
    actual = run_state_at(2) | {"gradient_norm": [float("inf"), 0.5]}
    start_saving(
        {"a": torch.ones(1)}, CheckpointWriter(tmp_path, 2, actual), None, wait=True
    ).result()
    assert read_run_state(tmp_path / checkpoint_name(2)) == actual


@pytest.mark.parametrize("is_wait", [True, False])
def test_an_interrupt_while_writing_is_raised_as_an_interrupt(
    is_wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "checksum", interrupt)
    done = start_saving(
        {"a": torch.ones(1)}, CheckpointWriter(tmp_path, 1, run_state_at(1)), None, wait=is_wait
    )
    with pytest.raises(KeyboardInterrupt):
        done.result()
    assert list_checkpoints(tmp_path) == []


def test_every_file_is_checked_by_one_of_the_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, 1, {"a": torch.randn(3, 4)})
    for name in ("run.json", "__0_0.distcp"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1])
        found = []
        for part in range(4):
            try:
                check_files(path, part=part, parts=4)
            except ValueError as error:
                found.append(str(error))
        (said,) = found
        assert f"{name} does not match its checksum" in said
        (path / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"b": torch.zeros(3, 4)}, "Missing key in checkpoint state_dict: b"),
        ({"a": torch.zeros(4, 3)}, "Size mismatch between saved"),
    ],
)
def test_a_tensor_that_is_missing_or_has_another_shape_is_refused(
    state: State, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, 1, {"a": torch.randn(3, 4)})
    with pytest.raises(ValueError, match=f"checkpoint {path} is damaged .{said}"):
        read_tensors(CheckpointReader(path), state)


# ---- the callback


class Saver(SaveCheckpoints):
    """A checkpoint callback that saves one small tensor without a trainer."""

    def __init__(self, folder: Path, losses: list[float]) -> None:
        super().__init__(
            folder, every=1, get_run_state=lambda: {"config": {}, "loss": list(losses)}
        )
        self.losses = losses

    def step(self, loss: float = 1.0, *, max_steps: int = 99) -> None:
        self.losses.append(loss)
        self.on_train_batch_end(trainer_at(len(self.losses), max_steps), None)


def trainer_at(step: int, max_steps: int = 99, *, num_updates: int | None = None) -> Any:
    plugin = SimpleNamespace(state_dict=dict)
    updates = torch.tensor(float(step if num_updates is None else num_updates))
    return SimpleNamespace(
        optimizers=[SimpleNamespace(state={"a": {"step": updates}})],
        global_step=step,
        max_steps=max_steps,
        should_stop=False,
        is_global_zero=True,
        strategy=SimpleNamespace(model=None),
        precision_plugin=plugin,
    )


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    monkeypatch.setattr(callbacks, "capture_state", lambda *arguments: {"a": torch.ones(3)})
    saver = Saver(tmp_path / "checkpoints", [])
    saver.on_train_start(trainer_at(0), None)  # type: ignore[arg-type]
    return saver


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, delay_s: float = 0.0) -> None:
    def write_data(self: CheckpointWriter, plan: Any, planner: Any) -> None:
        time.sleep(delay_s)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(CheckpointWriter, "write_data", write_data)


@pytest.mark.parametrize("max_steps", [3, 99])
def test_a_disk_that_fills_up_is_reported_at_the_next_checkpoint(
    max_steps: int, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.step()
    saver._finish(trainer_at(1))
    fill_the_disk(monkeypatch, delay_s=0.05)
    saver.step()
    with pytest.raises(CheckpointError) as caught:
        saver.step(max_steps=max_steps)
    assert str(caught.value) == (
        f"checkpoint-dir {saver.folder}: step 2 could not be saved ([Errno 28] No space left on "
        "device); step-00000001 is kept; free space and run again with --resume"
    )
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]
    saver.on_exception(trainer_at(3), None, caught.value)  # no write is under way


def test_the_last_checkpoint_is_written_before_training_ends(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.step(max_steps=1)
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]
    fill_the_disk(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be saved .*; step-00000001 is kept"
    ):
        saver.step(max_steps=2)


def test_a_disk_full_from_the_start_holds_no_partial_checkpoint(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch)
    with pytest.raises(CheckpointError, match=r"on device\); free space and run again$"):
        saver.step(max_steps=1)
    assert list(saver.folder.iterdir()) == []


def test_nothing_is_saved_before_the_first_gradient_that_did_not_overflow(saver: Saver) -> None:
    saver.losses.append(1.0)
    saver.on_train_batch_end(trainer_at(1, num_updates=0), None)
    assert not saver.folder.exists()
    saver.losses.append(1.0)
    saver.on_train_batch_end(trainer_at(2, max_steps=2, num_updates=1), None)
    actual = read_run_state(saver.folder / "step-00000002")
    assert (len(actual["loss"]), actual["num_updates"]) == (2, 1)


def test_a_nan_loss_is_not_checkpointed(saver: Saver) -> None:
    saver.step()
    with pytest.raises(
        FloatingPointError, match=r"nan at step 2; lower optimizer\.learning-rate and"
    ):
        saver.step(float("nan"))
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]


def test_a_failing_run_waits_for_the_checkpoint_under_way(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data = CheckpointWriter.write_data
    monkeypatch.setattr(
        CheckpointWriter,
        "write_data",
        lambda *arguments: [time.sleep(0.1), write_data(*arguments)][1],
    )
    saver.step()
    saver.on_exception(trainer_at(1), None, ArithmeticError())
    assert [path.name for path in saver.folder.iterdir()] == ["step-00000001"]


def test_a_failing_run_on_a_full_disk_reports_its_first_error(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch, delay_s=0.05)
    saver.step()
    saver.on_exception(trainer_at(1), None, ArithmeticError())  # does not raise
    assert list(saver.folder.iterdir()) == []


def test_a_failing_run_does_not_wait_forever_for_other_ranks(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MAX_WAIT_S", 0.05)
    fill_the_disk(monkeypatch, delay_s=0.5)
    saver.step()
    assert saver._pending is not None
    _, done = saver._pending
    saver._group = object()  # type: ignore[assignment]
    saver.on_exception(trainer_at(1), None, ArithmeticError())
    assert not done.done()
    assert done.exception() is not None


# ---- float16


class GradScaler(torch.amp.GradScaler):
    """float16 on a CPU, which has a loss scaler too."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0)


def test_the_loss_scale_of_float16_is_saved_and_restored() -> None:
    scaler, other = GradScaler(), GradScaler()
    scaler.scale(torch.ones(1))
    scaler.update(256.0)
    actual = callbacks._loss_scaler(trainer_with(scaler))
    assert json.loads(json.dumps(actual))["scale"] == 256.0
    callbacks._set_loss_scaler(trainer_with(other), actual)
    assert other.get_scale() == 256.0


def trainer_with(scaler: torch.amp.GradScaler) -> Any:
    plugin = SimpleNamespace(
        scaler=scaler, state_dict=scaler.state_dict, load_state_dict=scaler.load_state_dict
    )
    return SimpleNamespace(strategy=SimpleNamespace(model=None), precision_plugin=plugin)


def test_the_loss_scale_of_deepspeed_is_saved_and_restored() -> None:
    def trainer_with(scaler: DynamicLossScaler) -> Any:
        engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return SimpleNamespace(strategy=SimpleNamespace(model=engine))

    scaler, other = (
        DynamicLossScaler(
            init_scale=2.0**16,
            scale_window=1000,
            min_scale=1.0,
            delayed_shift=2,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
            dtype=torch.float16,
        )
        for _ in range(2)
    )
    scaler.cur_scale, scaler.cur_iter = 2.0**10, 7
    scaler.last_overflow_iter, scaler.cur_hysteresis = 5, 1
    actual = callbacks._loss_scaler(trainer_with(scaler))
    callbacks._set_loss_scaler(trainer_with(other), json.loads(json.dumps(actual)))
    assert vars(other) == vars(scaler)

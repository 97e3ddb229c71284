"""Bad input gives one line with field, value and fix, exit code 2, and writes nothing."""

import errno
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from tests.processes import PATIENCE_S
from unitransformer.checkpoint.reader import CHECKSUMS_FILE, METADATA_FILE, RUN_FILE, checksum
from unitransformer.launch import devices as process
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.schema import load_record
from unitransformer.transformer import Transformer

PRESETS = {module.PRESET.recipe: module for module in (bert, gpt, vit)}
SHAPE = (
    "--model.width 16 --model.num-layers 1 --model.num-heads 2 --model.feedforward-width 32 "
    "--batch-size 2 --max-steps 2 --accelerator cpu --num-workers 0 --ceiling-s 0"
)
TEXT = f"{SHAPE} --model.num-classes 300 --model.num-positions 8 --data text.txt"
IMAGES = f"{SHAPE} --model.image-size 16 --model.patch-size 8 --data images"
CHECKPOINT = "step-00000002"

Tree = dict[str, bytes | None]
Answer = tuple[int, str, str]  # exit code, stdout, stderr
Call = Callable[..., Answer]
Refuse = Callable[..., str]


def tree() -> Tree:
    """Every path below the working folder, with the contents of files."""
    paths = sorted(Path().rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def call(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Runs a command line in a folder with text.txt; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(cache))
    Path("text.txt").write_text("".join(f"{a} and {b}\n" for a in range(30) for b in range(20)))

    def run(line: str, recipe: str = "gpt") -> Answer:
        monkeypatch.delenv(RUN_FOLDER, raising=False)
        capsys.readouterr()
        module = PRESETS[recipe]
        code = run_recipe(module.PRESET, module.show, shlex.split(line))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refuse(call: Call) -> Refuse:
    """Runs a command line that must be refused; returns the message after `error: `."""

    def run(line: str, recipe: str = "gpt") -> str:
        before = tree()
        code, _, err = call(line, recipe)
        assert code == 2, err
        assert tree() == before
        said = [actual for actual in err.splitlines() if not actual.startswith("tokeniz")]
        assert len(said) == 1, err
        assert said[0].startswith("error: ")
        return said[0].removeprefix("error: ")

    return run


# ---- options


@pytest.mark.parametrize(
    ("line", "said"),
    [
        # impossible shapes
        ("--model.width 15", "model.width 15 does not divide into model.num-heads 2; choose a"),
        ("--sequence-length 9", "sequence-length 9 is longer than model.num-positions 8"),
        ("--dropout 1.0", "model.dropout is 1.0; it must be in [0, 1)"),
        ("--model.causal false", "model.causal is false; the next token"),
        # names
        ("--size refrence", "size 'refrence' is not known; did you mean reference?"),
        ("--size tiny", "size 'tiny' is not known; known: reference, 124m, 350m"),
        ("--batchsize 3", "--batchsize is not an option; did you mean --batch-size?"),
        ("--learning-rate=3", "--learning-rate is not an option; did you mean --optimizer.learn"),
        ("--max-step 3", "--max-step is not an option; did you mean --max-steps?"),
        ("--data.sequence-length 3", "--data.sequence-length is not an option; did you mean --seq"),
        ("--model.widht 3", "--model.widht is not an option; did you mean --model.width?"),
        ("--zzz", "--zzz is not an option; --help lists them all"),
        ("bert", "bert is not an option; --help lists them all"),
        # types and choices
        ("--max-steps many", "max-steps is 'many'; it must be an integer"),
        ("--max-steps 1.5", "max-steps is '1.5'; it must be an integer"),
        ("--max-steps", "argument --max-steps: expected one argument"),
        ("--seed true", "seed is 'true'; it must be an integer"),
        ("--dropout 0.1 --model.dropout 0.2", "dropout is 0.1 and model.dropout is 0.2; both mean"),
        ("--dropout low", "dropout is 'low'; it must be a number"),
        ("--model.causal maybe", "model.causal is 'maybe'; it must be true or false"),
        ("--strategy dpp", "strategy is 'dpp'; it must be one of auto, single, ddp"),
        ("--accelerator gpu", "accelerator is 'gpu'; it must be one of auto, cpu, cuda"),
        ("--precision 16", "precision is '16'; it must be one of 32-true, bf16-mixed"),
        ("--compile on", "compile is 'on'; it must be one of off, default"),
        ("--model.activation silu", "model.activation is 'silu'; it must be one of relu, gelu"),
        # counts
        ("--devices 0", "devices is 0; it must be at least 1"),
        ("--num-nodes 0", "num-nodes is 0; it must be at least 1"),
        ("--batch-size 0", "batch-size is 0; it must be at least 1"),
        ("--accumulate 0", "accumulate is 0; it must be at least 1"),
        ("--max-steps 0", "max-steps is 0; it must be at least 1"),
        ("--validate-every 0", "validate-every is 0; it must be at least 1"),
        ("--validation-batches 0", "validation-batches is 0; it must be at least 1"),
        ("--log-every 0", "log-every is 0; it must be at least 1"),
        ("--checkpoint-every -1", "checkpoint-every is -1; it must be at least 0"),
        ("--loss-chunk -1", "loss-chunk is -1; it must be at least 0"),
        (
            "--loss-block 1",
            "loss-block is 1: the loss would compute the 300 logits of each row in 300 blocks, "
            "which is very slow; give at least 64, or 0 for all at once",
        ),
        ("--loss-block 4", "loss-block is 4: the loss would compute the 300 logits of each"),
        (
            "--loss-chunk 1 --batch-size 9",
            "loss-chunk is 1: the loss would compute the 72 rows of logits in 72 blocks",
        ),
        ("--pad-vocabulary -1", "pad-vocabulary is -1; it must be at least 0"),
        ("--pad-vocabulary 1.5", "pad-vocabulary is '1.5'; it must be an integer"),
        ("--num-workers -1", "num-workers is -1; it must be at least 0"),
        ("--sequence-length 1", "sequence-length is 1; it must be at least 2"),
        ("--seed -1", "seed is -1; it must be at least 0"),
        ("--seed 4294967296", "seed is 4294967296; it must be below 2**32"),
        ("--model.num-heads 0", "model.num-heads is 0; it must be at least 1"),
        ("--optimizer.warmup-steps -1", "optimizer.warmup-steps is -1; it must be at least 0"),
        ("--optimizer.learning-rate nan", "optimizer.learning-rate is 'nan'; it must be a number"),
        ("--optimizer.learning-rate -1", "optimizer.learning-rate is -1.0; it must be at least 0"),
        ("--optimizer.beta2 1", "optimizer.beta2 is 1.0; it must be in [0, 1)"),
        # data
        ("--data-encoding utf-9", "data-encoding is 'utf-9'; it must be an encoding that Python"),
        ("--data-encoding zip", "data-encoding is 'zip'; it must be an encoding that Python knows"),
        (
            "--data builtin --data-encoding cp1252",
            "data-encoding is cp1252, but recipe gpt with data builtin reads no text files; leave",
        ),
        (
            "--data synthetic --data-field text",
            "data-field is text, but recipe gpt with data synthetic reads no text files; leave out",
        ),
        ("--data-field text", "data-field is text, but data text.txt holds no JSON Lines file"),
        # devices
        ("--strategy single --devices 2", "strategy is single with 2 devices; choose ddp, or one"),
        (
            "--strategy fsdp --devices 2 --precision 16-mixed",
            "precision 16-mixed does not work with strategy fsdp, which does not scale the loss",
        ),
        (
            "--strategy zero2 --devices 2 --precision bf16-true",
            "precision bf16-true does not work with strategy zero2: DeepSpeed keeps float32",
        ),
        (
            "--strategy ddp --cpu-offload",
            "cpu-offload does not work with strategy ddp, which keeps",
        ),
        (
            "--strategy fsdp --cpu-offload",
            "cpu-offload is for GPUs: on a CPU everything is in host",
        ),
        (
            "--num-nodes 2",
            "num-nodes is 2 and this command starts ranks on one machine only; run here, and with "
            "--node-rank 1 on the other node: torchrun --nnodes 2 --node-rank 0 "
            f"--nproc-per-node 1 --master-addr {socket.gethostname()} --master-port 29500 "
            "-m recipes.gpt ",
        ),
        (
            "--num-nodes 4 --repeats 2",
            "repeats is 2 and torchrun or srun launches once; leave --repeats out",
        ),
    ],
)
def test_an_invalid_option_is_refused(refuse: Refuse, line: str, said: str) -> None:
    assert refuse(f"{TEXT} {line}").startswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--model.image-size 20",
            "model.image-size 20 does not divide into patches of model.patch",
        ),
        ("--model.num-positions 9", "model.num-positions is 9; images of 16 pixels in patches"),
        ("--model.tied-head true", "model.tied-head is true; images have no token embeddings"),
        ("--sequence-length 3", "sequence-length is 3; the length of an image is its"),
    ],
)
def test_an_invalid_image_option_is_refused(refuse: Refuse, line: str, said: str) -> None:
    assert refuse(f"{IMAGES} --data builtin {line}", "vit").startswith(said)


@pytest.mark.parametrize(("found", "cure"), [(0, "use --accelerator cpu"), (2, "use --devices 2")])
def test_more_gpus_than_the_machine_has_are_refused_with_both_counts(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, found: int, cure: str
) -> None:
    monkeypatch.setattr(process, "count_gpus", lambda: found)
    monkeypatch.setattr(process, "driver_versions", dict)
    said = refuse(f"{TEXT} --devices 8 --accelerator cuda --precision 32-true")
    assert said == f"devices is 8 and this machine has {found} GPUs; {cure}"


def test_a_driver_beside_a_torch_that_finds_no_gpu_is_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "count_gpus", lambda: 0)
    monkeypatch.setattr(process, "driver_versions", lambda: {"nvidia driver": "535.104.05"})
    said = refuse(f"{TEXT} --accelerator auto")
    assert said.startswith("this machine has NVIDIA driver 535.104.05, but torch ")
    assert said.endswith(", or use --accelerator cpu")


def test_float16_is_refused_on_a_cpu_with_deepspeed(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_float16", lambda: False)
    said = refuse(f"{TEXT} --devices 2 --strategy zero1 --precision 16-mixed")
    assert said.startswith("precision 16-mixed is not for strategy zero1 on this CPU: DeepSpeed")


# ---- a file of options


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_stepps: 3", "config.max_stepps is not an option; did you mean max_steps?"),
        ("model:\n  widht: 3", "config.model.widht is not an option; did you mean model.width?"),
        ("gradient_noise: 1", "config.gradient_noise is not an option; --help lists them all"),
        ("max_steps: many", "max-steps is 'many'; it must be an integer"),
        ("strategy: dpp", "strategy is 'dpp'; it must be one of auto, single, ddp"),
        ("optimizer:\n  learning_rate: fast", "optimizer.learning-rate is 'fast'; it must be a"),
        ("seed: null", "config.seed is None; it must be an integer"),
        ("resume: maybe", "resume is 'maybe'; it must be true or false"),
        ("model: 3", "config.model is '3'; it must be a group of fields"),
        ("seed: -4", "seed is -4; it must be at least 0"),
        (
            "- 1",
            "config options.yaml holds no lines of the form `option: value`; --print_config prints "
            "an example",
        ),
        (
            "",
            "config options.yaml holds no lines of the form `option: value`; --print_config prints "
            "an example",
        ),
        ("out: [1", "config options.yaml: while parsing a flow sequence"),
        ("seed: 1\nseed: 2", "config options.yaml: line 2 gives seed again; give it once"),
    ],
)
def test_a_file_with_a_bad_option_is_refused(refuse: Refuse, content: str, said: str) -> None:
    Path("options.yaml").write_text(content)
    assert refuse(f"{TEXT} --config options.yaml").startswith(said)


def test_a_missing_file_of_options_is_named(refuse: Refuse) -> None:
    said = refuse(f"{TEXT} --config nowhere.yaml")
    assert said == f"config nowhere.yaml: File does not exist: '{Path('nowhere.yaml').absolute()}'"


# ---- data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere", "data nowhere does not exist; give builtin, synthetic or a path"),
        ("''", "data is empty; give builtin, synthetic or a path"),
        ("empty", "data empty holds no text; give text files that are not empty"),
        ("empty.txt", "data empty.txt holds no text; give text files that are not empty"),
        ("blank.txt", "blank.txt holds only white space; give files with text"),
        ("binary", "data binary holds no text, but 1 binary (binary); unpack or convert them"),
    ],
)
@pytest.mark.parametrize("recipe", ["gpt", "bert"])
def test_a_text_that_cannot_be_read_or_is_too_short_is_refused(
    refuse: Refuse, recipe: str, data: str, said: str
) -> None:
    Path("empty").mkdir()
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n" * 100)
    Path("binary").write_bytes(bytes(100))
    assert refuse(f"{TEXT} --data {data}", recipe).startswith(said)


def test_zero_without_deepspeed_says_how_to_install_it(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name)
    )
    actual = refuse("--strategy zero3 --devices 2")
    assert actual.startswith("strategy zero3 needs DeepSpeed, which is not installed: pip install")


def test_a_launcher_and_the_options_have_to_agree(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    actual = refuse("--devices 2")
    assert actual.startswith(
        "devices is 2 and num-nodes 1, and the launcher has started 4 ranks on"
    )


def test_a_text_shorter_than_one_sequence_is_refused_with_two_fixes(
    refuse: Refuse,
) -> None:
    Path("short.txt").write_text("a\nb")  # one line for training, one for validation
    assert refuse(f"{TEXT} --data short.txt") == (
        "data short.txt has 2 training tokens, fewer than one sequence of 8; "
        "give more text or a shorter sequence-length"
    )


def test_a_vocabulary_below_the_alphabet_is_refused(refuse: Refuse) -> None:
    assert "take 257 entries" in refuse(f"{TEXT} --model.num-classes 100")


@pytest.mark.parametrize("place", ["/proc/cache", "text.txt"])
def test_a_cache_that_cannot_be_written_is_named_with_the_fix(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    refuse(f"{TEXT} --seed -1")  # creates text.txt
    monkeypatch.setenv("UNITRANSFORMER_CACHE", place)
    said = refuse(TEXT)
    assert said.startswith(f"the corpus cache {place} cannot be used")
    assert said.endswith("set UNITRANSFORMER_CACHE to a writable folder with room")


def _write_images(folder: str, classes: str, *, count: int = 4) -> None:
    draw = np.random.default_rng(0)
    for name in classes:
        (Path(folder) / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, name, f"{index}.png"))


def test_an_image_folder_without_class_folders_is_refused(refuse: Refuse) -> None:
    Path("images").mkdir()
    Image.new("RGB", (9, 9)).save("images/0.png")
    said = refuse(IMAGES, "vit")
    assert said.startswith("data images must hold one folder of images per class")


def test_an_image_whose_white_is_not_known_is_refused_with_its_mode(refuse: Refuse) -> None:
    _write_images("images", "ab")
    Image.new("F", (9, 9), 255).save("images/b/deep.tif")
    assert refuse(IMAGES, "vit") == (
        "image images/b/deep.tif has mode F with values from 255 to 255; scale them to 0 to 1, or "
        "save it with 8 or 16 bits"
    )


def test_class_folders_beside_a_split_are_refused_with_the_fix(refuse: Refuse) -> None:
    _write_images("images", "ab")
    _write_images("images/train", "ab")
    said = refuse(IMAGES, "vit")
    assert said.endswith(
        "images in a/, b/ beside train/a/, train/b/; move or rename what does not fit"
    )


def test_more_classes_than_the_model_has_are_refused_with_the_fix(refuse: Refuse) -> None:
    _write_images("images", "abcde", count=1)
    said = refuse(IMAGES, "vit")
    assert said == (
        "data images has 5 classes and model.num-classes is 3; set --model.num-classes 5"
    )


def test_a_file_in_place_of_an_image_folder_is_refused(refuse: Refuse) -> None:
    said = refuse(f"{IMAGES} --data text.txt", "vit")
    assert said == "data text.txt is not a folder of images; check the path"


def test_images_with_an_unsupported_channel_count_are_refused(refuse: Refuse) -> None:
    _write_images("images", "ab")
    assert refuse(f"{IMAGES} --model.num-channels 2", "vit").startswith("model.num-channels is 2")


def test_training_names_and_counts_a_broken_image_and_continues(call: Call) -> None:
    _write_images("images", "ab", count=6)
    Path("images/a/0.png").write_text("not an image")
    line = f"{IMAGES} --model.num-classes 2"
    with pytest.warns(UserWarning, match=r"1 broken images skipped: images/a/0\.png"):
        code, out, err = call(line, "vit")
    assert code == 0, err
    assert "data    images, 11 images of 2 classes, 1 broken skipped" in out


def test_a_model_may_have_more_classes_than_the_folder(call: Call) -> None:
    _write_images("images", "ab")
    code, _, err = call(f"{IMAGES} --model.num-classes 50", "vit")
    assert code == 0, err


# ---- places


@pytest.mark.parametrize("flag", ["out", "checkpoint-dir", "record"])
@pytest.mark.parametrize("place", ["text.txt/below", "/proc/below/it"])
def test_an_unwritable_path_is_refused_with_its_option(
    refuse: Refuse, flag: str, place: str
) -> None:
    said = refuse(f"{TEXT} --{flag} {place}")
    assert said.startswith(f"{flag} {place}: ")
    assert "cannot be written (" in said
    assert said.endswith(f"choose another with --{flag}")


@pytest.mark.parametrize("flag", ["out", "checkpoint-dir"])
def test_a_file_in_place_of_a_folder_is_refused(refuse: Refuse, flag: str) -> None:
    said = refuse(f"{TEXT} --{flag} text.txt")
    assert said.startswith(f"{flag} text.txt: text.txt cannot be written (Not a directory)")


def test_a_folder_in_place_of_a_record_is_refused(refuse: Refuse) -> None:
    assert refuse(f"{TEXT} --record .").startswith("record . is a folder; name a file in it")


# ---- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / CHECKPOINT


@pytest.fixture
def kept(call: Call, trained: Path) -> Path:
    """A checkpoint after two steps of `TEXT`, in kept/step-00000002."""
    path = Path("kept", CHECKPOINT)
    if trained.exists():
        shutil.copytree(trained, path)
    else:
        code, _, err = call(f"{TEXT} --checkpoint-dir kept")
        assert code == 0, err
        shutil.copytree(path, trained)
    return path


RESUME = f"{TEXT} --checkpoint-dir kept --resume --max-steps 4"


def test_a_new_run_does_not_write_among_old_checkpoints(refuse: Refuse, kept: Path) -> None:
    said = refuse(f"{TEXT} --checkpoint-dir kept")
    assert said == (
        f"checkpoint-dir kept holds {kept}; add --resume to continue from it, "
        "or choose another folder"
    )


def test_resuming_a_finished_run_says_that_it_is_finished(refuse: Refuse, kept: Path) -> None:
    said = refuse(f"{RESUME} --max-steps 2")
    assert said == (
        f"checkpoint {kept} is at step 2 of max-steps 2: nothing is left to do; raise --max-steps"
    )


@pytest.mark.parametrize(
    ("line", "field", "there", "here"),
    [
        ("--seed 4", "seed", 0, 4),
        ("--model.width 32", "model.width", 16, 32),
        ("--batch-size 3", "global_batch_size", 2, 3),
        ("--data synthetic", "data.source", "text.txt", "synthetic"),
        ("--data-encoding cp1252", "data.encoding", "utf-8", "cp1252"),
        ("--optimizer.learning-rate 0.5", "optimizer.learning_rate", 0.001, 0.5),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_with_both_values(
    refuse: Refuse, kept: Path, line: str, field: str, there: Any, here: Any
) -> None:
    said = refuse(f"{RESUME} {line}")
    assert said.startswith(
        f"checkpoint {kept} is of another run: {field} is {there} there and {here} here; "
    )


def test_resuming_from_a_checkpoint_that_does_not_exist_is_refused(refuse: Refuse) -> None:
    path = Path("nowhere", CHECKPOINT)
    said = refuse(f"{TEXT} --checkpoint-dir kept --resume {path}")
    assert said == f"resume {path.absolute()} does not exist; give the path of a checkpoint"


@pytest.mark.parametrize("path", ["kept", "text.txt", "kept/lock", "step-2"])
def test_resuming_from_what_is_no_checkpoint_is_refused(
    refuse: Refuse, kept: Path, path: str
) -> None:
    assert refuse(f"{TEXT} --resume {path}") == (
        f"resume is '{path}'; it must be true or false, auto, or the path of a checkpoint, which "
        "is a folder such as step-00000100"
    )


def test_a_checkpoint_elsewhere_is_not_resumed_into_a_folder_that_holds_others(
    refuse: Refuse, kept: Path
) -> None:
    other = Path("other", "step-00000001")
    shutil.copytree(kept, other)
    said = refuse(f"{TEXT} --checkpoint-dir kept --max-steps 4 --resume {other}")
    assert said.startswith(f"checkpoint-dir kept holds {kept}; add --resume to continue from it")


@pytest.mark.parametrize("resume", ["--resume", "--resume auto"])
def test_a_damaged_checkpoint_is_refused_with_the_command_for_the_one_before(
    call: Call, refuse: Refuse, kept: Path, resume: str
) -> None:
    code, _, err = call(f"{RESUME} --max-steps 3")
    assert code == 0, err
    newest = Path("kept", "step-00000003")
    part = next(newest.glob("*.distcp"))
    part.write_bytes(_flip_one_bit(part.read_bytes()))
    line = f"{TEXT} --checkpoint-dir kept --max-steps 4"
    assert refuse(f"{line} {resume}") == (
        f"checkpoint {newest} is damaged ({part.name} does not match its checksum); "
        f"{kept} is sound: give that one (--resume {kept}), or delete the damaged one"
    )
    code, out, err = call(f"{line} --resume {kept}")
    assert code == 0, err
    assert f"resume  moves {newest.name} to kept/set-aside" in out
    names = sorted(path.name for path in Path("kept").glob("step-*"))
    assert names == [CHECKPOINT, "step-00000004"]
    assert Path("kept", "set-aside", newest.name).is_dir()


def _cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _flip_one_bit(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


def _overwrite_the_middle(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + np.random.default_rng(0).bytes(1000) + whole[middle + 1000 :]


@pytest.mark.parametrize("name", [METADATA_FILE, "__0_0.distcp", RUN_FILE, CHECKSUMS_FILE])
@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip_one_bit,
        _overwrite_the_middle,
        lambda whole: whole[:-1],
        lambda whole: np.random.default_rng(0).bytes(5000),
        lambda whole: b"",
        lambda whole: b"a text\n",
        lambda whole: b"{}",
        None,
    ],
    ids=["cut", "one bit", "middle", "last byte", "random", "empty", "text", "json", "missing"],
)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_was(
    refuse: Refuse, kept: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    path = kept / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    said = refuse(RESUME)
    assert re.match(rf"checkpoint {kept} is damaged \(.+\); delete it and start again", said)
    assert "torch" not in said


def _write_run(checkpoint: Path, content: Any) -> None:
    (checkpoint / RUN_FILE).write_text(json.dumps(content))
    _sum_up(checkpoint)


def _sum_up(checkpoint: Path) -> None:
    """Updates the checksums of files that the test has changed."""
    names = [path.name for path in checkpoint.iterdir() if path.name != CHECKSUMS_FILE]
    sums = {name: checksum(checkpoint / name) for name in names}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(sums))


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, [1, 2], 3, {"config": {}, "loss": 2}, {"config": {}, "loss": [1.0]}],
    ids=repr,
)
def test_a_foreign_checkpoint_is_refused(refuse: Refuse, kept: Path, content: Any) -> None:
    _write_run(kept, content)
    said = refuse(RESUME)
    assert said == f"checkpoint {kept} was not written by this program; choose another folder"


@pytest.mark.parametrize("content", [None, {}, {"model.pt": b"weights"}], ids=repr)
def test_a_foreign_file_or_folder_in_place_of_a_checkpoint_is_refused(
    refuse: Refuse, kept: Path, content: dict[str, bytes] | None
) -> None:
    shutil.rmtree(kept)
    if content is None:
        kept.write_bytes(b"a file")
    else:
        kept.mkdir()
        for name, inside in content.items():
            (kept / name).write_bytes(inside)
    said = refuse(RESUME)
    assert said == f"checkpoint {kept} was not written by this program; choose another folder"


def test_a_checkpoint_with_an_invalid_config_is_refused(refuse: Refuse, kept: Path) -> None:
    actual = json.loads((kept / RUN_FILE).read_text())
    actual["config"]["model"]["depth"] = 3
    _write_run(kept, actual)
    said = refuse(RESUME)
    assert said.startswith(f"checkpoint {kept}: config.model.depth is not a field; known: ")


class _Code:
    """An object whose unpickling creates a folder, if the reader executes code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def _list(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / METADATA_FILE).read_bytes())


def test_a_pickle_in_place_of_the_list_of_parts_is_refused_and_not_executed(
    refuse: Refuse, kept: Path
) -> None:
    (kept / METADATA_FILE).write_bytes(pickle.dumps(_Code()))
    _sum_up(kept)
    said = refuse(RESUME)
    assert said.startswith(
        f"checkpoint {kept} holds more than tensors and plain values (posix.mkdir is not part of"
    )
    pickle.loads((kept / METADATA_FILE).read_bytes())
    assert Path("executed").is_dir()  # the code does work


def test_code_within_the_list_of_parts_is_refused_and_not_executed(
    refuse: Refuse, kept: Path
) -> None:
    metadata = _list(kept)
    metadata.planner_data["weight.lm_head.weight"] = _Code()
    (kept / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _sum_up(kept)
    assert refuse(RESUME).startswith(f"checkpoint {kept} holds more than tensors and plain values")
    _list(kept)
    assert Path("executed").is_dir()


def test_a_class_reached_through_torch_is_refused_and_not_instantiated(
    refuse: Refuse, kept: Path
) -> None:
    module, name = b"torch.distributed.checkpoint.filesystem", b"io.FileIO"
    opcodes = [b"\x80\x04", *(b"\x8c" + bytes([len(word)]) + word for word in (module, name))]
    opcodes += [b"\x93", b"\x8c\x08executed", b"\x8c\x01w", b"\x86R."]  # FileIO("executed", "w")
    (kept / METADATA_FILE).write_bytes(b"".join(opcodes))
    _sum_up(kept)
    assert refuse(RESUME).startswith(f"checkpoint {kept} holds more than tensors and plain values")
    _list(kept).close()
    assert Path("executed").is_file()


def _replace_tensor(checkpoint: Path, content: Any, *, is_zip: bool) -> Any:
    """Replaces one tensor by `content`; returns the file that lists it."""
    metadata = _list(checkpoint)
    index, part = next(iter(metadata.storage_data.items()))
    with (checkpoint / part.relative_path).open("ab") as file:
        part.offset = file.tell()
        torch.save(content, file, _use_new_zipfile_serialization=is_zip)
        part.length = file.tell() - part.offset
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _sum_up(checkpoint)
    return metadata, index, part


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_place_of_a_tensor_is_refused_and_not_executed(
    refuse: Refuse, kept: Path, is_zip: bool
) -> None:
    _, index, part = _replace_tensor(kept, _Code(), is_zip=is_zip)
    assert refuse(RESUME).startswith(
        f"checkpoint {kept} holds more than tensors and plain values ({index.fqn} is not the listed"
    )
    whole = (kept / part.relative_path).read_bytes()
    torch.load(io.BytesIO(whole[part.offset :]), weights_only=False)
    assert Path("executed").is_dir()


def test_an_entry_that_torch_would_execute_is_refused_and_not_executed(
    refuse: Refuse, kept: Path
) -> None:
    metadata, index, _ = _replace_tensor(kept, _Code(), is_zip=True)
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(index.fqn)] = metadata.storage_data.pop(index)
    (kept / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _sum_up(kept)
    said = refuse(RESUME)
    assert said.startswith(f"checkpoint {kept} holds more than tensors and plain values (it lists")
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.load({index.fqn: 0}, checkpoint_id=kept, no_dist=True)
    assert Path("executed").is_dir()


def test_a_tensor_of_another_shape_is_refused(refuse: Refuse, kept: Path) -> None:
    _, index, _ = _replace_tensor(kept, torch.zeros(3, 3, 3), is_zip=True)
    assert f"({index.fqn} is not the listed tensor)" in refuse(RESUME)


def test_a_file_outside_the_checkpoint_is_not_read(refuse: Refuse, kept: Path) -> None:
    metadata = _list(kept)
    next(iter(metadata.storage_data.values())).relative_path = "../../text.txt"
    (kept / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    _sum_up(kept)
    said = refuse(RESUME)
    assert said.startswith(f"checkpoint {kept} is damaged (../../text.txt has no checksum); delete")


def test_a_run_that_does_not_exist_cannot_be_resumed(refuse: Refuse) -> None:
    said = refuse(f"{TEXT} --resume")
    assert said.startswith("resume: runs holds no checkpoint of these options; run without")
    said = refuse(f"{TEXT} --resume --checkpoint-dir nowhere")
    assert said.startswith("checkpoint-dir nowhere holds no checkpoint to resume; run without")


# ---- weights to begin with


def _weights() -> dict[str, torch.Tensor]:
    """Weights of the model that `TEXT` trains."""
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "feedforward_width": 32}
    model = gpt.model_config("reference", **shape, num_classes=300, num_positions=8)
    return dict(Transformer(model).state_dict())


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: values for key, values in _weights().items() if key != name}


FIX = "give the size and the model options that it was made with"


@pytest.mark.parametrize("devices", ["", "--devices 2 --strategy fsdp"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: _without("lm_head.bias"), f"lacks lm_head.bias, which the model has; {FIX}"),
        (lambda: _weights() | {"x": torch.zeros(1)}, f"has x, which the model lacks; {FIX}"),
        (
            lambda: _weights() | {"lm_head.weight": torch.zeros(299, 16)},
            f": lm_head.weight is (299, 16) there and (300, 16) in the model; {FIX}",
        ),
    ],
    ids=["missing", "extra", "size"],
)
def test_weights_of_another_model_are_refused_with_the_first_name(
    refuse: Refuse, content: Callable[[], Any], said: str, kind: str, devices: str
) -> None:
    path = Path(f"weights.{kind}")
    (torch.save if kind == "pt" else save_file)(content(), path)
    actual = refuse(f"{TEXT} --init-from {path} {devices}")
    assert actual == f"init-from {path}{'' if said[0] == ':' else ' '}{said}"


@pytest.mark.parametrize("damage", [_cut, lambda whole: b"", lambda whole: b"a text\n"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_damaged_file_of_weights_is_refused(
    refuse: Refuse, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    path = Path(f"weights.{kind}")
    (torch.save if kind == "pt" else save_file)(_weights(), path)
    path.write_bytes(damage(path.read_bytes()))
    assert re.fullmatch(
        rf"init-from {path} cannot be read \(.+\); give a \.safetensors file or a state dict "
        r"written by torch\.save",
        refuse(f"{TEXT} --init-from {path}"),
    )


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_of_weights_is_refused_and_not_executed(
    refuse: Refuse, is_zip: bool
) -> None:
    content = _weights() | {"x": _Code()}
    torch.save(content, "weights.pt", _use_new_zipfile_serialization=is_zip)
    said = refuse(f"{TEXT} --init-from weights.pt")
    assert said.startswith("init-from weights.pt cannot be read (")
    assert "do those steps only if you trust" not in said
    torch.load("weights.pt", weights_only=False)
    assert Path("executed").is_dir()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.pt", "init-from nowhere.pt does not exist; check the path"),
        ("~no_such_user/w.pt", "init-from ~no_such_user/w.pt does not exist; check the path"),
        (
            ".",
            "init-from . is a folder; name a file, for example one that "
            "`python -m unitransformer.export` has written",
        ),
        ("text.txt", "init-from text.txt cannot be read ("),
    ],
)
def test_a_path_that_is_no_file_of_weights_is_refused(refuse: Refuse, path: str, said: str) -> None:
    assert refuse(f"{TEXT} --init-from {path}").startswith(said)


def test_a_weights_path_may_begin_with_a_tilde(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    torch.save(_weights(), "weights.pt")
    code, _, err = call(f"{TEXT} --init-from ~/weights.pt")
    assert code == 0, err


# ---- a run that began and could not go on: exit code 1, still one line


def call_on_a_full_disk(line: str, folder: Path, *, num_bytes: int) -> Answer:
    """Runs a command line in a fork in which no file may grow beyond `num_bytes`.

    In this process the limit would also hold for the file that captures the test output.
    """
    places = [folder / "stdout", folder / "stderr"]

    def call() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        streams = [path.open("w", buffering=1) for path in places]
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = streams
        sys.exit(run_recipe(gpt.PRESET, gpt.show, shlex.split(line)))

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode is not None
    return process.exitcode, *(path.read_text() for path in places)


@pytest.mark.parametrize(
    ("options", "steps"), [("--max-steps 3", 3), ("--max-steps 5 --checkpoint-every 1", 4)]
)
def test_a_full_disk_leaves_the_previous_checkpoint_and_a_record(
    kept: Path, tmp_path_factory: pytest.TempPathFactory, options: str, steps: int
) -> None:
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    line = f"{RESUME} {options} --record record.json"
    room = max(map(len, before.values())) // 2
    said = tmp_path_factory.mktemp("said")
    code, _, err = call_on_a_full_disk(line, said, num_bytes=room)
    assert code == 1
    reason = f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"
    assert err.splitlines() == [
        f"error: checkpoint-dir kept: step 3 could not be saved ({reason}); {CHECKPOINT} is kept; "
        "free space and run again with --resume (record: record.json)"
    ]
    assert [path.name for path in Path("kept").glob("step-*")] == [CHECKPOINT]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    record = load_record(Path("record.json"))
    # A failed background write is noticed when the next checkpoint is due.
    assert (record["status"], len(record["loss"])) == ("crashed", steps)


def test_a_disk_too_full_for_the_record_is_one_line_and_exit_code_1(
    call: Call, tmp_path_factory: pytest.TempPathFactory
) -> None:
    call(f"{TEXT} --out first")  # tokenizes while there is space
    said = tmp_path_factory.mktemp("said")
    code, _, err = call_on_a_full_disk(f"{TEXT} --record record.json", said, num_bytes=3000)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "record.json" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("record.json").exists()


def test_a_nan_loss_ends_the_run_and_its_record_names_the_step(call: Call) -> None:
    code, _, err = call(f"{TEXT} --optimizer.learning-rate 1e30 --record record.json")
    assert code == 1
    assert "error: loss is nan at step 2; lower optimizer.learning-rate" in err
    record = load_record(Path("record.json"))
    assert (record["status"], len(record["loss"])) == ("diverged", 1)
    assert "Traceback" not in err

"""Tests exporting weights from a checkpoint to a file, and starting a run from such a file."""

import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes import bert, gpt, vit
from recipes.presets import Preset
from tests.builders.plain_model import PlainTransformer
from unitransformer import export
from unitransformer.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from unitransformer.run import RunOutcome, RunPaths, run
from unitransformer.training.module import TrainingModule
from unitransformer.transformer import Transformer
from unitransformer.weights import WRAPPERS, read_weights, write_weights

TINY = {"width": 16, "num_layers": 2, "num_heads": 2, "feedforward_width": 32, "dropout": 0.0}
TEXT = {**TINY, "num_classes": 300, "num_positions": 16}
IMAGES = {**TINY, "image_size": 16, "patch_size": 8}


def config_of(preset: Preset = gpt.PRESET, *, max_steps: int = 2, **shape: Any) -> RunConfig:
    fields = IMAGES if preset.recipe == "vit" else TEXT
    return RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **fields, **shape),
        data=DataConfig(source="synthetic"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1, schedule_steps=20),
        parallel=ParallelConfig(accelerator="cpu", strategy="single"),
        batch_size=4,
        max_steps=max_steps,
        validate_every=20,
        validation_batches=1,
        ceiling_s=0,
    )


def train(config: RunConfig, folder: Path, **options: Any) -> RunOutcome:
    paths = RunPaths(
        folder=folder, checkpoints=folder / "checkpoints", record=folder / "record.json"
    )
    return run(config, paths, command="a test", print_line=lambda line: None, **options)


def losses(outcome: RunOutcome) -> list[float]:
    assert outcome.record is not None
    values: list[float] = outcome.record["loss"]
    return values


def export_to(folder: Path, out: Path) -> dict[str, Tensor]:
    assert export.main([str(folder), str(out)]) == 0
    return load_file(out)


# ---- out


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_an_exported_file_is_the_state_dict_of_the_trained_network(
    preset: Preset, tmp_path: Path
) -> None:
    config = config_of(preset)
    outcome = train(config, tmp_path / "run")
    weights = export_to(tmp_path / "run", tmp_path / "out.safetensors")
    trained = outcome.network.state_dict()
    assert weights.keys() == trained.keys()
    assert all(torch.equal(values, trained[name]) for name, values in weights.items())
    Transformer(config.model).load_state_dict(weights, strict=True)


def test_an_exported_file_loads_into_the_plain_model_with_equal_outputs(tmp_path: Path) -> None:
    config = config_of(bert.PRESET)
    network = train(config, tmp_path / "run").network
    plain = PlainTransformer(config.model)
    plain.load_state_dict(export_to(tmp_path / "run", tmp_path / "out.safetensors"), strict=True)
    tokens = torch.arange(32).view(2, 16)
    torch.testing.assert_close(plain.eval()(tokens), network(tokens), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_exported(tmp_path: Path) -> None:
    config = config_of(tied_head=True)
    trained = train(config, tmp_path / "run").network.state_dict()
    weights = export_to(tmp_path / "run", tmp_path / "out.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["embedding.lut.weight"])
    assert all(torch.equal(values, trained[name]) for name, values in weights.items())
    Transformer(config.model).load_state_dict(weights, strict=True)


def test_weights_in_bf16_are_exported_in_float32(tmp_path: Path) -> None:
    config = config_of()
    parallel = replace(config.parallel, precision="bf16-true")
    train(replace(config, parallel=parallel), tmp_path / "run")
    weights = export_to(tmp_path / "run", tmp_path / "out.safetensors")
    assert {values.dtype for values in weights.values()} == {torch.float32}
    assert torch.equal(weights["lm_head.weight"], weights["lm_head.weight"].bfloat16().float())


@pytest.mark.parametrize("subfolder", ["", "checkpoints", "checkpoints/step-00000002"])
def test_export_accepts_a_run_its_checkpoints_or_one_checkpoint(
    subfolder: str, tmp_path: Path
) -> None:
    config = config_of()
    train(config, tmp_path / "run")
    out = tmp_path / "new folder" / "out.safetensors"
    export_to(tmp_path / "run" / subfolder, out)
    with safetensors.safe_open(out, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "recipe": "gpt",
            "size": "reference",
            "step": "2",
            "config_hash": config.hash(),
        }


def test_export_takes_the_newer_checkpoint_if_a_run_replaces_the_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(max_steps=1), tmp_path / "run")
    first = export.find_checkpoint(tmp_path / "run")
    train(config_of(max_steps=2), tmp_path / "run", resume=True)
    second = export.find_checkpoint(tmp_path / "run")
    shutil.rmtree(first)
    checkpoints = iter([first, second])
    monkeypatch.setattr(export, "find_checkpoint", lambda folder: next(checkpoints))
    assert str(second) in export.export(tmp_path / "run", tmp_path / "out.safetensors")


def test_an_existing_file_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of(), tmp_path / "run")
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert export.main([str(tmp_path / "run"), str(out)]) == 2
    message = f"error: out {out} exists; name another file, or replace it with --force\n"
    assert capsys.readouterr().err == message
    assert out.read_text() == "mine"
    assert export.main([str(tmp_path / "run"), str(out), "--force"]) == 0
    assert "pe.pe" in load_file(out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere out.safetensors", "dir nowhere is not a folder; give a run's folder or a"),
        ("empty out.safetensors", "dir empty holds no checkpoint; give a run's folder, its"),
        ("run out.pt", "out out.pt does not end in .safetensors; name such a file"),
        ("run empty", "out empty is a folder; name a file in it"),
        ("run text/out.safetensors", "out text/out.safetensors: text cannot be written (Not a"),
        ("run /proc/x/out.safetensors", "out /proc/x/out.safetensors: /proc cannot be written ("),
        ("run", "the following arguments are required: out; --help shows"),
        ("run out.safetensors --forse", "--forse is not an option; did you mean --force?"),
    ],
)
def test_an_unexportable_path_is_refused_in_one_line(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("text").touch()
    assert export.main(line.split()) == 2
    (actual,) = capsys.readouterr().err.splitlines()
    assert actual.startswith(f"error: {message}")
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "run", "text"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", "sums.json"])
def test_a_damaged_checkpoint_is_not_exported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of(), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 2
    (actual,) = capsys.readouterr().err.splitlines()
    assert actual.startswith(f"error: checkpoint {checkpoint} is damaged (")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_an_exported_file_is_written_atomically(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        if name == "b":
            raise OSError("the disk is full")
        return torch.zeros(3)

    shapes = {"a": torch.empty(3, device="meta"), "b": torch.empty(2, 2, device="meta")}
    with pytest.raises(OSError, match="the disk is full"):
        write_weights(shapes, read, tmp_path / "out.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_exported_weights_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 5), "b.c": torch.randn(7), "d": torch.randn(2, 3, 4).mT}
    path = tmp_path / "out.safetensors"
    write_weights(values, values.__getitem__, path, {"step": "3"})
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert header % 8 == 0  # tensors are aligned
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], values[name]) for name in values)


# ---- in


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_a_run_starts_from_the_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    first = train(config_of(), tmp_path / "first")
    path = tmp_path / f"weights{kind}"
    if kind == ".pt":
        torch.save(first.network.state_dict(), path)
    else:
        export_to(tmp_path / "first", path)
    still = config_of(max_steps=1)
    still = replace(still, optimizer=replace(still.optimizer, learning_rate=0.0))
    again = train(replace(still, init_from=str(path)), tmp_path / "again")
    before, after = first.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_keeps_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    train(config_of(), tmp_path / "first")
    export_to(tmp_path / "first", path)
    config = replace(config_of(max_steps=4), init_from=str(path))
    whole = losses(train(config, tmp_path / "whole"))
    train(replace(config, max_steps=2), tmp_path / "parts")
    path.unlink()  # no longer needed
    assert losses(train(config, tmp_path / "parts", resume=True)) == whole


def plain_weights() -> dict[str, Tensor]:
    return dict(Transformer(config_of().model).state_dict())


def wrap_parts(name: str) -> str:
    """The name under torch.compile and activation checkpointing of single layers."""
    return name.replace("transformer_layers.0.", "transformer_layers.0._orig_mod.").replace(
        "mha.", "_checkpoint_wrapped_module.mha."
    )


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "rename",
    [
        "_orig_mod.{}",
        "module.{}",
        "model.{}",
        "_forward_module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.model.{}",
        "_forward_module.module._orig_mod.objective.network.{}",
        "net.{}",
        "module.learner.backbone._orig_mod.{}",
        wrap_parts,
    ],
)
def test_the_prefixes_of_wrappers_are_no_part_of_a_name(
    kind: str, rename: str | Callable[[str], str], tmp_path: Path
) -> None:
    rename = rename.format if isinstance(rename, str) else rename
    weights = plain_weights()
    path = tmp_path / f"weights{kind}"
    write = torch.save if kind == ".pt" else save_file
    write({rename(name): values for name, values in weights.items()}, path)
    read = read_weights(path, config_of().model)
    assert all(torch.equal(read(name, values), values) for name, values in weights.items())


@pytest.mark.parametrize(
    "nest",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "pytorch-lightning_version": "2.6.0"},
        lambda weights: {"model_state_dict": weights, "loss": 1.5},
        lambda weights: {"module": weights, "optimizer": {"state": {}}},
        lambda weights: {"model": {"state_dict": weights}, "step": 7},
    ],
)
def test_a_state_dict_inside_a_checkpoint_is_read(nest: Any, tmp_path: Path) -> None:
    weights = plain_weights()
    named = {f"model._orig_mod.{name}": values for name, values in weights.items()}
    torch.save(nest(named), tmp_path / "last.ckpt")
    read = read_weights(tmp_path / "last.ckpt", config_of().model)
    assert all(torch.equal(read(name, values), values) for name, values in weights.items())


def test_a_file_of_several_networks_is_refused(tmp_path: Path) -> None:
    weights = plain_weights()
    both = {f"{who}.{name}": weights[name] for name in weights for who in ("student", "teacher")}
    torch.save(both, tmp_path / "weights.pt")
    said = r"several networks \(student\.embedding.lut.weight and teacher\.emb.*; save one of them"
    with pytest.raises(ValueError, match=said):
        read_weights(tmp_path / "weights.pt", config_of().model)
    torch.save(weights | both, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"has student\.embedding.*, which the model lacks"):
        read_weights(tmp_path / "weights.pt", config_of().model)


def test_a_state_dict_in_torchs_old_format_is_read(tmp_path: Path) -> None:
    weights = plain_weights()
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    read = read_weights(tmp_path / "old.pt", config_of().model)
    assert all(torch.equal(read(name, values), values) for name, values in weights.items())


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_with_objects_says_how_to_save_its_weights(
    is_zip: bool, tmp_path: Path
) -> None:
    content = {"state_dict": plain_weights(), "hyper_parameters": {"folder": tmp_path}}
    path = tmp_path / "last.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"more than tensors.*; save its state dict alone with"):
        read_weights(path, config_of().model)


def test_the_state_dict_of_a_wrapped_training_module_is_read(tmp_path: Path) -> None:
    module = TrainingModule(config_of())
    wrapped = torch.nn.ModuleDict({"module": torch.compile(module)})
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "weights.pt")
    read = read_weights(tmp_path / "weights.pt", config_of().model)
    for name, values in module.network.state_dict().items():
        assert torch.equal(read(name, values), values)


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        (
            "module.extra.weight",
            None,
            r"has module\.extra\.weight, which the model lacks; give the",
        ),
        (None, "module.lm_head.bias", r"lacks lm_head\.bias, which the model has; give the size"),
        (
            "lm_head.bias",
            None,
            r"has module\.lm_head\.bias and lm_head\.bias, which are both lm_head",
        ),
    ],
)
def test_a_wrapped_file_that_does_not_fit_is_refused_by_its_own_names(
    added: str | None, removed: str | None, message: str, tmp_path: Path
) -> None:
    weights = {f"module.{name}": values for name, values in plain_weights().items()}
    if added is not None:
        weights[added] = torch.zeros(300)
    if removed is not None:
        del weights[removed]
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.pt", config_of().model)


@pytest.mark.parametrize("preset", [bert.PRESET, gpt.PRESET, vit.PRESET], ids=lambda p: p.recipe)
def test_no_part_of_a_weights_name_is_that_of_a_wrapper(preset: Preset) -> None:
    names = Transformer(config_of(preset, final_norm=True).model).state_dict()
    assert not WRAPPERS & {part for name in names for part in name.split(".")}


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_head_may_be_missing_from_the_file(is_tied: bool, tmp_path: Path) -> None:
    weights = plain_weights()
    del weights["lm_head.weight"], weights["pe.pe"]
    save_file(weights, tmp_path / "weights.safetensors")
    model = config_of(tied_head=is_tied).model
    if is_tied:
        values = read_weights(tmp_path / "weights.safetensors", model)
        embeddings = weights["embedding.lut.weight"]
        assert torch.equal(values("embedding.lut.weight", embeddings), embeddings)
    else:
        with pytest.raises(ValueError, match=r"lacks lm_head\.weight, which the model has; give"):
            read_weights(tmp_path / "weights.safetensors", model)


def test_an_untied_head_in_the_file_is_refused_for_a_tied_model(tmp_path: Path) -> None:
    torch.save(plain_weights(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"has a separate head; model\.tied-head is true"):
        read_weights(tmp_path / "weights.pt", config_of(tied_head=True).model)


def test_integer_tensors_are_refused_as_weights(tmp_path: Path) -> None:
    weights = plain_weights()
    weights["lm_head.bias"] = weights["lm_head.bias"].to(torch.int8)
    for name, write in (("weights.pt", torch.save), ("weights.safetensors", save_file)):
        write(weights, tmp_path / name)
        with pytest.raises(ValueError, match=r"lm_head\.bias is not floating-point"):
            read_weights(tmp_path / name, config_of().model)

"""Tests which samples form a batch, BERT's masks, and refused data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import bert, gpt, vit
from tests.builders.images import write_class_folders
from unitransformer.config import DataConfig, ParallelConfig, RunConfig
from unitransformer.data import baselines
from unitransformer.data.baselines import (
    count_tokens,
    most_frequent_baseline,
    unigram_baseline,
    validation_targets,
)
from unitransformer.data.counter_rng import uniform
from unitransformer.data.datamodule import DataModule
from unitransformer.data.sampler import BatchIndices, TrainSampler, ValidationSampler, permutation
from unitransformer.data.sources import Synthetic, load_source
from unitransformer.data.text import MaskedTokens, NextTokens
from unitransformer.data.tokenizer import SPECIAL_TOKENS
from unitransformer.objectives import IGNORED

TINY = {"width": 16, "num_layers": 1, "num_heads": 2, "feedforward_width": 32}


def config_of(module: object, devices: int = 1, **fields: object) -> RunConfig:
    preset = module.PRESET  # type: ignore[attr-defined]
    config = RunConfig(
        recipe=preset.recipe,
        size="reference",
        model=preset.model_config("reference", **TINY),
        parallel=ParallelConfig(devices=devices),
        batch_size=4,
        max_steps=6,
    )
    return replace(config, **fields)  # type: ignore[arg-type]


def batches(config: RunConfig, num_samples: int, start_step: int = 0) -> list[list[int]]:
    """Sample indices of each global micro-batch over all ranks."""
    world = config.parallel.world_size
    ranks = [
        [indices.tolist() for _, indices in sampler]
        for sampler in (
            TrainSampler(config, num_samples, rank=rank, start_step=start_step)
            for rank in range(world)
        )
    ]
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_global_batch_is_the_same_on_any_number_of_devices(devices: int) -> None:
    one = batches(config_of(gpt, batch_size=8), 100)
    many = batches(config_of(gpt, devices, batch_size=8 // devices), 100)
    assert one == many


def test_accumulation_uses_the_samples_of_a_larger_batch() -> None:
    whole = batches(config_of(gpt, batch_size=8), 100)
    parts = batches(config_of(gpt, batch_size=4, accumulate=2), 100)
    assert [sum(pair, []) for pair in zip(parts[::2], parts[1::2], strict=True)] == whole


def test_every_epoch_sees_each_sample_once_in_another_order() -> None:
    stream = sum(batches(config_of(gpt, batch_size=5, max_steps=8), 20), [])
    first, second = stream[:20], stream[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_a_run_resumed_at_step_4_sees_the_samples_of_an_uninterrupted_run() -> None:
    config = config_of(gpt, 2, max_steps=9)
    assert batches(config, 30, start_step=4) == batches(config, 30)[4:]


def test_other_seeds_give_other_orders() -> None:
    assert not np.array_equal(permutation(50, 0, 0), permutation(50, 1, 0))


def test_validation_samples_are_divided_without_repeats() -> None:
    config = config_of(gpt, 2, validation_batches=3)
    ranks = [ValidationSampler(config, 30, rank=rank) for rank in range(2)]
    seen = [index for sampler in ranks for _, indices in sampler for index in indices.tolist()]
    assert len(set(seen)) == len(seen) == 24
    assert set(seen) <= set(range(30))
    assert ranks[0].order.tolist() != list(range(30))


def test_every_number_of_devices_validates_on_the_same_samples() -> None:
    one = ValidationSampler(config_of(gpt, batch_size=8, validation_batches=3), 30, rank=0)
    two = [
        ValidationSampler(config_of(gpt, 2, batch_size=4, validation_batches=3), 30, rank=rank)
        for rank in range(2)
    ]
    samples = [{int(i) for s in ranks for _, batch in s for i in batch} for ranks in ([one], two)]
    assert samples[0] == samples[1]


def test_fewer_validation_samples_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="3 validation samples for 4 devices"):
        ValidationSampler(config_of(gpt, 4), 3, rank=0)


def batch_of(*samples: int, epoch: int = 0) -> BatchIndices:
    indices = np.array(samples, dtype=np.int64)
    return np.full_like(indices, epoch), indices


def test_the_target_of_next_token_prediction_is_the_following_token() -> None:
    samples = NextTokens(np.arange(21, dtype=np.uint16), 5)
    batch = samples[batch_of(0, 3)]
    assert len(samples) == 4
    assert batch["inputs"].tolist() == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    assert batch["targets"].tolist() == [[1, 2, 3, 4, 5], [16, 17, 18, 19, 20]]


def masked(vocab_size: int = 1000, **data: object) -> MaskedTokens:
    tokens = np.random.default_rng(0).integers(5, vocab_size, 180_000).astype(np.uint16)
    config = config_of(bert, data=DataConfig(**data))  # type: ignore[arg-type]
    return MaskedTokens(config, tokens, vocab_size)


def test_masks_cover_15_percent_of_which_80_10_10_are_mask_random_and_kept() -> None:
    samples = masked()
    batch = samples[batch_of(*range(9000))]
    shown = batch["inputs"].gather(1, batch["positions"])
    mask = SPECIAL_TOKENS["wordpiece"].index("[MASK]")
    assert batch["positions"].shape == (9000, 3)  # 15 % of 20
    assert (shown == mask).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (shown == batch["targets"]).float().mean().item() == pytest.approx(0.1, abs=0.01)
    is_other = (shown != mask) & (shown != batch["targets"])
    assert is_other.float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_every_position_but_the_ends_is_masked_equally_often() -> None:
    positions = masked()[batch_of(*range(9000))]["positions"]
    share = torch.bincount(positions.reshape(-1), minlength=20) / 9000
    assert share[0] == share[19] == 0
    assert share[1:19].min().item() > 0.14
    assert share[1:19].max().item() < 0.20


def test_a_mask_depends_only_on_seed_epoch_and_sample() -> None:
    samples = masked()
    alone, among = samples[batch_of(7)], samples[batch_of(3, 7, 9)]
    assert torch.equal(alone["inputs"][0], among["inputs"][1])
    later = samples[batch_of(7, epoch=1)]
    assert not torch.equal(alone["positions"], later["positions"])


def test_special_tokens_are_never_masked() -> None:
    samples = masked()
    samples.tokens = np.full(180, 3, dtype=np.uint16)  # only [SEP]
    samples.tokens[4] = 77
    batch = samples[batch_of(0)]
    assert batch["targets"].tolist()[0].count(IGNORED) == 2
    assert 77 in batch["targets"]
    inputs = batch["inputs"][0].tolist()
    assert inputs[0] == 2
    assert inputs.count(3) == 18


def test_uniform_numbers_look_uniform() -> None:
    chance = uniform(3, torch.arange(500), torch.arange(500), 200).numpy()
    assert 0 <= chance.min() < 0.001
    assert 0.999 < chance.max() < 1
    counts, _ = np.histogram(chance, bins=20)
    expected = chance.size / 20
    # Chi-square with 19 degrees of freedom: 43.8 is its 99.9 % point.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_the_unigram_baseline_is_the_entropy_of_a_known_source() -> None:
    tokens = np.array([0, 1] * 5000, dtype=np.uint16)
    baseline = unigram_baseline(count_tokens(tokens, 2), torch.tensor([0, 1, 1]))
    assert baseline.loss == pytest.approx(np.log(2), rel=1e-4)


def test_built_in_digits_are_real_images_without_overlap() -> None:
    config = config_of(vit)
    source = load_source(config)
    train, validation = source.train, source.validation
    batch = train[batch_of(0, 1)]
    assert batch["inputs"].shape == (2, 3, 224, 224)
    assert float(batch["inputs"].max()) <= 1.0
    assert len(train) + len(validation) == 537  # the zeros, ones and twos
    # Bit for bit those of scikit-learn, so that older losses stay comparable.
    assert source.sha256.startswith("7ead52c7")
    seen = {bytes(p.numpy().tobytes()) for p in train.images}  # type: ignore[attr-defined]
    held = [bytes(p.numpy().tobytes()) for p in validation.images]  # type: ignore[attr-defined]
    assert not seen.intersection(held)


def test_a_batch_of_images_can_be_pinned() -> None:
    """Pinning copies into equal strides, which fails for a tensor that overlaps itself."""
    batch = load_source(config_of(vit)).train[batch_of(0, 1)]
    assert 0 not in batch["inputs"].stride()


def test_tokens_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 9, 1000).astype(np.uint16)
    monkeypatch.setattr(baselines, "CHUNK_TOKENS", 64)
    assert count_tokens(tokens, 12).tolist() == np.bincount(tokens, minlength=12).tolist()


def test_the_majority_baseline_counts_its_class() -> None:
    config = config_of(vit)
    source = load_source(config)
    targets = validation_targets(config, source.validation)
    sampler = ValidationSampler(config, len(source.validation), rank=0)
    labels = torch.cat([source.validation[indices]["targets"] for indices in sampler])
    assert torch.equal(targets, labels)
    ones = (labels == 1).sum().item()
    assert most_frequent_baseline("ones", targets, 1).accuracy == pytest.approx(ones / len(labels))


@pytest.mark.parametrize("module", [bert, gpt, vit], ids=["bert", "gpt", "vit"])
def test_synthetic_samples_are_generated_on_the_device_reproducibly(module: object) -> None:
    config = config_of(module, data=DataConfig(source="synthetic"))
    data = DataModule(config, load_source(config))
    loader = data.train_dataloader()
    assert isinstance(data.source.train, Synthetic)
    device = torch.device("cpu")
    first, again = (data.transfer_batch_to_device(next(iter(loader)), device, 0) for _ in range(2))
    assert torch.equal(first["inputs"], again["inputs"])
    assert first["inputs"].shape[0] == 4


@pytest.mark.parametrize("module", [bert, gpt, vit], ids=["bert", "gpt", "vit"])
def test_a_synthetic_sample_does_not_depend_on_its_batch(module: object) -> None:
    config = config_of(module, data=DataConfig(source="synthetic"))
    samples, device = Synthetic(config, 8), torch.device("cpu")

    def fill(*indices: int) -> dict[str, torch.Tensor]:
        order = torch.tensor(indices)
        return samples.fill({"inputs": order, "targets": order}, device)  # type: ignore[return-value]

    together, parts = fill(5, 2, 7, 0), (fill(5, 2), fill(7), fill(0))
    for name, values in together.items():
        assert torch.equal(values, torch.cat([part[name] for part in parts]))
        assert len({tuple(row.flatten().tolist()) for row in together["inputs"]}) == 4


def test_an_image_that_breaks_during_training_is_replaced_and_named(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "images", "cat", "dog")
    source = load_source(config_of(vit, data=DataConfig(source=str(root))))
    path, _ = source.train.files[0]  # type: ignore[attr-defined]
    Path(path).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="broken image .* skipped"):
        batch = source.train[batch_of(0, 1)]
    assert torch.equal(batch["inputs"][0], batch["inputs"][1])

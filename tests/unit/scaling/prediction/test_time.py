import dataclasses
import math
import random

import pytest

from scaling.prediction.fit_file import default_model
from scaling.prediction.hardware import THIS_MACHINE, load_hardware
from scaling.prediction.parameters import (
    count_numbers,
    embedding_parameters,
    outer_parameters,
)
from scaling.prediction.predict import predict as predict_whole
from scaling.prediction.time import MeasuredStep, StepTime, predict_time, what_matters
from scaling.prediction.work import collective_s, work_of_config
from unitransformer.config import ModelConfig, ParallelConfig, RunConfig
from unitransformer.costs.flops import MAIN_CONVENTION, count_flops

H100 = load_hardware("h100-sxm-8")


def config(
    *, width: int = 2048, layers: int = 24, batch: int = 4, devices: int = 8, strategy: str = "fsdp"
) -> RunConfig:
    return RunConfig(
        recipe="gpt",
        size="custom",
        model=ModelConfig(
            width=width,
            num_layers=layers,
            num_heads=width // 64,
            feedforward_width=4 * width,
            num_classes=50_000,
            num_positions=1024,
            causal=True,
        ),
        parallel=ParallelConfig(
            accelerator="cuda",
            devices=min(8, devices),
            num_nodes=math.ceil(devices / 8),
            strategy=strategy,  # type: ignore[arg-type]
            precision="bf16-mixed",
        ),
        batch_size=batch,
    )


def predict(run: RunConfig, hardware_name: str = "h100-sxm-8") -> StepTime:
    return predict_time(run, load_hardware(hardware_name), default_model())


def test_random_configs_have_positive_times_that_stay_below_the_peak() -> None:
    rng = random.Random(0)
    for _ in range(60):  # `tests/benchmarks/test_predicted_steps.py` checks 10,000
        run = config(
            width=64 * rng.randint(1, 200),
            layers=rng.randint(1, 120),
            batch=rng.randint(1, 64),
            devices=rng.choice((1, 2, 8, 64, 1024, 16384)),
            strategy=rng.choice(("ddp", "fsdp", "zero2", "zero3")),
        )
        time = predict(run, rng.choice(("h100-sxm-8", "a100-80-sxm-8", "l40s-8", "mi300x-8")))

        parts = (time.compute_s, time.exposed_communication_s, time.optimizer_s)
        assert min(parts) >= 0
        assert time.total_s == pytest.approx(sum(parts))
        assert 0 < time.low_s < time.total_s < time.high_s

    work = work_of_config(config(), H100)
    assert predict(config()).total_s > 3 * (work.matmul_s + work.attention_s + work.head_s)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero2", "zero3"])
def test_a_larger_batch_takes_longer(strategy: str) -> None:
    times = [predict(config(batch=2**i, strategy=strategy)).total_s for i in range(8)]

    assert times == sorted(times)


CPU = dataclasses.replace(H100, name=THIS_MACHINE, gpu=None, memory_bytes_per_s=1.0)


def in_float32(run: RunConfig) -> RunConfig:
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, precision="32-true"))


def test_only_a_cpu_waits_for_copies_of_weights_and_gradients() -> None:
    cpu, base, ddp = CPU, config(), config(strategy="ddp")
    numbers = work_of_config(base, cpu).parameters
    outer = count_numbers(outer_parameters(base.model))
    assert work_of_config(base, H100).copied_s == work_of_config(ddp, H100).copied_s == 0
    # Autocast casts each weight of a product, and its gradient back; DDP fills its buckets.
    embedding = count_numbers(embedding_parameters(base.model))
    casts = (numbers - embedding) * (4 + 2 + 2 + 4)
    assert work_of_config(ddp, cpu).copied_s == casts + 8 * numbers
    assert work_of_config(in_float32(ddp), cpu).copied_s == 8 * numbers
    tied = dataclasses.replace(ddp, model=dataclasses.replace(ddp.model, tied_head=True))
    of_tied = work_of_config(tied, cpu)
    assert of_tied.copied_s == of_tied.parameters * (4 + 2 + 2 + 4 + 8)
    # bf16-mixed on 8 ranks: shards cast (4 + 2) and copied (2 + 2), what is gathered (2 + 2),
    # of layers twice; gradients to float32 (2 + 4), and their shards copied (4 + 4).
    gathered = 2 * numbers - outer
    expected = gathered * (10 / 8 + 4) + numbers * (6 + 8 / 8)
    assert work_of_config(base, cpu).copied_s == pytest.approx(expected, rel=1e-3)  # padding
    # Gradients to a bucket, joined, divided (8 each). Of a share: copied twice, joined (8 each), a
    # norm in float64 (12 + 4), new weights (8).
    zero = in_float32(config(strategy="zero2"))
    assert work_of_config(zero, cpu).copied_s == numbers * (24 + (24 + 16 + 8) / 8)


def test_only_a_cpu_starts_products_of_attention_in_16_bits_one_by_one() -> None:
    layers, heads, batch = 24, 32, 4
    run = config()
    # Blocks of 256 of the 1,024 queries.
    assert work_of_config(run, CPU).attention_blocks == layers * heads * batch * 4
    assert work_of_config(in_float32(run), CPU).attention_blocks == 0
    assert work_of_config(run, H100).attention_blocks == 0
    bert = dataclasses.replace(
        run,
        recipe="bert",
        model=dataclasses.replace(run.model, causal=False, num_positions=200),
        data=dataclasses.replace(run.data, mask_fraction=0.15),
    )
    # Blocks of 64 of 200 queries; of 32 in the last layer, which computes 30 predicted ones.
    blocks = (layers - 1) * 4 + 1
    assert work_of_config(bert, CPU).attention_blocks == heads * batch * blocks


def test_unknown_gpus_and_far_counts_are_extrapolated() -> None:
    assert predict(config()).provenance == "fitted"
    assert predict(config(), "l40s-8").provenance == "extrapolated"
    far = predict(config(devices=16384))
    assert far.provenance == "extrapolated"
    assert far.beyond == ("devices 16,384, more than 4 times beyond the 8 to 512 of the fit",)
    (reason,) = predict(config(width=1024), "b200-8").beyond
    assert reason.endswith("more than 4 times beyond the 8,029,995,008 of the fit")


def test_a_number_format_that_no_run_of_the_fit_had_is_extrapolated() -> None:
    time = predict(in_float32(config()))
    assert time.provenance == "extrapolated"
    assert time.beyond == ("products in float32, in which no run of the fit was",)
    model = default_model()
    ranges = {"h100": {**model.ranges["h100"], "is_float32": (1.0, 1.0)}}
    measured = dataclasses.replace(model, ranges=ranges)  # as of runs in float32 alone
    assert predict_time(in_float32(config()), H100, measured).provenance == "fitted"
    (reason,) = predict_time(config(), H100, measured).beyond
    assert reason == "products in 16 bits, in which no run of the fit was"


def test_the_share_of_the_peak_is_that_of_the_format_that_computes() -> None:
    found = predict_whole(in_float32(config()), H100, default_model())
    assert found.mfu.high < 0.9  # of TF32: of float32 it would be seven times as much
    per_s = count_flops(found.config)[MAIN_CONVENTION] * found.units_per_s.value
    assert found.mfu.value == pytest.approx(per_s / (8 * H100.peak_flops["tf32"]))


def test_a_measured_config_keeps_its_measured_time() -> None:
    step = MeasuredStep(seconds=2.0, low_s=1.9, high_s=2.1)
    model = dataclasses.replace(default_model(), measured={what_matters(config()): step})

    longer = dataclasses.replace(config(), max_steps=77, seed=5)  # changes no step
    time = predict_time(longer, H100, model)

    assert time.total_s == pytest.approx(2.0)
    assert (time.low_s, time.high_s) == (1.9, 2.1)
    assert time.provenance == "measured"
    assert predict_time(config(batch=8), H100, model).provenance == "fitted"


def test_a_ring_over_nodes_takes_the_steps_of_all_its_ranks() -> None:
    near, far = H100.intra_node, H100.inter_node
    steps = 2 * 7 * near.latency_s + far.latency_s
    sent = 7 / 8 / near.bytes_per_s + 1 / 2 / 8 / far.bytes_per_s

    assert collective_s("all_gather", 1e9, 16, 1, H100) == pytest.approx(steps + 1e9 * sent)
    assert collective_s("all_gather", 1e9, 1, 1, H100) == 0

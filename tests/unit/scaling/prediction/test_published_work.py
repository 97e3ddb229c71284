from dataclasses import replace

import pytest

from scaling.prediction.published_work import describe_run
from scaling.prediction.work import StepWork
from scaling.published.csv_rows import PublishedRow, load_rows

ROWS = [row for row in load_rows() if row.is_compiled and row.gpu.startswith("H100")]
HYBRID = next(row for row in ROWS if row.strategy == "HSDP")
CONTEXT = next(row for row in ROWS if row.strategy == "FSDP2 CP4")


def work_of(row: PublishedRow) -> StepWork:
    run = describe_run(row)
    assert run is not None
    return run.sample.work


def test_hybrid_sharding_adds_up_gradients_over_a_network_as_fast_as_the_row_states() -> None:
    nodes = HYBRID.num_gpus // 8
    weights = work_of(HYBRID).parameters

    slow, fast, one = (
        work_of(replace(HYBRID, gpu=f"H100 SXM 80GB {gbit}Gbps", num_gpus=gpus))
        for gbit, gpus in ((800, 8 * nodes), (1600, 8 * nodes), (800, 8))
    )

    # Each of eight GPUs has an eighth of the network of its node, for its eighth of the gradients.
    sent = 2 * (nodes - 1) / nodes * 4 * weights / 8
    assert slow.reduce_s - fast.reduce_s == pytest.approx(sent / 100e9 * 8 - sent / 200e9 * 8)
    assert slow.reduce_s > one.reduce_s
    assert slow.gather_s == slow.regather_s == one.gather_s  # within a node, forward and backward


def test_context_parallelism_divides_the_positions_and_not_the_attention_to_them() -> None:
    over = 4
    alone = replace(CONTEXT, strategy="FSDP8 CP1")

    shared, whole = work_of(CONTEXT), work_of(alone)

    for name in ("positions", "matmul_s", "attention_s", "head_s", "logits_s", "elements_s"):
        assert getattr(whole, name) == pytest.approx(over * getattr(shared, name)), name
    assert shared.gather_s == whole.gather_s  # all GPUs share the weights
    assert shared.micro_batches == whole.micro_batches == 1
    run, other = describe_run(CONTEXT), describe_run(alone)
    assert run is not None
    assert other is not None
    assert other.sample.step_s == pytest.approx(over * run.sample.step_s)


def test_slower_memory_that_a_row_states_takes_longer() -> None:
    plain, slower = (
        work_of(replace(CONTEXT, gpu=gpu)) for gpu in ("H100 SXM", "H100 SXM 96GB HBM2e 500W")
    )
    assert slower.elements_s == pytest.approx(3.35 / 2.4 * plain.elements_s)
    assert slower.matmul_s == plain.matmul_s


@pytest.mark.parametrize("strategy", ["DP8", "TP1 DP8 PP1", "TP1 PP1 DP8", "DP8 TP1 PP1 CP1"])
def test_a_run_that_divides_only_data_is_known_in_any_notation(strategy: str) -> None:
    run = describe_run(replace(CONTEXT, strategy=strategy))
    assert run is not None
    assert run.is_data_parallel
    assert run.sample.work.gather_s == 0 < run.sample.work.reduce_s
    assert describe_run(replace(CONTEXT, strategy=f"{strategy} TP2")) is None

"""Tests the arithmetic of shards and padding."""

import pytest
import torch

from scaling.prediction import communication
from unitransformer.launch.signals import StopSignalListener
from unitransformer.rehearsal import result
from unitransformer.rehearsal.observer import Collective
from unitransformer.rehearsal.result import group_padding, shard_rows, sum_collectives
from unitransformer.training.stop import AgreeToStop


@pytest.mark.parametrize("size", [1, 7, 8, 9, 300])
@pytest.mark.parametrize("num_shards", [1, 4, 8])
def test_rows_of_shards_are_those_of_torch_chunk(size: int, num_shards: int) -> None:
    chunks = [len(chunk) for chunk in torch.empty(size).chunk(num_shards)]
    expected = chunks + [0] * (num_shards - len(chunks))
    assert [shard_rows(size, num_shards, rank) for rank in range(num_shards)] == expected


def test_padding_of_a_gather_is_what_its_parameters_lack() -> None:
    # Over 4 ranks 10 rows of 3 become 12 of 3, and 5 numbers become 8.
    groups = [[(torch.Size((10, 3)), 0, 4), (torch.Size((5,)), 0, 4)]]
    assert group_padding(groups) == {36 + 8: 6 + 3}


def test_equal_collectives_are_added_up_with_their_padding() -> None:
    gather = Collective(
        kind="all-gather", ranks=(0, 1, 2, 3), dtype="bfloat16", num_bytes=88, num_elements=44
    )
    (total,) = sum_collectives([gather, gather], {44: 9})
    assert (total.calls, total.num_bytes, total.padding_bytes) == (2, 176, 2 * 9 * 2)
    assert total.group == (4, 1)


def test_rehearsals_and_predictions_name_the_bytes_that_agreeing_to_stop_takes() -> None:
    sent = AgreeToStop(StopSignalListener())._number
    assert sent.nbytes == result.AGREEMENT_BYTES == communication.AGREEMENT_BYTES
    assert result.AGREEMENT == communication.AGREEMENT

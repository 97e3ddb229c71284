"""Tests which rehearsals are refused, and in which nodes ranks are placed."""

import pytest

from recipes import gpt
from recipes.options import parse
from recipes.rehearsal import resolve_rehearsal
from unitransformer.config import RunConfig


def resolved(*options: str) -> RunConfig:
    return resolve_rehearsal(parse(gpt.PRESET, options))[0]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (("--rehearse", "64"), (8, 8)),
        (("--rehearse", "2"), (1, 2)),
        (("--rehearse", "16", "--devices", "4"), (4, 4)),
        (("--rehearse", "1"), (1, 1)),
    ],
)
def test_ranks_are_placed_in_nodes_of_eight_or_as_given(
    options: tuple[str, ...], shape: tuple[int, int]
) -> None:
    parallel = resolved(*options).parallel
    assert (parallel.num_nodes, parallel.devices) == shape
    assert parallel.accelerator == "cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rehearse", "0"), "rehearse is 0; it must be a number of ranks, 1 to 16384"),
        (("--rehearse", "12"), "rehearse is 12 ranks, which nodes of 8 do not divide"),
        (("--rehearse", "16", "--num-nodes", "3"), "num-nodes is 3, and 16 ranks"),
        (("--rehearse", "8", "--strategy", "zero2"), "strategy zero2 cannot be rehearsed"),
        (("--rehearse", "8", "--strategy", "fsdp1"), "strategy fsdp1 cannot be rehearsed"),
        (("--rehearse", "8", "--compile", "default"), "compile default cannot be rehearsed"),
        (("--rehearse", "8", "--strategy", "fsdp", "--cpu-offload"), "cpu-offload cannot be"),
        (("--rehearse", "8", "--model.num-heads", "5"), "model.width 768 does not divide into"),
        (("--rehearse", "7", "--devices", "3"), "or rehearse 6"),
        (("--rehearse", "8", "--record", "x.json"), "rehearse is no run, and --record is for one"),
        (("--rehearse", "8", "--hardware", "h100-sxm-8"), "leave --hardware or --rehearse out"),
        (("--rehearse", "8", "--dry-run"), "rehearse is no run, and --dry-run is for one"),
        (("--json", "x.json"), "json x.json is for the result of --rehearse"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_with_the_fix(
    options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(*options)

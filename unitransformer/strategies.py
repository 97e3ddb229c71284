"""A name -> a Lightning strategy. Nothing here edits the network."""

import datetime
from typing import assert_never

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from unitransformer.config import ParallelConfig

# A rank that dies is noticed by the launcher at once; this bounds only a stuck collective.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def build_strategy(parallel: ParallelConfig, device: str) -> Strategy:
    """The strategy of `parallel` on `device`, "cpu" or "cuda".

    `auto` is one process on one device, and ddp on more: both hold the whole model on each device.
    """
    match parallel.strategy:
        case "auto" if parallel.world_size == 1:
            return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else "cpu")
        case "single":
            return SingleDeviceStrategy(device="cuda:0" if device == "cuda" else "cpu")
        case "ddp" | "auto":
            return DDPStrategy(
                process_group_backend="nccl" if device == "cuda" else "gloo",
                gradient_as_bucket_view=True,
                static_graph=True,
                timeout=COLLECTIVE_TIMEOUT,
            )
        case unknown:
            assert_never(unknown)

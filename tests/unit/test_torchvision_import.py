"""Tests that torchvision and lightning import with any torch, in this process and in workers."""

import multiprocessing
import sys
from multiprocessing.queues import Queue

import pytest

import unitransformer  # noqa: F401  (first, as in a recipe; a spawned worker imports this module)
from tests.processes import PATIENCE_S


def import_both(queue: "Queue[int]") -> None:
    import lightning  # noqa: F401
    import torchvision.datasets

    queue.put(int(torchvision.datasets.FakeData(size=1)[0][1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_torchvision_and_lightning_import_in_workers(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=import_both, args=(queue,))
    worker.start()
    assert queue.get(timeout=PATIENCE_S) >= 0
    worker.join()


def test_torchvision_and_lightning_import_here() -> None:
    import lightning  # noqa: F401
    import torch
    from torchvision.transforms import v2

    assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)


def test_missing_operators_raise_when_called() -> None:
    import torch
    from torchvision import extension, ops

    if extension._has_ops():
        pytest.skip("torchvision's compiled operators load with this torch")
    with pytest.raises(RuntimeError, match="Couldn't load custom C"):
        ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)


def test_the_finder_is_installed_once() -> None:
    from unitransformer.torchvision_import import make_torchvision_importable

    before = list(sys.meta_path)
    make_torchvision_importable()
    assert sys.meta_path == before

"""Tests that torchvision and lightning import with any torch, in this process and in workers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S

SCRIPT = """
import multiprocessing

def work(queue):
    import torchvision.datasets
    import lightning
    queue.put(torchvision.datasets.FakeData(size=1)[0][1])

if __name__ == "__main__":
    import unitransformer
    import lightning
    from torchvision.transforms import v2
    import torch
    assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        worker = context.Process(target=work, args=(queue,))
        worker.start()
        print(method, int(queue.get(timeout=250)) >= 0)
        worker.join()
"""


def test_torchvision_and_lightning_import_here_and_in_workers(
    tmp_path: Path, repository: Path
) -> None:
    script = tmp_path / "script.py"
    # A spawned worker runs the script's top level first, as it does with a recipe's module.
    script.write_text("import unitransformer\n" + SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=repository,
        env={"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout.split() == ["fork", "True", "spawn", "True"], done.stderr


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

"""Lets torchvision be imported with a CPU build of torch.

torchvision's wheels hold C++ operators linked to CUDA, which do not load with a CPU build of torch.
Importing torchvision then fails ("operator torchvision::nms does not exist"), and so does importing
torchmetrics or lightning. This module declares the two missing operators if the compiled ones fail
to load. Calling them raises PyTorch's "not implemented" error.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

EXTENSION = "torchvision.extension"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def make_torchvision_importable() -> None:
    """Installs an import hook for torchvision. It imports nothing and may be called again."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())


class _ExtensionFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != EXTENSION:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ExtensionLoader(name, spec.origin or "")
        return spec


class _ExtensionLoader(importlib.machinery.SourceFileLoader):
    """Loads `torchvision.extension` and then declares the operators that are missing."""

    library: object = None  # the declarations end with this object

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module._has_ops():
            return
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _ExtensionLoader.library = library
        for schema in SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                library.define(schema)  # type: ignore[no-untyped-call]

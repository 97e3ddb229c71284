"""Keeps a short run from importing what it does not use: a third of its time.

Lightning imports torch's compiler to know the type of compiled models, and torchmetrics, which
imports every package that it can draw or compare with. torch's checkpoints import DTensor, and with
it sympy, to know the type of sharded tensors.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

COMPILER, TENSOR, FSDP = "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"
# Types and functions that may be named before their module is imported. A process that compiles
# nothing and shards nothing asks only whether something is an instance of them.
NAMES: dict[str, tuple[str, ...]] = {
    COMPILER: ("OptimizedModule",),
    TENSOR: ("DTensor", "Replicate", "_DTensorSpec", "distribute_tensor"),
    f"{TENSOR}._utils": ("compute_local_shape_and_global_offset",),
    FSDP: (
        *("CPUOffloadPolicy", "FSDPModule", "FullyShardedDataParallel", "MixedPrecision"),
        *("MixedPrecisionPolicy", "fully_shard", "register_fsdp_forward_method"),
    ),
    f"{FSDP}._shard_utils": ("_create_chunk_sharded_tensor",),
    f"{FSDP}.sharded_grad_scaler": ("ShardedGradScaler",),
    f"{FSDP}.wrap": ("ModuleWrapPolicy",),
}


def import_lightly() -> None:
    """Puts off modules that a run does not need until something uses them.

    For a process that is a run and nothing else, and that probably compiles and shards nothing.
    Its torchmetrics cannot draw, and lacks the metrics that need other packages. What is imported
    already stays as it is.
    """
    import torch.distributed  # noqa: F401

    for package in (COMPILER, TENSOR, FSDP):
        if package not in sys.modules:
            for name in NAMES:
                if name == package or name.startswith(f"{package}."):
                    module = sys.modules[name] = _PutOffModule(name, package)
                    parent, _, child = name.rpartition(".")
                    setattr(sys.modules[parent], child, module)
    if not any(isinstance(finder, _SubmoduleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SubmoduleFinder())
    with _optional_packages_hidden():
        import torchmetrics  # noqa: F401


class _PutOffModule(types.ModuleType):
    """Stands in for a module of `package`; all but its `NAMES` imports the package."""

    def __init__(self, name: str, package: str) -> None:
        super().__init__(name)
        self.__path__ = []  # it may have submodules
        self._package = package
        for attribute in NAMES[name]:
            setattr(self, attribute, _PutOff(attribute, (), {"module": name, "package": package}))
        if name == COMPILER:
            # Optimizers mark with these where a graph has to end: there is none.
            self.graph_break, self.disable = _do_nothing, _return_first

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__} has no attribute {name}")
        _import_package(self._package)
        return getattr(importlib.import_module(self.__name__), name)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Stands in for `graph_break`."""


def _return_first(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """Stands in for `disable`, which returns a function that is not traced."""
    return function


class _PutOff(type):
    """The type of stand-ins for a type or a function, which any use but `isinstance` imports."""

    module: str
    package: str

    def _real(cls) -> Any:
        _import_package(cls.package)
        return getattr(importlib.import_module(cls.module), cls.__name__)

    def __instancecheck__(cls, instance: object) -> bool:
        module = sys.modules.get(cls.module)
        is_imported = module is not None and not isinstance(module, _PutOffModule)
        return is_imported and isinstance(instance, getattr(module, cls.__name__, ()))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._real())

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{cls.__name__} has no attribute {name}")
        return getattr(cls._real(), name)


def _import_package(package: str) -> None:
    """Replaces the stand-ins of a package by the package."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, _PutOffModule) and module._package == package:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)
    importlib.import_module(package)


class _SubmoduleFinder(importlib.abc.MetaPathFinder):
    """Imports a package itself before the first of its submodules that has no stand-in."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(parent, _PutOffModule):
            return None
        _import_package(parent._package)
        importlib.import_module(name)
        return importlib.machinery.ModuleSpec(name, _AlreadyImported())


class _AlreadyImported(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: the module is complete."""


@contextlib.contextmanager
def _optional_packages_hidden() -> Iterator[None]:
    """Lets packages that torchmetrics can do without look absent, broken ones too."""
    from lightning_utilities.core.imports import RequirementCache

    is_met = RequirementCache.__bool__

    def is_met_and_needed(self: RequirementCache) -> bool:
        name = (self.requirement or "").split(">")[0].split("<")[0]
        return name in ("torch", "torchmetrics") and is_met(self)

    RequirementCache.__bool__ = is_met_and_needed  # type: ignore[method-assign]
    try:
        yield
    finally:
        RequirementCache.__bool__ = is_met  # type: ignore[method-assign]

"""Imported for its effect: torchvision can be imported beside a CPU-only torch.

The registry's torchvision is a CUDA build. Beside a CPU-only torch its import fails, because the compiled operators
that it registers shapes for are missing. Declaring them is enough, as nothing here calls them. Where the import
succeeds, nothing changes. This module itself imports neither torch nor torchvision.

Every module that imports diffusers, transformers, peft or open_clip imports this one before, because they import
torchvision. env_setup.sh makes each Python of the environment import it, so that `import diffusers` works alone.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")


class _Retry(Loader):
    """Loads torchvision; if that fails, once more with the operators declared."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if not any(f"torchvision::{name} does not exist" in str(error) for name in OPERATORS):
                raise
            import torch

            # The library object must live on.
            module._declared = library = torch.library.Library("torchvision", "DEF")
            for name in OPERATORS:
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            self.loader.exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Retry(spec.loader)
        return spec


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Finder())

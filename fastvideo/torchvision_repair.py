"""Imported for its effect: makes torchvision importable beside a CPU-only torch.

Every module that imports diffusers, transformers, peft or open_clip imports this one before, because they import
torchvision.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # The registry's torchvision is a CUDA build. Beside a CPU-only torch its import fails because the compiled
    # operators it registers shapes for are missing. Declaring them is enough, as nothing here calls them; the library
    # object must live on.
    _torchvision_ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _torchvision_ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

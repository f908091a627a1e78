"""What the settings `device` and `dtype` mean: names of devices and number formats, and what `auto` chooses.

torch is imported only when it is asked: command lines that know these names answer --help at once.
"""

import os
from typing import TYPE_CHECKING

from fastvideo.cli import FlagError

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # name in settings -> name in torch


def torch_dtype(name: str) -> "torch.dtype":
    """The number format with this name in DTYPES."""
    import torch

    return getattr(torch, DTYPES[name])


def resolve_device(name: str = "auto") -> str:
    """The torch device that `name` means: auto is a GPU where there is one, else the CPU.

    cuda, also as chosen by auto, is this process's own GPU: torchrun numbers its processes on a machine by LOCAL_RANK.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def resolve_dtype(name: str, device: str) -> str:
    """The key of DTYPES that `name` means: auto is bf16 on a GPU and fp32 on the CPU, where bf16 is slow.

    device: where the model computes, a torch device. Raises FlagError for another name.
    """
    if name == "auto":
        name = "fp32" if device == "cpu" else "bf16"
    if name not in DTYPES:
        raise FlagError("dtype", name, f"choose from {', '.join(('auto', *DTYPES))}")
    return name

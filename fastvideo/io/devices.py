"""The meaning of the settings `device` and `dtype`, and the choices of `auto`.

torch is imported inside functions only, so that command lines answer --help at once.
"""

import os
from typing import TYPE_CHECKING

from fastvideo.cli import FlagError, choose_from

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # name in settings -> name in torch


def torch_dtype(name: str) -> "torch.dtype":
    """The number format with this name in DTYPES."""
    import torch

    return getattr(torch, DTYPES[name])


def resolve_device(name: str = "auto") -> str:
    """The torch device for `name`. auto: a GPU if there is one, else the CPU. Raises FlagError for any other name.

    cuda (also chosen by auto) is this process's own GPU: torchrun numbers the processes of a machine by LOCAL_RANK.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if name not in choices:
        raise FlagError("device", name, choose_from(choices, name))
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def resolve_dtype(name: str, device: str) -> str:
    """The key of DTYPES for `name`. auto: bf16 on a GPU, and fp32 on the CPU, where bf16 is slow.

    device: where the model computes, a torch device. Raises FlagError for another name.
    """
    if name == "auto":
        name = "fp32" if device.partition(":")[0] == "cpu" else "bf16"  # cpu:0 too, as Accelerate says
    if name not in DTYPES:
        raise FlagError("dtype", name, choose_from(("auto", *DTYPES), name))
    return name

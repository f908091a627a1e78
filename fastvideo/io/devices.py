"""What the settings `device` and `dtype` mean: names of devices and number formats, and what `auto` chooses."""

import os

from fastvideo.cli import FlagError

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> str:
    """The torch device that `name` means: auto is a GPU where there is one, else the CPU.

    cuda, also as chosen by auto, is this process's own GPU: torchrun numbers its processes on a machine by LOCAL_RANK.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def resolve_dtype(name: str, device: str) -> str:
    """The key of DTYPES that `name` means: auto is bf16 on a GPU and fp32 on the CPU, where bf16 is slow.

    device: where the model computes. Raises FlagError for another name.
    """
    if name == "auto":
        name = "fp32" if torch.device(device).type == "cpu" else "bf16"
    if name not in DTYPES:
        raise FlagError("dtype", name, f"choose from {', '.join(('auto', *DTYPES))}")
    return name

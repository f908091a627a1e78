"""Runs the trainer with autocast on the CPU computing RMS norms in float32, as CUDA's autocast does."""

import sys

from fastvideo import train_grpo_flux
from fastvideo.io.processes import entry_point

import torch

library = torch.library.Library("aten", "IMPL", "AutocastCPU")


def rms_norm(x, shape, weight=None, eps=None):
    with torch.autocast("cpu", enabled=False):
        return torch.rms_norm(x.float(), shape, None if weight is None else weight.float(), eps)


library.impl("rms_norm", rms_norm)
entry_point(lambda: train_grpo_flux.main(sys.argv[1:]))

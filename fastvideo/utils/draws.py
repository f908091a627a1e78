"""Likelihood-free training: finished pictures with fresh noise, instead of the steps that drew them.

A draw takes a time t and a noise ε. The model sees x_t = (1 − t)·x0 + t·ε and predicts x0. How well it does stands for
the picture's likelihood, so any sampler will do, also one without noise.
"""

from dataclasses import dataclass, field

from fastvideo.config import GRPOConfig
from fastvideo.utils.sampling_utils import Noise, to_device
from fastvideo.utils.transitions import DRAWS, prompt_rng

import numpy as np
import torch


@dataclass
class Draws:
    """An iteration's draws, for the P·G pictures of this rank. The dict keys are numbers of draws."""

    pictures: torch.Tensor  # x0, [P·G, L, C]
    times: dict[int, torch.Tensor] = field(default_factory=dict)  # t, [P·G]
    noisy: dict[int, torch.Tensor] = field(default_factory=dict)  # x_t, [P·G, L, C]
    old_errors: dict[int, torch.Tensor] = field(default_factory=dict)  # `prediction_error` before any update, [P·G]


def make_draws(config: GRPOConfig, pictures: torch.Tensor, first_stream: int, noise: Noise) -> Draws:
    """`config.draws` draws per picture. A prompt's pictures share t and ε, so that only pictures differ.

    Times are stratified: draw j has a uniform t in [j/n, (j+1)/n).

    Args:
        pictures: [P·G, L, C], sorted by prompt. noise: of the iteration and its prompts. first_stream: first stream of
            `noise` that the rollout has not used.
    """
    group, found = len(pictures) // len(noise.slots), Draws(pictures)
    rngs = [prompt_rng(config, noise.iteration, slot, DRAWS) for slot in noise.slots]
    places = torch.from_numpy(np.stack([rng.random(config.draws) for rng in rngs])).float()  # [P, draws]
    for j in range(config.draws):
        t = to_device(((j + places[:, j]) / config.draws).repeat_interleave(group), pictures.device)
        eps = noise(first_stream + j, 1).repeat_interleave(group, 0)
        found.times[j] = t
        found.noisy[j] = torch.lerp(pictures, eps, t[:, None, None])
        found.old_errors[j] = torch.zeros_like(t)
    return found


def prediction_error(
    noisy: torch.Tensor, velocity: torch.Tensor, times: torch.Tensor, pictures: torch.Tensor
) -> torch.Tensor:
    """V-GRPO's ℓ = mean((x̂0 − x0)²)/mean|x̂0 − x0|, [N], with x̂0 = x_t − t·v (arXiv 2604.23380).

    The divisor has no gradient: it brings all times to one scale. Means are over a picture's elements.

    Args:
        noisy: x_t. velocity: v. pictures: x0, all [N, L, C]. times: t, [N].
    """
    error = noisy - times[:, None, None] * velocity - pictures
    scale = error.detach().abs().mean(dim=(1, 2)).clamp(min=1e-8)
    return (error**2).mean(dim=(1, 2)) / scale

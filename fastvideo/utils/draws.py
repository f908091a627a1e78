"""Likelihood-free training: finished pictures with fresh noise, instead of the steps that drew them.

A draw takes a time t and a noise ε. The model sees x_t = (1 − t)·x0 + t·ε = x0 + t·f, where f = ε − x0 is the velocity
that a perfect model predicts. How close the model comes to f stands for the picture's likelihood, so any sampler will
do, also one without noise.
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
    flows: dict[int, torch.Tensor] = field(default_factory=dict)  # f = ε − x0, [P·G, L, C]


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
        found.times[j] = to_device(((j + places[:, j]) / config.draws).repeat_interleave(group), pictures.device)
        found.flows[j] = noise(first_stream + j, 1).repeat_interleave(group, 0) - pictures
    return found


def v_grpo_error(velocity: torch.Tensor, flow: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """V-GRPO's ℓ = mean((x̂0 − x0)²)/mean|x̂0 − x0|, [N], with x̂0 = x_t − t·v (arXiv 2604.23380).

    As x̂0 − x0 = t·(f − v), this is t·mean((f − v)²)/mean|f − v|. The divisor has no gradient: it brings all times to
    one scale. Means are over a picture's elements.

    Args:
        velocity: v. flow: f, both [N, L, C]. times: t, [N].
    """
    error = flow - velocity
    scale = error.detach().abs().mean(dim=(1, 2)).clamp(min=1e-8)
    return times * (error**2).mean(dim=(1, 2)) / scale


def velocity_error(velocity: torch.Tensor, flow: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """AWM's ℓ = mean((v − f)²), [N], the loss of flow matching itself (arXiv 2509.25050). Arguments: v_grpo_error's."""
    return ((velocity - flow) ** 2).mean(dim=(1, 2))


ERRORS = {"v_grpo": v_grpo_error, "awm": velocity_error, "diffusion_nft": v_grpo_error}


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    flow: torch.Tensor,
    times: torch.Tensor,
    advantages: torch.Tensor,
    beta: float,
    adv_clip_max: float,
) -> torch.Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117), [N]: A_max/β·(r·ℓ(v⁺) + (1 − r)·ℓ(v⁻)), v± = v_old ± β·(v − v_old).

    r = ½ + A/(2·A_max) says how good a picture is, from 0 to 1. ℓ is the paper's error of x̂0, which V-GRPO shares. The
    factor makes the gradient at v = v_old A·∇ℓ, whatever A_max and β are.

    Args:
        velocity, old_velocity, flow: v, v_old, f, [N, L, C]. times, advantages: t, A, [N]. adv_clip_max: A_max.
    """
    share = (0.5 + advantages / (2 * adv_clip_max)).clamp(0, 1)
    move = beta * (velocity - old_velocity)
    good, bad = (v_grpo_error(old_velocity + sign * move, flow, times) for sign in (1, -1))
    return adv_clip_max / beta * (share * good + (1 - share) * bad)

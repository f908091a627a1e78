"""The policy loss and its gradient against hand-computed numbers and an independent calculation."""

import math

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.models.family import Conditioning
from fastvideo.rollout_plan import make_plan
from fastvideo.train_grpo_flux import Rollout, StepsObjective, Transition, policy_loss, set_up, transition_table
from fastvideo.utils.plan import Plan
from fastvideo.utils.steps import Step

import numpy as np
import pytest
import torch
from conftest import relative_difference


def loss_and_slope(
    ratio: float, advantage: float, clip_range: float = 0.1, kl_coeff: float = 0.0, too_far: bool | None = None
):
    """Loss of one transition, its derivative by the new log-probability, and the parts."""
    change = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    too_far = None if too_far is None else torch.tensor([too_far])
    loss, parts = policy_loss(change, advantages, clip_range, kl_coeff, too_far)
    loss.sum().backward()
    return loss.item(), change.grad.item(), {name: part.item() for name, part in parts.items()}


@pytest.mark.parametrize(
    "ratio,advantage,loss,slope,clipped",
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # at the start the gradient is −A
        (1.05, 2.0, -2.1, -2.1, 0),  # inside the range: −A·r
        (0.95, -2.0, 1.9, 1.9, 0),
        (1.2, 1.0, -1.1, 0.0, 1),  # a good sample that is already 1.1 times as likely: gradient 0
        (1.2, -1.0, 1.2, 1.2, 1),  # a bad one that became likelier: full push, however far
        (0.8, 1.0, -0.8, -0.8, 1),  # a good one that became less likely: full pull
        (0.8, -1.0, 0.9, 0.0, 1),  # a bad one that is already 0.9 times as likely: gradient 0
        (1.2, 0.0, 0.0, 0.0, 1),
    ],
)
def test_the_clipped_surrogate(ratio, advantage, loss, slope, clipped):
    found_loss, found_slope, parts = loss_and_slope(ratio, advantage)
    assert found_loss == pytest.approx(loss) and found_slope == pytest.approx(slope)
    assert parts["ratio"] == pytest.approx(ratio) and parts["policy_loss"] == pytest.approx(loss)
    assert (parts["clip_high"], parts["clip_low"]) == (clipped * (ratio > 1), clipped * (ratio < 1))


@pytest.mark.parametrize(
    "ratio,advantage,too_far,slope,high,low",
    [
        (1.5, 1.0, False, -1.5, 0, 0),  # within the limit nothing is clipped, whatever the ratio
        (1.5, 1.0, True, 0.0, 1, 0),  # a good sample, likelier than before and too far: no further
        (1.5, -1.0, True, 1.5, 1, 0),  # a bad one that became likelier: back
        (0.5, 1.0, True, -0.5, 0, 1),  # a good one that became less likely: back
        (0.5, -1.0, True, 0.0, 0, 1),
        (1.0, 2.0, True, -2.0, 0, 0),
    ],
)
def test_a_transition_too_far_away_is_only_moved_back(ratio, advantage, too_far, slope, high, low):
    """Flow-DPPO's mask. The loss keeps the value −A·r; its gradient is 0 where the mask stops it."""
    found_loss, found_slope, parts = loss_and_slope(ratio, advantage, too_far=too_far)
    assert found_loss == pytest.approx(-advantage * ratio) and found_slope == pytest.approx(slope)
    assert (parts["clip_high"], parts["clip_low"]) == (high, low)


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.2])
def test_kl_coeff_adds_half_the_squared_change_of_the_log_probability(ratio):
    change = math.log(ratio)
    plain_loss, plain_slope, _ = loss_and_slope(ratio, 1.0)
    loss, slope, parts = loss_and_slope(ratio, 1.0, kl_coeff=3.0)
    assert parts["kl_loss"] == pytest.approx(0.5 * change**2)
    assert loss == pytest.approx(plain_loss + 3.0 * 0.5 * change**2)
    assert slope == pytest.approx(plain_slope + 3.0 * change)


def test_the_parts_carry_no_gradient():
    _, parts = policy_loss(torch.zeros(3, requires_grad=True), torch.ones(3), 0.1, 1.0)
    assert not any(part.requires_grad for part in parts.values())


def test_the_gradient_of_a_transition_by_hand(flags):
    """One number w: v = w·x. Two transitions from one row, x = (1, 2), at σ 0.5 → 0.4 with η 0.3, DanceGRPO's step.

    correction c = η²Δ/(2σ) = 0.09·0.1/1 = 0.009; mean = (1 − c)·x − (Δ + c·(1 − σ))·v = 0.991·x − 0.1045·v;
    variance η²Δ = 0.009. At w = 2, mean = 0.782·x = (0.782, 1.564).
    d log p / dw = mean over the two elements of (x' − mean)·(−0.1045·x)/0.009.
    """
    settings = parse_dataclass(GRPOConfig, flags(clip_range=0.1, kl_coeff=0.5))
    first = Step(0, 0.5, 0.4, 0.9, "dance_sde", 0.3, branch=2, train=True)
    plan = Plan((first, Step(1, 0.4, 0.0, 0.9, "ode")))
    x = torch.tensor([[[1.0, 2.0]]])
    after = torch.tensor([[[0.8, 1.5]], [[0.7, 1.7]]])
    w = torch.tensor(2.0, requires_grad=True)
    mean = [0.782, 1.564]
    gaussian = [
        sum(
            -((a - m) ** 2) / (2 * 0.009) - 0.5 * math.log(0.009) - 0.5 * math.log(2 * math.pi)
            for a, m in zip(row, mean, strict=True)
        )
        / 2
        for row in ([0.8, 1.5], [0.7, 1.7])
    ]
    slopes = [
        sum((a - m) * -0.1045 * e / 0.009 for a, m, e in zip(row, mean, (1, 2), strict=True)) / 2
        for row in ([0.8, 1.5], [0.7, 1.7])
    ]
    # When sampled, the first transition was 5 % less likely than now, the second equally likely.
    old = torch.tensor([gaussian[0] - math.log(1.05), gaussian[1]])
    sampled = Rollout(after, {0: x}, {0: after}, {0: torch.zeros_like(after)}, {0: old})
    transitions = [Transition(0, 0, 0, 0, 1.5), Transition(0, 0, 1, 0, -0.5)]
    table = transition_table(plan, torch.device("cpu"))
    loss, parts = StepsObjective(settings, sampled, table).loss(transitions, lambda x, *_: w * x)
    loss.sum().backward()
    assert parts["ratio"].tolist() == pytest.approx([1.05, 1.0], rel=1e-4)
    kl = 0.5 * math.log(1.05) ** 2
    assert loss.tolist() == pytest.approx([-1.5 * 1.05 + 0.5 * kl, 0.5], rel=1e-4)
    slope = (-1.5 * 1.05 + 0.5 * math.log(1.05)) * slopes[0] + 0.5 * slopes[1]
    assert w.grad.item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("window", [[0, 1], [2, 3]])
def test_an_optimizer_step_descends_the_mean_over_prompts_samples_and_steps(flags, window):
    """Compares an iteration with the formulas of docs/algorithms.md, computed for one sample at a time."""
    settings = parse_dataclass(
        GRPOConfig,
        flags(train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=1e9, adv_clip_max=1.5, eta=0.6),
    )
    trainer, _, loader = set_up(settings)
    batch = next(iter(loader))
    conditioning = Conditioning(
        batch["prompt_embeds"], batch["pooled_prompt_embeds"], batch["text_ids"][0], trainer.image_ids, 3.5
    )
    plan = make_plan(settings, window)
    sampled = trainer.sample(plan, 1, range(2), conditioning)
    advantages = np.array([[3.0, -1, -1, -1], [0.5, 0.2, -0.4, -0.3]])

    total = 0.0
    for prompt in range(2):
        for sample in range(4):
            for position in window:
                step = plan[position]
                x = sampled.before[position][4 * prompt + sample if step.branch == 1 else prompt][None]
                v = trainer.engine.transformer(
                    hidden_states=x,
                    timestep=torch.tensor([step.sigma]),
                    guidance=torch.tensor([3.5]),
                    pooled_projections=batch["pooled_prompt_embeds"][prompt][None],
                    encoder_hidden_states=batch["prompt_embeds"][prompt][None],
                    txt_ids=batch["text_ids"][prompt],
                    img_ids=trainer.image_ids,
                ).sample
                sigma, delta = step.sigma, step.sigma - step.sigma_next
                a = 0.6 * math.sqrt(sigma / (1 - (plan[0].sigma_next if sigma == 1 else sigma)))
                mean = x * (1 - a**2 * delta / (2 * sigma)) - v * delta * (1 + a**2 * (1 - sigma) / (2 * sigma))
                after = sampled.after[position][4 * prompt + sample][None]
                new = torch.distributions.Normal(mean, a * math.sqrt(delta)).log_prob(after).mean()
                assert new.item() == pytest.approx(sampled.log_probs[position][4 * prompt + sample].item(), abs=1e-5)
                advantage = min(max(advantages[prompt, sample], -1.5), 1.5)
                total = total - advantage * torch.exp(new - new.detach()) / (2 * 4 * 2)
    expected = torch.autograd.grad(total, list(trainer.engine.transformer.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in expected])

    metrics = trainer.optimize(plan, 1, sampled, dict.fromkeys(window, advantages), conditioning)
    moments = trainer.engine.optimizer.state_dict()["state"].values()
    found = torch.cat([entry["exp_avg"].flatten() for entry in moments]) / (1 - 0.9)
    assert relative_difference(found, expected) < 1e-4
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(total.item(), abs=1e-5) and metrics["optimizer_steps"] == 1

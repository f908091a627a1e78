"""V-GRPO: training on finished pictures with fresh noise, whatever sampler drew them."""

import math

from fastvideo import train_grpo_flux
from fastvideo.config import GRPOConfig
from fastvideo.models.flux import LatentShape
from fastvideo.rollout_plan import describe, make_plan
from fastvideo.train_grpo_flux import Transition, draws_loss, remember_errors
from fastvideo.utils.draws import Draws, make_draws, prediction_error
from fastvideo.utils.sampling_utils import Noise

import numpy as np
import pytest
import torch
from conftest import Run, assert_same_update, same_weights, torchrun

V_GRPO = {"algorithm": "v_grpo", "reward_model": "custom_rewards:rough_brightness", "learning_rate": 1e-5}


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(algorithm="v_grpo", prompts_file="p.txt", reward_model="shapes", **given)


def test_the_error_is_the_papers_formula_and_its_divisor_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    noisy, pictures, velocity = (torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    velocity.requires_grad_()
    found = prediction_error(noisy, velocity, times, pictures)
    found.sum().backward()
    for i in range(3):
        error = (noisy[i] - times[i] * velocity[i] - pictures[i]).detach()
        assert found[i].item() == pytest.approx(float((error**2).mean() / error.abs().mean()))
        slope = -2 * times[i] * error / error.numel() / error.abs().mean()  # the divisor is a constant
        torch.testing.assert_close(velocity.grad[i], slope)


def test_pictures_of_a_prompt_share_times_and_noise_which_depend_on_seed_iteration_and_prompt_alone():
    pictures = torch.randn(2 * 3, 4, 8, generator=torch.Generator().manual_seed(0))
    settings, shape = config(num_generations=3, gradient_accumulation_steps=3, draws=4), LatentShape(4, 8, 4, 4)

    def draws(number: int, slots: range, part: torch.Tensor) -> Draws:
        return make_draws(settings, part, 26, Noise(settings.seed, number, slots, shape))

    both, second = draws(1, range(2), pictures), draws(1, range(1, 2), pictures[3:])
    for j in range(4):
        t = both.times[j].reshape(2, 3)
        assert (t == t[:, :1]).all() and t[0, 0] != t[1, 0]
        assert (t >= j / 4).all() and (t < (j + 1) / 4).all()  # one time per quarter
        eps = (both.noisy[j] - (1 - both.times[j][:, None, None]) * pictures) / both.times[j][:, None, None]
        eps = eps.reshape(2, 3, 4, 8)
        torch.testing.assert_close(eps, eps[:, :1].expand_as(eps), rtol=0, atol=1e-4)
        assert abs(float(eps.std()) - 1) < 0.4
        assert torch.equal(second.noisy[j], both.noisy[j][3:]) and torch.equal(second.times[j], both.times[j][3:])
        assert not torch.equal(draws(2, range(2), pictures).noisy[j], both.noisy[j])
    streams = [both.noisy[j] - (1 - both.times[j][:, None, None]) * pictures for j in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(streams) for b in streams[:i])


def test_the_loss_is_the_clipped_surrogate_of_the_errors_change():
    """One number w: v = w·x_t. Two pictures, one draw."""
    settings = config(clip_range=0.03)
    pictures = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    times, noisy = torch.tensor([0.5, 0.5]), torch.tensor([[[0.8, -0.2]], [[0.1, 1.5]]])
    drawn = Draws(pictures, {0: times}, {0: noisy}, {0: torch.zeros(2)})
    batch = [Transition(0, 0, 0, 0, 1.5), Transition(0, 1, 1, 0, -0.5)]
    w = torch.tensor(-1.0, requires_grad=True)
    remember_errors(batch, drawn, lambda x, *_: w * x)
    old = drawn.old_errors[0].clone()
    w = torch.tensor(-0.99, requires_grad=True)
    loss, parts = draws_loss(batch, drawn, lambda x, *_: w * x, settings)
    loss.sum().backward()
    new = [float(prediction_error(noisy, -0.99 * noisy, times, pictures)[i]) for i in range(2)]
    ratios = [math.exp(float(o) - n) for o, n in zip(old, new, strict=True)]
    assert parts["ratio"].tolist() == pytest.approx(ratios) and all(abs(r - 1) < 0.03 for r in ratios)
    assert loss.tolist() == pytest.approx([-1.5 * ratios[0], 0.5 * ratios[1]])
    # dℓ/dw by hand: error e = x_t − t·w·x_t − x0, de/dw = −t·x_t, dℓ/dw = 2·mean(e·de/dw)/mean|e|; d loss = A·r·dℓ/dw
    slope = 0.0
    for i, (advantage, ratio) in enumerate(zip((1.5, -0.5), ratios, strict=True)):
        error = noisy[i] * (1 + 0.5 * 0.99) - pictures[i]
        slope += advantage * ratio * float(2 * (error * -0.5 * noisy[i]).mean() / error.abs().mean())
    assert w.grad.item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("solver", ["None", "dpmsolver++"])
def test_noise_free_pictures_train_with_a_first_ratio_of_one(train, solver):
    run = train(**V_GRPO, dpm_algorithm_type=solver, dpm_solver_order=3, max_train_steps=2, clip_range=1e-4)
    for line in run.metrics:
        assert line["ratio_first_deviation"] <= 1e-6 < line["ratio_max_deviation"]
        assert line["nfe"] == 4 * 6 and line["window"] == [] and line["optimizer_steps"] == 2
        assert {f"clip_high/draw_{j}" for j in range(4)} <= line.keys()
    plan = make_plan(config(sampling_steps=6, dpm_algorithm_type=None if solver == "None" else solver), [0])
    assert {step.kind for step in plan} == {"ode" if solver == "None" else "dpmpp"} and not plan.trained


def test_the_update_does_not_depend_on_micro_batches_or_prompts_a_process(train):
    run = train(**V_GRPO, train_batch_size=2, train_micro_batch_size=100, max_train_steps=1)
    assert_same_update(train(**V_GRPO, train_batch_size=2, train_micro_batch_size=3, max_train_steps=1), run)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_a_resumed_run_goes_on_exactly(
    train, flags, tmp_path, subprocess_environment
):
    settings = {**V_GRPO, "max_train_steps": 2, "checkpointing_steps": 1, "prompts_per_iteration": 2}
    whole = train("whole", **settings)
    done = torchrun(flags(**settings, parallel="ddp", output_dir=tmp_path / "two"), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_update(Run(tmp_path / "two"), whole)
    rest = train("rest", **settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:] and same_weights(rest.weights(), whole.weights())


def test_training_makes_good_pictures_likelier_than_bad_ones(train, monkeypatch):
    """After an update, the errors of pictures with a positive advantage fell relative to those with a negative one."""
    seen, real = [], train_grpo_flux.draws_loss

    def noting(batch, **given):
        loss, parts = real(batch, **given)
        seen.extend(zip([t.advantage for t in batch], parts["log_ratio"].tolist(), strict=True))
        return loss, parts

    monkeypatch.setattr(train_grpo_flux, "draws_loss", noting)
    # One optimizer step over all samples, then another one over the same samples.
    settings = {**V_GRPO, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "max_train_steps": 1}
    work = train_grpo_flux.deal_out
    monkeypatch.setattr(train_grpo_flux, "deal_out", lambda *given: work(*given) * 2)
    train(**settings)
    advantages, changes = np.array(seen[len(seen) // 2 :]).T
    assert len(changes) == 4 * 4 and np.ptp(changes) > 0
    assert np.corrcoef(advantages, changes)[0, 1] > 0.2


def test_settings_of_denoising_steps_are_refused():
    for given in (
        {"ratio_norm": True}, {"step_weights": "noise"}, {"trust_region": "divergence"}, {"ref_kl_coeff": 0.1},
        {"recompute_old_log_prob": True}, {"timestep_fraction": 0.5}, {"init_same_noise": True},
    ):  # fmt: skip
        (name,) = given
        with pytest.raises(ValueError, match=f"{name}|contradicts --{name}"):
            config(**given)
    with pytest.raises(ValueError, match="draws 8: goes with --algorithm v_grpo"):
        GRPOConfig.create(algorithm="mix_grpo", prompts_file="p.txt", reward_model="shapes", draws=8)
    text = describe(config(), 1)
    assert "4 draws of time and noise train each picture" in text and "trained" not in text

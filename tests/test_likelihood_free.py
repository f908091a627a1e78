"""Likelihood-free algorithms: training on finished pictures with fresh noise, whatever sampler drew them."""

import math

from fastvideo import train_grpo_flux
from fastvideo.config import DRAWN, GRPOConfig
from fastvideo.models.family import LatentShape
from fastvideo.rollout_plan import describe, make_plan
from fastvideo.train_grpo_flux import DrawsObjective, Transition
from fastvideo.utils.draws import ERRORS, Draws, make_draws, nft_loss, v_grpo_error, velocity_error
from fastvideo.utils.sampling_utils import Noise

import numpy as np
import pytest
import torch
from conftest import Run, assert_same_update, same_weights, torchrun
from safetensors.torch import load_file

REWARD = {"reward_model": "custom_rewards:rough_brightness", "learning_rate": 1e-5}
EACH = pytest.mark.parametrize("algorithm", DRAWN)


def config(algorithm: str = "v_grpo", **given) -> GRPOConfig:
    return GRPOConfig.create(algorithm=algorithm, prompts_file="p.txt", reward_model="shapes", **given)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_v_grpo_s_error_is_the_papers_formula_and_its_divisor_has_no_gradient():
    velocity, flow, pictures = (random(3, 5, 4, seed=i) for i in range(3))
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    velocity.requires_grad_()
    found = v_grpo_error(velocity, flow, times)
    found.sum().backward()
    for i in range(3):
        noisy = pictures[i] + times[i] * flow[i]
        error = (noisy - times[i] * velocity[i] - pictures[i]).detach()
        assert found[i].item() == pytest.approx(float((error**2).mean() / error.abs().mean()))
        slope = -2 * times[i] * error / error.numel() / error.abs().mean()  # the divisor is a constant
        torch.testing.assert_close(velocity.grad[i], slope)


def test_diffusion_nft_s_loss_is_the_papers_formula():
    velocity, old, flow = (random(3, 5, 4, seed=i) for i in range(3))
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    advantages = torch.tensor([-9.0, 0.5, 2.0], dtype=torch.float64)
    found = nft_loss(velocity, old, flow, times, advantages, beta=0.3, adv_clip_max=4.0)
    for i, share in enumerate([0.0, 0.5 + 0.5 / 8, 0.5 + 2 / 8]):
        expected = 0.0
        for policy, weight in ((0.7 * old + 0.3 * velocity, share), (1.3 * old - 0.3 * velocity, 1 - share)):
            error = times[i] * (policy[i] - flow[i])  # of x0
            expected += weight * float((error**2).mean() / error.abs().mean())
        assert found[i].item() == pytest.approx(expected * 4 / 0.3)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_old_policy_diffusion_nft_climbs_like_a_policy_gradient(beta):
    """Its gradient there is A·∇ℓ, the gradient of V-GRPO's loss at a ratio of 1."""
    old, flow = random(2, 5, 4), random(2, 5, 4, seed=1)
    times, advantages = torch.tensor([0.2, 0.7]).double(), torch.tensor([-1.5, 3.0]).double()
    velocity, other = (old.clone().requires_grad_() for _ in range(2))
    nft_loss(velocity, old, flow, times, advantages, beta, adv_clip_max=5.0).sum().backward()
    (advantages * v_grpo_error(other, flow, times)).sum().backward()
    torch.testing.assert_close(velocity.grad, other.grad)


def loss_of_one_number(settings: GRPOConfig, w: float, old: float, reference: float):
    """(objective, loss [2], parts, d loss/dw, flows, inputs) for v = w·x_t: two pictures, one draw."""
    pictures = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    times, flows = torch.tensor([0.5, 0.25]), torch.tensor([[[0.8, -0.2]], [[0.1, 1.5]]])
    objective = DrawsObjective(settings, Draws(pictures, {0: times}, {0: flows}))
    batch = [Transition(0, 0, 0, 0, 1.5), Transition(0, 1, 1, 0, -0.5)]
    for policy, remember in objective.before_updates.items():
        factor = {"current": old, "old_policy": old, "reference": reference}[policy]
        remember(batch, lambda x, *_, factor=factor: factor * x)
    weight = torch.tensor(w, requires_grad=True)
    loss, parts = objective.loss(batch, lambda x, *_: weight * x)
    loss.sum().backward()
    return loss.tolist(), parts, weight.grad.item(), flows, pictures + times[:, None, None] * flows, times


@EACH
def test_the_loss_of_a_draw_by_hand(algorithm):
    given = {} if algorithm == "diffusion_nft" else {"clip_range": 9.0, "kl_coeff": 0.3}
    settings = config(algorithm, ref_kl_coeff=0.2, **given)

    def loss_at(w: float) -> list[float]:
        return loss_of_one_number(settings, w, -0.8, -0.6)[0]

    loss, parts, slope, flows, noisy, times = loss_of_one_number(settings, -0.9, -0.8, -0.6)
    errors, before = (ERRORS[algorithm](w * noisy, flows, times) for w in (-0.9, -0.8))
    ratios = torch.exp(before - errors)
    assert parts["ratio"].tolist() == pytest.approx(ratios.tolist())
    base = 0.2 * ((0.3 * noisy) ** 2).mean(dim=(1, 2))
    advantages = torch.tensor([1.5, -0.5])
    if algorithm == "diffusion_nft":
        expected = nft_loss(-0.9 * noisy, -0.8 * noisy, flows, times, advantages, 1.0, 5.0) + base
    else:
        expected = -advantages * ratios + 0.15 * torch.log(ratios) ** 2 + base
    if algorithm == "awm":
        expected += 0.1 * ((0.1 * noisy) ** 2).mean(dim=(1, 2))
        assert errors.tolist() == pytest.approx(((-0.9 * noisy - flows) ** 2).mean(dim=(1, 2)).tolist())
    assert loss == pytest.approx(expected.tolist(), rel=1e-5)
    if algorithm == "awm":  # the others divide by a constant that finite differences would move
        numeric = (sum(loss_at(-0.899)) - sum(loss_at(-0.901))) / 2e-3
        assert slope == pytest.approx(numeric, rel=1e-3)
    assert torch.equal(velocity_error(noisy, noisy, times), torch.zeros(2))


@pytest.mark.parametrize("algorithm", ["v_grpo", "awm"])
def test_ratios_are_clipped(algorithm):
    _, parts, slope, *_ = loss_of_one_number(config(algorithm, clip_range=1e-6), -0.9, -0.8, -0.6)
    assert (parts["clip_high"] + parts["clip_low"]).tolist() == [1, 1]


# --- draws ------------------------------------------------------------------------------------------------------------


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
        eps = (both.flows[j] + pictures).reshape(2, 3, 4, 8)
        torch.testing.assert_close(eps, eps[:, :1].expand_as(eps), rtol=0, atol=1e-6)
        assert abs(float(eps.std()) - 1) < 0.4
        assert torch.equal(second.flows[j], both.flows[j][3:]) and torch.equal(second.times[j], both.times[j][3:])
        assert not torch.equal(draws(2, range(2), pictures).flows[j], both.flows[j])
    noises = [both.flows[j] + pictures for j in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(noises) for b in noises[:i])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "solver"), [("v_grpo", "None"), ("v_grpo", "dpmsolver++"), ("awm", "dpmsolver++")]
)
def test_noise_free_pictures_train_with_a_first_ratio_of_one(train, algorithm, solver):
    more = {"dpm_algorithm_type": solver, "dpm_solver_order": 3, "max_train_steps": 2, "clip_range": 1e-4}
    run = train(algorithm=algorithm, **REWARD, **more)
    for line in run.metrics:
        assert line["ratio_first_deviation"] <= 1e-6 < line["ratio_max_deviation"]
        assert line["nfe"] == 4 * 6 and line["window"] == [] and line["optimizer_steps"] == 2
        assert {f"clip_high/draw_{j}" for j in range(4)} <= line.keys()
    assert ("old_kl_loss" in run.metrics[0]) == (algorithm == "awm")
    plan = make_plan(config(sampling_steps=6, dpm_algorithm_type=None if solver == "None" else solver), [0])
    assert {step.kind for step in plan} == {"ode" if solver == "None" else "dpmpp"} and not plan.trained


@EACH
def test_the_update_does_not_depend_on_micro_batches_or_prompts_a_process(train, algorithm):
    settings = {"algorithm": algorithm, **REWARD, "train_batch_size": 2, "max_train_steps": 1, "ref_kl_coeff": 0.1}
    run = train(train_micro_batch_size=100, **settings)
    assert_same_update(train(train_micro_batch_size=3, **settings), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"algorithm": "v_grpo"},
        {"algorithm": "diffusion_nft", "ref_kl_coeff": 0.1, "ref_reset_steps": 1},
        {"algorithm": "awm", "use_lora": True, "lora_rank": 4, "lora_alpha": 8, "ema_decay": 0.5},
    ],
    ids=lambda given: given["algorithm"],
)
def test_two_processes_train_what_one_trains_and_a_resumed_run_goes_on_exactly(
    train, flags, tmp_path, subprocess_environment, given
):
    """Also with copies of the policy, which FSDP2 shards and checkpoints hold."""
    settings = {**REWARD, **given, "max_train_steps": 3, "checkpointing_steps": 2, "prompts_per_iteration": 2}
    whole = train("whole", **settings)
    parallel = "ddp" if given["algorithm"] == "v_grpo" else "fsdp"
    done = torchrun(flags(**settings, parallel=parallel, output_dir=tmp_path / "two"), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_update(Run(tmp_path / "two"), whole, 5e-5)  # three iterations: 1.3e-5 measured on an AMD processor
    rest = train("rest", **settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[2:]
    copies = {"v_grpo": set(), "diffusion_nft": {"old_policy", "reference"}, "awm": {"old_policy", "ema"}}
    files = [sorted(run.checkpoints[-1].rglob("*.safetensors")) for run in (whole, rest)]
    assert {file.parent.name for file in files[0]} == {whole.checkpoints[-1].name, *copies[given["algorithm"]]}
    for one, other in zip(*files, strict=True):
        assert same_weights(load_file(one), load_file(other)), one


def test_diffusion_nft_samples_with_the_average_of_its_policies(train, monkeypatch):
    """The average is the policy after the first iteration, whatever its decay. From the second on, the decay counts."""
    drawn, real = [], train_grpo_flux.Trainer.sample
    noting = lambda self, *given: drawn.append(real(self, *given)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr(train_grpo_flux.Trainer, "sample", noting)
    settings = {"algorithm": "diffusion_nft", **REWARD, "ref_kl_coeff": 0, "max_train_steps": 3}
    for decay in (0.0, 0.9):
        train(f"decay{decay}", **settings, old_policy_decay=decay, prompts_per_iteration=1)
    same = [torch.equal(one.latents, other.latents) for one, other in zip(drawn[:3], drawn[3:], strict=True)]
    assert same == [True, True, False]


@EACH
def test_training_makes_good_pictures_likelier_than_bad_ones(train, monkeypatch, algorithm):
    """After an update, the errors of pictures with a positive advantage fell relative to those with a negative one."""
    seen, real = [], DrawsObjective.loss

    def noting(self, batch, velocity):
        loss, parts = real(self, batch, velocity)
        seen.extend(zip([t.advantage for t in batch], parts["log_ratio"].tolist(), strict=True))
        return loss, parts

    monkeypatch.setattr(DrawsObjective, "loss", noting)
    # One optimizer step over all samples, then another one over the same samples.
    settings = {**REWARD, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "max_train_steps": 1}
    work = train_grpo_flux.deal_out
    monkeypatch.setattr(train_grpo_flux, "deal_out", lambda *given: work(*given) * 2)
    train(algorithm=algorithm, **settings)
    advantages, changes = np.array(seen[len(seen) // 2 :]).T
    assert len(changes) == 4 * 4 and np.ptp(changes) > 0
    assert np.corrcoef(advantages, changes)[0, 1] > 0.2


def test_settings_of_denoising_steps_are_refused():
    for given in (
        {"ratio_norm": True}, {"step_weights": "noise"}, {"trust_region": "divergence"}, {"timestep_fraction": 0.5},
        {"recompute_old_log_prob": True}, {"init_same_noise": True}, {"ref_reset_steps": 3},
        {"eta": 0.5}, {"sde_type": "cps"},
    ):  # fmt: skip
        (name,) = given
        with pytest.raises(ValueError, match=f"{name}|contradicts --{name}"):
            config(**given)
    for given in ({"clip_range": 1e-3}, {"kl_coeff": 1.0}, {"old_kl_coeff": 1.0}, {"parallel": "deepspeed"}):
        with pytest.raises(ValueError, match="algorithm|DiffusionNFT"):
            config("diffusion_nft", **given)
    with pytest.raises(ValueError, match="draws 8: goes with --algorithm v_grpo"):
        GRPOConfig.create(algorithm="mix_grpo", prompts_file="p.txt", reward_model="shapes", draws=8)
    assert "loss: DiffusionNFT, beta 1, old policy of decay 0.5, 0.0001 x distance from the reference" in describe(
        config("diffusion_nft"), 1
    )
    text = describe(config(), 1)
    assert "4 draws of time and noise per picture in the loss" in text and "trained" not in text
    assert math.isclose(config("diffusion_nft").ref_kl_coeff, 1e-4)

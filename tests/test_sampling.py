"""Steps, plans, the sampler, its noise, shared work and the sliding window."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from itertools import islice

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.pretrained import decode_latents
from fastvideo.rollout_plan import make_plan
from fastvideo.train_grpo_flux import StepsObjective, rollout, set_up, transition_table
from fastvideo.utils.grpo_states import window_counts, windows
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import Noise, log_prob
from fastvideo.utils.steps import KINDS, SDE_KINDS, Coefficients, Step, sigma_schedule
from fastvideo.utils.transitions import Transition, micro_batches

import numpy as np
import pytest
import torch
from conftest import ROOT, relative_difference
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

SIGMAS = sigma_schedule(25, 3.0)


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(data_json_path="unused", reward_model="shapes", **given)


def coefficients(step: Step) -> Coefficients:
    return KINDS[step.kind].coefficients(step, ())


def step(kind: str, index: int, eta: float = 0.7, **more) -> Step:
    return Step(index, SIGMAS[index], SIGMAS[index + 1], SIGMAS[1], kind, eta, **more)


# --- single steps -----------------------------------------------------------------------------------------------------


def test_the_documentation_has_a_formula_for_every_kind_of_step():
    table = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8").partition("| kind |")[2].partition("\n\n")[0]
    rows = {row.split("|")[1].strip(" `"): row for row in table.splitlines()[2:]}
    assert rows.keys() == KINDS.keys()
    assert all(f"`--sde_type {name}`" in rows[kind] for name, kind in SDE_KINDS.items())


@pytest.mark.parametrize("kind", SDE_KINDS.values())
@pytest.mark.parametrize("index", [0, 1, 12, 23, 24])
def test_without_noise_a_stochastic_step_is_the_ode_step(kind, index):
    if (kind, index) == ("precise", 0):
        pytest.skip("from σ = 1 all noise is new, whatever eta is")
    ode = coefficients(step("ode", index))
    for eta, tolerance in ((1e-2, 1e-2), (1e-4, 1e-6), (0.0, 1e-12)):
        found = coefficients(step(kind, index, eta))
        assert found.x == pytest.approx(ode.x, abs=tolerance)
        assert found.v == pytest.approx(ode.v, abs=tolerance)
        assert found.std <= 10 * eta


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_a_rollout_with_vanishing_eta_ends_where_the_ode_does(kind):
    generator = torch.Generator().manual_seed(0)
    matrix, start = (torch.randn(shape, generator=generator) for shape in ((8, 8), (2, 6, 8)))

    def end(kind: str) -> torch.Tensor:
        plan = Plan(tuple(step(kind, i, 1e-6) for i in range(25)))
        noise = torch.Generator().manual_seed(1)
        return rollout(
            plan, start, 1, lambda x, *_: torch.tanh(x @ matrix), lambda *_: torch.randn(2, 6, 8, generator=noise)
        ).latents

    torch.testing.assert_close(end(kind), end("ode"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", range(24))
def test_cps_keeps_the_shares_of_data_and_noise(index):
    """From x = (1 − σ)·x0 + σ·ε with the true v = ε − x0, a step makes (1 − σ')·x0 plus noise of variance σ'²."""
    c = coefficients(step("cps", index))
    sigma, target = SIGMAS[index], SIGMAS[index + 1]
    assert c.x * (1 - sigma) - c.v == pytest.approx(1 - target)
    assert (c.x * sigma + c.v) ** 2 + c.std**2 == pytest.approx(target**2)
    assert c.std == pytest.approx(target * math.sin(0.7 * math.pi / 2))


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_the_sdes_keep_the_marginal_variance_of_gaussian_data_to_first_order(kind):
    """With data N(0, s²) the exact velocity is linear in x, and one step's variance has a formula."""
    spread, sigma = 0.5, 0.6

    def variance(level: float) -> float:
        return ((1 - level) * spread) ** 2 + level**2

    slope = (sigma - (1 - sigma) * spread**2) / variance(sigma)  # v = slope · x

    def error(delta: float) -> float:
        c = coefficients(Step(3, sigma, sigma - delta, 0.99, kind, 0.7))
        return abs((c.x + c.v * slope) ** 2 * variance(sigma) + c.std**2 - variance(sigma - delta))

    assert error(0.01) < 0.05 * 0.01  # the drift removes the variance η²Δ that the noise adds, up to higher order
    assert error(0.01) / error(0.001) == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    "kind,eta,expected", [("flow_sde", 0.7, 0.6), ("dance_sde", 0.3, 0.6), ("cps", 0.7, 0.511), ("cps", 0.9, 0.456)]
)
def test_where_noise_at_all_steps_leads_gaussian_data(kind, eta, expected):
    """With data N(1.7, 0.6²) and the exact velocity, the SDEs end there as T grows. cps ends narrower."""

    def end(steps: int) -> tuple[float, float]:
        sigmas, mean, variance = sigma_schedule(steps, 3.0), 0.0, 1.0
        for i, (sigma, target) in enumerate(itertools.pairwise(sigmas)):
            c = coefficients(Step(i, sigma, target, sigmas[1], kind if target else "ode", eta))
            slope = (sigma - (1 - sigma) * 0.36) / (0.36 * (1 - sigma) ** 2 + sigma**2)
            mean = c.x * mean + c.v * (slope * (mean - (1 - sigma) * 1.7) - 1.7)  # v = slope·(x − E[x]) − E[x0]
            variance = (c.x + c.v * slope) ** 2 * variance + c.std**2
        return mean, math.sqrt(variance)

    assert end(30_000) == pytest.approx((1.7, expected), abs=1e-3)
    if eta == 0.9:
        assert end(25)[1] == pytest.approx(0.409, abs=1e-3)  # smaller than by Euler's steps, 0.542


def test_noise_scale_widens_the_noise_and_leaves_the_mean():
    one, four = (coefficients(step("dance_sde", 5, noise_scale=s)) for s in (1.0, 4.0))
    assert (four.x, four.v) == (one.x, one.v) and four.std == pytest.approx(4 * one.std)


def test_log_prob_is_the_mean_gaussian_log_density_with_its_constants():
    generator = torch.Generator().manual_seed(0)
    sample, mean = torch.randn(2, 3, 6, 8, generator=generator)
    std = torch.tensor([0.05, 0.7, 2.0])[:, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(sample).mean((1, 2))
    torch.testing.assert_close(log_prob(sample, mean, std), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob(sample, mean, std[1]), log_prob(sample, mean, std[1].expand(3, 1, 1)))


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_of(kinds: str, eta: float = 0.7, train: str = "") -> list[Step]:
    """One letter per step: o(de), f(low_sde), d(ance_sde), c(ps). In `train`, t marks trained steps."""
    names = {"o": "ode", "f": "flow_sde", "d": "dance_sde", "c": "cps"}
    sigmas = sigma_schedule(len(kinds), 3.0)
    return [
        Step(i, sigmas[i], sigmas[i + 1], sigmas[1], names[kind], eta, train=flag == "t")
        for i, (kind, flag) in enumerate(zip(kinds, train.ljust(len(kinds)), strict=True))
    ]


def test_a_plan_check_accepts_a_sound_plan():
    plan = Plan(tuple(plan_of("offdco", train=" tttt")))
    assert plan.check() is plan


@pytest.mark.parametrize(
    "kinds,train,message",
    [
        ("ofoo", "", "trains no step"),
        ("ofoo", "tt", r"step 0 \(ode\) has no noise"),
        ("oooc", "   t", r"step 3 \(cps\) has no noise"),  # the last cps step has no noise for any eta
    ],
)
def test_a_plan_check_refuses_what_cannot_be_trained(kinds, train, message):
    with pytest.raises(ValueError, match=message):
        Plan(tuple(plan_of(kinds, train=train))).check()


def test_a_plan_check_refuses_noise_free_stochastic_steps_and_branches_without_noise():
    with pytest.raises(ValueError, match="has no noise"):
        Plan(tuple(plan_of("offo", eta=0.0, train=" t"))).check()
    plan = plan_of("offo", train=" t")
    with pytest.raises(ValueError, match="neither trained nor branched"):
        Plan((replace(plan[0], branch=4), *plan[1:])).check()


def test_a_plan_check_refuses_gaps_wrong_ends_rising_noise_and_unknown_kinds():
    plan = plan_of("offo", train=" t")
    with pytest.raises(ValueError, match="from sigma 1 to 0"):
        Plan(tuple(plan[:3])).check()
    with pytest.raises(ValueError, match="from sigma 1 to 0"):
        Plan(tuple(plan[1:])).check()
    with pytest.raises(ValueError, match="step 0 ends at sigma .* next starts at"):
        Plan((plan[0], *plan[2:])).check()
    for kind in ("ode", "flow_sde"):
        rising = replace(plan[2], kind=kind, sigma=0.5, sigma_next=0.6)
        with pytest.raises(ValueError, match="step 2: sigma must fall"):
            Plan((*plan[:1], replace(plan[1], sigma_next=0.5), rising, replace(plan[3], sigma=0.6))).check()
    with pytest.raises(ValueError, match="unknown kind 'heun'; choose from"):
        Plan((*plan[:2], replace(plan[2], kind="heun"), plan[3])).check()


def test_dance_grpo_scores_the_x0_prediction_and_leaves_the_last_transition_untrained():
    plan = make_plan(config(training_strategy="all"), [0])
    assert [s.kind for s in plan] == ["dance_sde"] * 15 + ["ode"]
    assert [s.train for s in plan] == [True] * 15 + [False]
    (last,) = plan.coefficients[-1:]
    assert (last.x, last.v) == (1, pytest.approx(-plan[-1].sigma))  # x0 = x − σ·v
    noisy = make_plan(config(training_strategy="all", drop_last_sample=False), [0])
    assert noisy[-1].kind == "dance_sde" and not noisy[-1].train
    frozen = make_plan(config(training_strategy="all", frozen_init_timesteps=3), [0])
    assert [s.train for s in frozen] == [True] * 3 + [False] * 13
    flow = make_plan(config(training_strategy="all", flow_grpo_sampling=True, sampling_steps=8), [0])
    assert [s.kind for s in flow] == ["flow_sde"] * 8 and sum(s.train for s in flow) == 7


@pytest.mark.parametrize("ratio,order,steps", [(0.4, 2, 6), (0.2, 2, 2), (1.0, 3, 18), (0.01, 1, 1)])
def test_flash_compresses_the_tail_to_points_linear_in_time_down_to_zero(ratio, order, steps):
    settings = config(dpm_algorithm_type="dpmsolver++", dpm_post_compress_ratio=ratio, dpm_solver_order=order)
    plan = make_plan(settings, [3, 4, 5, 6])
    tail = plan[7:]
    points = max(int((25 - 6) * ratio), 2)
    assert len(tail) == points - 1 == steps and {s.kind for s in tail} == {"dpmpp"}
    assert plan[-1].sigma_next == 0 and tail[-1].order == 1
    assert [s.order for s in tail] == [min(order, len(tail) - i) for i in range(len(tail))]
    # σ back to time: t = σ / (shift − (shift − 1)·σ)
    times = [s.sigma / (3 - 2 * s.sigma) for s in tail] + [0]
    np.testing.assert_allclose(times, np.linspace(1 - 7 / 25, 0, points), atol=1e-12)


# --- work that samples share ------------------------------------------------------------------------------------------


def toy_rollout(settings: GRPOConfig, window: list[int], prompts: int = 2):
    """A rollout of a small velocity field that depends on the prompt, and the evaluated rows of every step."""
    generator = torch.Generator().manual_seed(3)
    matrix, offset = (torch.randn(shape, generator=generator) for shape in ((8, 8), (prompts, 1, 8)))
    plan, noise, rows = make_plan(settings, window), Noise(0, 1, range(prompts), LatentShape(6, 8, 4, 6)), []

    def velocity(x, sigma, prompt_index):
        rows.append(len(x))
        return torch.tanh(x @ matrix) + offset[prompt_index]

    start = noise(0, 1).repeat_interleave(plan.start, 0)
    return plan, rollout(plan, start, prompts, velocity, noise), rows


TOYS = {
    "mix": {},
    "dance steps": {"sde_type": "dance"},
    "cps": {"sde_type": "cps"},
    "flash": {
        "dpm_algorithm_type": "dpmsolver++",
        "dpm_solver_order": 3,
        "dpm_post_compress_ratio": 1.0,
        "group_size": 1,
    },  # fmt: skip
    "dance_grpo": {"training_strategy": "all", "sampling_steps": 10},
}


@pytest.mark.parametrize("case", TOYS)
@pytest.mark.parametrize("first", [0, 3])
def test_a_shared_beginning_gives_the_same_samples_and_log_probabilities(case, first):
    given = {"sampling_steps": 10, "num_generations": 4, "gradient_accumulation_steps": 2, **TOYS[case]}
    window = [first] if case == "flash" else [first, first + 1]
    plan, shared, _ = toy_rollout(config(**given), window)
    _, alone, _ = toy_rollout(config(**given, share_prefix=False), window)
    torch.testing.assert_close(shared.latents, alone.latents, rtol=0, atol=1e-5)
    assert sorted(shared.log_probs) == sorted(alone.log_probs) == [s.index for s in plan if s.train]
    for position in shared.log_probs:
        torch.testing.assert_close(shared.log_probs[position], alone.log_probs[position], rtol=0, atol=1e-5)
        torch.testing.assert_close(shared.after[position], alone.after[position], rtol=0, atol=1e-5)
    assert len({tuple(x.flatten().tolist()) for x in shared.latents}) == 2 * 4  # all samples differ


@pytest.mark.parametrize("first", [0, 1, 5, 8])
def test_the_number_of_evaluations_is_the_formula(first):
    settings = config(sampling_steps=12, num_generations=6, gradient_accumulation_steps=3, group_size=2)
    plan, _, rows = toy_rollout(settings, [first, first + 1])
    formula = (first + 1) + (12 - first - 1) * 6
    assert plan.evaluations == formula == sum(rows) / 2
    for given in ({"share_prefix": False}, {"init_same_noise": False}):
        other = replace(settings, **given)
        plan, _, rows = toy_rollout(other, [first, first + 1])
        assert plan.evaluations == 12 * 6 == sum(rows) / 2


def seed_with_window(start: int, usable: int) -> int:
    """A seed whose first random window of size 2 begins at `start`."""
    for seed in itertools.count(1):
        settings = config(sampling_steps=usable + 2, group_size=2, sample_strategy="random", seed=seed)
        if next(windows(settings))[0] == start:
            return seed
    raise AssertionError


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("algorithm", ["mix_grpo", "mix_grpo_flash"])
def test_sharing_on_or_off_gives_the_same_pictures_and_gradients(train, velocity_calls, start, algorithm):
    rows = {True: 0, False: 0}  # evaluated in the rollout and in training

    def counting(velocity, sampling):
        rows[sampling] += len(velocity)
        return velocity

    velocity_calls(counting)
    seed = seed_with_window(start, 6)
    runs = {}
    for share in (True, False):
        rows.update({True: 0, False: 0})
        run = train(
            share_prefix=share, algorithm=algorithm, sampling_steps=8, sample_strategy="random", seed=seed,
            max_train_steps=1, train_batch_size=2, num_generations=6, gradient_accumulation_steps=3, image_log_steps=1,
        )  # fmt: skip
        runs[share] = run
        (line,) = run.metrics
        assert line["window"] == [start, start + 1] and line["nfe"] == rows[True]
        steps = len(make_plan(config(algorithm=algorithm, sampling_steps=8, group_size=2), [start, start + 1]))
        # Rollout: the prefix once per prompt. Training, 2 optimizer steps: the split once per prompt and slice of 3.
        assert rows[True] == 2 * ((start + 1) + (steps - start - 1) * 6 if share else steps * 6)
        assert rows[False] == 2 * 2 * (1 + 3 if share else 3 + 3)
    pictures = [np.asarray(Image.open(run.folder / "images/iteration_000001.png")).astype(int) for run in runs.values()]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert relative_difference(runs[True].gradient(), runs[False].gradient()) < 1e-4
    assert runs[True].metrics[0]["reward"] == pytest.approx(runs[False].metrics[0]["reward"], abs=1e-4)


# --- noise ------------------------------------------------------------------------------------------------------------

SHAPE = LatentShape(4, 6, 4, 4)


def test_noise_of_a_sample_does_not_depend_on_who_else_is_in_the_batch():
    whole = Noise(7, 3, range(4), SHAPE)(2, 5).reshape(4, 5, 4, 6)
    for slots in ([0, 1], [2, 3], [3], [1, 2]):  # ranks, world sizes
        assert torch.equal(Noise(7, 3, slots, SHAPE)(2, 5).reshape(len(slots), 5, 4, 6), whole[slots])
    assert torch.equal(Noise(7, 3, range(4), SHAPE)(2, 2).reshape(4, 2, 4, 6), whole[:, :2])
    torch.manual_seed(5)
    assert torch.equal(Noise(7, 3, range(4), SHAPE)(2, 5).reshape(4, 5, 4, 6), whole)


def test_noise_differs_between_seeds_iterations_prompts_samples_and_steps():
    keys = itertools.product((7, 8), (1, 2), (0, 1), (1, 2))
    found = [Noise(seed, number, [slot], LatentShape(64, 64, 16, 16))(step, 3) for seed, number, slot, step in keys]
    rows = torch.cat(found).flatten(1)
    assert rows.shape == (48, 64 * 64)
    similarity = torch.corrcoef(rows) - torch.eye(48)
    assert similarity.abs().max() < 6 / 64  # six standard deviations for independent noise


def test_noise_is_standard_normal():
    noise = Noise(1, 1, range(8), LatentShape(64, 64, 16, 16))(1, 8).double()
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert (noise.bfloat16().double() != noise).float().mean() > 0.9  # more digits than bf16 has
    assert noise.var() == pytest.approx(1, abs=0.02)


# --- the model as diffusers uses it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_our_sampler_without_noise_draws_what_diffusers_pipeline_draws(flags, tiny_flux, size):
    """From the same latents and σ: timesteps, position ids, guidance, packing, the VAE's scale and shift must agree."""
    height, width = size
    argv = flags(train_batch_size=2, h=height, w=width, guidance_scale=2.5)
    settings = parse_dataclass(GRPOConfig, argv)
    trainer, _, loader = set_up(settings)
    batch = next(iter(loader))
    conditioning = Conditioning(
        batch["prompt_embeds"], batch["pooled_prompt_embeds"], batch["text_ids"][0], trainer.image_ids, 2.5
    )
    sigmas = sigma_schedule(5, 3.0)
    plan = Plan(tuple(Step(i, sigmas[i], sigmas[i + 1], sigmas[1], "ode") for i in range(5)))
    start = Noise(0, 1, range(2), trainer.shape)(0, 1)
    ours = rollout(plan, start, 2, trainer.velocity_of(trainer.engine.transformer, conditioning), None).latents
    pipe = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    for vae in (trainer.vae, pipe.vae):  # the tiny one's shift is too small to be seen
        vae.register_to_config(shift_factor=0.3, scaling_factor=1.3)
    pictures = decode_latents(trainer.family, trainer.vae, ours, height, width, 1)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # our σ are shifted already
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": batch["prompt_embeds"], "pooled_prompt_embeds": batch["pooled_prompt_embeds"],
        "latents": start, "sigmas": sigmas[:-1], "guidance_scale": 2.5, "height": height, "width": width,
    }  # fmt: skip
    torch.testing.assert_close(ours, pipe(**given, output_type="latent").images, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(pictures, pipe(**given).images, strict=True):
        assert mine.size == theirs.size == (width, height)
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


# --- what training computes again -------------------------------------------------------------------------------------


@pytest.fixture
def sampled(flags):
    """A trainer on the tiny pipeline, its first rollout, and all trained transitions with advantage 1."""
    settings = parse_dataclass(GRPOConfig, flags(num_generations=4, train_batch_size=2))
    trainer, _, loader = set_up(settings)
    batch = next(iter(loader))
    conditioning = Conditioning(
        batch["prompt_embeds"], batch["pooled_prompt_embeds"], batch["text_ids"][0], trainer.image_ids, 3.5
    )
    plan = make_plan(settings, [1, 2])
    result = trainer.sample(plan, 1, range(2), conditioning)
    transitions = [
        Transition(position, child // plan[position].branch, child, child // 4, 1.0)
        for position in (1, 2)
        for child in range(8)
    ]

    def ratios(transitions: list[Transition] = transitions, size: int = 100) -> torch.Tensor:
        table, velocity = (
            transition_table(plan, trainer.accelerator.device),
            trainer.velocity_of(trainer.engine.model, conditioning),
        )
        parts = [
            StepsObjective(settings, result, table).loss(batch, velocity)[1]["ratio"]
            for batch in micro_batches(transitions, size)
        ]
        return torch.cat(parts)

    return trainer, result, ratios


def test_the_ratio_is_one_before_the_first_update(sampled):
    _, _, ratios = sampled
    for size in (1, 2, 3, 100):
        torch.testing.assert_close(ratios(size=size), torch.ones(16), rtol=0, atol=1e-6)


def test_log_probabilities_change_when_weights_change(sampled):
    trainer, _, ratios = sampled
    with torch.no_grad():
        trainer.engine.transformer.proj_out.weight.mul_(1.05)
    assert ((ratios() - 1).abs() > 1e-6).all()


def test_log_probabilities_change_when_the_stored_sample_or_its_start_changes(sampled):
    _, result, ratios = sampled
    result.after[2][3] += 0.1
    changed = (ratios() - 1).abs() > 1e-5
    assert changed.nonzero().flatten().tolist() == [8 + 3]  # step 2, sample 3
    result.before[1][1] += 0.1  # a state that the second prompt's samples share
    changed = (ratios() - 1).abs() > 1e-5
    assert changed.nonzero().flatten().tolist() == [4, 5, 6, 7, 11]


def test_micro_batches_hold_whole_rows_and_lose_no_transition():
    transitions = [Transition(p, c // (4 if p == 0 else 1), c, 0, 0.0) for p in (0, 1) for c in range(4)]
    for size in (1, 2, 3, 9):
        batches = micro_batches(transitions, size)
        assert sum(batches, []) == transitions
        widths = [len({(t.position, t.parent) for t in batch}) for batch in batches]
        assert all(width == size for width in widths[:-1]) and widths[-1] <= size
    assert [len(batch) for batch in micro_batches(transitions, 1)] == [4, 1, 1, 1, 1]  # the shared row serves all four


# --- window -----------------------------------------------------------------------------------------------------------

STRATEGIES = ("progressive", "random", "decay", "exp_decay")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_is_never_empty_and_always_usable(strategy):
    shapes = [(3, 1), (4, 2), (5, 1), (9, 4), (16, 4), (16, 14), (25, 4), (25, 23), (30, 7)]
    moves = [(overlap, stride) for overlap in (True, False) for stride in (0, 1, 2, 5, 40)]
    for (steps, size), (overlap, stride), back in itertools.product(shapes, moves, (True, False)):
        settings = config(
            sample_strategy=strategy, sampling_steps=steps, group_size=size, prog_overlap=overlap,
            prog_overlap_step=stride, roll_back=back, iters_per_group=2, max_iters_per_group=3,
        )  # fmt: skip
        for window in islice(windows(settings), 150):
            assert 1 <= len(window) <= size and window == list(range(window[0], window[0] + len(window)))
            assert window[0] >= 0 and window[-1] <= steps - 3


def test_random_windows_depend_on_seed_and_iteration_alone():
    settings = config(sample_strategy="random", seed=3)
    first = list(islice(windows(settings), 200))
    np.random.seed(1)
    torch.manual_seed(1)
    assert list(islice(windows(settings), 200)) == first
    assert list(islice(windows(settings), 150, 200)) == first[150:]  # a resumed run starts in the middle
    assert list(islice(windows(replace(settings, seed=4)), 200)) != first
    starts = [window[0] for window in first]
    assert set(starts) == set(range(0, 25 - 2 - 4 + 1)) and all(len(window) == 4 for window in first)
    assert max(starts.count(s) for s in set(starts)) < 30  # 10 each on average


def test_roll_back_restarts_as_at_the_first_iteration():
    settings = config(sampling_steps=7, group_size=2, iters_per_group=3)
    cycle = [[i, i + 1] for i in range(4) for _ in range(3)] + [[4]] * 3
    assert list(islice(windows(settings), 30)) == cycle + cycle
    stay = replace(settings, roll_back=False)
    assert list(islice(windows(stay), 30)) == cycle + [[4]] * 15


def test_stride_zero_freezes_the_window():
    settings = config(prog_overlap_step=0, iters_per_group=2)
    assert list(islice(windows(settings), 50)) == [[0, 1, 2, 3]] * 50


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])
def test_windows_are_counted_as_if_iterations_were_counted_one_by_one(strategy):
    for stride, back, (first, last) in itertools.product((0, 1, 3), (True, False), [(1, 1), (1, 97), (30, 64)]):
        settings = config(
            sample_strategy=strategy, sampling_steps=9, group_size=3, prog_overlap_step=stride, roll_back=back,
            iters_per_group=4, max_iters_per_group=5,
        )  # fmt: skip
        one_by_one = Counter(map(tuple, islice(windows(settings), first - 1, last)))
        assert Counter({tuple(w): n for w, n in window_counts(settings, first, last)}) == one_by_one


def test_every_algorithm_can_plan_every_window():
    for algorithm in ("mix_grpo", "mix_grpo_flash", "mix_grpo_flash_star"):
        for strategy, order in itertools.product(STRATEGIES, (1, 2, 3)):
            settings = config(
                algorithm=algorithm, sample_strategy=strategy, sampling_steps=9, dpm_solver_order=order,
                iters_per_group=1, max_iters_per_group=1,
            )  # fmt: skip
            for window in islice(windows(settings), 20):
                plan = make_plan(settings, window)
                assert [s.index for s in plan if s.train] == window
                assert [s.index for s in plan if KINDS[s.kind].sde_type] == window

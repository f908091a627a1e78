"""Numbers computed with the references' formulas (tests/golden/README.md), and DPM-Solver++ against other sources."""

import hashlib
import json
import math
from itertools import islice
from pathlib import Path

from fastvideo.config import GRPOConfig
from fastvideo.rollout_plan import make_plan
from fastvideo.train_grpo_flux import rollout
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import log_prob, transition_mean
from fastvideo.utils.steps import KINDS, Step, sigma_schedule

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

GOLDEN, SHARED = Path(__file__).parent / "golden", Path(__file__).parents[2] / "shared/golden"
SUMS = {  # SHA-256 of the original files
    "mixgrpo.npz": "031a530bac97206022e923f3b8029b74914c2ca3068fa82501f3978c61784ca2",
    "windows.json": "d60512fa92117d8a159ed6fd8bcc9beb03239499420e2fe8ca7bd00fed66c09b",
}
NUMBERS = np.load(GOLDEN / "mixgrpo.npz")
WINDOWS = json.loads((GOLDEN / "windows.json").read_text())
STEP_CASES = sorted({key.split("/", 1)[1].rsplit("/", 1)[0] for key in NUMBERS if key.startswith("flow_step/")})


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(NUMBERS[key]))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equality within the tolerance in tests/golden/README.md."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-4, atol=1e-5)


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(data_json_path="unused", reward_model="shapes", **given)


@pytest.mark.parametrize("name", SUMS)
def test_the_golden_numbers_are_those_that_were_handed_out(name):
    for folder in (GOLDEN, SHARED) if SHARED.exists() else (GOLDEN,):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == SUMS[name], folder


def test_schedules():
    cases = [key for key in NUMBERS if key.startswith("sigmas/")]
    assert len(cases) == 15
    for key in cases:
        _, shift, steps = key.split("/")
        schedule = sigma_schedule(int(steps.removeprefix("steps")), float(shift.removeprefix("shift")))
        close(torch.tensor(schedule), golden(key))
        assert schedule[0] == 1 and schedule[-1] == 0


def single_step(kind: str, case: str) -> tuple[Step, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step of a golden case, and its inputs v, x and noise."""
    eta, steps, index = (part.lstrip("etasip") for part in case.split("/"))
    sigmas = sigma_schedule(int(steps), float(golden(f"flow_step/{case}/shift")))
    i = int(index)
    step = Step(i, sigmas[i], sigmas[i + 1], sigmas[1], kind, float(eta), train=True)
    return (step, *(golden(f"flow_step/{case}/{name}") for name in ("v", "x", "noise")))


def mean_and_std(step: Step, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = KINDS[step.kind].coefficients(step, ())
    x_weight, v_weight, std = torch.tensor([numbers.x, numbers.v, numbers.std])
    return transition_mean(x, v, x_weight, v_weight), std


@pytest.mark.parametrize("case", STEP_CASES)
def test_one_flow_sde_step_and_its_log_probability(case):
    step, v, x, noise = single_step("flow_sde", case)
    mean, std = mean_and_std(step, x, v)
    prev = mean + std * noise
    close(mean, golden(f"flow_step/{case}/mean"))
    close(std, golden(f"flow_step/{case}/std"))
    close(prev, golden(f"flow_step/{case}/prev"))
    close(x - step.sigma * v, golden(f"flow_step/{case}/x0"))
    close(log_prob(prev, mean, std), golden(f"flow_step/{case}/log_prob"))
    new_mean, _ = mean_and_std(step, x, golden(f"flow_step/{case}/v_new"))
    close(log_prob(golden(f"flow_step/{case}/prev"), new_mean, std), golden(f"flow_step/{case}/log_prob_new"))


@pytest.mark.parametrize("case", STEP_CASES)
def test_one_ode_step(case):
    step, v, x, _ = single_step("ode", case)
    mean, std = mean_and_std(step, x, v)
    close(mean, golden(f"flow_step/{case}/prev_ode"))
    assert std == 0


@pytest.mark.parametrize("case", STEP_CASES)
def test_one_dance_sde_step_and_its_log_probability_with_the_gaussians_constants(case):
    step, v, x, noise = single_step("dance_sde", case)
    mean, std = mean_and_std(step, x, v)
    assert float(std) == pytest.approx(step.eta * math.sqrt(step.sigma - step.sigma_next))
    prev = mean + std * noise
    constants = -math.log(std) - 0.5 * math.log(2 * math.pi)
    close(prev, golden(f"dance_step/{case}/prev"))
    close(x - step.sigma * v, golden(f"dance_step/{case}/x0"))
    close(log_prob(prev, mean, std), golden(f"dance_step/{case}/log_prob_without_constant") + constants)
    new_mean, _ = mean_and_std(step, x, golden(f"flow_step/{case}/v_new"))
    new = log_prob(golden(f"dance_step/{case}/prev"), new_mean, std)
    close(new, golden(f"dance_step/{case}/log_prob_new_without_constant") + constants)


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case):
    strategy, *rest = case.split("|")
    values = dict(part.split("=") for part in rest)
    settings = config(
        sample_strategy=strategy,
        prog_overlap=values["overlap"] == "True",
        prog_overlap_step=int(values["stride"]),
        roll_back=values["roll_back"] == "True",
        sampling_steps=int(values["steps"]),
        group_size=int(values["group"]),
        iters_per_group=int(values["iters"]),
    )
    expected: list[list[int]] = []
    for window in WINDOWS[case]:  # an empty window is a bug of the reference at the end of its schedule
        if window:
            expected.append(window)
        elif not settings.roll_back:
            expected.append(expected[-1])
    assert len(expected) > 290
    assert list(islice(windows(settings), len(expected))) == expected


ROLLOUTS = {
    "mix": {},
    "dance_all": {"training_strategy": "all", "drop_last_sample": False, "algorithm": "dance_grpo"},
    "flash": {"dpm_algorithm_type": "dpmsolver++"},
    "flash_star": {"dpm_algorithm_type": "dpmsolver++", "prog_overlap_step": 0},
    "flash_o1": {"dpm_algorithm_type": "dpmsolver++", "dpm_solver_order": 1},
}


@pytest.mark.parametrize("case", ROLLOUTS)
def test_whole_rollouts(case):
    data = {name: golden(f"rollout/{case}/{name}") for name in ("A", "b", "x", "noises", "log_probs", "all_latents")}
    window = golden(f"rollout/{case}/window").tolist()
    settings = config(
        sampling_steps=int(golden(f"rollout/{case}/steps")),
        shift=float(golden(f"rollout/{case}/shift")),
        eta=float(golden(f"rollout/{case}/eta")),
        dpm_post_compress_ratio=float(golden(f"rollout/{case}/ratio")),
        init_same_noise=False,
        num_generations=2,
        gradient_accumulation_steps=1,
        **ROLLOUTS[case],
    )
    plan = make_plan(settings, window)
    assert settings.algorithm == {
        "mix": "mix_grpo",
        "dance_all": "dance_grpo",
        "flash_star": "mix_grpo_flash_star",
    }.get(case, "mix_grpo_flash")
    visited = []

    def velocity(x, sigma, prompt_index):
        visited.append(x)
        return torch.tanh(x @ data["A"]) + data["b"]

    result = rollout(plan, data["x"], 1, velocity, lambda stream, rows: data["noises"][stream - 1])
    assert len(visited) == len(plan) == int(golden(f"rollout/{case}/calls"))
    close(torch.stack([*visited, result.latents], 1), data["all_latents"])
    close(result.latents, golden(f"rollout/{case}/final"))
    trained = window[:-1] if case == "dance_all" else window  # the very last transition is not trained
    assert sorted(result.log_probs) == trained
    for position in trained:
        close(result.before[position], data["all_latents"][:, position])
        close(result.after[position], data["all_latents"][:, position + 1])
        # The references' DanceGRPO leaves the constants of the Gaussian out.
        std = settings.eta * math.sqrt(plan[position].sigma - plan[position].sigma_next)
        constant = -math.log(std) - 0.5 * math.log(2 * math.pi) if case == "dance_all" else 0.0
        close(result.log_probs[position], data["log_probs"][:, position] + constant)


# --- DPM-Solver++ -----------------------------------------------------------------------------------------------------


def solver_plan(sigmas: list[float], order: int, solver_type: str) -> Plan:
    """DPM-Solver++ alone on a schedule that ends at 0, with the orders of MixGRPO-Flash's tail."""
    last = len(sigmas) - 1
    orders = [min(order, i + 1, last - i) for i in range(last)]
    return Plan(
        tuple(
            Step(i, sigmas[i], sigmas[i + 1], sigmas[1], "dpmpp", order=orders[i], solver_type=solver_type)
            for i in range(last)
        )
    )


@pytest.mark.parametrize("order,solver_type", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_agrees_with_diffusers(order, solver_type):
    sigmas = [s for s in sigma_schedule(10, 3.0) if s < 1]
    generator = torch.Generator().manual_seed(0)
    matrix, start = (torch.randn(shape, generator=generator) for shape in ((8, 8), (2, 6, 8)))

    def velocity(x, sigma, prompt_index):
        return torch.tanh(x @ matrix / 2) * (1 + sigma[:, None, None])

    ours = rollout(solver_plan(sigmas, order, solver_type), start, 1, velocity, None).latents

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type=solver_type,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    x = start
    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, torch.full((2,), sigma), None), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


SPREAD = 0.5  # standard deviation of Gaussian data, for which the flow has a closed form


def exact_x(sigma: float) -> float:
    """The trajectory of the probability-flow ODE with x = 1 at σ = 1: proportional to the marginal's deviation."""
    return math.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2)


def exact_x0(sigma: float) -> float:
    """x − σ·v with the exact velocity E[noise − data | x]."""
    velocity = exact_x(sigma) * (sigma - (1 - sigma) * SPREAD**2) / exact_x(sigma) ** 2
    return exact_x(sigma) - sigma * velocity


def one_step_error(order: int, solver_type: str, width: float) -> float:
    """Error of one solver step of the given width in λ, from exact history."""
    lambdas = [-1.0 + width * i for i in range(-2, 2)]
    sigmas = [1 / (1 + math.exp(value)) for value in lambdas]
    plan = tuple(
        Step(i, sigmas[i], sigmas[i + 1], sigmas[1], "dpmpp", order=min(order, i + 1), solver_type=solver_type)
        for i in range(3)
    )
    numbers = Plan(plan).coefficients[-1]
    now, target = sigmas[2], sigmas[3]
    velocity = (exact_x(now) - exact_x0(now)) / now
    found = numbers.x * exact_x(now) + numbers.v * velocity
    found += sum(weight * exact_x0(sigmas[1 - n]) for n, weight in enumerate(numbers.history))
    return abs(found - exact_x(target))


@pytest.mark.parametrize("order,solver_type,exponent", [(1, "midpoint", 2), (2, "midpoint", 3), (2, "heun", 3)])
def test_dpm_solver_has_the_order_it_claims_on_a_flow_with_a_known_solution(order, solver_type, exponent):
    coarse, fine = (one_step_error(order, solver_type, width) for width in (0.02, 0.01))
    assert math.log2(coarse / fine) == pytest.approx(exponent, abs=0.15)


def test_dpm_solver_of_order_3_is_more_accurate_than_order_2():
    """The published multistep formula (also in diffusers) gives the second difference half the weight of a true third
    order. So the error is smaller than with order 2, but of the same order.
    """
    assert one_step_error(3, "midpoint", 0.02) < one_step_error(2, "midpoint", 0.02) / 3


def test_dpm_solver_steps_that_look_back_to_pure_noise_are_finite():
    """λ is −∞ at σ = 1, so there is no difference to extrapolate, and the step has a lower order."""
    for order in (2, 3):
        settings = config(
            sampling_steps=8, group_size=1, dpm_algorithm_type="dpmsolver++", dpm_solver_order=order,
            dpm_post_compress_ratio=1.0,
        )  # fmt: skip
        numbers = make_plan(settings, [0]).coefficients
        assert all(math.isfinite(n) for c in numbers for n in (c.x, c.v, c.std, *c.history))
        assert numbers[1].history[0] == 0

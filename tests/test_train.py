"""Training through the command line on the tiny pipeline: numbers, files, restarts and errors of a run."""

import json
import math
import threading
import time
from contextlib import contextmanager

from fastvideo import train_grpo_flux
from fastvideo.runtime.engines import Engine
from fastvideo.utils import advantages as advantage_maths
from fastvideo.utils import transitions
from fastvideo.utils.steps import SDE_KINDS

import custom_rewards
import numpy as np
import pytest
import torch
from conftest import (
    PROMPTS,
    TIME_LIMIT,
    Run,
    assert_same_update,
    base_weights,
    forget_accelerator,
    relative_difference,
    same_weights,
    torchrun,
)
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from PIL import Image

COMPONENTS = ("binding", "form", "clean")


# --- same seed, same numbers ------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run(train):
    settings = {"max_train_steps": 3, "iters_per_group": 1, "advantage_rerange_strategy": "random"}
    first, again, other = (train(**settings, seed=seed) for seed in (5, 5, 6))
    assert first.numbers() == again.numbers()
    assert same_weights(first.weights(), again.weights())
    assert first.numbers() != other.numbers()


@pytest.mark.parametrize("settings", [*({"sde_type": name} for name in SDE_KINDS), {"init_same_noise": False}], ids=str)
def test_the_ratio_is_exactly_one_before_the_first_update_where_batch_shapes_agree(train, settings):
    run = train(rollout_batch_size=1, train_micro_batch_size=1, **settings)
    assert [line["ratio_first_deviation"] for line in run.metrics] == [0.0, 0.0]
    run = train(train_micro_batch_size=3, train_batch_size=2, gradient_checkpointing=True, **settings)
    assert all(line["ratio_first_deviation"] <= 1e-6 for line in run.metrics)
    assert all(line["ratio_max_deviation"] > 1e-6 for line in run.metrics)  # the second step's policy has moved


def test_the_first_deviation_covers_the_first_optimizer_step_alone(train):
    """If samples draw random steps, optimizer steps have different numbers of micro-batches."""
    run = train(
        algorithm="dance_grpo", timestep_fraction=0.4, sampling_steps=4, num_generations=12,
        gradient_accumulation_steps=6, train_batch_size=2, learning_rate=1e-3, max_train_steps=4,
    )  # fmt: skip
    assert all(line["ratio_first_deviation"] <= 1e-6 < line["ratio_max_deviation"] for line in run.metrics)


@pytest.fixture(scope="module")
def reference(small_flags, tmp_path_factory) -> tuple[Run, dict]:
    """A run of two iterations on four prompts, with random windows and a random order."""
    settings = {
        "sample_strategy": "random",
        "sampling_steps": 8,
        "advantage_rerange_strategy": "random",
        "learning_rate": 1e-6,
        "reward_model": "custom_rewards:rough_brightness",
    }
    run = Run(tmp_path_factory.mktemp("reference") / "run")
    forget_accelerator()
    train_grpo_flux.main(small_flags(output_dir=run.folder, train_batch_size=4, train_micro_batch_size=2, **settings))
    return run, settings


def test_micro_batches_and_rollout_batches_change_nothing_but_speed(train, reference):
    run, settings = reference
    for rollout_size, micro in ((None, 1), (3, 5), (1, 100)):
        other = train(train_batch_size=4, train_micro_batch_size=micro, rollout_batch_size=rollout_size, **settings)
        assert_same_update(other, run)


@pytest.mark.long  # C++ is compiled for minutes
def test_compiled_blocks_change_nothing_but_speed(train, reference):
    run, settings = reference
    # Sampled and trained two rows at a time: float32 graphs of two and of three rows round differently on some CPUs.
    settings = settings | {"train_micro_batch_size": 2, "gradient_checkpointing": True}
    compiled = train(compile="true", train_batch_size=4, **settings)
    assert_same_update(compiled, run)
    assert [line["ratio_first_deviation"] for line in compiled.metrics] == [0, 0]


def test_gradient_checkpointing_changes_nothing_but_memory(train, reference):
    run, settings = reference
    for share in (1.0, 0.5):
        other = train(train_batch_size=4, gradient_checkpointing=True, selective_checkpointing=share, **settings)
        assert_same_update(other, run)


def test_blocks_computed_again_in_the_backward_pass_use_the_forward_passes_attention(train, monkeypatch):
    """Another attention backend saves other tensors, which would be an error."""
    open_contexts, calls, forward = [], [], FluxTransformerBlock.forward

    @contextmanager
    def attention(_engine: Engine, training: bool):
        open_contexts.append(training)
        yield
        open_contexts.pop()

    def counted(block, *args, **kwargs):
        calls.append(open_contexts[-1] if open_contexts else None)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(Engine, "attention", attention)
    monkeypatch.setattr(FluxTransformerBlock, "forward", counted)
    passes = []
    for checkpointing in (False, True):
        train(max_train_steps=1, gradient_checkpointing=checkpointing)
        passes.append(calls.count(True))
        assert None not in calls
        calls.clear()
    assert passes[1] > passes[0] > 0


@pytest.mark.slow
def test_the_update_does_not_depend_on_how_prompts_lie_on_processes(
    train, reference, flags, run_at, tmp_path, subprocess_environment
):
    run, settings = reference
    # prompts_per_iteration overrides train_batch_size
    assert_same_update(train(prompts_per_iteration=4, train_batch_size=1, **settings), run)
    argv = flags(output_dir=tmp_path / "two", image_log_steps=1, prompts_per_iteration=4, **settings)
    done = torchrun(argv, subprocess_environment)
    assert done.returncode == 0, done.stderr
    assert "4 prompts x 4 samples = 16 images per iteration on 2 processes" in done.stdout
    assert_same_update(run_at("two"), run)
    with Image.open(tmp_path / "two/images/iteration_000002.png") as grid:
        assert grid.size == (64, 64)
    done = torchrun(argv, subprocess_environment)  # bad input ends all processes without waiting
    assert done.returncode != 0 and "holds a run already" in done.stderr


@pytest.mark.slow
def test_all_processes_skip_a_step_that_is_bad_on_one(flags, run_at, tmp_path, subprocess_environment):
    argv = flags(output_dir=tmp_path / "spoiled", reward_model="custom_rewards:spoils_one_step_of_rank_1")
    done = torchrun(argv, subprocess_environment)
    assert done.returncode == 0, done.stderr
    lines = run_at("spoiled").metrics
    assert [(line["optimizer_steps"], line["skipped_steps"]) for line in lines] == [(1, 1), (2, 0)]
    assert all(tensor.isfinite().all() for tensor in run_at("spoiled").weights().values())


# --- optimizer steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 6])
def test_an_iteration_makes_g_over_k_optimizer_steps_and_each_changes_the_weights(train, monkeypatch, k):
    seen: list[torch.Tensor] = []
    real = torch.optim.AdamW.step

    def parameters(optimizer: torch.optim.AdamW) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for group in optimizer.param_groups for p in group["params"]])

    def recording(optimizer, *args, **kwargs):
        seen.append(parameters(optimizer))
        real(optimizer, *args, **kwargs)
        seen.append(parameters(optimizer))

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    run = train(num_generations=6, gradient_accumulation_steps=k)
    assert [line["optimizer_steps"] for line in run.metrics] == [6 // k] * 2
    before, after = seen[::2], seen[1::2]
    assert len(after) == 2 * (6 // k)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, before[1:], strict=False))  # nothing moves in between


def test_the_gpu_has_the_next_steps_work_before_the_cpu_waits_for_a_step(train, monkeypatch):
    begun, known, backward, wait = [], [], torch.Tensor.backward, Engine.gradient_norm
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **given: begun.append(1) or backward(*args, **given))
    monkeypatch.setattr(Engine, "gradient_norm", lambda engine: known.append(len(begun)) or wait(engine))
    train(max_train_steps=1, num_generations=6, gradient_accumulation_steps=2, train_micro_batch_size=100)
    assert known == [2, 3, 3]  # of three steps with a backward pass each


def test_the_gradient_is_clipped_to_max_grad_norm_and_logged_unclipped(train):
    settings = {"gradient_accumulation_steps": 4, "max_train_steps": 1}
    free, clipped = train(max_grad_norm=1e3, **settings), train(max_grad_norm=1e-3, **settings)
    norm = free.metrics[0]["grad_norm"]
    assert clipped.metrics[0]["grad_norm"] == norm > 1e-3
    # AdamW's first moment after one step is 0.1 of the gradient.
    assert [10 * run.gradient().norm().item() for run in (free, clipped)] == pytest.approx([norm, 1e-3], rel=1e-3)


def test_the_learning_rate_schedule_counts_optimizer_steps(train):
    run = train(lr_scheduler="linear", learning_rate=1e-4, lr_warmup_steps=2, max_train_steps=4)
    # 8 optimizer steps, 6 of them after the warm-up. After 2, 4, 6 and 8 steps, 6, 4, 2 and 0 steps are left.
    assert [line["lr"] for line in run.metrics] == pytest.approx([1e-4, 1e-4 * 4 / 6, 1e-4 * 2 / 6, 0])


def test_the_order_of_samples_matters_only_between_optimizer_steps(train):
    whole = {"gradient_accumulation_steps": 4, "max_train_steps": 1}
    plain = train(**whole)
    for strategy in ("random", "balance"):
        assert (
            relative_difference(train(advantage_rerange_strategy=strategy, **whole).gradient(), plain.gradient()) < 1e-5
        )
    half = {"gradient_accumulation_steps": 2, "max_train_steps": 1}
    assert (
        relative_difference(train(advantage_rerange_strategy="random", **half).gradient(), train(**half).gradient())
        > 1e-3
    )


# --- rewards ----------------------------------------------------------------------------------------------------------

SHARES = {  # the share of the way from start to end at progress p, with γ
    "linear": lambda p, gamma: p,
    "exponential": lambda p, gamma: p ** (gamma or 2),
    "logarithmic": lambda p, gamma: 1 - (1 - p) ** (gamma or 0.5),
    "cosine": lambda p, gamma: (1 - math.cos(math.pi * p)) / 2,
}


def expected_weights(schedule: str, p: float, start=(0.5, 0.3, 0.2), end=(0.2, 0.5, 0.3), gamma=None) -> np.ndarray:
    weights = np.array([s + (e - s) * SHARES[schedule](p, gamma) for s, e in zip(start, end, strict=True)])
    return weights / weights.sum()


@pytest.mark.parametrize(
    "schedule,given",
    [
        ("linear", {}),
        ("exponential", {}),
        ("logarithmic", {"gamma": 3.0}),
        ("cosine", {"start": (5, 0, 1), "end": (0, 1, 1)}),
    ],
)
def test_logged_weights_are_the_formula_and_the_logged_reward_their_weighted_sum(train, schedule, given):
    flags = {f"granular_{'gamma' if k == 'gamma' else f'{k}_weights'}": v for k, v in given.items()}
    run = train(granular_schedule=schedule, max_train_steps=4, train_batch_size=2, **flags)
    for number, line in enumerate(run.metrics, start=1):
        weights = [line[f"granular_weight_{name}"] for name in COMPONENTS]
        assert weights == pytest.approx(expected_weights(schedule, number / 4, **given), abs=1e-9)
        total = sum(w * line[f"reward_ShapesRewardModel_{c}"] for w, c in zip(weights, COMPONENTS, strict=True))
        assert line["reward"] == pytest.approx(total, abs=1e-9)
        assert line["reward_ShapesRewardModel"] == pytest.approx(total, abs=1e-9)
        assert 0 <= line["reward_ShapesRewardModel_right"] <= 1  # reported, and in no sum


def test_a_mix_logs_every_model_and_the_weighted_total(train):
    run = train(reward_model="shapes:1,jpeg_compressibility:3", multi_reward_mix="reward_aggr")
    for line in run.metrics:
        parts = line["reward_ShapesRewardModel"], line["reward_JpegCompressibilityRewardModel"]
        assert line["reward"] == pytest.approx(0.25 * parts[0] + 0.75 * parts[1], abs=1e-9)


@pytest.fixture
def advantage_calls(monkeypatch) -> list:
    """Arguments and results of the trainer's calls of mix_advantages."""
    calls, real = [], advantage_maths.mix_advantages

    def recording(scores, *rest):
        calls.append((scores, real(scores, *rest)[0]))
        return real(scores, *rest)

    monkeypatch.setattr(advantage_maths, "mix_advantages", recording)
    return calls


def normalised(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-8)


@pytest.mark.parametrize("progress", ["train_step", "batch_index"])
@pytest.mark.parametrize("mix", ["raw", "advantage"])
def test_granular_mix_and_progress_reach_the_advantages(train, advantage_calls, mix, progress):
    train(granular_mix=mix, granular_progress=progress, train_batch_size=2, max_train_steps=2)
    for number, (scores, advantages) in enumerate(advantage_calls, start=1):
        places = [number / 2] * 4 if progress == "train_step" else [i / 4 for i in range(4)]
        weights = np.stack([expected_weights("linear", p) for p in places], axis=-1)  # [component, place in the group]
        parts = [scores[f"ShapesRewardModel_{name}"] for name in COMPONENTS]
        total = sum(w * part for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(scores["ShapesRewardModel"], total, atol=1e-9)
        if mix == "raw":
            expected = normalised(total)
        else:
            expected = sum(w * normalised(part) for w, part in zip(weights, parts, strict=True))
        assert scores["ShapesRewardModel"].shape == (2, 4)
        np.testing.assert_allclose(advantages, expected, atol=1e-4)


def test_batch_index_logs_the_mean_weights_of_a_group(train):
    (line,) = train(granular_progress="batch_index", max_train_steps=1).metrics
    mean = np.mean([expected_weights("linear", i / 4) for i in range(4)], axis=0)
    assert [line[f"granular_weight_{name}"] for name in COMPONENTS] == pytest.approx(mean, abs=1e-9)


def test_a_prompt_that_comes_twice_in_an_iteration_is_two_groups_with_noise_of_their_own(
    train, advantage_calls, tmp_path
):
    (tmp_path / "one.txt").write_text(f"{PROMPTS[0]}\n")
    given = {"prompts_file": tmp_path / "one.txt", "reward_model": "custom_rewards:brightness"}
    train(**given, train_batch_size=2, max_train_steps=1)
    ((scores, advantages),) = advantage_calls
    assert not np.intersect1d(*scores["brightness"]).size
    np.testing.assert_allclose(advantages, normalised(scores["brightness"]), atol=1e-4)


def test_advantages_without_groups(train, advantage_calls):
    train(use_group=False, multi_reward_mix="reward_aggr", train_batch_size=2, max_train_steps=1)
    ((scores, advantages),) = advantage_calls
    flat = scores["ShapesRewardModel"].reshape(1, -1)
    np.testing.assert_allclose(advantages.reshape(1, -1), normalised(flat), atol=1e-4)


def test_a_group_without_spread_is_counted_and_leaves_the_weights_to_weight_decay(train, tiny_flux):
    run = train(reward_model="custom_rewards:constant", train_batch_size=2, weight_decay=0)
    assert [line["zero_spread_groups"] for line in run.metrics] == [2, 2]
    assert [line["grad_norm"] for line in run.metrics] == [0, 0]
    base = base_weights(tiny_flux)
    assert same_weights(run.weights(), base)
    run = train(reward_model="custom_rewards:constant", weight_decay=0.1, learning_rate=0.01)
    for name, tensor in run.weights().items():  # four optimizer steps of 1 − 0.1 · 0.01
        torch.testing.assert_close(tensor, base[name] * 0.999**4)


def test_a_failed_sample_is_counted_and_its_group_still_teaches(train, advantage_calls):
    run = train(reward_model="custom_rewards:first_of_each_batch_fails")
    assert [line["failed_rewards"] for line in run.metrics] == [1, 1]
    assert [line["optimizer_steps"] for line in run.metrics] == [2, 2]
    for scores, advantages in advantage_calls:
        assert np.isnan(scores["first_of_each_batch_fails"][0, 0]) and advantages[0, 0] == 0
        assert np.abs(advantages[0, 1:]).min() > 0 and math.isfinite(advantages.sum())
    assert all(math.isfinite(line["reward"]) for line in run.metrics)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["never", "infinite"])
def test_rewards_that_are_never_finite_stop_the_run_with_sound_weights(train, run_at, tiny_flux, capsys, reward):
    with pytest.raises(SystemExit) as stop:
        train("out", reward_model=f"custom_rewards:{reward}", max_train_steps=20, max_skipped_steps=5)
    assert stop.value.code == 1
    lines = run_at("out").metrics
    assert [line["step"] for line in lines] == [1, 2, 3]  # 2 steps per iteration: 6 is the first even count ≥ 5
    assert [(line["skipped_steps"], line["optimizer_steps"], line["failed_rewards"]) for line in lines] == [
        (2, 0, 4)
    ] * 3
    assert lines[0]["reward"] is None
    assert same_weights(run_at("out").weights(), base_weights(tiny_flux))
    message = capsys.readouterr().err.splitlines()[-1]
    assert "stopped: no score came for any picture, the last time in iteration 3; 6 optimizer steps in a row" in message


def test_more_prompts_an_iteration_than_there_are_are_trained_with_a_warning(train, flags, capsys):
    given, text = {"train_batch_size": 7, "max_train_steps": 1}, "an iteration takes 7 prompts of only 5: some repeat"
    train_grpo_flux.main(flags(**given, dry_run=True))
    assert text in capsys.readouterr().err
    assert train(**given).metrics[0]["images"] == 7 * 4


def test_one_bad_iteration_is_skipped_and_the_run_goes_on(train, tiny_flux, warned):
    settings = {"max_train_steps": 5, "max_skipped_steps": 3, "checkpointing_steps": 1}
    with warned("iteration [1-5]: all 4 scores failed; nothing is trained"):
        run = train(reward_model="custom_rewards:red_prompts_fail", **settings)
    lines = run.metrics
    (bad,) = (i for i, line in enumerate(lines) if line["reward"] is None)  # one prompt of the five is red
    assert lines[bad]["skipped_steps"] == 2 and lines[bad]["failed_rewards"] == 4
    assert [line["optimizer_steps"] for i, line in enumerate(lines) if i != bad] == [2] * 4
    before = run.weights(bad - 1) if bad else base_weights(tiny_flux)
    assert same_weights(run.weights(bad), before)


@pytest.fixture
def spoil_loss(monkeypatch):
    """spoil_loss(calls) makes the loss of those calls of policy_loss (from 0) infinite."""

    def spoil(which: range) -> None:
        real, count = train_grpo_flux.policy_loss, iter(range(10**6))

        def policy_loss(*args):
            loss, parts = real(*args)
            return (loss * math.inf if next(count) in which else loss), parts

        monkeypatch.setattr(train_grpo_flux, "policy_loss", policy_loss)

    return spoil


def test_a_step_with_a_bad_gradient_changes_neither_weights_nor_moments_nor_schedule(train, spoil_loss):
    settings = {"train_micro_batch_size": 100, "checkpointing_steps": 1, "lr_scheduler": "linear"}
    good = train(**settings)
    spoil_loss(range(2, 4))  # one call an optimizer step: both of the second iteration
    run = train(**settings)
    assert [(line["optimizer_steps"], line["skipped_steps"]) for line in run.metrics] == [(2, 0), (0, 2)]
    assert same_weights(run.weights(1), run.weights(0)) and same_weights(run.weights(0), good.weights(0))
    assert torch.equal(run.gradient(), good.gradient(0))
    assert run.metrics[1]["lr"] == run.metrics[0]["lr"] != good.metrics[1]["lr"]


def test_bad_steps_count_only_in_a_row(train, spoil_loss):
    spoil_loss(range(0, 100, 2))
    run = train(train_micro_batch_size=100, max_train_steps=4, max_skipped_steps=2)
    assert [(line["optimizer_steps"], line["skipped_steps"]) for line in run.metrics] == [(1, 1)] * 4


def test_gradients_that_stay_bad_stop_the_run_with_sound_weights(train, run_at, spoil_loss, capsys):
    spoil_loss(range(2, 100))
    with pytest.raises(SystemExit) as stop:
        train("out", train_micro_batch_size=100, max_train_steps=20, max_skipped_steps=3)
    assert stop.value.code == 1 and "3 optimizer steps in a row" in capsys.readouterr().err
    run = run_at("out")
    assert [line["skipped_steps"] for line in run.metrics] == [0, 2, 1]
    assert [path.name.split("-")[1] for path in run.checkpoints] == ["3"]
    assert all(tensor.isfinite().all() for tensor in (*run.weights().values(), run.gradient()))
    FluxTransformer2DModel.from_pretrained(run.checkpoints[-1])


# --- files of a run ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_transformer_that_diffusers_loads_and_differs_from_the_base(train, tiny_flux):
    run = train()
    tuned = FluxTransformer2DModel.from_pretrained(run.checkpoints[-1])
    base = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer")
    assert dict(tuned.config).keys() == dict(base.config).keys() and tuned.config.guidance_embeds
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    moved = [not torch.equal(a, b.float()) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert all(moved)
    assert sorted(path.name for path in run.checkpoints[-1].iterdir()) == [
        "checkpoint.json", "config.json", "diffusion_pytorch_model.safetensors", "optimizer"
    ]  # fmt: skip


def test_a_run_stops_at_exactly_max_train_steps_and_always_saves_the_end(train):
    run = train(max_train_steps=6, checkpointing_steps=4, train_batch_size=2)
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]
    # 5 prompts, 2 per iteration: iteration 4 starts after 6 prompts, in the second pass over the prompts
    assert [line["epoch"] for line in run.metrics] == [0, 0, 0, 1, 1, 2]
    assert [path.name for path in run.checkpoints] == ["checkpoint-4-1", "checkpoint-6-2"]
    assert not list(run.folder.glob(".*"))  # no leftovers of atomic writes


def test_metrics_have_what_the_documentation_promises(train):
    run = train(train_batch_size=2, num_generations=6, gradient_accumulation_steps=3, iters_per_group=1)
    promised = (
        "step epoch images optimizer_steps skipped_steps nfe lr loss policy_loss kl_loss ratio_mean "
        "ratio_max_deviation clip_frac grad_norm reward reward_std failed_rewards zero_spread_groups window "
        "seconds_rollout seconds_decode seconds_reward seconds_train seconds_total"
    ).split()
    for start, line in enumerate(run.metrics):
        assert not set(promised) - line.keys()
        assert line["images"] == 12 and line["window"] == [start, start + 1]
        assert line["nfe"] == 2 * ((start + 1) + (6 - start - 1) * 6)
        assert line["grad_norm"] > 0 and 0 <= line["clip_frac"] <= 1
        assert line["seconds_total"] >= line["seconds_rollout"] + line["seconds_train"] > 0


def test_the_logged_loss_and_ratio_describe_all_steps_of_the_iteration(train):
    """With one optimizer step the ratio is 1, and the loss is minus the mean clamped advantage."""
    run = train(gradient_accumulation_steps=4, kl_coeff=1.0, max_train_steps=1)
    (line,) = run.metrics
    assert line["ratio_mean"] == pytest.approx(1, abs=1e-6) and line["clip_frac"] == 0
    assert line["loss"] == pytest.approx(0, abs=1e-5) and line["kl_loss"] == pytest.approx(0, abs=1e-10)
    # A large learning rate pushes the later steps of an iteration out of the clip range.
    (line,) = train(learning_rate=1e-2, clip_range=1e-4, max_train_steps=1).metrics
    assert line["ratio_max_deviation"] > 1e-4 and line["clip_frac"] > 0.4 and line["kl_loss"] > 0


def test_picture_grids_show_a_group(train):
    run = train(image_log_steps=2, max_train_steps=4, num_generations=6, gradient_accumulation_steps=3)
    paths = sorted(run.folder.glob("images/*"))
    assert [path.name for path in paths] == ["iteration_000002.png", "iteration_000004.png"]
    with Image.open(paths[0]) as grid:
        assert grid.size == (3 * 32, 2 * 32)
        assert np.asarray(grid).std() > 1


def test_args_json_holds_the_settings_and_no_secrets(train, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush" * 10)
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    run = train(
        max_train_steps=1, eta=0.5, unified_reward_url="http://me:hush1@host/v1,https://you:hush2@other/v1",
        image_reward_http_proxy="http://me:hush3@proxy:8080", pick_score_https_proxy="me:hush4@proxy:8080",
    )  # fmt: skip
    text = (run.folder / "args.json").read_text()
    assert "hush" not in text
    saved = json.loads(text)
    assert saved["eta"] == 0.5 and saved["sampling_steps"] == 6 and saved["algorithm"] == "mix_grpo"
    assert "wandb_key" not in saved and saved["image_reward_http_proxy"] == "http://proxy:8080"


def test_an_output_directory_in_use_is_refused_and_left_alone(train, run_at, capsys):
    train("out")
    before = {path: path.read_bytes() for path in run_at("out").folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        train("out", eta=0.3)
    assert stop.value.code == 2
    assert "--output_dir" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in run_at("out").folder.rglob("*") if path.is_file()} == before


def wandb_history(file) -> list[dict]:
    """The log of an offline wandb run, one dict per step."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        (record := Record()).ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return found


@pytest.mark.slow
def test_wandb_gets_what_metrics_jsonl_gets_offline_without_a_key(train, prompts_file, monkeypatch, tmp_path, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(
        use_wandb=True, image_log_steps=1, max_train_steps=1, experiment_name="mine", eval_steps=1,
        eval_prompts=prompts_file,
    )  # fmt: skip
    (folder,) = (run.folder / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    record = json.loads((run.folder / "wandb.json").read_text())
    assert record["folders"] == [str(folder)] and record["sync"] == f"wandb sync --append {folder}"
    assert record["sync"] in capsys.readouterr().out
    deadline = time.monotonic() + TIME_LIMIT  # another process writes the file, on a busy machine a while later
    while len(wandb_history(file)) < len(run.metrics) and time.monotonic() < deadline:
        time.sleep(0.5)
    for line, logged in zip(run.metrics, wandb_history(file), strict=True):
        assert line.items() <= logged.items()
        assert logged["evaluation_samples.captions"] == list(PROMPTS)
        assert logged["evaluation_samples.count"] == len(PROMPTS)
        captions = logged.get("samples.captions", [])
        assert len(captions) == line["step"] and set(captions) <= set(PROMPTS)


# --- going on ---------------------------------------------------------------------------------------------------------

# Uses everything that has a state: a schedule, an average, a moving window, random orders.
STATEFUL = {
    "max_train_steps": 5,
    "checkpointing_steps": 2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "learning_rate": 1e-4,
    "ema_decay": 0.9,
    "iters_per_group": 1,
    "advantage_rerange_strategy": "random",
    "train_batch_size": 2,
    "image_log_steps": 1,
}


def assert_same_run(a: Run, b: Run) -> None:
    assert a.numbers() == b.numbers()
    pictures, others = ({p.name: p.read_bytes() for p in run.folder.glob("images/*.png")} for run in (a, b))
    assert pictures == others and len(pictures) == len(a.metrics)
    assert [path.name for path in a.checkpoints] == [path.name for path in b.checkpoints]
    for part in (".", "ema"):
        assert same_weights(a.weights(part=part), b.weights(part=part)), part
    assert torch.equal(a.gradient(), b.gradient())


def test_a_resumed_run_equals_an_uninterrupted_one(train, run_at, monkeypatch):
    whole = train("whole", **STATEFUL)
    real = train_grpo_flux.Trainer.iteration

    def dies_at_4(trainer, *args):
        if trainer.progress.iteration == 3:
            raise KeyboardInterrupt
        return real(trainer, *args)

    monkeypatch.setattr(train_grpo_flux.Trainer, "iteration", dies_at_4)
    with pytest.raises(KeyboardInterrupt):
        train("cut", **STATEFUL)
    monkeypatch.setattr(train_grpo_flux.Trainer, "iteration", real)
    cut = run_at("cut")
    assert [line["step"] for line in cut.metrics] == [1, 2, 3]  # the third comes again
    with open(cut.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # a line cut off by a kill
    (cut.folder / ".checkpoint-4-1.part").mkdir()  # and a checkpoint cut off
    train("cut", **STATEFUL, resume_from_checkpoint="latest")
    assert_same_run(cut, whole)


def test_a_checkpoint_of_any_folder_can_be_resumed_from(train):
    whole = train("whole", **STATEFUL)
    rest = train("rest", **STATEFUL, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[2:]
    assert same_weights(rest.weights(), whole.weights())


def test_a_checkpoint_of_one_run_is_not_continued_in_the_folder_of_another(train, capsys):
    one, other = train("one", max_train_steps=2), train("other", max_train_steps=4, eta=0.3)
    before = other.metrics
    with pytest.raises(SystemExit) as stop:
        train("other", max_train_steps=4, resume_from_checkpoint=one.checkpoints[-1])
    assert stop.value.code == 2 and "--output_dir" in capsys.readouterr().err.splitlines()[-1]
    assert other.metrics == before


def test_resuming_a_finished_run_does_nothing(train):
    whole = train("whole", **STATEFUL)
    metrics, names = whole.metrics, [path.name for path in whole.checkpoints]
    train("whole", **STATEFUL, resume_from_checkpoint="latest")
    assert whole.metrics == metrics and [path.name for path in whole.checkpoints] == names


@pytest.mark.parametrize(
    "value,message", [("latest", "no checkpoint in"), ("data", "no checkpoint of a training run; give")]
)
def test_a_checkpoint_that_is_not_there_is_refused(train, capsys, value, message):
    with pytest.raises(SystemExit) as stop:
        train(resume_from_checkpoint=value)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--resume_from_checkpoint" in error and message in error


# --- settings that change what is trained -----------------------------------------------------------------------------


def test_the_average_of_the_weights_is_saved_beside_them(train, tiny_flux):
    run = train(ema_decay=0.5, learning_rate=1e-3, max_train_steps=4)
    folder = run.checkpoints[-1] / "ema"
    average = FluxTransformer2DModel.from_pretrained(folder)
    assert average.config.guidance_embeds
    base, last, average = base_weights(tiny_flux), run.weights(), run.weights(part="ema")
    assert not same_weights(average, base) and not same_weights(average, last)
    distance = {name: sum((w[k] - base[k]).norm() ** 2 for k in base) for name, w in (("a", average), ("l", last))}
    assert distance["a"] < distance["l"]  # the average lags behind
    late = train(ema_decay=0.5, ema_start_step=2, max_train_steps=2)
    assert same_weights(late.weights(part="ema"), base)


ALGORITHMS = {
    "mix_grpo": ({}, [0, 1], 1 + 5 * 4),
    "cps": ({"sde_type": "cps", "eta": 0.5}, [0, 1], 1 + 5 * 4),
    "mix_grpo_flash": ({"algorithm": "mix_grpo_flash", "sampling_steps": 10}, [0, 1], 1 + 1 * 4 + 2 * 4),
    "mix_grpo_flash_star": ({"algorithm": "mix_grpo_flash_star", "dpm_solver_order": 3}, [0, 1], 1 + 1 * 4 + 1 * 4),
    "dance_grpo": ({"algorithm": "dance_grpo"}, [0, 1, 2, 3, 4], 1 + 5 * 4),
    "flow_grpo": ({"training_strategy": "all", "flow_grpo_sampling": True}, [0, 1, 2, 3, 4], 1 + 5 * 4),
    "own noise": ({"init_same_noise": False}, [0, 1], 6 * 4),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains(train, tiny_flux, name):
    given, window, evaluations = ALGORITHMS[name]
    run = train(**given)
    for line in run.metrics:
        assert line["window"] == window and line["nfe"] == evaluations
        assert line["optimizer_steps"] == 2 and line["grad_norm"] > 0
        assert line["ratio_first_deviation"] <= 1e-6
    assert json.loads((run.folder / "args.json").read_text())["algorithm"] == given.get(
        "algorithm", "flow_grpo" if name == "flow_grpo" else "mix_grpo"
    )
    assert not same_weights(run.weights(), base_weights(tiny_flux))


def test_a_share_of_the_steps_is_drawn_for_every_sample(train, monkeypatch):
    drawn = []
    real = transitions.trained_positions
    monkeypatch.setattr(transitions, "trained_positions", lambda *args: drawn.append(real(*args)) or drawn[-1])
    train(algorithm="dance_grpo", sampling_steps=11, timestep_fraction=0.45, train_batch_size=2)
    for positions in drawn:
        assert positions.shape == (2, 4, 4)  # ⌊10 · 0.45⌋
        assert all(len(set(row)) == 4 and set(row) <= set(range(10)) for row in positions.reshape(-1, 4).tolist())
    assert len({tuple(row) for positions in drawn for row in positions.reshape(-1, 4).tolist()}) > 10
    train(algorithm="dance_grpo", sampling_steps=11, frozen_init_timesteps=3)
    assert drawn[-1].tolist() == [[[0, 1, 2]] * 4]


def test_a_model_without_guidance_embeds_trains_from_a_prompt_file(train, schnell_flux, prompts_file):
    run = train(pretrained_model_name_or_path=schnell_flux, prompts_file=prompts_file)
    tuned = FluxTransformer2DModel.from_pretrained(run.checkpoints[-1])
    assert not tuned.config.guidance_embeds
    assert not same_weights(run.weights(), base_weights(schnell_flux))
    assert (run.folder / "rl_embeddings/prompt.json").exists()
    # A model without guidance embeds ignores the guidance scale; a model with guidance embeds uses it.
    other = train(pretrained_model_name_or_path=schnell_flux, prompts_file=prompts_file, guidance_scale=1.0)
    assert other.numbers() == run.numbers()
    assert train(guidance_scale=1.0).numbers() != train().numbers()


def test_a_prompt_file_gives_the_run_that_its_cached_embeddings_give(train, prompts_file):
    assert train(prompts_file=prompts_file).numbers() == train().numbers()


def test_bfloat16_compute_keeps_float32_weights(train):
    run = train(mixed_precision="bf16", max_train_steps=1)
    (line,) = run.metrics
    assert line["optimizer_steps"] == 2 and line["ratio_first_deviation"] < 1e-2
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.float32}
    half = train(mixed_precision="bf16", master_weight_type="bf16", max_train_steps=1)
    assert {tensor.dtype for tensor in half.weights().values()} == {torch.bfloat16}


def test_pictures_need_not_be_square(train):
    run = train(h=32, w=48, image_log_steps=1, max_train_steps=1)
    with Image.open(run.folder / "images/iteration_000001.png") as grid:
        assert grid.size == (2 * 48, 2 * 32)


def test_embeddings_may_be_read_by_other_threads(train):
    assert train(dataloader_num_workers=2).numbers() == train().numbers()


# --- scoring beside sampling ------------------------------------------------------------------------------------------


def test_pictures_are_scored_while_the_next_prompts_are_sampled(train, monkeypatch):
    sample, begun = train_grpo_flux.rollout, []
    second = threading.Event()

    def counted(*args):
        begun.append(threading.current_thread())
        if len(begun) % 2 == 0:
            second.set()
        return sample(*args)

    def patient(images, prompts):
        """Scores the first prompt's pictures only after sampling of the second prompt's pictures has started."""
        assert threading.current_thread() not in begun and second.wait(timeout=TIME_LIMIT)
        return custom_rewards.brightness(images, prompts)

    monkeypatch.setattr(train_grpo_flux, "rollout", counted)
    monkeypatch.setattr(custom_rewards, "patient", patient, raising=False)
    run = train(reward_model="custom_rewards:patient", train_batch_size=2, rollout_batch_size=4, max_train_steps=1)
    assert len(begun) == 2 and run.metrics[0]["failed_rewards"] == 0


def test_prompts_sampled_and_scored_in_parts_train_the_same(train):
    flags = dict(reward_model="custom_rewards:rough_brightness", train_batch_size=3)
    whole = train(**flags)
    for rows in (2, 4, 9):  # less than a group; one group; two, so that the last part is smaller
        assert_same_update(train(**flags, rollout_batch_size=rows), whole)


def test_a_run_ended_by_failed_scores_repeats_that_iteration_when_it_is_resumed(train, run_at, monkeypatch):
    calls = []

    def fails_in_iteration_2(images, prompts):
        calls.append(len(images))
        scores = custom_rewards.brightness(images, prompts)
        return [math.nan] * len(images) if len(calls) == 2 else scores

    monkeypatch.setattr(custom_rewards, "fails_once", fails_in_iteration_2, raising=False)
    flags = dict(reward_model="custom_rewards:fails_once", max_train_steps=3, max_reward_failures=0)
    with pytest.raises(SystemExit):
        train("out", **flags)
    assert [path.name for path in run_at("out").checkpoints] == ["checkpoint-1-0"]
    resumed = train("out", **flags, resume_from_checkpoint="latest")
    whole = train("whole", **flags)  # the reward fails no more
    assert resumed.numbers() == whole.numbers() and same_weights(resumed.weights(), whole.weights())

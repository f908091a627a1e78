"""Training runs through the command line with every real reward, on narrow random-weight checkpoints."""

import base64
import io
import itertools
import math

from fastvideo import train_grpo_flux
from fastvideo.train_grpo_flux import main

import numpy as np
import pytest
from conftest import PROMPTS, Run, assert_same_update, parts_missing, same_weights, torchrun
from PIL import Image
from reward_checkpoints import CLIP_SCORE_FOLDER, HPS_FILE, PICK_SCORE_FOLDER

HPS, CLIP, IMAGE, PICK = "HPSClipRewardModel CLIPScoreRewardModel ImageRewardModel PickScoreRewardModel".split()
UNIFIED = "UnifiedRewardModel"
COMPONENTS = ("blip", "clip", "aesthetic")
FAILING = "first_of_each_batch_fails"
OVERALL, SUMMED = {"image_reward_mode": "overall"}, {"multi_reward_mix": "reward_aggr"}
BY_PART = {"granular_mix": "advantage"}
THREE = dict.fromkeys([HPS, IMAGE, PICK], 1 / 3)
FOUR = dict.fromkeys([HPS, IMAGE, PICK, UNIFIED], 1 / 4)
LOST = [[0, 2], [], [0, 1, 2, 3]]  # per iteration, which of the 4 pictures get no score
# --reward_model, settings, {model: weight}, {model: pictures that get no score, per iteration}. The runs have each
# reward and all pairs of values of --image_reward_mode, --granular_mix, --multi_reward_mix and failing or not.
RUNS = {
    "granular": ("image_reward", {}, {IMAGE: 1}, {}),
    "granular by component": ("image_reward", BY_PART, {IMAGE: 1}, {}),
    "overall": ("image_reward", OVERALL | SUMMED, {IMAGE: 1}, {}),
    "weighted mix": ("hpsv2_clip_score", {"hps_weight": 3} | SUMMED, {HPS: 0.75, CLIP: 0.25}, {}),
    "custom reward fails": (
        f"pick_score:2,custom_rewards:{FAILING}", {}, {PICK: 2 / 3, FAILING: 1 / 3}, {FAILING: [[0], [0]]},
    ),
    "multi_reward": ("multi_reward", OVERALL, THREE, {}),
    "multi_reward with a server": ("multi_reward", {}, FOUR, {UNIFIED: [[], []]}),
    "server fails": ("multi_reward", OVERALL | SUMMED, FOUR, {UNIFIED: LOST}),
    "server fails, by component": ("multi_reward", BY_PART, FOUR, {UNIFIED: LOST}),
}  # fmt: skip


@pytest.fixture
def train_with(narrow_rewards, train):
    """train_with(reward_model, name=value, ...): a run on the narrow checkpoints."""
    paths = {
        "hps_path": narrow_rewards / "hps_ckpt" / HPS_FILE,
        "clip_score_path": narrow_rewards / CLIP_SCORE_FOLDER,
        "pick_score_path": narrow_rewards / PICK_SCORE_FOLDER,
        "image_reward_score_dir": narrow_rewards / "image_reward_ckpt",
    }
    return lambda reward, **given: train(reward_model=reward, **paths, **given)


def test_a_run_prints_the_normalised_weights_first(flags, capsys):
    with parts_missing():
        main(flags(dry_run=True, reward_model="hpsv2,image_reward:0.5"))
    assert "rewards: hpsv2 0.6667, image_reward 0.3333\n" in capsys.readouterr().out


@pytest.fixture
def advantages(monkeypatch):
    """[(scores {name: [P, pictures]}, advantages {position: [P, G]})], filled by each iteration of a run."""
    seen, compute = [], train_grpo_flux.plan_advantages

    def watched(config, plan, scores, *rest):
        found = compute(config, plan, scores, *rest)
        seen.append((scores, found[0]))
        return found

    monkeypatch.setattr(train_grpo_flux, "plan_advantages", watched)
    return seen


def normalised(scores: np.ndarray) -> np.ndarray:
    """(R - mean)/(std + 1e-8) of a group [G] over its valid scores. A failed score, or a single valid one, gets 0."""
    valid = scores[np.isfinite(scores)]
    if len(valid) < 2:
        return np.zeros(len(scores))
    return np.nan_to_num((scores - valid.mean()) / (valid.std(ddof=1) + 1e-8))


# The trainer must not repeat a request after any of these answers.
TROUBLES = [(400, b"no such model"), (200, "What a picture!"), (200, "Alignment Score (1-5): 9")]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_each_reward_scores_logs_and_trains_on_what_was_scored(name, train_with, advantages, chat_server):
    reward, settings, weights, failing = RUNS[name]
    iterations = max(map(len, failing.values()), default=2)
    places, troubles = itertools.product(range(iterations), range(4)), itertools.cycle(TROUBLES)

    def answer(content):
        iteration, picture = next(places)
        failed = picture in failing[UNIFIED][iteration]
        return next(troubles) if failed else (200, f"Alignment Score (1-5): {mark(content)}")

    if UNIFIED in failing:
        settings = {**settings, "unified_reward_url": chat_server(answer).url}
    run = train_with(reward, **settings, max_train_steps=iterations)
    assert len(run.metrics) == len(advantages) == iterations
    granular = IMAGE in weights and "image_reward_mode" not in settings
    parts = [f"{IMAGE}_{component}" for component in COMPONENTS] if granular else []
    for iteration, (line, (scores, found)) in enumerate(zip(run.metrics, advantages, strict=True)):
        failed = {model: failing[model][iteration] if model in failing else [] for model in weights}
        logged = {key.removeprefix("reward_") for key in line if key.startswith("reward_")}
        assert logged == {"std", *weights, *parts} and scores.keys() == {*weights, *parts}
        assert {model: line[f"failed_{model}"] for model in weights} == {m: len(lost) for m, lost in failed.items()}
        assert line["failed_rewards"] == sum(map(len, failed.values())) and line["images"] == 4
        for model, lost in failed.items():
            assert np.flatnonzero(np.isnan(scores[model][0])).tolist() == lost
            assert len(lost) == 4 or math.isfinite(line[f"reward_{model}"])
        values = {model: weight * scores[model][0] for model, weight in weights.items()}
        if settings.get("granular_mix") == "advantage":
            share = weights[IMAGE]
            weighted = {f"{IMAGE}_{c}": share * line[f"granular_weight_{c}"] for c in COMPONENTS}
            counted = {model: weight for model, weight in weights.items() if model != IMAGE} | weighted
        else:
            counted = weights
        if "multi_reward_mix" in settings:
            expected = normalised(sum(values.values()))
        else:
            expected = sum(weight * normalised(scores[model][0]) for model, weight in counted.items())
        for position in found.values():
            np.testing.assert_allclose(position[0], expected, atol=1e-9)
        nothing = "multi_reward_mix" in settings and any(len(lost) == 4 for lost in failed.values())
        assert expected.any() != nothing
        assert (line["optimizer_steps"], line["skipped_steps"]) == ((0, 2) if nothing else (2, 0))
        assert nothing or (math.isfinite(line["loss"]) and line["grad_norm"] > 0)
        assert failing or line["zero_spread_groups"] == 0
    first = next(iter(weights))
    assert len({line[f"reward_{first}"] for line in run.metrics}) == iterations  # new pictures, new scores


# --- UnifiedReward over HTTP, alone and in a mix ----------------------------------------------------------------------


def mark(content) -> float:
    """A mark from 1 to 5 of the picture in a chat message: its brightness."""
    data = content[0]["image_url"]["url"].split(",", 1)[1]
    return round(1 + 4 * np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255, 4)


@pytest.mark.parametrize("question,line", [("semantic", "Alignment Score (1-5): {}"), ("score", "Final Score: {}")])
def test_a_run_with_unified_reward_learns_from_its_server_s_marks(train, chat_server, question, line):
    marks = []

    def answer(content):
        marks.append(mark(content))
        return 200, "A picture.\n" + line.format(marks[-1])

    server = chat_server(answer)
    run = train(
        reward_model="unified_reward", unified_reward_url=server.url, unified_reward_default_question_type=question
    )
    for number, metrics in enumerate(run.metrics):
        given = marks[4 * number : 4 * number + 4]
        assert metrics["reward"] == metrics[f"reward_{UNIFIED}"] == pytest.approx(np.mean(given))
        assert metrics["reward_std"] == pytest.approx(np.std(given)) and metrics["grad_norm"] > 0
        assert metrics["failed_rewards"] == metrics[f"failed_{UNIFIED}"] == metrics["zero_spread_groups"] == 0
    asked = [body["messages"][0]["content"][1]["text"] for _, _, body in server.requests]
    assert len(asked) == 8 and len(set(asked)) == 2 and all(any(p in text for p in PROMPTS) for text in asked)


@pytest.mark.parametrize("mix", ["advantage_aggr", "reward_aggr"])
def test_a_picture_without_any_score_has_advantage_0(mix, train, advantages):
    run = train(reward_model=f"custom_rewards:{FAILING}", multi_reward_mix=mix)
    assert [line[f"failed_{FAILING}"] for line in run.metrics] == [1, 1]
    assert [line["zero_spread_groups"] for line in run.metrics] == [0, 0]
    for _, found in advantages:
        assert found and all(values[0, 0] == 0 and values[0, 1:].all() for values in found.values())


# --- failures on one of several processes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_failures_on_one_rank_end_all_and_resuming_repeats_the_iteration(
    train, flags, tmp_path, subprocess_environment
):
    settings = {"max_train_steps": 3, "prompts_per_iteration": 2, "learning_rate": 1e-6, "max_reward_failures": 3}
    settings["reward_model"] = "failing_rewards:lost_on_rank_1_in_iteration_2"
    argv = flags(output_dir=tmp_path / "out", parallel="ddp", **settings)
    done = torchrun(argv, subprocess_environment)
    assert done.returncode != 0
    assert (
        "stopped: more scores failed in iteration 2 than --max_reward_failures 3 (4 failed_rewards, 4 failed_lost"
        in done.stderr
    )
    run = Run(tmp_path / "out")
    assert [line["failed_rewards"] for line in run.metrics] == [0, 4] and run.metrics[1]["optimizer_steps"] == 0
    assert [path.name for path in run.checkpoints] == ["checkpoint-1-0"]
    settings["reward_model"] = "custom_rewards:rough_brightness"  # the same scores without failures
    train("out", **settings, resume_from_checkpoint="latest")
    assert [(line["step"], line["failed_rewards"]) for line in run.metrics] == [(1, 0), (2, 0), (3, 0)]
    assert_same_update(run, train(**settings))


@pytest.mark.slow
def test_training_goes_on_when_the_scores_of_one_rank_fail(flags, tmp_path, subprocess_environment):
    settings = {"max_train_steps": 3, "prompts_per_iteration": 2, "parallel": "fsdp", "checkpointing_steps": 1}
    settings["reward_model"] = "failing_rewards:lost_on_rank_1_in_iteration_2"
    done = torchrun(flags(output_dir=tmp_path / "out", **settings), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    run = Run(tmp_path / "out")
    assert [line["failed_rewards"] for line in run.metrics] == [0, 4, 0]
    assert [(line["optimizer_steps"], line["skipped_steps"]) for line in run.metrics] == [(2, 0)] * 3
    assert all(line["grad_norm"] > 0 for line in run.metrics)
    assert not same_weights(run.weights(0), run.weights(1))


def test_a_reward_that_the_hub_does_not_give_ends_the_run_before_prompts_are_embedded(flags, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a small red circle\n")
    given = {"data_json_path": None, "prompts_file": tmp_path / "prompts.txt", "output_dir": tmp_path / "run"}
    with pytest.raises(SystemExit) as stop:
        main(flags(**given, reward_model="pick_score", pick_score_path="nobody/no-such-model"))
    assert stop.value.code == 2 and "--pick_score_path nobody/no-such-model" in capsys.readouterr().err
    assert not (tmp_path / "run/rl_embeddings").exists()

"""Rewards that compare the pictures of a group: pairwise comparisons by a judge, and custom functions with `groups`."""

import itertools
import json
import math

from fastvideo import train_grpo_flux
from fastvideo.config import GRPOConfig
from fastvideo.eval import eval_reward
from fastvideo.models.reward_model.custom import FunctionReward
from fastvideo.models.reward_model.groups import Group
from fastvideo.models.reward_model.pairwise import PairwiseRewardModel, chosen_pairs
from fastvideo.models.reward_model.spec import REWARDS, RewardSpecConfig
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files, compute_reward
from fastvideo.rollout_plan import make_plan

import hypothesis
import numpy as np
import pytest
from conftest import Run, assert_same_update, torchrun
from custom_rewards import place_in_group
from hypothesis import strategies as st
from test_reward_training import mark
from test_unified_reward import red, red_of

RANKED = "custom_rewards:place_in_group"


def brighter(content):
    """Prefers the brighter of two pictures; close to a tie it doesn't decide."""
    first, second = (mark([picture]) for picture in content[:2])
    return 200, f"Better: {'tie' if abs(first - second) < 0.005 else 1 if first > second else 2}"


def judged(server, groups, **given):
    return PairwiseRewardModel(server.url, num_workers=4, retries=0, **given).score_groups(groups)


def test_a_picture_s_score_is_its_share_of_wins_asked_in_both_orders(chat_server):
    server = chat_server(brighter)
    groups = [Group([red(level) for level in (200, 0, 100, 100)], "a {x}"), Group([red(9), red(250)], "b")]
    first, second = judged(server, groups)
    assert first.tolist() == [1, 0, 0.5, 0.5] and second.tolist() == [0, 1]  # one win, one loss, one tie
    assert len(server.requests) == 2 * (4 * 3 // 2 + 1)
    asked = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert sum("a {x}" in content[2]["text"] for content in asked) == 12
    orders = {(red_of(content[:1]), red_of(content[1:2])) for content in asked}
    assert all(order[::-1] in orders for order in orders)


def test_a_judge_that_always_prefers_one_place_finds_only_ties(chat_server):
    server = chat_server(lambda content: (200, "Better: 1"))
    assert judged(server, [Group([red(level) for level in (0, 100, 200)], "a")])[0].tolist() == [0.5] * 3


def test_a_failed_comparison_leaves_the_count_and_a_picture_without_any_has_no_score(chat_server, caplog):
    def answer(content):
        levels = {red_of(content[:1]), red_of(content[1:2])}
        if any(level > 240 for level in levels) or (min(levels) < 10 and max(levels) > 190 and red_of(content) < 10):
            return 200, "I can't tell."  # nothing about the brightest; of the darkest and the second one order
        return brighter(content)

    scores = judged(chat_server(answer), [Group([red(level) for level in (0, 100, 200, 255)], "a")])[0]
    np.testing.assert_array_equal(scores, [0, 0.5, 1, np.nan])
    assert "of 12 samples failed, e.g. nothing to read after 'Better:'" in caplog.text


@hypothesis.given(st.integers(2, 13), st.integers(1, 14))
def test_every_picture_has_as_many_comparisons_as_asked_for(size, matches):
    pairs = chosen_pairs(size, matches, "a cat")
    assert pairs == chosen_pairs(size, matches, "a cat")
    assert all(0 <= a < b < size for a, b in pairs) and len(set(pairs)) == len(pairs)
    wanted = min(matches + (size % 2 and matches % 2), size - 1)
    assert np.bincount(np.ravel(pairs), minlength=size).tolist() == [wanted] * size
    met = {0}
    for _ in range(size):  # each picture is linked to each other by comparisons
        met |= {x for pair in pairs if met & set(pair) for x in pair}
    assert len(met) == size or wanted == 1


def test_the_choice_of_comparisons_differs_between_prompts():
    assert len({tuple(chosen_pairs(12, 4, prompt)) for prompt in "abcdefgh"}) > 4


def test_the_registry_knows_which_rewards_compare_pictures():
    assert [key for key, entry in REWARDS.items() if entry.groupwise] == ["pairwise"] and PairwiseRewardModel.groupwise


def test_groups_may_be_mixed_and_single_pictures_are_left_out():
    images = [red(level) for level in (0, 250, 100, 50, 200)]
    model = FunctionReward(RANKED)
    given = (images, ["a", "b", "a", "b", "c"], {"x": model}, {"x": 1.0})
    scores = compute_reward(*given, groups=[7, 3, 7, 3, 1])[2]["x"]
    np.testing.assert_array_equal(scores, [0, 0.5, 0.5, 0, np.nan])
    with pytest.raises(ValueError, match="compares pictures of a group; give `groups`"):
        compute_reward(*given)
    with pytest.raises(ValueError, match="a group has several prompts"):
        compute_reward(*given, groups=[0, 0, 1, 1, 1])


PLANS = {
    "mix_grpo": {},
    "dance_grpo": {},
    "v_grpo": {},
    "grpo_merge": {},
    "granular_grpo": {"granular_list": [1, 3]},
    "branch_grpo": {"tree_split_points": [0, 3]},
}


@pytest.mark.parametrize("algorithm", PLANS)
def test_a_group_is_what_an_advantage_compares(algorithm):
    """Changing a score changes no advantage outside of the picture's group, and some advantage in it."""
    config = GRPOConfig.create(
        algorithm=algorithm, prompts_file="x", reward_model="shapes", num_generations=4,
        gradient_accumulation_steps=4, sampling_steps=8, **PLANS[algorithm],
    )  # fmt: skip
    plan = make_plan(config, [0, 1], 1)
    groups = plan.groups(2).reshape(2, plan.pictures)
    assert not set(groups[0]) & set(groups[1])
    sizes = [int((groups[0] == number).sum()) for number in np.unique(groups[0])]
    merged = algorithm in ("grpo_merge", "granular_grpo")
    assert sizes == [4] * (len(sizes) - merged) + [1] * merged  # the last leaf is the noise-free anchor
    rng = np.random.default_rng(0)
    scores = rng.normal(size=groups.shape)

    def by_picture(values: np.ndarray) -> dict[int, np.ndarray]:
        """Leaf -> advantages of its own trained steps, when other leaves' scores are all equal: theirs are then 0."""
        found = {}
        for leaf, columns in plan.columns.items():
            only = np.zeros_like(values)
            only[:, columns] = values[:, columns]
            weights = {"x": np.ones(plan.pictures)}
            advantages = train_grpo_flux.plan_advantages(config, plan, {"x": only}, weights, {})[0]
            found[leaf] = np.concatenate([values for _, values in sorted(advantages.items())], axis=1)
        return found

    before = by_picture(scores)
    for leaf, columns in plan.columns.items():
        changed = scores.copy()
        changed[0, columns.start] += 3
        after = by_picture(changed)
        differs = {(p, other) for other in before for p in (0, 1) if (before[other][p] != after[other][p]).any()}
        assert differs == ({(0, leaf)} if columns.stop - columns.start > 1 else set())


@pytest.mark.parametrize("algorithm", ["mix_grpo", "grpo_merge"])
def test_a_run_passes_whole_groups_and_logs_anchors_only_for_other_rewards(algorithm, train, chat_server):
    """Pairwise comparisons on the tiny pipeline, in a mix, with failed comparisons."""
    failing = itertools.cycle([False] * 6 + [True])

    def answer(content):
        return (200, "no idea") if next(failing) else brighter(content)

    server = chat_server(answer)
    settings = {"reward_model": "pairwise:2,jpeg_compressibility", "vlm_judge_url": server.url, "max_train_steps": 1}
    if algorithm == "grpo_merge":
        settings |= {"algorithm": algorithm, "eta_step_list": [0, 1], "eta_step_merge_list": [1, 1]}
        settings["granular_list"] = [1, 3]
    (line,) = train(**settings, pairwise_matches=2).metrics
    groups = 4 if algorithm == "grpo_merge" else 1
    assert len(server.requests) == 1 + groups * 4 * 2  # after a trial, 4 pictures with 2 comparisons, asked twice
    assert 0 < line["reward_PairwiseRewardModel"] < 1 and line["grad_norm"] > 0
    assert math.isfinite(line["reward_JpegCompressibilityRewardModel"])
    if algorithm == "grpo_merge":
        assert line["eval_reward"] == line["eval_reward_JpegCompressibilityRewardModel"]
        assert "eval_reward_PairwiseRewardModel" not in line
        assert line["eval_failed_rewards"] == 0


@pytest.mark.slow
def test_processes_and_batches_change_no_comparison(train, flags, tmp_path, subprocess_environment, chat_server):
    server = chat_server(brighter)
    settings = {"reward_model": f"pairwise,{RANKED}", "vlm_judge_url": server.url, "prompts_per_iteration": 2}
    settings |= {"pairwise_matches": 2, "learning_rate": 1e-6}
    alone = train(**settings)
    done = torchrun(flags(output_dir=tmp_path / "two", parallel="ddp", **settings), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    batched = train(**settings, rollout_batch_size=2, train_micro_batch_size=1)
    names = ("reward_PairwiseRewardModel", "reward_place_in_group", "failed_rewards")
    for run in (Run(tmp_path / "two"), batched):
        assert_same_update(run, alone)
        assert [[line[name] for name in names] for line in run.metrics] == [
            [line[name] for name in names] for line in alone.metrics
        ]


def test_a_custom_function_with_groups_is_tried_and_trained(train):
    run = train(reward_model=RANKED, train_batch_size=2)
    assert [line["reward_place_in_group"] for line in run.metrics] == pytest.approx([3 / 8] * 2, abs=0.1)


def test_a_custom_function_with_groups_is_called_with_two_pictures_of_one_group(monkeypatch, tmp_path):
    from fastvideo.models.reward_model import custom

    (tmp_path / "grouped.py").write_text(
        "def ranks(images, prompts, groups):\n"
        "    assert groups == [0, 0] and len(set(prompts)) == 1\n"
        "    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"ranks returned .* for 2 pictures|scores of shape \(1,\)"):
        custom.probe("grouped:ranks", "reward_model", (8, 8), 60.0)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_compares_with_the_baseline_s_pictures(chat_server, tmp_path, capsys, monkeypatch):
    server = chat_server(brighter)
    for name, levels in (("tuned", (200, 50, 100)), ("base", (100, 100, 100))):
        (tmp_path / name).mkdir()
        for i, level in enumerate(levels):
            red(level).save(tmp_path / name / f"{i}.png")
        entries = [{"image": f"{i}.png", "prompt": f"rose {i}"} for i in range(3)]
        (tmp_path / name / "manifest.json").write_text(json.dumps(entries))
    tuned, base = (str(tmp_path / name / "manifest.json") for name in ("tuned", "base"))
    command = ["--manifest", tuned, "--reward_model_type", f"pairwise,{RANKED}", "--vlm_judge_url", server.url]
    command += ["--reward_batch_size", "2", "--baseline_manifest", base]
    assert eval_reward.main(command) == 0
    summary = json.loads((tmp_path / "tuned/manifest_scores_summary.json").read_text())["models"]
    assert summary["PairwiseRewardModel"]["mean"] == 0.5 and summary["PairwiseRewardModel"]["win_rate"] == 0.5
    for file, expected in (("", [1, 0, 0.5]), ("_baseline", [0, 1, 0.5])):
        scores = json.loads((tmp_path / f"tuned/manifest_scores{file}.json").read_text())
        assert [entry["reward"]["PairwiseRewardModel"] for entry in scores] == expected
    assert len(server.requests) == 1 + 3 * 2


def test_without_pictures_to_compare_with_an_evaluation_is_refused_in_one_line(
    chat_server, flags, refused, prompts_file
):
    message = "--reward_model_type pairwise: compares pictures; give --baseline_manifest"
    with refused(message):
        eval_reward.main(["--image", "cat.png", "--prompt", "a cat", "--reward_model_type", "pairwise"])
    steps = {"eval_steps": 1, "eval_prompts": prompts_file}
    for given in ({"reward_model": "pairwise,shapes"}, {"reward_model": RANKED}, {"eval_reward": "pairwise"}):
        with refused("--eval_reward.*: an evaluation has one picture per prompt, and no group to compare"):
            train_grpo_flux.main(flags(**steps, **given, vlm_judge_url="http://127.0.0.1:9"))


def test_a_run_evaluates_its_other_rewards(train, prompts_file):
    given = {"eval_steps": 1, "eval_prompts": prompts_file, "eval_reward": "shapes", "max_train_steps": 1}
    line = train(reward_model=RANKED, **given).metrics[-1]
    assert "evaluation_reward_ShapesRewardModel" in line and "evaluation_reward_place_in_group" not in line


def test_what_is_wrong_with_comparisons_is_said_before_anything_loads(chat_server):
    server = chat_server(lambda content: (400, b"one picture only") if len(content) > 2 else (200, "1"))
    for given, message in (
        ({}, "vlm_judge_url: a question about a grey picture failed: .*one picture only"),
        (
            {"pairwise_template": "rating_10"},
            "pairwise_template rating_10: its answer is number; this reward needs image",
        ),
        ({"vlm_judge_url": None}, "vlm_judge_url: not given; pairwise needs the URL"),
    ):
        config = RewardSpecConfig(**{"reward_model": "pairwise", "vlm_judge_url": server.url} | given)
        with pytest.raises(ValueError, match=f"^{message}"):
            check_reward_files(config)


def test_a_trial_of_a_judge_is_one_question(chat_server):
    server = chat_server(brighter)
    build_reward_models(RewardSpecConfig(reward_model="pairwise", vlm_judge_url=server.url), "cpu")
    assert len(server.requests) == 1
    assert place_in_group([red(1), red(200)], ["a", "a"], [0, 0]) == [0, 0.5]

"""Training runs through the command line with every real reward, on narrow random-weight checkpoints."""

import base64
import io
import itertools
import math

from fastvideo.train_grpo_flux import Trainer, main

import numpy as np
import pytest
from conftest import PROMPTS, Run, assert_same_update, same_weights, torchrun
from PIL import Image
from reward_checkpoints import CLIP_SCORE_FOLDER, HPS_FILE, PICK_SCORE_FOLDER

HPS, CLIP, IMAGE, PICK = "HPSClipRewardModel CLIPScoreRewardModel ImageRewardModel PickScoreRewardModel".split()
UNIFIED = "UnifiedRewardModel"
GRANULAR = [IMAGE, *(f"{IMAGE}_{component}" for component in ("blip", "clip", "aesthetic"))]
RUNS = {
    "granular raw": ("image_reward", {"granular_mix": "raw"}, GRANULAR),
    "granular advantage": ("image_reward", {"granular_mix": "advantage"}, GRANULAR),
    "overall": ("image_reward", {"image_reward_mode": "overall"}, [IMAGE]),
    "hpsv2": ("hpsv2", {}, [HPS]),
    "clip_score": ("clip_score", {}, [CLIP]),
    "pick_score": ("pick_score", {}, [PICK]),
    "custom": ("custom_rewards:brightness", {}, ["brightness"]),
    "hpsv2_clip_score": ("hpsv2_clip_score", {"hps_weight": 3}, [HPS, CLIP]),
    "multi_reward, advantages": (
        "multi_reward", {"image_reward_mode": "overall", "multi_reward_mix": "advantage_aggr"}, [HPS, IMAGE, PICK],
    ),
    "multi_reward, rewards": (
        "multi_reward", {"image_reward_mode": "overall", "multi_reward_mix": "reward_aggr"}, [HPS, IMAGE, PICK],
    ),
    "multi_reward with a granular part": ("multi_reward", {"granular_mix": "advantage"}, [HPS, PICK, *GRANULAR]),
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
    main(flags(dry_run=True, reward_model="hpsv2,image_reward:0.5"))
    assert "rewards: hpsv2 0.6667, image_reward 0.3333\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_each_reward_scores_logs_and_learns(name, train_with):
    reward, settings, keys = RUNS[name]
    run = train_with(reward, **settings)
    assert len(run.metrics) == 2
    for line in run.metrics:
        assert {key for key in line if key.startswith("reward_")} == {"reward_std", *(f"reward_{key}" for key in keys)}
        assert all(math.isfinite(line[f"reward_{key}"]) for key in keys)
        assert line["failed_rewards"] == 0 and line["zero_spread_groups"] == 0
        assert line["optimizer_steps"] % 2 == 0 and line["grad_norm"] > 0
    assert len({line[f"reward_{keys[0]}"] for line in run.metrics}) == 2  # other pictures, other scores


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["advantage_aggr", "reward_aggr"])
@pytest.mark.parametrize("failing", [False, True])
def test_a_mix_trains_with_one_reward_failing_or_not(mix, failing, train_with):
    other = "custom_rewards:first_of_each_batch_fails" if failing else "custom_rewards:brightness"
    run = train_with(f"pick_score:2,{other}", multi_reward_mix=mix)
    for line in run.metrics:
        assert line["failed_rewards"] == int(failing) and line["grad_norm"] > 0 and line["skipped_steps"] == 0
        assert np.isfinite([line[f"reward_{PICK}"], line[f"reward_{other.split(':')[1]}"], line["loss"]]).all()


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


def normalised(scores: np.ndarray) -> np.ndarray:
    """(R - mean)/(std + 1e-8) of a group [G] without its failed scores, which get 0, as a lone score does."""
    valid = scores[np.isfinite(scores)]
    if len(valid) < 2:
        return np.zeros(len(scores))
    return np.nan_to_num((scores - valid.mean()) / (valid.std(ddof=1) + 1e-8))


# None of these is asked again.
TROUBLES = [(400, b"no such model"), (200, "What a picture!"), (200, "Alignment Score (1-5): 9")]
# Which of the 4 pictures of each iteration fail.
FAILING = {"never": [[], [], []], "on and off": [[0, 2], [], [0, 1, 2, 3]]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix,granular", [("advantage_aggr", "raw"), ("advantage_aggr", "advantage"), ("reward_aggr", "raw")]
)
@pytest.mark.parametrize("failing", FAILING)
def test_multi_reward_trains_on_what_was_scored(mix, granular, failing, train_with, chat_server, monkeypatch):
    places = itertools.product(range(3), range(4))
    troubles = itertools.cycle(TROUBLES)

    def answer(content):
        iteration, picture = next(places)
        failed = picture in FAILING[failing][iteration]
        return next(troubles) if failed else (200, f"Alignment Score (1-5): {mark(content)}")

    seen, advantages = [], Trainer.advantages

    def watched(self, plan, sampled, scores):
        found = advantages(self, plan, sampled, scores)
        seen.append((scores, found[0]))
        return found

    monkeypatch.setattr(Trainer, "advantages", watched)
    url = chat_server(answer).url
    run = train_with(
        "multi_reward", multi_reward_mix=mix, granular_mix=granular, unified_reward_url=url, max_train_steps=3
    )
    assert len(run.metrics) == len(seen) == 3
    for line, (scores, found), failed in zip(run.metrics, seen, FAILING[failing], strict=True):
        assert {name: line[f"failed_{name}"] for name in (HPS, IMAGE, PICK, UNIFIED)} == {
            HPS: 0, IMAGE: 0, PICK: 0, UNIFIED: len(failed)
        }  # fmt: skip
        assert line["failed_rewards"] == len(failed) and line["images"] == 4
        assert np.flatnonzero(np.isnan(scores[UNIFIED][0])).tolist() == failed
        weights = {name: 0.25 for name in (HPS, IMAGE, PICK, UNIFIED)}
        if granular == "advantage":
            del weights[IMAGE]
            weights |= {f"{IMAGE}_{c}": 0.25 * line[f"granular_weight_{c}"] for c in ("blip", "clip", "aesthetic")}
        values = {name: weight * scores[name][0] for name, weight in weights.items()}
        if mix == "reward_aggr":
            expected = normalised(sum(values.values()))
            assert (expected[failed] == 0).all()
        else:
            expected = sum(weight * normalised(scores[name][0]) for name, weight in weights.items())
        assert expected.any() == (mix == "advantage_aggr" or len(failed) < 3)
        for position in found.values():
            np.testing.assert_allclose(position[0], expected, atol=1e-9)
        if expected.any():
            assert line["optimizer_steps"] == 2 and math.isfinite(line["loss"]) and line["grad_norm"] > 0
        else:
            assert line["optimizer_steps"] == 0 and line["skipped_steps"] == 2


@pytest.mark.parametrize("mix", ["advantage_aggr", "reward_aggr"])
def test_a_picture_without_any_score_has_advantage_0(mix, train, monkeypatch):
    seen, advantages = [], Trainer.advantages

    def watched(self, plan, sampled, scores):
        seen.append(advantages(self, plan, sampled, scores))
        return seen[-1]

    monkeypatch.setattr(Trainer, "advantages", watched)
    run = train(reward_model="custom_rewards:first_of_each_batch_fails", multi_reward_mix=mix)
    assert [line["failed_first_of_each_batch_fails"] for line in run.metrics] == [1, 1]
    for found, flat in seen:
        assert found and all(values[0, 0] == 0 and values[0, 1:].all() for values in found.values()) and flat == 0


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
    settings["reward_model"] = "custom_rewards:rough_brightness"  # the same, and it fails no more
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

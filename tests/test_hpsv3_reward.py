"""HPSv3 on narrow random weights, in the format of the published files."""

import json
import os
import shutil
from pathlib import Path

from fastvideo.eval import eval_reward
from fastvideo.models.reward_model.hpsv3 import HPSv3RewardModel
from fastvideo.models.reward_model.spec import RewardConfig
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from reward_checkpoints import HPSV3_FOLDER, PROMPTS, hpsv3_settings, make_hpsv3, pictures
from safetensors.torch import load_file, save_file
from test_reward_registry import config

NAME = "HPSv3RewardModel"
# The published guide isn't ours to copy. download_checkpoints.sh puts it here; the variable names another place.
GUIDE = Path(os.environ.get("HPSV3_GUIDE") or ROOT / RewardConfig.hpsv3_guide_path)
# μ and σ of the first four pictures on the narrow weights with the published guide, from package hpsv3 1.0.0 with
# transformers 4.45.2 in fp32, whose own code loaded the checkpoint with strict names.
PUBLISHED = [
    [-0.491257905960083, -0.5569003224372864, -0.46382009983062744, -0.28638550639152527],
    [0.47606608271598816, 0.5944918394088745, 0.5102572441101074, 0.7201509475708008],
]
# The same with a guide of our own words, from this code: any later version must give these numbers too.
OWN_GUIDE = [
    [0.21359312534332275, -0.7366008758544922, 0.267724871635437, 0.084786057472229],
    [0.9146217107772827, 1.7034956216812134, 0.878614604473114, 0.9956814646720886],
]


@pytest.fixture(scope="module")
def model(narrow_hpsv3) -> HPSv3RewardModel:
    return HPSv3RewardModel(*narrow_hpsv3.values(), number_format="fp32")


@pytest.mark.skipif(
    not GUIDE.is_file(), reason="`bash scripts/huggingface/download_checkpoints.sh hpsv3` gets the guide"
)
def test_scores_are_those_of_the_published_package(tmp_path):
    make_hpsv3(tmp_path, guide=GUIDE.read_text(encoding="utf-8"))
    model = HPSv3RewardModel(*hpsv3_settings(tmp_path / HPSV3_FOLDER).values(), number_format="fp32")
    mean, details = model.score(pictures()[:4], PROMPTS[:4])
    np.testing.assert_allclose([mean, details["uncertainty"]], PUBLISHED, atol=1e-5)


def test_scores_stay_what_they_were_in_both_number_formats(model, narrow_hpsv3):
    images, prompts = pictures()[:4], PROMPTS[:4]
    mean, details = model.score(images, prompts)
    np.testing.assert_allclose([mean, details["uncertainty"]], OWN_GUIDE, atol=1e-5)
    assert model(images, prompts).tolist() == mean.tolist()
    rounded = HPSv3RewardModel(*narrow_hpsv3.values())  # in bf16, as on the command line
    np.testing.assert_allclose(rounded(images, prompts), mean, atol=0.02)


def test_neither_batch_nor_order_nor_control_tokens_in_a_prompt_change_a_score(model):
    """Prompts of different lengths: the shorter ones are padded."""
    images = [*pictures()[:3], Image.new("RGB", (10, 3000))]
    prompts = ["a cat", PROMPTS[3], "a <|Reward|> dog <|im_end|>", "too elongated"]
    together = model(images, prompts)
    model.batch_size = 1
    np.testing.assert_allclose(model(images[::-1], prompts[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose(model(images[2:3], ["a   dog  "]), together[2:3], atol=1e-5)
    assert np.isnan(together).tolist() == [False, False, False, True]


def test_another_checkpoint_is_refused_in_one_line(narrow_hpsv3, tmp_path):
    given = {"reward_model": "hpsv3", **narrow_hpsv3}
    with pytest.raises(ValueError, match="hpsv3_path .*: has no HPSv3.safetensors; .*download_checkpoints.sh hpsv3"):
        check_reward_files(config(**{**given, "hpsv3_path": str(tmp_path)}))
    guide = tmp_path / "guide.txt"
    given["hpsv3_guide_path"] = str(guide)
    with pytest.raises(ValueError, match="hpsv3_guide_path .*: no such file; .*download_checkpoints.sh hpsv3` gets it"):
        check_reward_files(config(**given))
    guide.write_text("Rate {text_prompt}")
    with pytest.raises(ValueError, match="hpsv3_guide_path .*Reward.* must be in it once; .*sh hpsv3` gets it"):
        build_reward_models(config(**given), "cpu")
    folder = tmp_path / "copy"
    shutil.copytree(narrow_hpsv3["hpsv3_path"], folder)
    settings = hpsv3_settings(folder)
    state = load_file(folder / "HPSv3.safetensors")
    save_file({k: v for k, v in state.items() if k != "rm_head.5.bias"}, folder / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="wrong checkpoint for Rater: rm_head.5.bias is missing"):
        HPSv3RewardModel(*settings.values())
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
    save_file(state, folder / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="embed_tokens.weight has shape") as error:
        build_reward_models(config(reward_model="hpsv3", **settings), "cpu")
    assert "\n" not in str(error.value)


def test_a_run_logs_the_uncertainty_and_an_evaluation_reports_it(train, narrow_hpsv3, tmp_path):
    run = train(reward_model="hpsv3:3,custom_rewards:first_of_each_batch_fails", **narrow_hpsv3, max_train_steps=1)
    (line,) = run.metrics
    assert line[f"reward_{NAME}_uncertainty"] > 0 and np.isfinite(line[f"reward_{NAME}"]) and line["grad_norm"] > 0
    assert (line["failed_rewards"], line[f"failed_{NAME}"]) == (1, 0)
    entry = json.loads((run.folder / "args.json").read_text())["reward_names"][NAME]
    assert entry["components"] == ["uncertainty"] and entry["weight"] == 0.75
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    command = ["--image", str(tmp_path / "black.png"), "--prompt", "night", "--reward_model_type", "hpsv3"]
    command += [word for name, value in narrow_hpsv3.items() for word in (f"--{name}", value)]
    command += ["--output_json", str(tmp_path / "scores.json")]
    assert eval_reward.main([*command, "--device", "cpu"]) == 0
    (entry,) = json.loads((tmp_path / "scores.json").read_text())
    assert entry["reward"].keys() == {NAME, f"{NAME}_uncertainty"}

"""What a prompt file says beside its prompts reaches the rewards that ask for it: in training, sampling, evaluation."""

import csv
import json

from fastvideo import train_grpo_flux
from fastvideo.eval import eval_reward
from fastvideo.io.prompts import read_prompts
from fastvideo.models.reward_model.utils import compute_reward
from fastvideo.sample import sample_flux

import numpy as np
import pytest
from conftest import PROMPTS
from PIL import Image
from test_reward_server import connect, no_proxy_and_short_waits, serve  # noqa: F401  (fixtures)

WANTS = [{"tag": "counting", "include": [{"class": "circle", "count": i}]} for i in range(len(PROMPTS))]
REWARD = "custom_rewards:number_of_class"


def table(path):
    """A CSV file of PROMPTS, and of WANTS in its other columns."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag", "prompt", "include", "note"])
        writer.writerows(
            [want["tag"], text, json.dumps(want["include"]), ""] for want, text in zip(WANTS, PROMPTS, strict=True)
        )
    return path


def json_lines(path):
    path.write_text("".join(json.dumps({"prompt": p, **w}) + "\n" for p, w in zip(PROMPTS, WANTS, strict=True)))
    return path


def test_columns_and_keys_beside_a_prompt_are_its_metadata(tmp_path):
    for path in (table(tmp_path / "p.csv"), json_lines(tmp_path / "p.jsonl")):
        found = read_prompts(path, "prompts_file")
        assert found.prompts == list(PROMPTS) and found.metadata == WANTS
    (tmp_path / "twice.json").write_text(json.dumps(["a", {"text": "b", "n": 1}, {"text": "b", "n": 2}, "a"]))
    found = read_prompts(tmp_path / "twice.json", "prompts_file")
    assert (found.prompts, found.metadata, found.duplicates) == (["a", "b"], [{}, {"n": 1}], 2)


def test_training_sampling_and_evaluation_hand_metadata_to_the_reward(train, tiny_flux, tmp_path):
    prompts = table(tmp_path / "prompts.csv")
    files = {"prompts_file": prompts, "eval_prompts": json_lines(tmp_path / "eval.jsonl"), "eval_steps": 1}
    run = train(reward_model=f"{REWARD},shapes", **files, prompts_per_iteration=5, max_train_steps=1)
    before, line = run.metrics
    assert line["reward_number_of_class"] == line["evaluation_reward_number_of_class"] == 2  # the mean of 0 to 4
    assert before["evaluation_reward_number_of_class"] == 2 and line["failed_rewards"] == 0
    entries = json.loads((run.folder / "rl_embeddings/prompt.json").read_text())
    assert [entry["metadata"] for entry in entries] == WANTS

    command = ["--pretrained_model_name_or_path", tiny_flux, "--baseline", "--prompts_file", prompts, "--device", "cpu"]
    command += ["--output_dir", tmp_path / "pictures", "--total_sampling_steps", 1, "--h", 32, "--w", 32]
    manifest = sample_flux.main(list(map(str, command)))
    assert [entry["metadata"] for entry in json.loads(manifest.read_text())] == WANTS
    assert eval_reward.main(["--manifest", str(manifest), "--reward_model_type", REWARD, "--device", "cpu"]) == 0
    scores = json.loads((manifest.parent / "manifest_scores.json").read_text())
    assert [entry["reward"]["number_of_class"] for entry in scores] == [0, 1, 2, 3, 4]


def test_weights_lie_beside_the_embeddings_and_decide_which_prompts_are_trained(train, flags, refused, tmp_path):
    def weighted(*weights):
        path = tmp_path / "prompts.jsonl"
        lines = [{"prompt": text, "weight": weight} for text, weight in zip(PROMPTS, weights, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def embedded(run):
        return json.loads((run.folder / "rl_embeddings/prompt.json").read_text())

    plain, alone = train(prompts_file=weighted(1, 1, 1, 1, 1)), train(prompts_file=weighted(0, 0, 0.5, 0, 0))
    assert [entry.get("weight") for entry in embedded(alone)] == [0, 0, 0.5, 0, 0]
    assert [{k: v for k, v in entry.items() if k != "weight"} for entry in embedded(alone)] == embedded(plain)
    one = tmp_path / "one.txt"
    one.write_text(PROMPTS[2])
    assert alone.numbers() == train(prompts_file=one).numbers() != plain.numbers()
    with refused("--prompts_file .*prompts.jsonl: no prompt has a weight above 0"):
        train_grpo_flux.main(flags(prompts_file=weighted(0, 0, 0, 0, 0)))


def test_metadata_travels_to_a_reward_server_and_no_reward_needs_it(serve):  # noqa: F811
    images = [Image.new("RGB", (8, 8))] * 5
    models, weights = connect(serve(REWARD), reward_model=REWARD, reward_batch_size=2)
    found = compute_reward(images, list(PROMPTS), models, weights, metadata=WANTS)[2]["number_of_class"]
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(compute_reward(images, list(PROMPTS), models, weights)[2]["number_of_class"]).all()
    with pytest.raises(ValueError, match="5 images but 4 entries of metadata"):
        compute_reward(images, list(PROMPTS), models, weights, metadata=WANTS[:4])

"""Evaluation while training: the same pictures with any number of processes, a link `best`, no effect on training."""

import json
import os
import shutil

from fastvideo.cli import FlagError
from fastvideo.dataset.split import held_out
from fastvideo.train_grpo_flux import Trainer, main

import pytest
import torch
from conftest import PROMPTS, same_weights, torchrun
from PIL import Image

# A reward that the training doesn't see, and a learning rate at which every iteration changes the pictures.
SETTINGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
    "eval_steps": 1,
    "eval_reward": "jpeg_compressibility",
    "train_batch_size": 2,
}
DECIDES = "evaluation_reward_JpegCompressibilityRewardModel"


@pytest.fixture
def eval_prompts(tmp_path):
    path = tmp_path / "eval.txt"
    path.write_text(PROMPTS[0] + '\na <b>large</b> "blue" circle / 🐟\n' + PROMPTS[3] + "\n", encoding="utf-8")
    return path


def training_numbers(run):
    """The metrics of training only, without the metrics of evaluation."""
    lines = [{k: v for k, v in line.items() if not k.startswith("evaluation_")} for line in run.numbers()]
    return [line for line in lines if line["step"]]


def pictures(run, iteration):
    return {p.name: p.read_bytes() for p in sorted((run.folder / f"evaluation/{iteration:06d}").glob("*.png"))}


def scores(run, iteration):
    return json.loads((run.folder / f"evaluation/{iteration:06d}/scores.json").read_text())


def test_evaluation_leaves_training_alone_and_keeps_the_best_checkpoint(train, eval_prompts):
    plain = train(**{k: v for k, v in SETTINGS.items() if not k.startswith("eval")})
    run = train("run", **SETTINGS, eval_prompts=eval_prompts, checkpoints_total_limit=1)
    assert training_numbers(run) == training_numbers(plain)
    assert run.metrics[1]["window"][0] == run.metrics[1]["seconds_prefix"] == 0  # no step of an evaluation counts

    values = {line["step"]: line["evaluation_reward"] for line in run.metrics}
    assert sorted(values) == [0, 1, 2, 3, 4] and len(set(values.values())) == 5
    for line in run.metrics:
        entries = scores(run, line["step"])
        assert [entry["prompt"] for entry in entries] == eval_prompts.read_text(encoding="utf-8").splitlines()
        found = [entry["reward"]["JpegCompressibilityRewardModel"] for entry in entries]
        assert line["evaluation_reward"] == line[DECIDES] == pytest.approx(sum(found) / 3)
        assert line["evaluation_failed_rewards"] == 0 and 0 <= line["evaluation_reward_ShapesRewardModel_binding"] <= 1
        assert line["evaluation_reward_ShapesRewardModel_right"] in (0, 0.5, 1)  # of two known captions
        with Image.open(run.folder / f"evaluation/{line['step']:06d}" / entries[1]["image"]) as image:
            assert image.size == (32, 32)
    assert pictures(run, 0) != pictures(run, 4)

    best = max(range(1, 5), key=values.get)
    assert (run.folder / "best").resolve().name.split("-")[1] == str(best)
    assert {int(path.name.split("-")[1]) for path in run.checkpoints} == {best, 4}  # one newest, and the best
    assert [line["evaluation_best_iteration"] for line in run.metrics] == [
        None, *(max(range(1, n + 1), key=values.get) for n in range(1, 5))
    ]  # fmt: skip


def test_larger_pictures_of_more_steps_are_judged_and_leave_training_and_its_graphs_alone(
    train, eval_prompts, random_flux, monkeypatch
):
    """Blocks are traced and guarded as when they are compiled, and then run as they are, which takes seconds less."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda model, _, **__: model)
    graphs, iteration = [], Trainer.iteration

    def counted(self, *args):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = iteration(self, *args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return found

    monkeypatch.setattr(Trainer, "iteration", counted)
    judging = dict(eval_steps=1, eval_prompts=eval_prompts, eval_reward="jpeg_compressibility")
    judging |= dict(pretrained_model_name_or_path=random_flux)
    own = dict(eval_h=64, eval_w=48, eval_sampling_steps=8, eval_guidance_scale=2.0)
    torch._dynamo.reset()
    train(compile="true", **judging, **own)
    assert graphs[0] > 0 and graphs[1] == 0  # evaluations before and between the iterations replaced no graph

    other, same = train(**judging, **own), train(**judging)
    assert training_numbers(other) == training_numbers(same) and same_weights(other.weights(), same.weights())
    with Image.open(other.folder / "evaluation/000002/00000.png") as image:
        assert image.size == (48, 64)
    best = [json.loads((run.folder / "best/checkpoint.json").read_text())["best"] for run in (other, same)]
    assert best[0]["measure"] != best[1]["measure"]  # results of other settings are never compared


def test_an_evaluation_with_failed_scores_is_counted_and_never_the_best(train, prompts_file):
    run = train(eval_steps=1, eval_prompts=prompts_file, eval_reward="failing_rewards:lost_for_circles")
    for line in run.metrics:
        found = [entry["reward"]["lost_for_circles"] for entry in scores(run, line["step"])]
        lost = [index for index, value in enumerate(found) if value is None]
        assert lost == [index for index, prompt in enumerate(PROMPTS) if "circle" in prompt]
        assert line["evaluation_failed_rewards"] == len(lost) and line["evaluation_best_iteration"] is None
        assert line["evaluation_reward"] == pytest.approx(sum(filter(None, found)) / (len(found) - len(lost)))
    assert not (run.folder / "best").is_symlink() and len(run.checkpoints) == 1


def test_held_out_prompts_are_evaluated_and_leave_training_to_the_others(
    train, flags, prompts_file, embedded_prompts, tmp_path, capsys
):
    """As if the two parts were given as two files, from prompts and from embeddings."""
    settings = {"eval_steps": 2, "prompts_per_iteration": 3}
    main(flags(**settings, eval_split=2, prompts_file=prompts_file, dry_run=True))
    assert "prompts: 3 to train on, 2 held out to evaluate: 'a " in capsys.readouterr().out
    runs = [train(**settings, eval_split=2, prompts_file=prompts_file), train(**settings, eval_split=2)]
    judged = [entry["prompt"] for entry in scores(runs[0], 2)]
    rest = [prompt for prompt in PROMPTS if prompt not in judged]
    assert judged == [prompt for prompt in PROMPTS if prompt in judged] and len(judged) == 2
    for name, prompts in (("rest.txt", rest), ("judged.txt", judged)):
        (tmp_path / name).write_text("\n".join(prompts))
    files = train(**settings, prompts_file=tmp_path / "rest.txt", eval_prompts=tmp_path / "judged.txt")
    assert runs[0].numbers() == runs[1].numbers() == files.numbers()
    assert pictures(runs[0], 2) == pictures(runs[1], 2) == pictures(files, 2)


def test_the_caption_alone_decides_whether_a_prompt_is_held_out():
    captions = [f"prompt {number}" for number in range(1000)]
    share, number = held_out(captions, 0.1), held_out(captions, 100)
    assert 70 < sum(share) < 130 and sum(number) == 100
    edited = ["new", *(f"Prompt  {number} " for number in range(500, 1000)), *captions[:600]]
    sides = dict(zip(captions, share, strict=True)) | {"new": held_out(["new", *captions], 0.1)[0]}
    assert held_out(edited, 0.1) == [sides[" ".join(caption.lower().split())] for caption in edited]
    assert sum(held_out(captions * 2, 100)) == 200  # both copies of a caption lie on one side
    moved = sum(a != b for a, b in zip(held_out([*captions, "more"], 100), number, strict=False))
    assert moved <= 1
    with pytest.raises(FlagError, match="^eval_split 1e-09: holds out none of 1000 prompts; choose a larger share"):
        held_out(captions, 1e-9)
    with pytest.raises(FlagError, match="^eval_split 1000: holds out all of 1000 prompts; none is left to train on"):
        held_out(captions, 1000)


@pytest.mark.slow
def test_two_processes_and_a_resumed_run_evaluate_alike(train, flags, eval_prompts, tmp_path, subprocess_environment):
    whole = train("whole", **SETTINGS, eval_prompts=eval_prompts)
    command = {k: v for k, v in SETTINGS.items() if k != "train_batch_size"}
    command |= {"prompts_per_iteration": 2, "eval_prompts": eval_prompts, "max_train_steps": 1, "parallel": "fsdp"}
    done = torchrun(flags(**command, output_dir=tmp_path / "two"), subprocess_environment)
    assert done.returncode == 0, done.stderr
    two = type(whole)(tmp_path / "two")
    assert pictures(two, 0) == pictures(whole, 0) and len(pictures(two, 0)) == 3
    assert scores(two, 0) == scores(whole, 0)
    assert (two.folder / "best").resolve() == two.checkpoints[-1]

    shutil.copytree(whole.folder, tmp_path / "again", symlinks=True)
    first = next(path for path in whole.checkpoints if path.name.startswith("checkpoint-2-"))
    checkpoint = tmp_path / "again" / first.name
    again = train("again", **SETTINGS, eval_prompts=eval_prompts, resume_from_checkpoint=checkpoint)
    assert again.numbers() == whole.numbers() and pictures(again, 4) == pictures(whole, 4)
    assert os.readlink(again.folder / "best") == os.readlink(whole.folder / "best")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"eval_steps": 1}, "give --eval_prompts or --eval_split too"),
        ({"eval_split": 2}, "--eval_split 2: goes with --eval_steps"),
        (
            {"eval_steps": 1, "eval_split": 2, "eval_prompts": "p.txt"},
            "--eval_split 2: not with --eval_prompts p.txt",
        ),
        ({"eval_steps": 1, "eval_split": 1.5}, "--eval_split 1.5: give a share below 1, or a whole number of prompts"),
        ({"eval_steps": 1, "eval_split": 5}, "--eval_split 5: holds out all of 5 prompts"),
        ({"eval_reward": "shapes"}, "--eval_reward shapes: goes with --eval_steps"),
        ({"eval_sampling_steps": 50}, "--eval_sampling_steps 50: goes with --eval_steps"),
        ({"eval_steps": 1, "eval_prompts": "no.txt", "eval_w": 40}, "--eval_w 40: must be a multiple of 16"),
        ({"eval_steps": 1, "eval_prompts": "none.txt"}, "--eval_prompts none.txt: "),
        ({"eval_steps": 1, "eval_prompts": "no.txt", "eval_reward": "shape"}, "--eval_reward 'shape': unknown reward"),
    ],
)
def test_bad_evaluation_flags_are_one_line(train, capsys, given, text):
    with pytest.raises(SystemExit) as stop:
        train(**given)
    assert stop.value.code == 2 and text in capsys.readouterr().err.splitlines()[-1]

"""A run and --dry_run name everything that is missing before anything slow, with status 2."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from fastvideo.models.reward_model import loading
from fastvideo.runtime import preflight
from fastvideo.train_grpo_flux import main

import pytest
from diffusers import FluxTransformer2DModel


@pytest.fixture
def lines(flags, capsys, monkeypatch):
    """lines(dry_run, name=value, ...) -> what is missing, one line each. Loads no weights."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the checks")

    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", loaded)

    def run(dry_run: bool = True, **given) -> list[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(flags(dry_run=dry_run, **given))
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert ("plan of the first window" in printed.out) == dry_run  # a run names what is missing first
        found = printed.err.splitlines()
        assert all(line.startswith("train_grpo_flux.py: error: --") for line in found), found
        return [line.partition("error: ")[2] for line in found]

    return run


@pytest.fixture
def pipeline(tiny_flux, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_flux, tmp_path / "pipeline"))


@pytest.mark.parametrize("dry_run", [True, False])
def test_everything_that_is_missing_is_named_at_once(lines, tmp_path, dry_run):
    (tmp_path / "file").write_text("")
    found = lines(
        dry_run,
        pretrained_model_name_or_path=tmp_path / "none", reward_model="hpsv2", hps_path="none.pt",
        prompts_file="none.txt", eval_steps=1, eval_prompts="no.txt", eval_reward="pick_score",
        output_dir=tmp_path / "file/run",
    )  # fmt: skip
    named = [line.split()[0] for line in found]
    assert sorted(named) == [
        "--eval_prompts", "--hps_path", "--output_dir", "--pick_score_path", "--pretrained_model_name_or_path",
        "--prompts_file",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "lost,words",
    [
        ("transformer/config.json", "transformer has no config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer has no *.safetensors"),
        ("vae", "no folder vae/"),
        ("text_encoder_2/model.safetensors", "text_encoder_2 has no *.safetensors"),
        ("tokenizer/tokenizer.json", "tokenizer has no tokenizer.json"),
        ("model_index.json", "no model_index.json"),
    ],
)
def test_a_part_that_the_pipeline_lacks_is_named_if_the_run_needs_it(lines, pipeline, prompts_file, lost, words):
    (shutil.rmtree if (pipeline / lost).is_dir() else Path.unlink)(pipeline / lost)
    (line,) = lines(pretrained_model_name_or_path=pipeline, prompts_file=prompts_file)
    assert f"--pretrained_model_name_or_path {pipeline}: " in line and words in line, line


def test_text_encoders_may_be_missing_where_embeddings_are_cached(flags, pipeline):
    for part in ("model_index.json", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (shutil.rmtree if (pipeline / part).is_dir() else Path.unlink)(pipeline / part)
    main(flags(dry_run=True, pretrained_model_name_or_path=pipeline))


def test_a_shard_that_an_index_lists_and_that_is_not_there_is_named(lines, pipeline):
    names = {"a": "one-of-two.safetensors", "b": "two-of-two.safetensors"}
    folder = pipeline / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / names["a"])
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    (line,) = lines(pretrained_model_name_or_path=pipeline)
    assert "transformer lacks 1 of the 2 files" in line and "two-of-two" in line
    index.write_text("{")
    assert "can't be read" in lines(pretrained_model_name_or_path=pipeline)[0]


def test_room_for_checkpoints_is_looked_at_before_the_first_iteration(lines, flags, capsys, monkeypatch):
    def room(checkpoints: float) -> None:
        free = int(checkpoints * 18.2e6)  # the tiny FLUX in float32 with AdamW's moments
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    room(0.5)
    (line,) = lines()
    assert line.startswith("--output_dir ") and "free" in line
    room(3.5)
    many = {"dry_run": True, "max_train_steps": 10, "checkpointing_steps": 1}
    main(flags(**many))
    text = capsys.readouterr().out
    assert "warning: checkpoints: 10 of 0.0182 GB" in text and "choose --checkpoints_total_limit 2" in text
    assert "\nprompts: 5 to train on\n" in text and "\ntrackers: none, beside metrics.jsonl" in text
    main(flags(**many, checkpoints_total_limit=2, log_with=["wandb", "tensorboard"], use_wandb=True))
    text = capsys.readouterr().out
    assert "warning" not in text and "\ntrackers: wandb, tensorboard, beside metrics.jsonl" in text


def test_a_model_of_a_hub_is_missing_only_if_no_hub_is_asked(lines, flags, capsys, monkeypatch):
    hub = {"pretrained_model_name_or_path": "owner/model", "reward_model": "pick_score,clip_score"}
    names = [line.split()[0] for line in lines(**hub)]
    assert names == ["--pretrained_model_name_or_path", "--pick_score_path", "--clip_score_path"]
    monkeypatch.setattr(preflight, "is_offline_mode", lambda: False)
    main(flags(dry_run=True, **hub))
    assert capsys.readouterr().err.count("the run downloads it first") == 3


def test_files_that_image_reward_would_download_are_missing_if_no_hub_is_asked(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: None)
    given = {"reward_model": "image_reward", "image_reward_mode": "overall", "image_reward_score_dir": tmp_path}
    names = ("bert-base-uncased/vocab.txt", "med_config.json", "ImageReward.pt")
    assert [line.split()[1] for line in lines(**given)] == [f"{tmp_path / name}:" for name in names]
    (tmp_path / "bert-base-uncased").mkdir()
    for name in names:
        (tmp_path / name).write_text("{}")
    given["reward_model"] += ",hpsv2"
    assert [line.split()[0] for line in lines(**given)] == ["--hps_path"]


@pytest.mark.parametrize("given,problem", [("nope", "not found"), ("latest", "no checkpoint")])
def test_a_dry_run_misses_the_checkpoint_to_resume_from(lines, tmp_path, given, problem):
    (line,) = lines(resume_from_checkpoint=given, output_dir=tmp_path / "none")
    assert line.startswith(f"--resume_from_checkpoint {given}: {problem}")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("field", ["reward_model", "eval_reward"])
def test_a_reward_that_is_no_function_is_named_before_the_plan_is_printed(flags, prompts_file, capsys, field):
    given = {"eval_steps": 1, "eval_prompts": prompts_file, field: "custom_rewards:missing"}
    with pytest.raises(SystemExit):
        main(flags(**given, dry_run=True))
    told = capsys.readouterr()
    assert not told.out and f"error: --{field} custom_rewards:missing: " in told.err


def test_a_dry_run_says_that_the_folder_holds_a_run_unless_it_is_to_go_on(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit) as stop:
        main(flags(dry_run=True))
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err
    main(flags(dry_run=True, resume_from_checkpoint="auto"))

"""The references' published command lines, tests/reference_commands: they run here, with the references' values."""

import shlex
from dataclasses import fields

from fastvideo import train as front_door
from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.reference_flags import REFERENCE_FLAGS, translate
from fastvideo.train_grpo_flux import main

import pytest
from conftest import ROOT, parts_missing

COMMANDS = {
    path.stem: shlex.split(path.read_text()) for path in sorted((ROOT / "tests/reference_commands").glob("*.txt"))
}
# What follows from each line besides the values that stand in it.
WINDOW = {
    "training_strategy": "part", "sde_type": "flow", "flow_grpo_sampling": False, "frozen_init_timesteps": 0,
    "image_reward_mode": "overall", "wandb_key": None,
}  # fmt: skip
ALL = {"training_strategy": "all", "sde_type": "dance", "reward_model": "hpsv2", "drop_last_sample": True}
SETTINGS = {
    "mixgrpo": {**WINDOW, "algorithm": "mix_grpo", "dpm_algorithm_type": None},
    "mixgrpo_flash": {**WINDOW, "algorithm": "mix_grpo_flash"},
    "mixgrpo_flash_star": {**WINDOW, "algorithm": "mix_grpo_flash_star"},
    "dancegrpo_16gpus": {**ALL, "algorithm": "dance_grpo", "ema_decay": 0},
    "dancegrpo_8gpus": {**ALL, "algorithm": "dance_grpo", "ema_decay": 0.995},
    "dancegrpo_8gpus_lora": {**ALL, "algorithm": "dance_grpo_lora", "use_lora": True},
    "branchgrpo_8gpus": {
        **ALL, "algorithm": "branch_grpo", "tree_split_points": [0, 3, 6, 9], "tree_width_prune": 0,
        "tree_fusion": "mean", "timestep_fraction": 1, "depth_pruning": [],
    },
    "egrpo_configuration": {
        "algorithm": "grpo_merge", "reward_model": "hpsv2", "learning_rate": 1e-6, "max_train_steps": 500,
        "num_generations": 16, "h": 512, "w": 512, "eta_step_list": [1], "eta_step_merge_list": [1],
        "granular_list": [1, 2], "seed": 42, "use_wandb": False,
        "pretrained_model_name_or_path": "ckpt/flux", "data_json_path": "data/rl_embeddings/videos2caption.json",
    },
    "egrpo_merge": {
        "algorithm": "grpo_merge", "reward_model": "hpsv2", "learning_rate": 1e-5, "max_train_steps": 300,
        "pretrained_model_name_or_path": "data/flux", "hps_path": "hps_ckpt/HPS_v2_compressed.pt",
        "data_json_path": "data/rl_embeddings/videos2caption.json", "output_dir": "exp_flux/grpo_merge",
        "eta_step_list": [1, 2, 3], "eta_step_merge_list": [1, 1, 1], "granular_list": [1, 2],
    },
}  # fmt: skip
# Flags of this trainer whose value in these lines becomes another one.
TRANSLATED = {"frozen_init_timesteps", "flow_grpo_sampling", "timestep_fraction"}
ONE_LINE = {
    "mixgrpo": ("--frozen_init_timesteps -1", "--flow_grpo_sampling", "--image_reward_mode", "--hps_clip_path"),
    "dancegrpo_8gpus": ("--use_hpsv2", "--use_ema", "--gradient_accumulation_steps 12", "dance_grpo"),
    "branchgrpo_8gpus": ("--timestep_fraction", "--depth_pruning_slide", "--width_pruning_mode", "branch_grpo"),
    "egrpo_configuration": ("--hps_path=hps_ckpt/HPS_v2.1_compressed.pt",),
    "egrpo_merge": ("--hps_clip_path",),
}


def parse(text: str) -> GRPOConfig:
    return parse_dataclass(GRPOConfig, ["--data_json_path", "p", *text.split()], "", translate)


def test_no_command_line_is_left_untested():
    assert SETTINGS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_line_runs_with_its_own_values(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no model or checkpoint lies
    argv = COMMANDS[name]
    flags, note = front_door.to_flags(argv) if "=" in argv[0] else (argv, "")
    with parts_missing():
        front_door.main([*argv, "dry_run=true"]) if note else main([*argv, "--dry_run"])
    printed = capsys.readouterr()
    assert f"{SETTINGS[name]['algorithm']}: " in printed.out and "images per iteration" in printed.out
    config = parse_dataclass(GRPOConfig, flags, "", translate)
    assert {key: getattr(config, key) for key in SETTINGS[name]} == SETTINGS[name]
    lines = [line for line in printed.err.splitlines() if ": error: " not in line]  # what isn't here
    assert all(line.startswith(("note: ", "warning: ")) for line in lines) and note in printed.err
    assert all(sum(text in line for line in lines) >= 1 for text in ONE_LINE.get(name, ())), printed.err
    for flag in {word[2:] for word in argv if word.startswith("--")} & REFERENCE_FLAGS.keys():
        assert sum(f"--{flag} " in line.partition(" is ")[0] + " " for line in lines) == 1, flag


@pytest.mark.parametrize("name", [name for name, argv in COMMANDS.items() if "=" not in argv[0]])
def test_every_value_in_a_line_is_the_value_of_its_setting(name):
    argv = COMMANDS[name]
    ours = {field.name: field for field in fields(GRPOConfig)}
    config = parse_dataclass(GRPOConfig, argv, "", translate)
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag[:2] == "--" and flag[2:] in ours.keys() - TRANSLATED:
            kind = ours[flag[2:]].type
            expected = True if kind is bool else None if value in ("None", "null", "") else value
            if kind in (int, float):
                expected = kind(value)
            elif kind == list[int]:
                expected = [int(number) for number in value.split(",")]
            assert getattr(config, flag[2:]) == expected, flag


@pytest.mark.parametrize(
    "argv,expected",
    [
        ("--use_pickscore", {"algorithm": "dance_grpo", "reward_model": "pick_score"}),
        ("--use_hpsv2 --reward_model clip_score", {"reward_model": "clip_score"}),  # this trainer's words count more
        ("--no_use_hpsv2 --no_use_ema", {"algorithm": "mix_grpo", "reward_model": "image_reward", "ema_decay": 0}),
        ("--use_ema", {"ema_decay": 0.995}),
        ("--use_ema --ema_decay 0.9", {"ema_decay": 0.9}),
        ("--use_hpsv2 --algorithm mix_grpo", {"algorithm": "mix_grpo", "reward_model": "hpsv2"}),
        (
            "--mix_ode_sde_tree --mix_sde_window_size 3 --tree_prob_weighted --width_pruning_mode 2 "
            "--width_pruning_ratio 0.25 --use-hpsv2",
            {
                "algorithm": "branch_grpo_mix", "group_size": 3, "tree_fusion": "probability", "tree_width_prune": 2,
                "tree_width_prune_share": 0.25, "reward_model": "hpsv2",
            },
        ),
        (
            "--use_hpsv2 --tree_split_points 0,3,6,9 --depth_pruning 15,16 --depth_pruning_slide",
            {"depth_pruning": [15, 16], "depth_pruning_slide_interval": 1, "depth_pruning_stop_depth": 9},
        ),
        (
            "--use_hpsv2 --tree_split_points 0,3,6,9 --depth_pruning 15 --depth_pruning_slide_interval 30",
            {"depth_pruning_slide_interval": 0},  # without --depth_pruning_slide nothing slides there
        ),
        ("--training_strategy part --flow_grpo_sampling --sde_type cps", {"sde_type": "cps", "algorithm": "mix_grpo"}),
        ("--training_strategy all --flow_grpo_sampling --frozen_init_timesteps=-1", {"algorithm": "flow_grpo"}),
        ("--reward_model multi_reward", {"image_reward_mode": "granular"}),  # a line in this trainer's words
        ("--t 1", {"fsdp_sharding_startegy": "full"}),
        ("--t 1 --parallel ddp", {"fsdp_sharding_startegy": None}),
        ("--reward_model multi_reward --t 1", {"image_reward_mode": "overall"}),
        ("--reward_model multi_reward --t 1 --image_reward_mode granular", {"image_reward_mode": "granular"}),
    ],
)  # fmt: skip
def test_a_flag_of_the_references_becomes_ours(argv, expected):
    config = parse(argv)
    assert {name: getattr(config, name) for name in expected} == expected


def test_frozen_steps_are_named_where_they_mean_something_else(capsys):
    assert parse("--training_strategy all --frozen_init_timesteps 4 --t 1").frozen_init_timesteps == 4
    assert "trains the first steps here" in capsys.readouterr().err
    assert parse("--training_strategy all --frozen_init_timesteps -1 --t 1").frozen_init_timesteps == 0
    assert "trains the first steps" not in capsys.readouterr().err


def test_a_refused_line_is_one_line_without_notes(capsys):
    with pytest.raises(SystemExit):
        parse("--use_hpsv2 --eta 0")
    (line,) = capsys.readouterr().err.splitlines()
    assert "--eta 0" in line


def test_only_the_first_process_prints_notes(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse("--t 1")
    assert not capsys.readouterr().err


def test_no_flag_is_both_the_references_and_ours():
    assert not REFERENCE_FLAGS.keys() & {field.name for field in fields(GRPOConfig)}

"""An unknown flag is answered with the flag that users of other programs mean, or not at all."""

from dataclasses import fields

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.data_preprocess.preprocess_flux_embedding import PreprocessConfig
from fastvideo.eval.eval_reward import EvalConfig
from fastvideo.eval.report import ReportConfig
from fastvideo.familiar_flags import _FAMILIAR, FAMILIAR, flags_in
from fastvideo.models.merge_lora import MergeConfig
from fastvideo.models.reward_model.server import ServerConfig
from fastvideo.sample.sample_flux import SampleConfig
from fastvideo.train import main as front_door

import pytest

PROGRAMS = {
    "trainer": GRPOConfig, "sampling": SampleConfig, "evaluation": EvalConfig, "report": ReportConfig,
    "preprocessing": PreprocessConfig, "merge": MergeConfig, "server": ServerConfig,
}  # fmt: skip


def names_of(config: type) -> set[str]:
    return {"config"} | {name for f in fields(config) for name in (f.name, f.metadata.get("alias")) if name}


def answer_of(capsys, program: str, flag: str) -> str:
    """What follows the name of an unknown flag."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse_dataclass(PROGRAMS[program], [flag, "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"unknown flag {flag}" in line, line
    return line.partition(f"unknown flag {flag}")[2].removesuffix(" (--help lists the flags)")


def test_every_suggestion_in_the_table_is_a_flag_that_exists_and_every_name_stands_once():
    known = set().union(*map(names_of, PROGRAMS.values()))
    assert {flag for answers in FAMILIAR.values() for text in answers for flag in flags_in(text)} <= known
    assert len(FAMILIAR) == sum(len(names.split()) for names in _FAMILIAR)


def test_no_program_is_answered_with_a_flag_that_it_lacks(capsys):
    for program, config in PROGRAMS.items():
        for name in FAMILIAR.keys() - names_of(config):
            assert set(flags_in(answer_of(capsys, program, f"--{name}"))) <= names_of(config), (program, name)


@pytest.mark.parametrize(
    "program,typed,right",
    [
        ("trainer", "lr", "--learning_rate"),
        ("trainer", "wandb", "--log_with"),
        ("trainer", "no_wandb", "--log_with none"),
        ("trainer", "no_lora", "--no_use_lora"),
        ("trainer", "tensorboard", "--log_with"),
        ("trainer", "resolution", "--h and --w"),
        ("trainer", "num_inference_steps", "--sampling_steps"),
        ("trainer", "config.sample.num_steps", "--sampling_steps"),
        ("trainer", "model_path", "--pretrained_model_name_or_path"),
        ("trainer", "reward_funcs", "--reward_model"),
        ("trainer", "save_steps", "--checkpointing_steps"),
        ("trainer", "network_dim", "--lora_rank"),
        ("trainer", "beta", "--ref_kl_coeff"),
        ("trainer", "push_to_hub", "no flag: upload"),
        ("trainer", "num_processes", "NPROC_PER_NODE"),
        ("trainer", "max_grad", "--max_grad_norm"),
        ("trainer", "learningrate", "--learning_rate"),
        ("trainer", "no_rol_back", "--no_roll_back"),
        ("sampling", "num_inference_steps", "--total_sampling_steps"),
        ("sampling", "num_images_per_prompt", "--images_per_prompt"),
        ("sampling", "lora_path", "--model_path"),
        ("sampling", "height", "--h"),
        ("evaluation", "output_dir", "--output_json"),
        ("evaluation", "reward", "--reward_model_type"),
        ("report", "logdir", "--run_dir"),
        ("preprocessing", "prompts_file", "--prompt_dir"),
        ("preprocessing", "pretrained_model_name_or_path", "--model_path"),
        ("merge", "output", "--output_dir"),
        ("server", "batch_size", "--reward_batch_size"),
        # a name that looks like a flag, but means something else
        ("trainer", "drop_last", ""),
        ("trainer", "hel", ""),
        ("trainer", "master_weight", ""),
        ("trainer", "train_seed", ""),
        ("merge", "learning_rate", ""),
        ("report", "lora_rank", ""),
        ("preprocessing", "lora_path", ""),
    ],
)
def test_names_of_other_programs_are_answered_with_the_flag_that_is_meant(capsys, program, typed, right):
    found = answer_of(capsys, program, f"--{typed}")
    assert right in found if right else not found, found
    assert "--help" not in found and "_key" not in found


@pytest.mark.parametrize(
    "key,right",
    [
        ("training.lr", "training.learning_rate?"),
        ("lr", "learning_rate?"),
        ("wandb.wandb", "wandb.log_with?"),
        ("sampling.num_inference_steps", "sampling.sampling_steps?"),
        ("training.push_to_hub", "no flag: upload"),
        ("gpro.eta", "grpo.eta?"),
    ],
)
def test_keys_of_e_grpo_s_command_line_are_answered_in_its_own_words(capsys, key, right):
    with pytest.raises(SystemExit):
        front_door([f"{key}=1"])
    assert right in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--fsdp_sharding_strategy", "--fsdp-sharding-strategy", "--fsdp_sharding_startegy"])
def test_the_sharding_strategy_has_the_right_spelling_beside_the_reference_s(capsys, flag):
    config = parse_dataclass(GRPOConfig, ["--data_json_path", "p.json", f"{flag}=hybrid_full"])
    assert config.fsdp_sharding_startegy == "hybrid_full"
    with pytest.raises(SystemExit):
        parse_dataclass(GRPOConfig, ["--help"])
    assert "--fsdp_sharding_startegy" in (text := capsys.readouterr().out) and "--fsdp_sharding_strategy" in text

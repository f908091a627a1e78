"""The trainer's command line: forms of flags, what is refused and how, algorithms, and the recipes in scripts/."""

import ast
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from fastvideo.cli import FlagError, parse_dataclass
from fastvideo.config import ALGORITHMS, GRPOConfig
from fastvideo.models.reward_model.spec import MIXES, REWARDS, SCHEDULES, SHARED
from fastvideo.reference_flags import REFERENCE_FLAGS, translate
from fastvideo.rollout_plan import describe
from fastvideo.runtime import preflight
from fastvideo.train_grpo_flux import main

import pytest
from conftest import ROOT, TIME_LIMIT, parts_missing
from diffusers import FluxTransformer2DModel

MIX_GRPO = ROOT / "scripts/finetune/finetune_flux_grpo_MixGRPO.sh"
RECIPES = sorted((ROOT / "scripts/finetune").glob("finetune_flux*.sh"))


def parse(*argv: str) -> GRPOConfig:
    data = [] if "--prompts_file" in argv or "--data_json_path" in argv else ["--data_json_path", "prompt.json"]
    return parse_dataclass(GRPOConfig, [*data, *argv], "", translate)


def refusal(capsys, *argv: str) -> str:
    """The one line that a failed parse prints to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line
    return line


# --- forms of flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--sampling_steps", "9", "--prog_overlap_step", "2", "--no_roll_back"],
        ["--sampling-steps", "9", "--prog-overlap-step", "2", "--no-roll-back"],
        ["--sampling-steps=9", "--prog_overlap_step=2", "--no-roll_back"],
        ["--sampling_steps", "5", "--sampling_steps", "9", "--prog_overlap-step", "2", "--roll_back", "--no_roll_back"],
    ],
)
def test_underscores_and_hyphens_are_the_same_and_the_last_value_counts(argv):
    config = parse(*argv)
    assert (config.sampling_steps, config.prog_overlap_step, config.roll_back) == (9, 2, False)


@pytest.mark.parametrize("name", [f.name for f in fields(GRPOConfig) if f.type is bool])
def test_every_switch_can_be_turned_on_and_off(name):
    needs = {
        "flow_grpo_sampling": ["--training_strategy", "all"],
        "drop_last_sample": ["--training_strategy", "all"],
        "use_group": ["--multi_reward_mix", "reward_aggr"],
        "quantize_base": ["--use_lora"],
    }.get(name, [])
    assert getattr(parse(*needs, f"--{name}"), name) is True
    assert getattr(parse(*needs, f"--no_{name}"), name) is False
    assert getattr(parse(*needs, "--no-" + name.replace("_", "-")), name) is False


@pytest.mark.parametrize("text", ["None", "none", "null", ""])
def test_none_means_not_set(text):
    config = parse("--dpm_algorithm_type", text, "--advantage_rerange_strategy", text, "--rollout_batch_size", text)
    assert config.dpm_algorithm_type is config.advantage_rerange_strategy is config.rollout_batch_size is None
    assert parse("--prompts_file", "p.txt", "--data_json_path", text).prompts_file == "p.txt"
    assert parse("--train_micro_batch_size", "auto").train_micro_batch_size is None


def test_lists_and_numbers_keep_their_types():
    config = parse("--granular_start_weights", "1", "2", "3", "--learning_rate", "1e-4", "--prompts_per_iteration", "8")
    assert config.granular_start_weights == [1.0, 2.0, 3.0]
    assert config.learning_rate == 1e-4 and config.prompts_per_iteration == 8


def test_help_explains_every_flag_in_a_sentence_by_section_needed_ones_first(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(GRPOConfig):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 10 and " ".join(field.metadata["help"].split()[:3]) in text
    order = "model: --pretrained_model_name_or_path data: --prompts_file reward: --reward_model --algorithm optimizer: "
    order += "--learning_rate LoRA: --lora_rank output: --output_dir addresses: --hps_path"
    flags = text[text.index("options:") :]
    places = [flags.index(f" {words} ") for words in order.split()]
    assert places == sorted(places) and text.index("model:") < 1500  # a short usage line
    assert all(name in text for name in (*REWARDS, *MIXES, *SCHEDULES))


def test_a_terminal_of_ascii_shows_other_letters_as_escapes_and_ends_nothing(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    parse()
    for stream in (sys.stdout, sys.stderr):
        print("right 0.91 ± 0.02", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"right 0.91 \\xb1 0.02\n"


def test_an_unknown_flag_is_an_error_with_a_suggestion(capsys):
    assert "--samplng_steps; did you mean --sampling_steps?" in refusal(capsys, "--samplng_steps", "5")
    assert "unknown flag --sampling" in refusal(capsys, "--sampling", "5")  # no abbreviations
    assert "did you mean --no_roll_back?" in refusal(capsys, "--no_rol_back")
    assert "error: stray is the value of no flag (" in refusal(capsys, "stray")
    assert "error: ddp is the value of no flag; did you mean --parallel ddp? (" in refusal(capsys, "ddp")


# Every flag of the reference recipe, with a value it may have there (None: a switch).
RECIPE_FLAGS = {
    "seed": "714", "pretrained_model_name_or_path": "data/flux", "vae_model_path": "data/flux", "cache_dir": "cache",
    "data_json_path": "prompt.json", "gradient_checkpointing": None, "train_batch_size": "1", "num_latent_t": "1",
    "sp_size": "1", "train_sp_batch_size": "1", "dataloader_num_workers": "4", "gradient_accumulation_steps": "3",
    "max_train_steps": "300", "learning_rate": "1e-5", "mixed_precision": "bf16", "checkpointing_steps": "50",
    "allow_tf32": None, "cfg": "0.0", "output_dir": "out", "h": "720", "w": "720", "t": "1", "sampling_steps": "25",
    "eta": "0.7", "lr_warmup_steps": "0", "sampler_seed": "7144", "max_grad_norm": "1.0", "weight_decay": "0.0001",
    "num_generations": "12", "shift": "3", "use_group": None, "ignore_last": None, "timestep_fraction": "0.6",
    "init_same_noise": None, "clip_range": "1e-4", "adv_clip_max": "5.0", "training_strategy": "part",
    "experiment_name": "mine", "kl_coeff": "0.0", "iters_per_group": "25", "group_size": "4",
    "sample_strategy": "progressive", "prog_overlap": None, "prog_overlap_step": "1", "max_iters_per_group": "10",
    "min_iters_per_group": "1", "roll_back": None, "trimmed_ratio": "0.0", "reward_model": "multi_reward",
    "hps_path": "a.pt", "hps_clip_path": "b.bin", "clip_score_path": "c.bin", "image_reward_path": "d.pt",
    "image_reward_med_config": "e.json", "image_reward_http_proxy": "None", "image_reward_https_proxy": "None",
    "pick_score_http_proxy": "None", "pick_score_https_proxy": "None", "unified_reward_url": "None",
    "unified_reward_default_question_type": "semantic", "unified_reward_num_workers": "1",
    "multi_reward_mix": "advantage_aggr", "hps_weight": "1.0", "clip_score_weight": "1.0",
    "image_reward_weight": "1.0", "pick_score_weight": "1.0", "unified_reward_weight": "1.0",
    "dpm_algorithm_type": "null", "dpm_apply_strategy": "post", "dpm_post_compress_ratio": "0.4",
    "dpm_solver_order": "2", "dpm_solver_type": "midpoint", "frozen_init_timesteps": "0", "wandb_key": "",
    "flow_grpo_sampling": None, "drop_last_sample": None, "advantage_rerange_strategy": "null",
    "resume_from_checkpoint": "latest", "lr_scheduler": "constant_with_warmup", "selective_checkpointing": "1.0",
    "fsdp_sharding_startegy": "full", "use_cpu_offload": None, "master_weight_type": "fp32", "ema_decay": "0.995",
    "ema_start_step": "0", "dit_model_name_or_path": "None", "precondition_outputs": None, "logging_dir": "logs",
    "loss_coef": "1.0", "lr_num_cycles": "1", "lr_power": "1.0",
}  # fmt: skip
ALL_STEPS = ("flow_grpo_sampling", "drop_last_sample")  # only with training_strategy all


@pytest.mark.parametrize("hyphens", [False, True])
def test_every_flag_of_the_reference_recipe_is_accepted(capsys, hyphens):
    names = [name for name in RECIPE_FLAGS if name not in ALL_STEPS]
    argv = []
    for name in names:
        flag = "--" + (name.replace("_", "-") if hyphens else name)
        argv += [flag] if RECIPE_FLAGS[name] is None else [flag, RECIPE_FLAGS[name]]
    config = parse(*argv)
    err = capsys.readouterr().err
    ignored = [name for name in names if name in REFERENCE_FLAGS]
    assert len(ignored) == 10 and all(f"warning: --{n} has no effect here and is ignored: " in err for n in ignored)
    assert "multi_reward is with --image_reward_mode overall" in err and "--ema_decay averages" in err
    assert "--hps_clip_path isn't read" in err
    assert len(err.splitlines()) == len(ignored) + 3
    assert (config.algorithm, config.ema_decay, config.dpm_solver_type) == ("mix_grpo", 0.995, "midpoint")
    assert parse("--training_strategy", "all", *(f"--{name}" for name in ALL_STEPS)).algorithm == "flow_grpo"


def test_flags_without_effect_warn_in_one_line_each_and_swallow_their_value_only(capsys):
    config = parse("--num_latent_t", "1", "--loss-coef=-1", "--logging_dir", "x", "--ignore_last", "--eta", "0.5")
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --")]
    assert len(warned) == 4
    assert "--num_latent_t" in warned[0] and "--loss_coef" in warned[1]
    assert config.eta == 0.5


def test_a_wandb_key_is_refused_on_the_command_line_and_not_repeated(capsys):
    for form in (["--wandb_key", "hush"], ["--wandb-key=hush"]):
        line = refusal(capsys, *form)
        assert "--wandb_key" in line and "WANDB_API_KEY" in line and "hush" not in line
    for empty in ("", "None"):
        assert not parse("--wandb_key", empty).wandb_key


def test_defaults_are_the_mixgrpo_recipe():
    config = parse()
    reference = {
        "algorithm": "mix_grpo", "seed": 714, "sampler_seed": 7144, "sampling_steps": 25, "eta": 0.7, "shift": 3,
        "h": 720, "w": 720, "num_generations": 12, "learning_rate": 1e-5, "weight_decay": 1e-4, "lr_warmup_steps": 0,
        "max_grad_norm": 1, "max_train_steps": 300, "checkpointing_steps": 50, "clip_range": 1e-4, "adv_clip_max": 5,
        "gradient_accumulation_steps": 3, "group_size": 4, "iters_per_group": 25, "prog_overlap": True,
        "prog_overlap_step": 1, "roll_back": True, "kl_coeff": 0, "multi_reward_mix": "advantage_aggr",
        "gradient_checkpointing": True, "mixed_precision": "bf16", "guidance_scale": 3.5, "init_same_noise": True,
        "use_group": True, "sample_strategy": "progressive", "training_strategy": "part",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in reference} == reference


# --- algorithms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,algorithm",
    [
        ("", "mix_grpo"),
        ("--prog_overlap_step 0", "mix_grpo"),
        ("--dpm_algorithm_type dpmsolver++ --dpm_apply_strategy post", "mix_grpo_flash"),
        ("--dpm_algorithm_type dpmsolver++ --prog_overlap_step 0", "mix_grpo_flash_star"),
        ("--training_strategy all", "dance_grpo"),
        ("--training_strategy all --flow_grpo_sampling", "flow_grpo"),
    ],
)
def test_the_algorithm_follows_from_the_flags_and_the_flags_from_the_algorithm(argv, algorithm):
    derived = parse(*argv.split())
    assert derived.algorithm == algorithm
    assert parse("--algorithm", algorithm, *argv.split()) == derived
    if argv != "--prog_overlap_step 0":
        assert parse("--algorithm", algorithm) == derived


def test_an_algorithm_brings_its_papers_values_and_given_flags_override_them():
    flash, star = parse("--algorithm", "mix_grpo_flash"), parse("--algorithm", "mix_grpo_flash_star")
    assert (flash.dpm_post_compress_ratio, flash.dpm_solver_order, flash.iters_per_group) == (0.4, 2, 20)
    assert (star.dpm_post_compress_ratio, star.prog_overlap_step) == (0.2, 0)
    dance = parse("--algorithm", "dance_grpo")
    assert (dance.sampling_steps, dance.eta, dance.gradient_accumulation_steps) == (16, 0.3, 12)
    assert dance.drop_last_sample and dance.sde_type == "dance"
    dance = parse("--algorithm", "dance_grpo", "--eta", "0.5", "--no_drop_last_sample", "--sampling_steps", "8")
    assert (dance.eta, dance.drop_last_sample, dance.sampling_steps) == (0.5, False, 8)


@pytest.mark.parametrize(
    "argv,named",
    [
        ("--algorithm mix_grpo --training_strategy all", ("mix_grpo", "--training_strategy all", "part")),
        ("--algorithm dance_grpo --training_strategy part", ("dance_grpo", "--training_strategy part", "all")),
        (
            "--algorithm dance_grpo --flow_grpo_sampling",
            ("dance_grpo", "--flow_grpo_sampling:", "--no_flow_grpo_sampling"),
        ),
        ("--algorithm flow_grpo --no_flow_grpo_sampling", ("flow_grpo", "contradicts --no_flow_grpo_sampling")),
        ("--algorithm mix_grpo --dpm_algorithm_type dpmsolver++", ("mix_grpo", "--dpm_algorithm_type dpmsolver++")),
        ("--algorithm mix_grpo_flash --dpm_algorithm_type None", ("mix_grpo_flash", "--dpm_algorithm_type None")),
        (
            "--algorithm mix_grpo_flash_star --prog_overlap_step 1",
            ("flash_star", "--prog_overlap_step 1", "needs --prog_overlap_step 0"),
        ),
        ("--flow_grpo_sampling", ("flow_grpo_sampling", "--training_strategy")),
        ("--drop_last_sample", ("drop_last_sample", "--training_strategy")),
        ("--training_strategy all --dpm_algorithm_type dpmsolver++", ("--dpm_algorithm_type", "part")),
    ],
)
def test_contradictions_are_errors(capsys, argv, named):
    line = refusal(capsys, *argv.split())
    assert all(text in line for text in named), line


# --- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,named",
    [
        ("--h 700", ("--h 700", "16")),
        ("--output_dir=", ("--output_dir ''", "empty")),
        ("--sampling_steps 100000", ("--sampling_steps 100000", "1000")),
        (f"--seed {2**64}", ("--seed", "below")),
        ("--w 1000", ("--w 1000", "16")),
        ("--h 0", ("--h 0",)),
        ("--group_size 24", ("--group_size 24", "23")),
        ("--group_size 5 --sampling_steps 6", ("--group_size 5", "4")),
        ("--sampling_steps 2 --group_size 1", ("--sampling_steps 2",)),
        ("--num_generations 1 --gradient_accumulation_steps 1", ("--num_generations 1", "2")),
        ("--gradient_accumulation_steps 5", ("--gradient_accumulation_steps 5", "--num_generations 12")),
        ("--gradient_accumulation_steps 24", ("--gradient_accumulation_steps 24", "--num_generations 12")),
        ("--reward_model nice_pictures", ("--reward_model", "nice_pictures", "hpsv2", "image_reward", "shapes")),
        ("--reward_model hpsv2,hpsv2", ("--reward_model", "hpsv2", "twice")),
        ("--reward_model shapes:-1", ("--reward_model", "shapes:-1")),
        ("--reward_model multi_reward --hps_weight -1", ("--hps_weight", "-1")),
        ("--reward_model hpsv2 --hps_weight 0", ("--reward_model", "0")),
        ("--reward_model hpsv2 --hps_weight nan", ("--hps_weight", "nan")),
        ("--eta nan", ("--eta nan",)),
        ("--eta 0", ("--eta 0",)),
        ("--eta -0.5", ("--eta -0.5",)),
        ("--eta 1 --sde_type cps", ("--eta 1", "below 1")),
        ("--eta high", ("--eta", "high")),
        ("--shift 0", ("--shift 0",)),
        ("--learning_rate 0", ("--learning_rate 0",)),
        ("--learning_rate inf", ("--learning_rate inf",)),
        ("--clip_range 0", ("--clip_range 0",)),
        ("--max_train_steps 0", ("--max_train_steps 0",)),
        ("--train_batch_size 0", ("--train_batch_size 0",)),
        ("--prompts_per_iteration 0", ("--prompts_per_iteration 0",)),
        ("--rollout_batch_size 0", ("--rollout_batch_size 0",)),
        ("--trimmed_ratio 1", ("--trimmed_ratio 1",)),
        ("--cfg 1.5", ("--cfg 1.5",)),
        ("--seed -1", ("--seed -1",)),
        ("--seed 1.5", ("--seed", "1.5")),
        ("--training_strategy some", ("--training_strategy", "some", "part", "all")),
        ("--sample_strategy zigzag", ("--sample_strategy", "zigzag", "progressive", "exp_decay")),
        ("--training_strategy all --timestep_fraction 0.01", ("--timestep_fraction 0.01",)),
        ("--training_strategy all --frozen_init_timesteps 16", ("--frozen_init_timesteps 16", "15")),
        ("--dpm_algorithm_type dpmsolver", ("--dpm_algorithm_type dpmsolver", "dpmsolver++")),
        ("--dpm_algorithm_type dpmsolver++ --dpm_apply_strategy all", ("--dpm_apply_strategy all", "post")),
        ("--dpm_solver_order 4", ("--dpm_solver_order", "4")),
        ("--dpm_post_compress_ratio 0", ("--dpm_post_compress_ratio 0",)),
        ("--no_use_group", ("--multi_reward_mix", "reward_aggr")),
        ("--granular_mix advantage --multi_reward_mix reward_aggr", ("--granular_mix advantage", "advantage_aggr")),
        ("--max_iters_per_group 1 --min_iters_per_group 2", ("--max_iters_per_group 1", "min_iters_per_group")),
        ("--lr_scheduler sometimes", ("--lr_scheduler", "sometimes", "cosine")),
        ("--lr_scheduler piecewise_constant", ("--lr_scheduler", "cosine")),
        ("--lr_scheduler polynomial --learning_rate 1e-7", ("--learning_rate 1e-07", "polynomial")),
        ("--lr_power -1", ("--lr_power -1",)),
        ("--lr_num_cycles 0", ("--lr_num_cycles 0",)),
        ("--master_weight_type bf16 --mixed_precision no", ("--master_weight_type bf16", "--mixed_precision bf16")),
        ("--mixed_precision int8", ("--mixed_precision", "int8", "bf16")),
        ("--advantage_rerange_strategy sort", ("--advantage_rerange_strategy", "sort", "balance")),
        ("--sp_size 0", ("--sp_size 0",)),
        ("--sp_size 2 --parallel deepspeed", ("--sp_size 2", "ddp", "fsdp", "deepspeed")),
        ("--sp_size 2 --parallel none", ("--sp_size 2", "ddp", "fsdp", "none")),
        ("--sp_size 2 --compile true", ("--compile true", "--sp_size 2")),
        ("--ema_decay 1", ("--ema_decay 1",)),
        ("--data_json_path None", ("--data_json_path", "--prompts_file")),
        ("--data_json_path a.json --prompts_file b.txt", ("--data_json_path", "--prompts_file")),
        ("--algorithm ppo", ("--algorithm", "ppo", "mix_grpo")),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_flag_and_value(capsys, argv, named):
    line = refusal(capsys, *argv.split())
    assert all(text in line for text in named), line


@pytest.fixture
def refused(flags, capsys, monkeypatch, tmp_path):
    """refused(name=value, ...) runs main on bad input and returns a line per fault; no transformer may be loaded."""

    def run(may_load: bool = False, **given) -> str:
        def loaded(*args, **kwargs):
            raise AssertionError("weights were loaded before the input was checked")

        if not may_load:
            monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", loaded)
        argv = flags(**given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "embedding prompts" not in line]
        errors = [line for line in errors if not line.startswith("note: ")]
        assert errors and all(": error: " in line for line in errors), errors
        assert not (tmp_path / "run/metrics.jsonl").exists()
        return "\n".join(errors)

    return run


def test_a_model_that_is_not_there(refused, tmp_path, tiny_flux):
    line = refused(may_load=True, pretrained_model_name_or_path=tmp_path / "none")
    assert "--pretrained_model_name_or_path" in line and str(tmp_path / "none") in line
    shutil.copytree(tiny_flux, tmp_path / "part", ignore=shutil.ignore_patterns("transformer"))
    line = refused(may_load=True, pretrained_model_name_or_path=tmp_path / "part")
    assert "--pretrained_model_name_or_path" in line and "transformer" in line


def test_a_hub_model_that_cannot_be_had_says_what_gated_models_need(refused, monkeypatch):
    def gated(*args, **kwargs):
        raise OSError("401 Client Error: access to this model is restricted")

    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", gated)
    monkeypatch.setattr(preflight, "is_offline_mode", lambda: False)
    line = refused(may_load=True, pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev")
    assert "black-forest-labs/FLUX.1-dev" in line and "licence" in line and "HF_TOKEN" in line


def test_a_polynomial_schedule_needs_steps_after_its_warm_up():
    """diffusers would divide by 0 after the last optimizer step, before the last checkpoint."""
    settings = {"prompts_file": "p.txt", "reward_model": "shapes", "lr_scheduler": "polynomial", "max_train_steps": 100}
    describe(GRPOConfig.create(**settings, lr_warmup_steps=399), 1)
    with pytest.raises(FlagError, match="^lr_warmup_steps 400: .* less than the run's 400 optimizer steps"):
        describe(GRPOConfig.create(**settings, lr_warmup_steps=400), 1)


@pytest.mark.parametrize(
    "content,message",
    [(b"", "no prompts"), (b" \n\n", "no prompts"), (b"fine\n\xff\xfe\n", "line 2"), (None, "No such")],
)
def test_a_prompt_file_that_is_missing_empty_or_no_text(refused, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    line = refused(prompts_file=path)
    assert "--prompts_file" in line and str(path) in line and message in line


@pytest.mark.parametrize(
    "content,message", [(None, "No such"), ("[]", "at least one"), ("{", "JSON"), ('[{"a": 1}]', "text")]
)
def test_a_prompt_json_that_is_missing_empty_or_malformed(refused, tmp_path, content, message):
    path = tmp_path / "prompt.json"
    if content is not None:
        path.write_text(content)
    line = refused(data_json_path=path)
    assert "--data_json_path" in line and str(path) in line and message in line


@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_corrupt_embedding_is_found_before_training_wherever_it_is(
    refused, embedded_prompts, tmp_path, damage, number
):
    shutil.copytree(embedded_prompts.parent, tmp_path / "data")
    index = tmp_path / "data/prompt.json"
    entry = json.loads(index.read_text())[number]
    path = tmp_path / "data/prompt_embed" / entry["prompt_embed_path"]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if damage == "cut" else b"not a tensor")
    line = refused(data_json_path=index)
    assert "--data_json_path" in line and path.name in line


@pytest.mark.parametrize(
    "given,named",
    [
        ({"reward_model": "hpsv2", "hps_path": "nowhere/HPS.pt"}, ("--hps_path", "nowhere/HPS.pt")),
        (
            {"reward_model": "image_reward", "image_reward_score_dir": "nowhere"},
            ("--image_reward_score_dir", "nowhere"),
        ),
        ({"reward_model": "clip_score", "clip_score_path": "./nowhere.bin"}, ("--clip_score_path", "nowhere.bin")),
        ({"reward_model": "unified_reward"}, ("--unified_reward_url",)),
        ({"reward_model": "no_such_module:reward"}, ("--reward_model", "no_such_module")),
        ({"reward_model": "custom_rewards:no_such_function"}, ("--reward_model", "no_such_function")),
        ({"reward_model": "custom_rewards:britness"}, ("has no 'britness'; choose from ", "did you mean brightness?")),
        ({"reward_model": "custom_rewards.py:brightness"}, ("leave out .py: custom_rewards:brightness",)),
        ({"reward_model": "custom_rewards"}, ("name a function: custom_rewards:FUNCTION",)),
        ({"granular_start_weights": (0.5, -0.3, 0.2)}, ("--granular_start_weights", "-0.3")),
        ({"granular_end_weights": (0, 0, 0)}, ("--granular_end_weights", "above 0")),
        ({"granular_start_weights": (1, 2)}, ("--granular_start_weights", "binding, form, clean")),
        ({"granular_gamma": 0}, ("--granular_gamma 0",)),
    ],
)
def test_a_reward_that_cannot_work(refused, given, named):
    line = refused(**given)
    assert all(text in line for text in named), line


def test_an_output_directory_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(output_dir=tmp_path / "file/run")
    assert "--output_dir" in line and "file/run" in line


def test_prompts_that_do_not_divide_among_processes(flags, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(flags(prompts_per_iteration=3, dry_run=True))
    assert stop.value.code == 2 and "--prompts_per_iteration 3" in capsys.readouterr().err


# --- dry runs and recipes ---------------------------------------------------------------------------------------------


def test_a_dry_run_prints_arithmetic_and_plan_and_touches_nothing(flags, capsys, tmp_path):
    main(flags(dry_run=True, output_dir=tmp_path / "out", train_batch_size=3))
    text = capsys.readouterr().out
    assert "mix_grpo: 3 prompts x 4 samples = 12 images" in text and "4 optimizer steps" in text
    assert "per prompt and iteration: 21 (without sharing 24)" in text
    assert "loss: ratio, clipped at ±0.0001" in text
    plan = [line.split() for line in text.splitlines() if " -> " in line]
    assert [line[4] for line in plan] == ["flow_sde"] * 2 + ["ode"] * 4
    assert [line[0] for line in plan] == list("012345") and plan[-1][3] == "0.0000"
    assert not (tmp_path / "out").exists() and "checkpoints: 1 of 0.0182 GB" in text


def test_a_recipe_tells_once_which_values_are_the_environment_s():
    command = ["bash", str(ROOT / "scripts/finetune/finetune_tiny_flux.sh"), "--dry_run"]
    command += ["--prompts_file", "data/tiny_prompts.txt"]
    given = {"PATH": os.environ["PATH"], "PYTHON_BIN": sys.executable, "SEED": "3", "H": "48"}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "environment variable" in line]
    assert told == ["--seed 3, from the environment variable SEED", "--h 48, from the environment variable H"]
    assert "hostfile" not in done.stderr  # the one of the repository names this machine alone


def recipe_commands(
    scripts: Sequence[Path], tmp_path: Path, *arguments: str, **environment: str
) -> dict[str, list[str]]:
    """{name of the recipe: command line for its interpreter}, for all recipes, from a single bash process."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    names = {field.name.upper() for field in fields(GRPOConfig)}
    clean = {name: value for name, value in os.environ.items() if name.upper() not in names}
    # A subshell for each, because a recipe ends with exec.
    code = f'for script in {shlex.join(map(str, scripts))}; do echo "== $script"; (source "$script" "$@"); done'
    done = subprocess.run(
        ["bash", "-c", code, "bash", *arguments],
        cwd=tmp_path, env={**clean, "PYTHON_BIN": str(fake), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = (part.splitlines() for part in done.stdout.split("== ")[1:])
    return {recipe_name(Path(script)): command for script, *command in parts}


def recipe_name(script: Path) -> str:
    return script.stem.removeprefix("finetune_").removeprefix("flux_grpo_")


def recipe_command(script: Path, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    (command,) = recipe_commands([script], tmp_path, *arguments, **environment).values()
    return command


def test_a_recipe_that_names_only_its_algorithm_trains_with_the_algorithm_s_own_values(tmp_path):
    scripts = [tmp_path / f"{name}.sh" for name in ALGORITHMS]
    for script in scripts:
        lines = (f"source {ROOT}/scripts/finetune/launch.sh", f"flag algorithm {script.stem}", 'launch "$@"')
        script.write_text("\n".join(lines))
    for name, (program, *argv) in recipe_commands(scripts, tmp_path).items():
        assert program == "fastvideo/train_grpo_flux.py"
        own = GRPOConfig.create(algorithm=name, data_json_path="data/rl_embeddings/prompt.json")
        assert parse_dataclass(GRPOConfig, argv) == own


# Other files than FLUX.1's, and batches, which don't change results. What the family decides isn't repeated.
KLEIN = {
    "pretrained_model_name_or_path": "data/flux2_klein",
    "data_json_path": "data/flux2_klein_rl_embeddings/prompt.json",
    "rollout_batch_size": 6,
    "train_micro_batch_size": 4,
}
# Recipe -> algorithm, and some of its paper's values.
RECIPE_VALUES = {
    "FastGRPO": ("mix_grpo", {"group_size": 4, "iters_per_group": 25, "reward_model": "image_reward"}),
    "MixGRPO": ("mix_grpo", {"prog_overlap_step": 1, "sampling_steps": 25, "h": 720, "seed": 714}),
    "MixGRPO_Flash": ("mix_grpo_flash", {"iters_per_group": 20, "dpm_post_compress_ratio": 0.4, "dpm_solver_order": 2}),
    "MixGRPO_Flash_star": ("mix_grpo_flash_star", {"prog_overlap_step": 0, "dpm_post_compress_ratio": 0.2}),
    "E_GRPO": ("grpo_merge", {
        "sampling_steps": 16, "learning_rate": 2e-6, "entropy_threshold": 2.2, "reward_model": "hpsv2",
    }),
    "Granular_GRPO": ("granular_grpo", {
        "sampling_steps": 16, "learning_rate": 2e-6, "granular_list": [1, 2, 3], "reward_model": "hpsv2",
    }),
    "BranchGRPO": ("branch_grpo", {
        "sampling_steps": 20, "num_generations": 16, "eta": 0.3, "clip_range": 1e-3,
        "tree_split_points": [0, 3, 6, 9], "tree_split_noise_scale": 4, "depth_pruning": [], "reward_model": "hpsv2",
        "gradient_accumulation_steps": 12,
    }),
    "DanceGRPO": ("dance_grpo", {
        "sampling_steps": 16, "eta": 0.3, "gradient_accumulation_steps": 12, "timestep_fraction": 0.6,
        "reward_model": "hpsv2",
    }),
    "DanceGRPO_lora": ("dance_grpo_lora", {
        "sampling_steps": 12, "eta": 0.3, "learning_rate": 3e-4, "use_lora": True,
        "lora_rank": 128, "lora_alpha": 256, "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "reward_model": "hpsv2",
    }),
    "V_GRPO": ("v_grpo", {"draws": 4, "clip_range": 3e-2, "init_same_noise": False}),
    "DiffusionNFT": ("diffusion_nft", {"draws": 4, "nft_beta": 1, "old_policy_decay": 0.5, "ref_kl_coeff": 1e-4}),
    "AWM": ("awm", {"draws": 4, "clip_range": 1e-2, "old_policy_decay": 0.9, "old_kl_coeff": 0.1}),
    "GRPO_Guard": ("mix_grpo", {"ratio_norm": True, "step_weights": "velocity", "clip_range": 2e-6}),
    "FlowGRPO": ("flow_grpo", {"sde_type": "flow", "flow_grpo_fast_steps": 0}),
    "flux2_klein_MixGRPO": ("mix_grpo", KLEIN),
    "flux2_klein_MixGRPO_Flash": ("mix_grpo_flash", KLEIN),
    "flux2_klein_MixGRPO_Flash_lora": ("mix_grpo_flash", KLEIN | {
        "use_lora": True, "lora_rank": 128, "lora_alpha": 128, "learning_rate": 3e-4,
    }),
}  # fmt: skip


def test_every_recipe_trains_with_the_values_of_its_paper(tmp_path, capsys):
    commands = recipe_commands(RECIPES, tmp_path, "--dry_run")
    assert commands.keys() == RECIPE_VALUES.keys()
    for name, (program, *argv) in commands.items():
        algorithm, values = RECIPE_VALUES[name]
        config = parse_dataclass(GRPOConfig, argv)
        assert {key: getattr(config, key) for key in values} == values
        title = "MixGRPO" if name == "FastGRPO" else name
        places = {"experiment_name": title, "output_dir": f"outputs/{title}", "dry_run": True}
        places["reward_model"] = values.get("reward_model", "image_reward")
        places["data_json_path"] = "data/rl_embeddings/prompt.json"
        if name == "GRPO_Guard" or "klein" in name:
            places |= values  # the other values are the algorithm's own
        assert config == GRPOConfig.create(algorithm=algorithm, **places)
        assert program == "fastvideo/train_grpo_flux.py"
        with parts_missing():
            main(argv)
        assert f"{algorithm}: 1 prompt x " in capsys.readouterr().out


def test_the_environment_counts_more_than_a_recipe_and_arguments_more_than_both(tmp_path):
    given = {"ETA": "0.5", "NUM_GENERATIONS": "6", "OUTPUT_DIR": "elsewhere"}
    argv = recipe_command(MIX_GRPO, tmp_path, "--eta", "0.4", **given)[1:]
    config = parse_dataclass(GRPOConfig, argv)
    assert (config.eta, config.num_generations, config.output_dir) == (0.4, 6, "elsewhere")


@pytest.mark.parametrize(
    "recipe,environment,argv,expected",
    [
        ("MixGRPO", {"DATA_JSON_PATH": "d"}, "--prompts-file=p.txt", {"prompts_file": "p.txt", "data_json_path": None}),
        ("MixGRPO", {"PROMPTS_FILE": "p.txt"}, "", {"prompts_file": "p.txt", "data_json_path": None}),
        ("MixGRPO", {"PROMPTS_FILE": "p.txt"}, "--data_json_path d", {"prompts_file": None, "data_json_path": "d"}),
        ("MixGRPO", {}, "--dpm_algorithm_type dpmsolver++", {"algorithm": "mix_grpo_flash"}),
        ("MixGRPO", {"TRAINING_STRATEGY": "all"}, "--training_strategy all", {"algorithm": "dance_grpo"}),
        ("MixGRPO_Flash", {"DPM_ALGORITHM_TYPE": "dpmsolver++"}, "--algorithm mix_grpo", {"dpm_algorithm_type": None}),
        ("E_GRPO", {"ETA_STEP_LIST": "1"}, "--algorithm mix_grpo", {"algorithm": "mix_grpo", "eta_step_list": []}),
        ("DanceGRPO", {}, "--use_pickscore", {"algorithm": "dance_grpo", "reward_model": "pick_score"}),
    ],
)
def test_flags_given_by_hand_replace_those_of_recipe_and_environment_that_they_exclude(
    tmp_path, capsys, recipe, environment, argv, expected
):
    script = ROOT / f"scripts/finetune/finetune_flux_grpo_{recipe}.sh"
    command = recipe_command(script, tmp_path, *argv.split(), **environment)[1:]
    config = parse_dataclass(GRPOConfig, command, "", translate)
    assert {name: getattr(config, name) for name in expected} == expected
    assert "note: --" in capsys.readouterr().err  # never without a word


@pytest.mark.parametrize("argv", ["--prompts_file p.txt", "--prompts-file=p.txt"])
def test_a_prompt_file_takes_the_place_of_a_recipe_s_cached_embeddings_that_nobody_named(tmp_path, capsys, argv):
    config = parse_dataclass(GRPOConfig, recipe_command(MIX_GRPO, tmp_path, *argv.split())[1:], "", translate)
    assert (config.prompts_file, config.data_json_path) == ("p.txt", None)
    assert "data_json_path" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv,named",
    [
        ("--data_json_path d --prompts_file p.txt", "--data_json_path d: give either"),
        ("--prompts_file p.txt --data_json_path d", "--data_json_path d: give either"),
        ("--algorithm mix_grpo --training_strategy all", "--algorithm mix_grpo: contradicts --training_strategy all"),
    ],
)
def test_contradictions_among_the_flags_given_by_hand_stay_errors(tmp_path, capsys, argv, named):
    command = recipe_command(MIX_GRPO, tmp_path, *argv.split())[1:]
    with pytest.raises(SystemExit):
        parse_dataclass(GRPOConfig, command, "", translate)
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "argv,named",
    [
        ("--algorithm AWM", "invalid choice: 'AWM'; choose from mix_grpo_flash_star, "),
        ("--algorithm AWM", ", awm; did you mean awm? ("),
        ("--parallel dpp", "choose from none, ddp, fsdp, deepspeed; did you mean ddp? ("),
        ("--log_with none wandb", "--log_with/--report_to: none wandb: none is no part of a list; it stands alone ("),
        ("--quantize_base", "--quantize_base: goes with --use_lora"),
        ("--lora_rank 16", "--lora_rank 16: goes with --use_lora"),
        ("--algorithm awm --init_same_noise", "contradicts --init_same_noise: it needs --no_init_same_noise"),
    ],
)
def test_a_refusal_names_what_may_be_meant_and_writes_switches_as_they_are_given(capsys, argv, named):
    with pytest.raises(SystemExit):
        parse_dataclass(GRPOConfig, ["--prompts_file", "p.txt", *argv.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and "None" not in line


def test_help_says_where_an_algorithm_has_another_default(capsys):
    with pytest.raises(SystemExit):
        parse_dataclass(GRPOConfig, ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "denoising steps T (default: 25; 16 with dance_grpo, grpo_merge, granular_grpo; 12 with dance_grpo_lora" in told
    )
    assert "--training_strategy {part,all}" in told and "(default: part; all with flow_grpo, dance_grpo, " in told
    assert "order of the samples over optimizer steps (default: None)" in told and ",None}" not in told


def test_the_environment_sets_every_flag_that_a_recipe_has_ever_named():
    text = (ROOT / "scripts/finetune/launch.sh").read_text()
    names = text.partition('FROM_ENVIRONMENT="')[2].partition('"')[0].split()
    assert set(names) <= {field.name for field in fields(GRPOConfig)} and len(set(names)) == len(names)
    promised = (
        "pretrained_model_name_or_path data_json_path seed sampler_seed h w sampling_steps shift eta num_generations "
        "gradient_accumulation_steps train_batch_size max_train_steps checkpointing_steps learning_rate "
        "lr_warmup_steps weight_decay max_grad_norm clip_range adv_clip_max kl_coeff multi_reward_mix reward_model "
        "image_reward_mode mixed_precision algorithm experiment_name output_dir tree_split_points "
        "tree_split_noise_scale tree_fusion tree_width_prune depth_pruning timestep_fraction lora_rank lora_alpha "
        "lora_target_modules entropy_threshold eta_step_list eta_step_merge_list granular_list flow_grpo_fast_steps "
        "group_size sample_strategy iters_per_group prog_overlap_step dpm_algorithm_type dpm_apply_strategy "
        "dpm_post_compress_ratio dpm_solver_order dpm_solver_type prompts_per_iteration train_micro_batch_size "
        "lr_scheduler"
    )
    assert set(names) >= set(promised.split())


@pytest.mark.parametrize(
    "variable,value",
    [("NPROC_PER_NODE", "many"), ("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "-1"), ("PYTHON_BIN", "/no/python")],
)
def test_a_script_refuses_a_variable_that_it_cannot_use_in_one_line(variable, value):
    environment = {**os.environ, "PYTHON_BIN": sys.executable, variable: value}
    done = subprocess.run(["bash", str(MIX_GRPO), "--dry_run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{variable}={value}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_starts_several_processes_with_torchrun(tmp_path):
    command = recipe_command(MIX_GRPO, tmp_path, NPROC_PER_NODE="2")
    assert command[:2] == ["-m", "fastvideo.torchrun"] and "--nproc_per_node\n2\n" in "\n".join(command)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU takes all of it in one process")
@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (5, 4), (7, 6), (64, 8)])
def test_the_tiny_recipe_gives_each_core_a_process_as_far_as_24_prompts_divide(cores, processes, tmp_path):
    fake = tmp_path / "bin/nproc"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho {cores}\n")
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    command = recipe_command(ROOT / "scripts/finetune/finetune_tiny_flux.sh", tmp_path, PATH=path)
    at = command.index("--nproc_per_node") + 1 if "fastvideo.torchrun" in command else None
    assert (1 if at is None else int(command[at])) == processes


@pytest.mark.parametrize("recipe", ["finetune_flux_grpo_MixGRPO", "finetune_tiny_flux"])
def test_a_recipe_runs_from_anywhere(recipe, tmp_path):
    tiny = "--pretrained_model_name_or_path data/tiny_flux --prompts_file data/tiny_prompts.txt --reward_model shapes"
    done = subprocess.run(
        ["bash", str(ROOT / f"scripts/finetune/{recipe}.sh"), *tiny.split(), "--dry_run"],
        cwd=tmp_path, env={**os.environ, "PYTHON_BIN": sys.executable}, capture_output=True, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plan of the first window [0, 1, 2, 3]" in done.stdout


# --- no flag without effect -------------------------------------------------------------------------------------------


# Settings that no code reads as `config.NAME`, and the reasons.
READ_OTHERWISE = {
    "reward_model": "resolve_reward_spec reads the setting whose name it is given",
    "prompts_per_iteration": "GRPOConfig.local_prompts",
    "train_batch_size": "GRPOConfig.local_prompts",
    "flow_grpo_sampling": "decides in config.py which algorithm runs, and so which planner",
    "dpm_apply_strategy": "has one legal value; the reference's recipes give it",
    "hps_clip_path": "not needed; the reference's recipes give it",
    "wandb_key": "refused",
    "use_wandb": "decides in config.py what log_with is",
}


def test_every_setting_is_read_somewhere():
    read = set(SHARED.values())  # these and the next ones are read by getattr, from the registry of rewards
    for reward in REWARDS.values():
        read |= {*reward.arguments.values(), reward.weight, reward.mode}
    for path in (ROOT / "fastvideo").rglob("*.py"):
        if path.parent.name in ("sample", "eval", "data_preprocess") or path == ROOT / "fastvideo/config.py":
            continue  # other programs have another `config`; checking a setting is not using it
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if "config" in (getattr(owner, "id", None), getattr(owner, "attr", None)):  # config.x, self.config.x
                    read.add(node.attr)
    assert {field.name for field in fields(GRPOConfig)} - read == set(READ_OTHERWISE)


def test_every_setting_has_a_default_and_a_type_that_the_parser_knows():
    for field in fields(GRPOConfig):
        assert field.default is not MISSING or field.default_factory is not MISSING
        if field.type is not bool and field.default is not None and field.default is not MISSING:
            given = parse(f"--{field.name}", str(field.default)) if field.name != "algorithm" else parse()
            assert getattr(given, field.name) == field.default

"""E-GRPO's command line, fastvideo/train.py: the same trainer under other names."""

import json
import shutil
import subprocess
import sys

from fastvideo import train as front_door
from fastvideo.cli import parse_dataclass
from fastvideo.config import ALGORITHMS, GRPOConfig
from fastvideo.reference_flags import translate

import pytest
from conftest import ROOT, parts_missing, torchrun
from test_config import recipe_command, recipe_commands
from test_train import base_weights, same_weights

# The command in E-GRPO's README, with values for its placeholders.
DOCUMENTED = (
    "algorithm=grpo_merge reward=hps model.pretrained_model_name_or_path=data/flux data.json_path=prompt.json "
    "training.max_train_steps=300 training.learning_rate=1e-6 grpo.num_generations=16 grpo.eta_step_list=[1,2,3] "
    "grpo.eta_step_merge_list=[1,1,1] grpo.granular_list=[1,2] sampling.height=512 sampling.width=512 "
    "reward.hps_path=HPS.pt wandb.enabled=true wandb.project=mine output_dir=out"
).split()


def settings(*overrides: str) -> GRPOConfig:
    return parse_dataclass(GRPOConfig, front_door.to_flags(overrides)[0], "", translate)


def test_the_documented_command_gives_these_settings():
    config = settings(*DOCUMENTED)
    expected = {
        "algorithm": "grpo_merge", "reward_model": "hpsv2", "pretrained_model_name_or_path": "data/flux",
        "data_json_path": "prompt.json", "max_train_steps": 300, "learning_rate": 1e-6, "num_generations": 16,
        "eta_step_list": [1, 2, 3], "eta_step_merge_list": [1, 1, 1], "granular_list": [1, 2], "h": 512, "w": 512,
        "hps_path": "HPS.pt", "use_wandb": True, "wandb_project": "mine", "output_dir": "out",
        "sampling_steps": 16,  # the algorithm's own
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "override,name,value",
    [
        ("algorithm=grpo", "algorithm", "flow_grpo"),
        *((f"algorithm={name}", "algorithm", name) for name in ALGORITHMS),
        ("reward=clip", "reward_model", "clip_score"),
        ("reward=combined", "reward_model", "hpsv2:0.7,clip_score:0.3"),
        ("reward=multi_reward", "reward_model", "multi_reward"),
        ("reward=pick_score", "reward_model", "pick_score"),
        ("reward=jpeg_compressibility", "reward_model", "jpeg_compressibility"),
        ('reward.reward_model="shapes:2,jpeg_compressibility"', "reward_model", "shapes:2,jpeg_compressibility"),
        ("reward.reward_model=fastvideo.config:flag", "reward_model", "fastvideo.config:flag"),
        ("training.gradient_checkpointing=false", "gradient_checkpointing", False),
        ("wandb.enabled=False", "use_wandb", False),
        ("eta=0.5", "eta", 0.5),
        ("training.rollout_batch_size=null", "rollout_batch_size", None),
        ("training.train_micro_batch_size=auto", "train_micro_batch_size", None),
        ("grpo.depth_pruning=[]", "depth_pruning", []),
        ("reward.granular_start_weights=[1, 0.5, 2]", "granular_start_weights", [1.0, 0.5, 2.0]),
        ("sampling.sampling_steps=9", "sampling_steps", 9),
        ("data.cfg_rate=0.1", "cfg", 0.1),
        ("reward.clip_path=clip.bin", "hps_clip_path", "clip.bin"),
        ("distributed.master_weight_type=bf16", "master_weight_type", "bf16"),
        ("training.mixed_precision=no", "mixed_precision", "no"),  # YAML reads `no` as false
        ("training.compile=true", "compile", "true"),  # a text that looks like a switch
        ("wandb.name='1e3'", "experiment_name", "1e3"),
        ("wandb.name=1e3", "experiment_name", "1e3"),
        ("data.loss_coef=1", "algorithm", "grpo_merge"),  # a flag without effect, with the trainer's warning
    ],
)
def test_a_key_is_a_flag(override, name, value):
    assert getattr(settings("data.json_path=prompt.json", override), name) == value


@pytest.mark.parametrize(
    "override,named",
    [
        ("grpo.num_generation=16", ("grpo.num_generation", "grpo.num_generations?")),
        ("training.lerning_rate=1", ("training.lerning_rate", "training.learning_rate")),
        ("sampling.hight=512", ("sampling.hight", "sampling.height")),
        ("gpro.eta=1", ("unknown key gpro.eta", "grpo.eta")),
        ("wobble=1", ("unknown key wobble",)),
        ("+wobble=1", ("unknown key +wobble",)),
        ("hydra.run.dir=out", ("unknown key hydra.run.dir",)),
        ("algorithm=ppo", ("algorithm=ppo", "grpo_merge", "branch_grpo")),
        ("eta", ("eta", "key=value")),
        ("--learning-rate", ("--learning-rate: expected key=value", "write learning_rate=...")),
        ("--use_lora", ("--use_lora: expected key=value", "write use_lora=true")),
        ("--eta=1", ("unknown key --eta",)),
        ("reward=hsp", ("reward=hsp", "hps", "multi_reward", "reward.reward_model=")),
        ("reward=shapes:2,jpeg_compressibility", ("reward=shapes:2,", "pick_score", "'reward.reward_model=\"...\"'")),
        ("reward=[hps,clip]", ("reward=[hps,clip]", "choose from hps, clip")),
        ("reward.reward_model=hpsv2,pick_score", ("reward.reward_model=hpsv2,pick_score", "quotes")),
        ("grpo.eta_step_list=[1,", ("grpo.eta_step_list=[1,", "grammar")),
        ("grpo.eta={a: 1}", ("grpo.eta={a: 1}", "Float")),
        ("grpo.eta=null", ("grpo.eta=null", "not Optional")),
        ("grpo.eta=${grpo.etta}", ("grpo.etta", "not found")),
        ("wandb.enabled=maybe", ("wandb.enabled=maybe", "true, false")),
        ("grpo.num_generations=many", ("grpo.num_generations=many", "Integer")),
        ("grpo.num_generations=1", ("--num_generations 1", "at least 2")),
        ("sampling.sde_type=ode", ("--sde_type", "ode", "flow", "cps")),
        ("grpo.eta_step_list=[1,2]", ("--eta_step_merge_list 1 1 1",)),
        ("wandb.wandb_key=hush", ("WANDB_API_KEY",)),
        ("wandb.key=[hush", ("WANDB_API_KEY",)),
        ("reward.reward_server=http://me:hush@a,http://b", ("reward.reward_server=http://a,http://b", "quotes")),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(capsys, override, named):
    with pytest.raises(SystemExit) as stop:
        front_door.main([*DOCUMENTED, override])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line and all(text in line for text in named), line
    assert "hush" not in line


def test_the_last_one_given_counts_and_a_value_wins_over_a_group():
    assert settings("data.json_path=p", "eta=0.1", "grpo.eta=0.2", "reward=hps", "reward=clip").eta == 0.2
    assert settings("data.json_path=p", "reward=hps", "reward=clip").reward_model == "clip_score"
    for key in ("reward.reward_model", "reward.model", "reward_model"):
        assert settings("data.json_path=p", f"{key}=pick_score", "reward=clip").reward_model == "pick_score"
    assert settings("data.json_path=p", "grpo.algorithm=flow_grpo", "algorithm=mix_grpo").algorithm == "flow_grpo"


def test_a_key_that_is_not_given_has_the_value_of_e_grpo_s_configuration_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {
        "algorithm": "grpo_merge", "reward_model": "hpsv2", "pretrained_model_name_or_path": "ckpt/flux", "seed": 42,
        "data_json_path": "data/rl_embeddings/videos2caption.json", "use_wandb": False, "sampler_seed": 1223627,
        "learning_rate": 1e-5, "eta_step_list": [1], "eta_step_merge_list": [1], "granular_list": [1, 2],
        "max_train_steps": 300, "num_generations": 12, "sampling_steps": 16, "eta": 0.7, "shift": 3, "h": 720,
        "clip_range": 1e-4, "max_grad_norm": 1, "weight_decay": 1e-4, "fsdp_sharding_startegy": "full",
    }  # fmt: skip
    for overrides in ([], ["algorithm=grpo_merge", "reward=hps"]):
        config = settings(*overrides)
        assert {name: getattr(config, name) for name in expected} == expected
        (note,) = front_door.to_flags(overrides)[1].splitlines()
        assert "--hps_path=hps_ckpt/HPS_v2.1_compressed.pt" in note and "--eta_step_list=1 " in note
    by_entropy = settings("grpo.eta_step_list=[]")
    assert by_entropy.eta_step_list == by_entropy.eta_step_merge_list == []
    assert settings("data.prompts_file=p.txt").data_json_path is None
    assert settings("parallel=ddp").fsdp_sharding_startegy is None
    (tmp_path / "data/flux").mkdir(parents=True)
    assert settings().pretrained_model_name_or_path == "data/flux"  # where this project's README puts the model
    other = settings("algorithm=mix_grpo")
    assert (other.seed, other.learning_rate, other.reward_model) == (714, 1e-5, "hpsv2")


def test_a_reward_means_what_e_grpo_s_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    laion = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert settings("reward=image_reward").image_reward_mode == "overall"
    multi = settings("reward=multi_reward", "reward.image_reward_mode=granular")
    assert (settings("reward=multi_reward").image_reward_mode, multi.image_reward_mode) == ("overall", "granular")
    assert settings("reward=clip").clip_score_path == f"hf-hub:{laion}"
    combined = settings("reward=combined")  # raw scores are summed
    assert combined.multi_reward_mix == "reward_aggr" and combined.clip_score_path == f"hf-hub:{laion}"
    assert settings("reward.reward_model=image_reward").image_reward_mode == "granular"
    (tmp_path / "ckpt/hps").mkdir(parents=True)
    (tmp_path / "ckpt/hps/HPS_v2_compressed.pt").touch()
    (tmp_path / "ckpt/CLIP-ViT-H-14-laion2B-s32B-b79K").mkdir()
    assert settings("reward=hps").hps_path == "ckpt/hps/HPS_v2_compressed.pt"
    assert "HPS_v2_compressed.pt" in front_door.to_flags(["reward=hps"])[1]
    assert settings("reward=clip").clip_score_path == "ckpt/CLIP-ViT-H-14-laion2B-s32B-b79K"
    (tmp_path / "hps_ckpt").mkdir()
    (tmp_path / "hps_ckpt/HPS_v2.1_compressed.pt").touch()
    assert settings("reward=hps").hps_path == "hps_ckpt/HPS_v2.1_compressed.pt"
    assert settings("reward=hps", "reward.hps_path=mine.pt").hps_path == "mine.pt"


def test_every_flag_is_a_key_of_every_section():
    for name in front_door.FLAGS:
        for section in ("", *front_door.SECTIONS):
            assert front_door.KEYS[f"{section}.{name}".lstrip(".")] == name


def test_hydra_writes_nothing_and_stays_where_it_is(tmp_path, subprocess_environment):
    command = [sys.executable, str(ROOT / "fastvideo/train.py"), *DOCUMENTED, "dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr  # no FLUX.1 is here
    assert "images per iteration" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_trains_what_the_flags_train(train, tiny_flux, embedded_prompts, tmp_path, subprocess_environment):
    run = train(algorithm="grpo_merge", eta_step_list=[0, 2], eta_step_merge_list=[1, 2])
    saved = json.loads((run.folder / "args.json").read_text())
    given = {
        "algorithm": "grpo_merge", "reward": "shapes", "model.pretrained_model_name_or_path": tiny_flux,
        "data.json_path": embedded_prompts, "grpo.eta_step_list": "[0,2]", "grpo.eta_step_merge_list": "[1,2]",
        "output_dir": tmp_path / "other", "sampling.height": 32, "sampling.width": 32, "wandb.enabled": "false",
        "training.gradient_checkpointing": "false",
    }  # fmt: skip
    names = ("sampling_steps", "num_generations", "max_train_steps", "mixed_precision", "dataloader_num_workers")
    names += ("seed", "sampler_seed", "learning_rate", "granular_list", "checkpointing_steps")
    given |= {f"training.{name}": saved[name] for name in (*names, "group_size", "image_log_steps")}
    argv = [f"{key}={value}" for key, value in given.items()]
    done = torchrun(argv, subprocess_environment, script="fastvideo/train.py", processes=1)
    assert done.returncode == 0, done.stderr
    other = type(run)(tmp_path / "other")
    assert other.numbers() == run.numbers() and same_weights(other.weights(), run.weights())


# --- scripts ----------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "train_grpo_hps": {
        "algorithm": "grpo_merge", "reward_model": "hpsv2", "learning_rate": 1e-5, "eta_step_list": [1],
        "eta_step_merge_list": [1], "granular_list": [1, 2],
    },
    "train_grpo_merge": {"algorithm": "grpo_merge", "eta_step_list": [1, 2, 3], "granular_list": [1, 2]},
    "train_dance_grpo": {"algorithm": "dance_grpo", "sampling_steps": 16},
    "train_mix_grpo": {"algorithm": "mix_grpo"},
    "train_branch_grpo": {"algorithm": "branch_grpo", "num_generations": 16},
    "train_multi_reward": {"reward_model": "multi_reward", "image_reward_mode": "overall"},
}  # fmt: skip


def test_no_script_is_left_untested():
    assert set(SCRIPTS) == {path.stem for path in (ROOT / "scripts/finetune").glob("train_*.sh")}


def test_every_script_passes_a_dry_run(tmp_path, capsys):
    scripts = [ROOT / f"scripts/finetune/{name}.sh" for name in SCRIPTS]
    for name, (program, *overrides) in recipe_commands(scripts, tmp_path, "--dry_run", MODEL_PATH="m").items():
        assert program == "fastvideo/train.py"
        with parts_missing():
            front_door.main(overrides)
        assert "images per iteration" in capsys.readouterr().out
        config = settings(*overrides)
        expected = {**SCRIPTS[name], "pretrained_model_name_or_path": "m", "max_train_steps": 300, "use_wandb": False}
        assert {key: getattr(config, key) for key in expected} == expected


def test_prompts_given_by_hand_replace_the_embeddings_of_the_environment(tmp_path):
    script = ROOT / "scripts/finetune/train_mix_grpo.sh"
    _, *overrides = recipe_command(script, tmp_path, "data.prompts_file=p.txt", DATA_PATH="prompt.json", MODEL_PATH="m")
    assert (settings(*overrides).prompts_file, settings(*overrides).data_json_path) == ("p.txt", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_the_tiny_model_and_saves(name, run_at, tiny_flux, embedded_prompts, tmp_path):
    """Runs the command line that the script passes to its interpreter, in this process."""
    small = "sampling.height=32 sampling.width=32 reward.reward_model=shapes training.mixed_precision=no "
    small += f"training.gradient_checkpointing=false training.dataloader_num_workers=0 output_dir={tmp_path / 'run'}"
    given = {"MODEL_PATH": tiny_flux, "DATA_PATH": str(embedded_prompts)}
    argv = ["training.max_train_steps=2", *small.split()]
    _, *overrides = recipe_command(ROOT / f"scripts/finetune/{name}.sh", tmp_path, *argv, **given)
    front_door.main(overrides)
    run = run_at("run")
    assert [line["grad_norm"] > 0 for line in run.metrics] == [True, True]
    assert not same_weights(run.weights(), base_weights(tiny_flux))


@pytest.mark.slow
def test_preprocessing_and_index_as_the_readme_of_e_grpo_writes_them(
    tmp_path, tiny_flux, prompts_file, subprocess_environment
):
    folder = tmp_path / "rl_embeddings"
    given = {"MODEL_PATH": tiny_flux, "PROMPT_FILE": str(prompts_file), "OUTPUT_DIR": str(folder)}
    done = subprocess.run(
        ["bash", "scripts/preprocess/preprocess_prompts.sh"],
        cwd=ROOT, env={**subprocess_environment, **given, "PYTHON_BIN": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = json.loads((folder / "prompt.json").read_text())
    assert json.loads((folder / "videos2caption.json").read_text()) == index and len(index) == 5

    def generate(*flags) -> subprocess.CompletedProcess:
        command = [sys.executable, "scripts/preprocess/generate_json_index.py", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, env=subprocess_environment, capture_output=True, text=True)

    (folder / "prompt_embed" / index[1]["prompt_embed_path"]).write_bytes(b"cut off")
    done = generate("--embedding_dir", folder, "--output_path", folder / "new.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "new.json").read_text()) == [index[0], *index[2:]]
    (tmp_path / "some.txt").write_text(index[3]["caption"] + "\n")
    generate("--data_dir", folder, "--output_name", "some.json", "--prompt_file", tmp_path / "some.txt")
    assert json.loads((folder / "some.json").read_text()) == [index[3]]
    for flags, named in (
        (("--embedding_dir", tmp_path), "prompt.json: No such file"),
        (("--embedding_dir", folder, "--output_path", tmp_path / "x.json"), "--output_path"),
    ):
        done = generate(*flags)
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--output_dir", "here"], ["--output-dir=here"], ["--output_dir=here"]])
def test_the_index_is_of_the_folder_that_a_flag_names(flags, tmp_path, subprocess_environment):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$*"\n')
    python.chmod(0o755)
    environment = {**subprocess_environment, "PYTHON_BIN": str(python), "OUTPUT_DIR": "elsewhere"}
    command = ["bash", "scripts/preprocess/preprocess_prompts.sh", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "scripts/preprocess/generate_json_index.py --embedding_dir here"


def test_the_quickstart_refuses_a_folder_that_holds_a_run(tmp_path, subprocess_environment):
    for held in (tmp_path / "one", tmp_path / "two/run"):
        held.mkdir(parents=True)
        (held / "metrics.jsonl").touch()
        out = tmp_path / held.relative_to(tmp_path).parts[0]
        environment = {**subprocess_environment, "PYTHON_BIN": sys.executable, "OUTPUT_DIR": str(out)}
        done = subprocess.run(
            ["bash", "scripts/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        line = f"quickstart.sh: error: OUTPUT_DIR {out}: {held} holds a run already; choose another folder\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
        assert [*held.iterdir()] == [held / "metrics.jsonl"] and len([*out.iterdir()]) == 1


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir", "--pretrained_model_name_or_path"])
def test_the_quickstart_refuses_flags_that_it_sets_itself(flag, tmp_path, subprocess_environment):
    environment = {**subprocess_environment, "PYTHON_BIN": sys.executable, "OUTPUT_DIR": str(tmp_path / "out")}
    for given in ([flag, str(tmp_path / "x")], [f"{flag}={tmp_path / 'x'}"]):
        command = ["bash", "scripts/quickstart.sh", "--seed", "1", *given]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and not [*tmp_path.iterdir()]
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"quickstart.sh: error: {flag}: ") and ("OUTPUT_DIR=" in line or "recipes" in line)


PROGRAMS = """#!/usr/bin/env bash
# Python, of which only the files count that training and sampling make.
while [ $# -gt 0 ]; do
  case $1 in *train_grpo_flux*) program=train ;; *sample_flux*) program=draw ;; --output_dir) out=$2 ;; esac
  shift
done
case ${program:-} in
  train) mkdir -p "$out/checkpoint-$ITERATIONS-0" && echo '{"reward_model": "shapes"}' > "$out/args.json" ;;
  draw) mkdir -p "$out" && echo "$ITERATIONS" > "$out/manifest.json" ;;
esac
"""


def test_a_quickstart_that_goes_on_keeps_the_pictures_of_the_earlier_checkpoint(tmp_path, subprocess_environment):
    programs, out = tmp_path / "python", tmp_path / "out"
    programs.write_text(PROGRAMS)
    programs.chmod(0o755)
    for iterations, more in ((4, []), (10, ["--resume_from_checkpoint", "latest"]), (10, ["--resume_from_checkpoint"])):
        environment = {**subprocess_environment, "PYTHON_BIN": str(programs), "OUTPUT_DIR": str(out)}
        environment["ITERATIONS"] = str(iterations)
        command = ["bash", "scripts/quickstart.sh", *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    drawn = {folder.name: (folder / "manifest.json").read_text().strip() for folder in out.glob("tuned*")}
    assert drawn == {"tuned": "10", "tuned-checkpoint-4-0": "4"}


def test_latest_goes_on_with_the_last_quickstart(tmp_path, subprocess_environment):
    """As the stopped run's last line says, in a checkout of its own."""
    programs = tmp_path / "python"
    programs.write_text(PROGRAMS)
    programs.chmod(0o755)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("quickstart-20260101-000000/run", "quickstart-20260102-000000/run", "quickstart-20260103-000000"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    environment = {**subprocess_environment, "PYTHON_BIN": str(programs), "ITERATIONS": "3"}
    environment.pop("OUTPUT_DIR", None)
    for flags in (["--resume_from_checkpoint", "latest"], ["--resume-from-checkpoint=latest"]):
        command = ["bash", "scripts/quickstart.sh", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    trained = [path.parent.parent.name for path in (tmp_path / "outputs").glob("*/run/checkpoint-*")]
    assert trained == ["quickstart-20260102-000000"] and len([*(tmp_path / "outputs").iterdir()]) == 3


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/huggingface/download_checkpoints.sh"])
def test_scripts_that_take_long_explain_themselves_and_stop(script, tmp_path, subprocess_environment):
    environment = {**subprocess_environment, "PYTHON_BIN": sys.executable, "OUTPUT_DIR": str(tmp_path / "out")}
    done = subprocess.run(["bash", script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    first = next(line[2:] for line in (ROOT / script).read_text().splitlines() if line.startswith("# "))
    assert done.stdout.startswith(first)

"""E-GRPO's command line for the same trainer: `section.key=value` instead of `--flag value`.

    torchrun --nproc_per_node=8 fastvideo/train.py algorithm=grpo_merge reward=hps \\
        model.pretrained_model_name_or_path=data/flux data.json_path=data/rl_embeddings/prompt.json \\
        training.max_train_steps=300 training.learning_rate=1e-6 grpo.num_generations=16 \\
        grpo.eta_step_list=[1,2,3] grpo.eta_step_merge_list=[1,1,1] grpo.granular_list=[1,2] \\
        sampling.height=512 sampling.width=512 reward.hps_path=hps_ckpt/HPS_v2.1_compressed.pt \\
        wandb.enabled=true wandb.project=my-project output_dir=outputs/e_grpo

Sections: model, data, training, grpo, sampling, reward, distributed, wandb. A key is a flag of the trainer, alone
or in a section; `data.json_path` is --data_json_path, and ALIASES names what is called differently. Values are YAML.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields

from fastvideo.config import ALGORITHMS, IGNORED_FLAGS, GRPOConfig
from fastvideo.train_grpo_flux import main as train

import yaml

SECTIONS = ("model", "data", "training", "grpo", "sampling", "reward", "distributed", "wandb")
ALIASES = {
    "reward": "reward_model",
    "sampling.height": "h",
    "sampling.width": "w",
    "data.cfg_rate": "cfg",
    "reward.clip_path": "hps_clip_path",
    "distributed.fsdp_sharding_strategy": "fsdp_sharding_startegy",
    "wandb.enabled": "use_wandb",
    "wandb.name": "experiment_name",
}
REWARDS = {"hps": "hpsv2", "clip": "clip_score", "combined": "hpsv2:0.7,clip_score:0.3"}
GROUPS = {"grpo": "flow_grpo"}
FLAGS = {f.name: f.type for f in fields(GRPOConfig)} | dict.fromkeys(IGNORED_FLAGS, str)


def flag_of(key: str) -> str:
    """The trainer's flag of a key. Raises ValueError, with the nearest keys, if there is none."""
    section, _, name = key.rpartition(".")
    if section in ("", *SECTIONS):
        for candidate in (ALIASES.get(key), name, f"{section}_{name}"):
            if candidate in FLAGS:
                return candidate
    close = difflib.get_close_matches(name, [*FLAGS, *(alias.rpartition(".")[2] for alias in ALIASES)], 3)
    choices = ", ".join(f"{section}.{found}" if section in SECTIONS else found for found in close)
    if section not in ("", *SECTIONS):
        raise ValueError(f"{key}: unknown section {section!r}; choose from {', '.join(SECTIONS)}")
    raise ValueError(f"unknown key {key}" + (f"; did you mean {choices}?" if choices else ""))


def to_flags(overrides: Sequence[str]) -> list[str]:
    """The trainer's command line for `key=value` arguments. Raises ValueError, one line, for what can't be read."""
    argv: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: expected key=value, such as training.learning_rate=1e-6")
        flag = flag_of(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}={text}: not a YAML value") from error
        if flag == "algorithm" and value not in (*ALGORITHMS, *GROUPS):
            raise ValueError(f"algorithm={text}: choose from {', '.join([*GROUPS, *ALGORITHMS])}")
        if isinstance(value, dict):
            raise ValueError(f"{key}={text}: expected one value or a list")
        if FLAGS[flag] is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{key}={text}: choose from true, false")
            argv.append(f"--{flag}" if value else f"--no_{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *(str(entry) for entry in value or ["None"])]
        else:
            plain = (
                value if isinstance(value, str) else text
            )  # the trainer parses numbers, and YAML takes `no` for false
            names = {"algorithm": GROUPS, "reward_model": REWARDS}.get(flag, {})
            argv.append(f"--{flag}={names.get(plain, plain)}")
    return argv


def main(overrides: Sequence[str] | None = None) -> None:
    """Translates the command line and runs the trainer. Bad input ends it with one line and status 2."""
    overrides = list(sys.argv[1:] if overrides is None else overrides)
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    try:
        argv = to_flags(overrides)
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    train(argv)


if __name__ == "__main__":
    main()

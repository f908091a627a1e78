"""E-GRPO's command line for the same trainer, read by Hydra: `section.key=value` instead of `--flag value`.

    torchrun --nproc_per_node=8 fastvideo/train.py algorithm=grpo_merge reward=hps \\
        model.pretrained_model_name_or_path=data/flux data.json_path=data/rl_embeddings/prompt.json \\
        training.max_train_steps=300 training.learning_rate=1e-6 grpo.num_generations=16 \\
        grpo.eta_step_list=[1,2,3] grpo.eta_step_merge_list=[1,1,1] grpo.granular_list=[1,2] \\
        sampling.height=512 sampling.width=512 reward.hps_path=hps_ckpt/HPS_v2.1_compressed.pt \\
        wandb.enabled=true wandb.project=my-project output_dir=outputs/e_grpo

Groups: algorithm is one of the trainer's algorithms, or grpo (flow_grpo); reward is hps, clip, combined, or a reward of
the trainer, with E-GRPO's meaning (REWARD_GROUPS). Any other mix is a value,
'reward.reward_model="hpsv2:0.7,pick_score:0.3"': Hydra wants its own quotes around a text with commas, brackets or =,
inside the quotes of the shell. A value counts more than a group's choice. What isn't given has the value of E-GRPO's
configuration (DEFAULTS, E_GRPO), and one line says which; grpo.eta_step_list=[] chooses steps and merges by entropy.
Lists are [1,2]. Sections: model, data, training, grpo, sampling, reward, distributed, wandb. A key is a flag of the
trainer, alone or in a section (`data.json_path` is --data_json_path; ALIASES names the keys that are called
differently). If a key is given twice, the last value counts. `fastvideo/train_grpo_flux.py --help` lists the flags.
Hydra's own keys don't exist: Hydra writes no folder and no log.
"""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from fastvideo.cli import choose_from, parse_first
from fastvideo.config import ALGORITHMS, GRPOConfig
from fastvideo.familiar_flags import answer
from fastvideo.io.messages import end, say
from fastvideo.models.reward_model.spec import MIXES, REWARDS
from fastvideo.reference_flags import REFERENCE_FLAGS, translate

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SECTIONS = ("model", "data", "training", "grpo", "sampling", "reward", "distributed", "wandb")
ALIASES = {
    "sampling.height": "h",
    "sampling.width": "w",
    "data.cfg_rate": "cfg",
    "reward.clip_path": "hps_clip_path",
    **{f"{place}fsdp_sharding_strategy": "fsdp_sharding_startegy" for place in ("", "distributed.")},
    "wandb.enabled": "use_wandb",
    "wandb.name": "experiment_name",
}
GROUPS = {
    "algorithm": {"grpo": "flow_grpo"} | {name: name for name in ALGORITHMS},
    "reward": {"hps": "hpsv2", "clip": "clip_score", "combined": "hpsv2:0.7,clip_score:0.3"}
    | {name: name for name in (*REWARDS, *MIXES)},
}
PLACES = {"algorithm": "algorithm", "reward": "reward.reward_model"}  # the keys that the groups' choices set
FLAGS: dict[str, Any] = dict.fromkeys(REFERENCE_FLAGS, Any) | {f.name: f.type for f in fields(GRPOConfig)}
AUTOMATIC = {f.name: f.metadata["none"] for f in fields(GRPOConfig) if "none" in f.metadata}  # what None is called
KEYS = {f"{section}.{name.removeprefix(f'{section}_')}": name for section in SECTIONS for name in FLAGS}
KEYS |= {f"{section}.{name}": name for section in SECTIONS for name in FLAGS} | {name: name for name in FLAGS} | ALIASES

# What E-GRPO's configuration says where the command line says nothing: for every algorithm, and for its own. A tuple
# is several places: the first that exists counts, else the first.
DEFAULTS = {
    "algorithm": "grpo_merge",
    "pretrained_model_name_or_path": ("ckpt/flux", "data/flux"),
    "data_json_path": "data/rl_embeddings/videos2caption.json",
    "use_wandb": False,
    "fsdp_sharding_startegy": "full",
}
E_GRPO = {
    "seed": 42,
    "sampler_seed": 1223627,
    "output_dir": "exp_flux/test",
    "checkpointing_steps": 500,
    "learning_rate": 1e-5,
    "eta_step_list": [1],
    "eta_step_merge_list": [1],
    "granular_list": [1, 2],
}
INSTEAD = {  # a flag that is given -> the one of these that isn't added then
    "prompts_file": "data_json_path",
    "eta_step_list": "eta_step_merge_list",
    "log_with": "use_wandb",
    "parallel": "fsdp_sharding_startegy",
    "quantize_base": "fsdp_sharding_startegy",
}
# What a choice of the group `reward` sets besides the name of the reward.
_HPS = {"hps_path": (GRPOConfig.hps_path, "hps_ckpt/HPS_v2_compressed.pt", "ckpt/hps/HPS_v2_compressed.pt")}
_LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_CLIP = {"clip_score_path": (f"ckpt/{Path(_LAION).name}", f"hf-hub:{_LAION}")}
REWARD_GROUPS: dict[str, dict[str, Any]] = {
    "hps": _HPS,
    "clip": _CLIP,
    "combined": {**_HPS, **_CLIP, "multi_reward_mix": "reward_aggr"},  # a sum of raw scores
    "image_reward": {"image_reward_mode": "overall"},
    "multi_reward": {**_HPS, "image_reward_mode": "overall"},
}


def register() -> None:
    """Gives Hydra GRPOConfig's fields and types, without values: config.py has the defaults."""
    store = ConfigStore.instance()
    members: list[tuple[str, Any, Any]] = [(name, kind, MISSING) for name, kind in FLAGS.items()]
    for section in SECTIONS:
        keys = {key.removeprefix(f"{section}."): flag for key, flag in KEYS.items() if key.startswith(f"{section}.")}
        kind = make_dataclass(section, [(name, FLAGS[flag], MISSING) for name, flag in keys.items()])
        members.append((section, kind, field(default_factory=kind)))
    choices = field(default_factory=lambda: ["_self_", *({group: None} for group in GROUPS)])
    store.store("trainer", make_dataclass("Trainer", [*members, ("defaults", list, choices)]))
    for group, options in GROUPS.items():
        for option, value in options.items():
            store.store(option, OmegaConf.from_dotlist([f"{PLACES[group]}={value}"]), group, "_global_")


register()


def readable(argument: str) -> str:
    """The argument as Hydra shall read it. Raises ValueError, one line, where Hydra would write several lines."""
    key, equals, text = argument.partition("=")
    if not equals:
        name = argument.lstrip("-").replace("-", "_")
        kind = FLAGS.get(KEYS.get(name, ""))
        instead = f"; write {name}={'true' if kind is bool else '...'}" if kind else ""
        raise ValueError(f"{argument}: expected key=value, such as training.learning_rate=1e-6{instead}")
    if key not in (*KEYS, *GROUPS):
        raise ValueError(f"unknown key {key}{_answer(key)}")
    if KEYS.get(key) == "wandb_key":  # before any message could repeat its value
        raise ValueError(f"{key}: keys don't belong on a command line; set WANDB_API_KEY in the environment")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ValueError(
            f"{argument}: not a value in Hydra's grammar; a text goes in quotes, '{key}=\"...\"'"
        ) from error
    value, kind = override.value(), FLAGS.get(KEYS.get(key, ""))
    if key in GROUPS and str(value) not in GROUPS[key]:
        other = {"reward": "; give any other as 'reward.reward_model=\"...\"'"}.get(key, "")
        raise ValueError(f"{argument}: {choose_from(GROUPS[key], value)}{other}")
    if override.is_sweep_override():
        raise ValueError(
            f"{argument}: several values; a text with commas goes in quotes, '{key}=\"...\"', a list in [ ]"
        )
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{argument}: choose from true, false")
    if isinstance(value, str) and value == AUTOMATIC.get(KEYS.get(key)):
        return f"{key}=null"
    if kind in (str, str | None) and isinstance(value, (bool, int, float)):
        return f"{key}='{text}'"  # a name 1e3 stays what was typed, not 1000.0
    return argument


def _answer(key: str) -> str:
    """What follows "unknown key ...": a question or an advice, with this command line's names."""
    section, _, name = key.lstrip("-+").rpartition(".")
    names = {known.rpartition(".")[2] for known in KEYS}
    close = difflib.get_close_matches(section, SECTIONS, 1)
    if section not in (*SECTIONS, "") and name in names and close:
        return f"; did you mean {close[0]}.{name}?"
    text = answer(name, {*names, *(f"no_{f.name}" for f in fields(GRPOConfig) if f.type is bool)})
    place = f"{section}." if section in SECTIONS else ""
    return re.sub(r"--no_(\w+)", rf"{place}\1=false", re.sub(r"--(?!no_)(\w+)", rf"{place}\1", text))


def given(overrides: Sequence[str]) -> dict[str, Any]:
    """{flag: value} of `key=value` arguments, only what was given. Raises ValueError, one line."""
    try:
        with initialize(version_base="1.3", config_path=None):
            config = compose("trainer", [readable(argument) for argument in overrides])
        keys = [argument.partition("=")[0] for argument in overrides]
        places = [PLACES.get(key, key) for key in sorted(keys, key=lambda key: key not in GROUPS)]  # a value wins
        found = {KEYS[place]: OmegaConf.select(config, place) for place in places}
    except (HydraException, OmegaConfBaseException) as error:
        reasons = [str(reason).splitlines()[0] for reason in (error, error.__cause__) if reason]
        raise ValueError(": ".join(reasons)) from error
    return {name: list(value) if OmegaConf.is_list(value) else value for name, value in found.items()}


def chosen(overrides: Sequence[str], settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the group `reward` means, and what E-GRPO's configuration adds: each {flag: value}, without what the
    `overrides`, which give these `settings`, say themselves.
    """
    keys = [argument.partition("=") for argument in overrides]
    values = any(KEYS.get(key) == "reward_model" for key, _, _ in keys)
    group = next((text.strip("'\"") for key, _, text in reversed(keys) if key == "reward"), "hps")
    reward = {} if values else {"reward_model": GROUPS["reward"][group], **REWARD_GROUPS.get(group, {})}
    added = dict(DEFAULTS)
    if settings.get("algorithm", added["algorithm"]) == "grpo_merge":
        added |= E_GRPO
    for name in settings.keys() & INSTEAD.keys():
        added.pop(INSTEAD[name], None)
    settings = {name: value for name, value in settings.items() if name != "reward_model"}
    reward, added = (
        {name: _first(value) for name, value in part.items() if name not in settings} for part in (reward, added)
    )
    return reward, added


def _first(value: Any) -> Any:
    """The first of several places that exists. Without one: a hub's name, else the first."""
    if not isinstance(value, tuple):
        return value
    return next((place for place in value if Path(place).exists() or place.startswith("hf-hub:")), value[0])


def as_flags(settings: dict[str, Any]) -> list[str]:
    argv: list[str] = []
    for flag, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no_{flag}")
        else:
            text = ",".join(map(str, value)) or "None" if isinstance(value, list) else value
            argv.append(f"--{flag}={text}")
    return argv


def to_flags(overrides: Sequence[str]) -> tuple[list[str], str]:
    """(the trainer's command line for `key=value` arguments, a line that says what these don't say themselves).

    --dry_run is taken as well, because every other program takes it. Raises ValueError, one line.
    """
    overrides = ["dry_run=true" if argument in ("--dry_run", "--dry-run") else argument for argument in overrides]
    settings = given(overrides)
    reward, added = chosen(overrides, settings)
    parts = {"the reward is": reward, "E-GRPO's configuration adds": added}
    note = "; ".join(f"{words} {' '.join(as_flags(part))}" for words, part in parts.items() if part)
    return as_flags({**reward, **added, **settings}), f"note: {note}"


def read(overrides: Sequence[str]) -> None:
    """Translates the command line and parses it for the trainer, whose main() gets the result.

    --help and bad input end the program here, before the trainer is imported, which takes seconds.
    """
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        raise SystemExit
    try:
        argv, note = to_flags(overrides)
    except ValueError as error:
        end(f"train.py: error: {error}\n", 2)
    parse_first(GRPOConfig, argv, __doc__, translate)
    say(note)


def main(overrides: Sequence[str]) -> None:
    """Runs the trainer in this process. Bad input ends it with one line and status 2."""
    read(overrides)
    from fastvideo.train_grpo_flux import main as train

    train()


if __name__ == "__main__":
    read(sys.argv[1:])
    from fastvideo.io.processes import entry_point
    from fastvideo.train_grpo_flux import main as train

    entry_point(train)

"""The registry of reward models, and the one function that scores images with them.

A reward model is a callable `model(images, prompts)` on lists of PIL images and prompts that returns one float an image
(NaN: this image failed) and has a `name`, its key in metrics and manifests. REWARDS maps the names of `--reward_model`
to lazy builders, so a run imports only what it uses. To add a reward: a file beside this one and an entry here, or,
without touching this package, `--reward_model package.module:function`.
"""

import importlib
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.models.reward_model.common import bad_file, check_device
from fastvideo.models.reward_model.granular import GranularRewardModel, as_scores, check_schedule

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

RewardModel = Callable[[list[Image.Image], list[str]], Sequence[float]]


class FunctionReward:
    """A custom reward, `package.module:function`: images and prompts in, one number an image out."""

    def __init__(self, path: str) -> None:
        module_name, _, function_name = path.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module is there, something that it imports is not
            raise ValueError(f"--reward_model {path}: no module {error.name!r} (is it on PYTHONPATH?)") from None
        except AttributeError:
            raise ValueError(f"--reward_model {path}: {module_name} has no {function_name!r}") from None
        if not callable(function):
            raise ValueError(f"--reward_model {path}: {function_name} is not callable")
        self.function = function
        self.name = function_name

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Sequence[float]:
        return self.function(images, prompts)


# Builders: (config, device, evaluation) -> model. Each imports its model's file only when called.
def _hpsv2(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.hps_score import HPSClipRewardModel

    if config.hps_clip_path and Path(config.hps_clip_path).exists():
        logger.info("--hps_clip_path %s is not read: the HPS checkpoint holds the whole model", config.hps_clip_path)
    return HPSClipRewardModel(config.hps_path, device, batch_size=config.reward_batch_size, dtype=config.reward_dtype)


def _clip_score(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel

    return CLIPScoreRewardModel(
        config.clip_score_path,
        device,
        http_proxy=config.clip_score_http_proxy,
        https_proxy=config.clip_score_https_proxy,
        batch_size=config.reward_batch_size,
        dtype=config.reward_dtype,
    )


def _image_reward(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.image_reward import ImageRewardModel

    return ImageRewardModel(
        config.image_reward_path,
        device,
        http_proxy=config.image_reward_http_proxy,
        https_proxy=config.image_reward_https_proxy,
        med_config=config.image_reward_med_config,
        start_weights=config.granular_start_weights,
        end_weights=config.granular_end_weights,
        schedule=config.granular_schedule,
        gamma=config.granular_gamma,
        mode="overall" if evaluation else config.image_reward_mode,
        score_dir=config.image_reward_score_dir,
        batch_size=config.reward_batch_size,
        dtype=config.reward_dtype,
    )


def _pick_score(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.pick_score import PickScoreRewardModel

    return PickScoreRewardModel(
        config.pick_score_path,
        device,
        http_proxy=config.pick_score_http_proxy,
        https_proxy=config.pick_score_https_proxy,
        evaluation=evaluation,
        batch_size=config.reward_batch_size,
        dtype=config.reward_dtype,
    )


def _unified_reward(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.unified_reward import UnifiedRewardModel

    return UnifiedRewardModel(
        config.unified_reward_url,
        question_type=config.unified_reward_default_question_type,
        num_workers=config.unified_reward_num_workers,
    )


def _shapes(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.shapes import ShapesRewardModel

    return ShapesRewardModel(
        config.granular_start_weights, config.granular_end_weights, config.granular_schedule, config.granular_gamma
    )


def _jpeg_compressibility(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.jpeg import JpegCompressibilityRewardModel

    return JpegCompressibilityRewardModel()


def _jpeg_incompressibility(config: Any, device: str, evaluation: bool) -> RewardModel:
    from fastvideo.models.reward_model.jpeg import JpegIncompressibilityRewardModel

    return JpegIncompressibilityRewardModel()


@dataclass(frozen=True)
class Reward:
    """An entry of the registry. weight_flag: the config field with the weight used where --reward_model gives none.

    components: of a granular model, in the order of --granular_start_weights. checks: its yes/no questions, which have
    no weight.
    """

    build: Callable[[Any, str, bool], RewardModel]
    weight_flag: str | None = None
    components: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


REWARDS: dict[str, Reward] = {
    "hpsv2": Reward(_hpsv2, "hps_weight"),
    "clip_score": Reward(_clip_score, "clip_score_weight"),
    "image_reward": Reward(_image_reward, "image_reward_weight", ("blip", "clip", "aesthetic")),
    "pick_score": Reward(_pick_score, "pick_score_weight"),
    "unified_reward": Reward(_unified_reward, "unified_reward_weight"),
    "shapes": Reward(_shapes, components=("binding", "form", "clean"), checks=("right",)),
    "jpeg_compressibility": Reward(_jpeg_compressibility),
    "jpeg_incompressibility": Reward(_jpeg_incompressibility),
}

# Names for several rewards at once; those in URL_MIXES take unified_reward in when --unified_reward_url is given.
MIXES: dict[str, tuple[str, ...]] = {
    "hpsv2_clip_score": ("hpsv2", "clip_score"),
    "multi_reward": ("hpsv2", "image_reward", "pick_score"),
    "all": ("hpsv2", "image_reward", "clip_score", "pick_score"),
}
URL_MIXES = ("multi_reward", "all")

# Hub names ("hf-hub:owner/name", "owner/name", "ImageReward-v1.0") are left to the loaders; these are files or folders.
_LOCAL_PATH = re.compile(r"^[./~]|/.*/|\.(pt|pth|bin|safetensors|json|ckpt)$")


def _is_local(path: str) -> bool:
    """Whether a path can only be meant on this machine: data/x can when there is a folder data, owner/name can not."""
    return bool(_LOCAL_PATH.search(path)) or ("/" in path and Path(path).parent.is_dir())


def _choices() -> str:
    return f"{', '.join([*REWARDS, *MIXES])}, a comma list of them (hpsv2,image_reward:0.5) or package.module:function"


def _parse_weight(text: str, item: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--reward_model {item!r}: {text!r} is not a weight; write name:number, as hpsv2:0.5"
        ) from None


def _parse_item(item: str) -> tuple[str, float | None]:
    """'hpsv2' -> ('hpsv2', None); 'hpsv2:0.5' -> ('hpsv2', 0.5); 'pkg.mod:fn:2' -> ('pkg.mod:fn', 2.0)."""
    name, _, rest = item.partition(":")
    if name in REWARDS:
        return name, _parse_weight(rest, item) if ":" in item else None
    if name in MIXES:
        if ":" in item:
            raise ValueError(f"--reward_model {item!r}: weigh the parts of {name} one by one, as hpsv2:0.5")
        return name, None
    custom = re.fullmatch(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(.*))?", item)
    if not custom:
        raise ValueError(f"--reward_model {item!r}: unknown reward; choose from {_choices()}")
    return custom[1], None if custom[2] is None else _parse_weight(custom[2], item)


def resolve_reward_spec(config: Any) -> dict[str, float]:
    """`--reward_model` as {registry name or dotted path: weight}, weights summing to 1. Loads nothing.

    A weight in the list (`hpsv2:0.5`) goes before the flag (`--hps_weight`); both default to 1. Raises ValueError with
    one clear line for unknown or repeated names and for weights that are negative, not finite or all 0. A reward of
    weight 0 is scored and logged, and moves nothing.
    """
    items = [item.strip() for item in (config.reward_model or "").split(",")]
    if not all(items):
        raise ValueError(f"--reward_model {config.reward_model!r}: empty name; choose from {_choices()}")
    weights: dict[str, float] = {}
    for item in items:
        name, given = _parse_item(item)
        names = MIXES.get(name, (name,))
        if name in URL_MIXES and config.unified_reward_url:
            names = (*names, "unified_reward")
        for part in names:
            if part in weights:
                raise ValueError(f"--reward_model {config.reward_model!r}: {part} is named twice")
            flag = REWARDS[part].weight_flag if part in REWARDS else None
            weight, source = given, f"--reward_model {item!r}"
            if weight is None:
                weight, source = (float(getattr(config, flag)), f"--{flag}") if flag else (1.0, "")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{source}: weight {weight} of {part} must be a finite number >= 0")
            weights[part] = weight
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"--reward_model {config.reward_model!r}: the weights of {', '.join(weights)} are all 0")
    return {name: weight / total for name, weight in weights.items()}


def reward_settings(config: Any, evaluation: bool) -> dict[str, Any]:
    """What decides the scores of `--reward_model`, apart from checkpoint files: flat, and the same again after JSON.

    A reward server and its clients each make it from their own flags; where these differ, so may the scores.
    """
    spec = resolve_reward_spec(config)
    settings: dict[str, Any] = {"evaluation": evaluation, "reward_model": sorted(spec)}
    for key, weight in spec.items():
        settings[f"{key}.weight"] = round(weight, 9)  # a sum in another order rounds differently
        components = REWARDS[key].components if key in REWARDS else ()
        if key == "image_reward" and (evaluation or config.image_reward_mode == "overall"):
            components = ()
        settings[f"{key}.components"] = list(components)
        settings[f"{key}.checks"] = list(REWARDS[key].checks) if key in REWARDS else []
        if components:
            settings[f"{key}.start_weights"] = list(config.granular_start_weights)
        if components and not evaluation:  # an evaluation scores with the start weights
            settings[f"{key}.end_weights"] = list(config.granular_end_weights)
            settings[f"{key}.schedule"] = config.granular_schedule
            settings[f"{key}.gamma"] = config.granular_gamma
        if key == "unified_reward":
            settings[f"{key}.question_type"] = config.unified_reward_default_question_type
    return settings


def _require_file(flag: str, path: str | None, what: str) -> None:
    if not path:
        raise ValueError(f"--{flag} is empty: give {what}")
    if _is_local(path) and not Path(path).exists():
        raise bad_file(flag, path, f"no such file; {what} belongs there")


def check_reward_files(config: Any, evaluation: bool = False) -> None:
    """Raises ValueError, naming flag, path and what belongs there, when a chosen reward lacks something. Loads nothing.

    Names on a hub are not looked up here. Custom rewards are imported, and weights of granular ones checked. With
    --reward_server nothing has to be here: the servers are asked whether they score the same.
    """
    if config.reward_server:
        from fastvideo.models.reward_model.remote import connect

        connect(config, evaluation)
        return
    check_device(config.reward_device)
    chosen = resolve_reward_spec(config)
    if "hpsv2" in chosen:
        _require_file("hps_path", config.hps_path, "the HPSv2 checkpoint (HPS_v2.1_compressed.pt)")
    if "clip_score" in chosen:
        _require_file("clip_score_path", config.clip_score_path, "an open_clip checkpoint or an hf-hub: name")
    if "image_reward" in chosen:
        mode = "overall" if evaluation else config.image_reward_mode
        if mode not in ("granular", "overall"):
            raise ValueError(f"--image_reward_mode {mode!r}: choose from granular, overall")
        if mode == "overall":
            _require_file(
                "image_reward_path", config.image_reward_path, "ImageReward.pt (or the name ImageReward-v1.0)"
            )
        else:
            from fastvideo.models.reward_model.image_reward import SCORE_FILES

            for file, what in SCORE_FILES.items():
                _require_file("image_reward_score_dir", os.path.join(config.image_reward_score_dir or "", file), what)
        if config.image_reward_med_config:
            _require_file("image_reward_med_config", config.image_reward_med_config, "ImageReward's med_config.json")
    if "pick_score" in chosen:
        _require_file("pick_score_path", config.pick_score_path, "a PickScore_v1 folder or its hub name")
    if "unified_reward" in chosen and not config.unified_reward_url:
        raise ValueError("--unified_reward_url is empty: unified_reward needs the URL of a chat endpoint")
    for name in chosen:
        if name not in REWARDS:
            FunctionReward(name)
        elif REWARDS[name].components:
            check_schedule(
                config.granular_start_weights,
                config.granular_end_weights,
                config.granular_schedule,
                config.granular_gamma,
                REWARDS[name].components,
            )


def build_reward_models(
    config: Any, device: str, evaluation: bool = False
) -> tuple[dict[str, RewardModel], dict[str, float]]:
    """Loads the rewards of `--reward_model`: ({name: model}, {name: weight}) keyed by the models' `name`.

    device: used unless `--reward_device` names another. evaluation: ImageReward as its plain overall score, PickScore
    on its scale for reports. Raises ValueError for missing files before the first model is loaded. With --reward_server
    nothing is loaded: the models are those of the servers.
    """
    if config.reward_server:
        from fastvideo.models.reward_model.remote import connect

        return connect(config, evaluation)
    check_reward_files(config, evaluation)
    models: dict[str, RewardModel] = {}
    weights: dict[str, float] = {}
    for key, weight in resolve_reward_spec(config).items():
        if key in REWARDS:
            model = REWARDS[key].build(config, str(config.reward_device or device), evaluation)
        else:
            model = FunctionReward(key)
        if model.name in models:
            raise ValueError(f"--reward_model {config.reward_model!r}: two rewards have the name {model.name}")
        models[model.name] = model
        weights[model.name] = weight
    return models, weights


def compute_reward(
    images: list[Image.Image],
    prompts: list[str],
    reward_models: dict[str, RewardModel],
    reward_weights: dict[str, float],
    curr_step: float | np.ndarray | None = None,
    total_steps: float | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores N images with every model: (rewards, successes, rewards_dict, successes_dict).

    rewards: float64 [N], sum over reward_weights (normalised to sum 1) of the models' scores; 0 where one failed.
    successes: bool [N], whether every model of weight above 0 gave a finite score.
    rewards_dict: {name: float64 [N]}, NaN where failed, with `{name}_{component}` entries of granular models beside
    their own, checks included; they never enter `rewards`. successes_dict: the same keys, bool [N].
    curr_step, total_steps: training progress for granular models; curr_step may be an array with one entry an image.
    An exception raised by a model passes through: a broken scorer is no failed sample.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    missing = sorted(set(reward_weights) - set(reward_models))
    if missing:
        raise ValueError(f"reward_weights names {missing}, reward_models only has {sorted(reward_models)}")
    values = np.asarray(list(reward_weights.values()), dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise ValueError(f"reward_weights {reward_weights}: must be finite, >= 0 and not all 0")

    n = len(images)
    rewards_dict: dict[str, np.ndarray] = {}
    for name, model in reward_models.items():
        if isinstance(model, GranularRewardModel):
            scores, components = model.score(images, prompts, curr_step, total_steps)
            rewards_dict[name] = as_scores(scores, n, name)
            rewards_dict.update({f"{name}_{component}": found for component, found in components.items()})
        else:
            rewards_dict[name] = as_scores(model(images, prompts), n, name)
    successes_dict = {key: np.isfinite(found) for key, found in rewards_dict.items()}

    rewards = np.zeros(n)
    successes = np.ones(n, dtype=bool)
    for (name, _), weight in zip(reward_weights.items(), values / values.sum(), strict=True):
        if weight > 0:
            rewards += weight * rewards_dict[name]
            successes &= successes_dict[name]
    return np.where(successes, rewards, 0.0), successes, rewards_dict, successes_dict

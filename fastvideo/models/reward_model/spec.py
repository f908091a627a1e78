"""The rewards that `--reward_model` names: one entry per reward, the flags of all rewards, mixes and weights. All data.

A new reward is a file beside this one and an entry in REWARDS; its flags, if it has any, are fields of RewardConfig
(training and evaluation) or RewardSpecConfig (training only). This module imports neither torch nor a model, because
every command line reads it before it can print --help.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, choose_from, flag
from fastvideo.io.devices import DTYPES

SCHEDULES = ("linear", "exponential", "logarithmic", "cosine")
MODES = ("granular", "overall")  # of a reward with components: their weighted sum, or one plain score

# --- flags ------------------------------------------------------------------------------------------------------------


@dataclass
class RewardConfig:
    """Where the reward models lie and how they run; training and evaluation share these settings."""

    hps_path: str = flag("hps_ckpt/HPS_v2.1_compressed.pt", "HPS checkpoint", section="reward files and addresses")
    hps_clip_path: str | None = flag(
        "hps_ckpt/open_clip_pytorch_model.bin", "not needed and not read: the HPS checkpoint holds the whole model"
    )
    geneval_detector_path: str = flag(
        "facebook/mask2former-swin-small-coco-instance", "GenEval's object detector, a Mask2Former: hub id or folder"
    )
    geneval_clip_path: str = flag("image_reward_ckpt/ViT-L-14.pt", "OpenAI's CLIP that names colours for GenEval")
    hpsv3_path: str = flag("MizzenAI/HPSv3", "HPSv3 model: hub id or folder")
    hpsv3_guide_path: str = flag("hps_ckpt/hpsv3/rating_guide.txt", "the text in which HPSv3 was taught to rate")
    clip_score_path: str = flag("hf-hub:apple/DFN5B-CLIP-ViT-H-14-384", "open_clip model of CLIPScore: name or file")
    clip_score_http_proxy: str | None = flag(None, "HTTP proxy for downloading CLIPScore's model")
    clip_score_https_proxy: str | None = flag(None, "HTTPS proxy for downloading CLIPScore's model")
    image_reward_path: str = flag("ImageReward-v1.0", "ImageReward model: name or file (mode overall)")
    image_reward_med_config: str | None = flag(None, "med_config.json of ImageReward")
    image_reward_score_dir: str = flag("image_reward_ckpt", "folder with the files of the three granular scorers")
    image_reward_http_proxy: str | None = flag(None, "HTTP proxy for downloading ImageReward")
    image_reward_https_proxy: str | None = flag(None, "HTTPS proxy for downloading ImageReward")
    pick_score_path: str = flag("yuvalkirstain/PickScore_v1", "PickScore model: hub id or folder")
    pick_score_http_proxy: str | None = flag(None, "HTTP proxy for downloading PickScore")
    pick_score_https_proxy: str | None = flag(None, "HTTPS proxy for downloading PickScore")
    unified_reward_url: str | None = flag(None, "UnifiedReward endpoints, comma-separated, shared over the ranks")
    unified_reward_default_question_type: str = flag("semantic", "question asked", choices=["semantic", "score"])
    unified_reward_num_workers: int = flag(1, "concurrent requests to UnifiedReward", at_least=1, at_most=1024)
    vlm_judge_url: str | None = flag(
        None,
        "OpenAI-compatible endpoints of the judge, comma-separated, shared over the ranks; VLM_JUDGE_API_KEY: its key",
    )
    vlm_judge_model: str | None = flag(
        None,
        "id of the judge at the endpoints (None: the only model that they serve); given with --resume_from_checkpoint, "
        "a run goes on with another judge",
    )
    vlm_judge_template: str = flag(
        "yes_no", "question of vlm_judge: a text file, or yes_no, rating_10, unified_reward_2"
    )
    vlm_judge_num_workers: int = flag(8, "concurrent requests to the judge", at_least=1, at_most=1024)
    vlm_judge_timeout: float = flag(120.0, "seconds until a request to the judge has failed", above=0, at_most=10**6)
    vlm_judge_retries: int = flag(
        3, "further attempts after a failed request, at the next endpoint of the judge", at_least=0, at_most=10**4
    )
    ocr_num_workers: int = flag(4, "CPU threads that read text in pictures for ocr", at_least=1, at_most=1024)
    pairwise_template: str = flag(
        "pairwise", "question of pairwise: a text file, or pairwise, unified_reward_think, unified_reward_flex"
    )
    pairwise_matches: int | None = flag(
        None, "comparisons of each picture with others of its group (None: with all of them)", at_least=1
    )
    granular_start_weights: list[float] = flag(
        [0.5, 0.3, 0.2], "component weights at the start", metavar="W", section="reward"
    )
    reward_batch_size: int = flag(
        12, "images per forward pass of a reward model", at_least=1, section="reward processes"
    )
    reward_device: str | None = flag(None, "device of the reward models (None: the rank's own)")
    reward_dtype: str = flag("fp32", "number format of the reward models", choices=list(DTYPES))
    reward_server: str | None = flag(
        None, "score at these reward servers (server.py), comma-separated, shared over the ranks; None: in this process"
    )
    reward_server_timeout: float = flag(
        120.0, "seconds until a request to a reward server has failed", above=0, at_most=10**6
    )
    reward_server_retries: int = flag(
        3, "further attempts after a failed request, at the next reward server", at_least=0, at_most=10**4
    )


@dataclass
class RewardSpecConfig(RewardConfig):
    """Which rewards train, and how their scores add up; training and the reward server share these settings."""

    reward_model: str = flag("image_reward", "reward or mix", section="reward", names=lambda: ", ".join(_choices()))
    hps_weight: float = flag(1.0, "weight of HPSv2 in a mix")
    clip_score_weight: float = flag(1.0, "weight of CLIPScore in a mix")
    image_reward_weight: float = flag(1.0, "weight of ImageReward in a mix")
    pick_score_weight: float = flag(1.0, "weight of PickScore in a mix")
    unified_reward_weight: float = flag(1.0, "weight of UnifiedReward in a mix")
    image_reward_mode: str = flag("granular", "three weighted scorers, or the plain score", choices=list(MODES))
    granular_end_weights: list[float] = flag([0.2, 0.5, 0.3], "component weights at the end", metavar="W")
    granular_schedule: str = flag("linear", "how the weights move", choices=list(SCHEDULES))
    granular_gamma: float | None = flag(None, "curve exponent; None: 2 for exponential, 0.5 for logarithmic")


# --- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file that a reward needs. Its presence is checked before any model loads.

    Attributes:
        field: setting that says where the file lies.
        what: the file's content, for error messages.
        name: name of the file, if the setting is a folder.
        hub: whether the setting may name something on a hub instead of a file.
        inside: file that a folder or repository must have, if the setting names one.
        optional: whether the setting may be None.
        mode: the mode, one of MODES, that needs the file; None: every mode.
    """

    field: str
    what: str
    name: str = ""
    hub: bool = False
    inside: str | None = None
    optional: bool = False
    mode: str | None = None


@dataclass(frozen=True)
class Download:
    """A file that a reward downloads from a hub if it isn't in the folder of --image_reward_score_dir.

    Attributes:
        name: the file in that folder.
        repository: where it comes from.
        instead: setting that may name another file.
        mode: as in File.
    """

    name: str
    repository: str
    instead: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Reward:
    """An entry of REWARDS.

    Attributes:
        model: "module:Class" in this package, imported only to build the model.
        arguments: {argument of the constructor: setting that gives its value}, beside those in SHARED.
        weight: setting with the weight, used if --reward_model gives none; None: the weight is 1.
        files: what has to be there before training.
        downloads: what is downloaded when the model loads, where it isn't there yet.
        download: part of scripts/huggingface/download_checkpoints.sh that gets the files.
        url: setting with the address of a server, which must be given.
        check: "module:function" in this package, called with the settings on the first process before anything loads.
            Raises FlagError if the reward can't work.
        packages, extra: packages that not every installation has, and the extra in pyproject.toml that installs them.
        needs: what a prompt must have. The function can_score(prompt, metadata) of the model's module looks for it, and
            raises ValueError for malformed metadata.
        decisive: arguments that change scores. A reward server and its clients compare their values.
        components: parts of a granular reward, in the order of --granular_start_weights.
        groupwise: whether it scores groups of pictures, see groups.py.
        checks: yes/no questions that a reward answers; they have no weight.
        details: further numbers that a DetailedReward reports; they have no weight.
        mode: setting, one of MODES, for a granular reward with a plain score as well. Evaluation takes the plain score.
    """

    model: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    weight: str | None = None
    files: tuple[File, ...] = ()
    downloads: tuple[Download, ...] = ()
    download: str | None = None
    url: str | None = None
    check: str | None = None
    packages: tuple[str, ...] = ()
    extra: str | None = None
    needs: str | None = None
    decisive: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    groupwise: bool = False
    details: tuple[str, ...] = ()
    mode: str | None = None

    def missing_package(self) -> str | None:
        """The first of `packages` that isn't installed. Imports none."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is None), None)

    def chosen_mode(self, config: Any, evaluation: bool) -> str | None:
        """One of MODES; None for a reward without a choice. Raises FlagError for an unknown mode."""
        if self.mode is None:
            return None
        mode = "overall" if evaluation else getattr(config, self.mode)
        if mode not in MODES:
            raise FlagError(self.mode, repr(mode), choose_from(MODES, mode))
        return mode

    def scored_components(self, config: Any, evaluation: bool) -> tuple[str, ...]:
        """The components that are scored with these settings."""
        return () if self.chosen_mode(config, evaluation) == "overall" else self.components


# {argument of a constructor: setting}. A model gets those that its constructor has, and also device, evaluation, mode.
SHARED = {
    "batch_size": "reward_batch_size",
    "dtype": "reward_dtype",
    "start_weights": "granular_start_weights",
    "end_weights": "granular_end_weights",
    "schedule": "granular_schedule",
    "gamma": "granular_gamma",
}

REWARDS: dict[str, Reward] = {
    "hpsv2": Reward(
        model="hps_score:HPSClipRewardModel",
        arguments={"checkpoint": "hps_path"},
        weight="hps_weight",
        files=(File("hps_path", "the HPSv2 checkpoint (HPS_v2.1_compressed.pt)"),),
        download="hps",
    ),
    "hpsv3": Reward(
        model="hpsv3:HPSv3RewardModel",
        arguments={"model_path": "hpsv3_path", "guide_path": "hpsv3_guide_path"},
        files=(
            File("hpsv3_path", "an HPSv3 folder or its hub name", hub=True, inside="HPSv3.safetensors"),
            File("hpsv3_guide_path", "HPSv3's rating guide"),
        ),
        download="hpsv3",
        details=("uncertainty",),
    ),
    "clip_score": Reward(
        model="clip_score:CLIPScoreRewardModel",
        arguments={
            "model_path": "clip_score_path",
            "http_proxy": "clip_score_http_proxy",
            "https_proxy": "clip_score_https_proxy",
        },
        weight="clip_score_weight",
        files=(File("clip_score_path", "an open_clip checkpoint or an hf-hub: name", hub=True),),
        download="clip",
    ),
    "image_reward": Reward(
        model="image_reward:ImageRewardModel",
        arguments={
            "model_name": "image_reward_path",
            "med_config": "image_reward_med_config",
            "score_dir": "image_reward_score_dir",
            "http_proxy": "image_reward_http_proxy",
            "https_proxy": "image_reward_https_proxy",
        },
        weight="image_reward_weight",
        files=(
            File("image_reward_path", "ImageReward.pt (or the name ImageReward-v1.0)", hub=True, mode="overall"),
            # In the folder under the names that the image-reward package uses, and in the order of the components.
            File("image_reward_score_dir", "BLIP's large pretraining checkpoint", "model_large.pth", mode="granular"),
            File("image_reward_score_dir", "OpenAI's CLIP ViT-L/14", "ViT-L-14.pt", mode="granular"),
            File(
                "image_reward_score_dir",
                "the aesthetic predictor's checkpoint",
                "sac%2Blogos%2Bava1-l14-linearMSE.pth",
                mode="granular",
            ),
            File("image_reward_med_config", "ImageReward's med_config.json", optional=True),
        ),
        downloads=(
            Download("bert-base-uncased/vocab.txt", "bert-base-uncased"),
            Download("med_config.json", "THUDM/ImageReward", instead="image_reward_med_config"),
            Download("ImageReward.pt", "THUDM/ImageReward", instead="image_reward_path", mode="overall"),
        ),
        download="image_reward",
        components=("blip", "clip", "aesthetic"),
        mode="image_reward_mode",
    ),
    "pick_score": Reward(
        model="pick_score:PickScoreRewardModel",
        arguments={
            "model_path": "pick_score_path",
            "http_proxy": "pick_score_http_proxy",
            "https_proxy": "pick_score_https_proxy",
        },
        weight="pick_score_weight",
        files=(File("pick_score_path", "a PickScore_v1 folder or its hub name", hub=True),),
        download="pick",
    ),
    "unified_reward": Reward(
        model="unified_reward:UnifiedRewardModel",
        arguments={
            "urls": "unified_reward_url",
            "question_type": "unified_reward_default_question_type",
            "num_workers": "unified_reward_num_workers",
        },
        weight="unified_reward_weight",
        url="unified_reward_url",
        decisive=("question_type",),
    ),
    "vlm_judge": Reward(
        model="vlm_judge:VLMJudgeModel",
        arguments={
            "urls": "vlm_judge_url",
            "model": "vlm_judge_model",
            "template": "vlm_judge_template",
            "num_workers": "vlm_judge_num_workers",
            "timeout": "vlm_judge_timeout",
            "retries": "vlm_judge_retries",
        },
        url="vlm_judge_url",
        check="vlm_judge:check_judge",
        decisive=("model", "template"),
    ),
    "pairwise": Reward(
        model="pairwise:PairwiseRewardModel",
        arguments={
            "urls": "vlm_judge_url",
            "model": "vlm_judge_model",
            "template": "pairwise_template",
            "matches": "pairwise_matches",
            "num_workers": "vlm_judge_num_workers",
            "timeout": "vlm_judge_timeout",
            "retries": "vlm_judge_retries",
        },
        url="vlm_judge_url",
        check="pairwise:check_pairwise",
        decisive=("model", "template", "matches"),
        groupwise=True,
    ),
    "vlm_questions": Reward(
        model="vlm_questions:VLMQuestionsModel",
        arguments={
            "urls": "vlm_judge_url",
            "model": "vlm_judge_model",
            "num_workers": "vlm_judge_num_workers",
            "timeout": "vlm_judge_timeout",
            "retries": "vlm_judge_retries",
        },
        url="vlm_judge_url",
        check="vlm_questions:check_questions",
        decisive=("model",),
        needs="questions",
    ),
    "ocr": Reward(
        model="ocr:OCRRewardModel",
        arguments={"num_workers": "ocr_num_workers"},
        packages=("rapidocr_onnxruntime", "rapidfuzz"),
        extra="ocr",
        check="ocr:check_engine",
        needs="a text in quotation marks",
    ),
    "geneval": Reward(
        model="geneval:GenEvalRewardModel",
        arguments={"detector_path": "geneval_detector_path", "clip_path": "geneval_clip_path"},
        files=(
            File("geneval_detector_path", "a Mask2Former folder or its hub name", hub=True, inside="config.json"),
            File("geneval_clip_path", "OpenAI's CLIP ViT-L/14"),
        ),
        download="geneval",
        needs="metadata in GenEval's format",
        checks=("right",),
    ),
    "shapes": Reward("shapes:ShapesRewardModel", components=("binding", "form", "clean"), checks=("right",)),
    "jpeg_compressibility": Reward("jpeg:JpegCompressibilityRewardModel"),
    "jpeg_incompressibility": Reward("jpeg:JpegIncompressibilityRewardModel"),
}

# Names for several rewards at once. Those in URL_MIXES also take unified_reward if --unified_reward_url is given.
MIXES: dict[str, tuple[str, ...]] = {
    "hpsv2_clip_score": ("hpsv2", "clip_score"),
    "multi_reward": ("hpsv2", "image_reward", "pick_score"),
    "all": ("hpsv2", "image_reward", "clip_score", "pick_score"),
}
URL_MIXES = ("multi_reward", "all")

# --- names and weights ------------------------------------------------------------------------------------------------


def _choices() -> list[str]:
    return [*REWARDS, *MIXES, "a comma list of them (hpsv2,image_reward:0.5) or package.module:function"]


def _parse_weight(text: str, item: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FlagError(field, repr(item), f"{text!r} is not a weight; write name:number, as hpsv2:0.5") from None


def _parse_item(item: str, field: str) -> tuple[str, float | None]:
    """'hpsv2' -> ('hpsv2', None); 'hpsv2:0.5' -> ('hpsv2', 0.5); 'pkg.mod:fn:2' -> ('pkg.mod:fn', 2.0)."""
    name, _, rest = item.partition(":")
    if name in REWARDS:
        return name, _parse_weight(rest, item, field) if ":" in item else None
    if name in MIXES:
        if ":" in item:
            raise FlagError(field, repr(item), f"weigh the parts of {name} one by one, as hpsv2:0.5")
        return name, None
    if name.endswith(".py"):
        module = name.removesuffix(".py").replace("/", ".")
        raise FlagError(field, repr(item), f"leave out .py: {module}:{rest or 'FUNCTION'}")
    if name.isidentifier() and not rest and any(Path(folder, f"{name}.py").is_file() for folder in sys.path):
        raise FlagError(field, repr(item), f"name a function: {name}:FUNCTION")
    custom = re.fullmatch(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(.*))?", item)
    if not custom:
        raise FlagError(field, repr(item), f"unknown reward; {choose_from(_choices(), name)}")
    return custom[1], None if custom[2] is None else _parse_weight(custom[2], item, field)


def resolve_reward_spec(config: Any, field: str = "reward_model") -> dict[str, float]:
    """The rewards that a setting names: {name in REWARDS or package.module:function: weight}, weights of sum 1.

    config: has `field` and the settings of RewardConfig. field: the setting to read; errors name it.

    A weight in the list (`hpsv2:0.5`) counts before the weight setting (`hps_weight`). Both default to 1, also if the
    config has no such setting. A reward of weight 0 is scored and logged, and changes nothing. Loads nothing.

    Raises FlagError for unknown or repeated names, and for weights that are negative, not finite or all 0.
    """
    given = getattr(config, field)
    items = [item.strip() for item in (given or "").split(",")]
    if not all(items):
        raise FlagError(field, repr(given), f"empty name; {choose_from(_choices(), given)}")
    weights: dict[str, float] = {}
    for item in items:
        name, weight_given = _parse_item(item, field)
        names = MIXES.get(name, (name,))
        if name in URL_MIXES and config.unified_reward_url:
            names = (*names, "unified_reward")
        for part in names:
            if part in weights:
                raise FlagError(field, repr(given), f"{part} is named twice")
            setting = REWARDS[part].weight if part in REWARDS else None
            weight, source = weight_given, (field, repr(item))
            if weight is None:
                weight = float(getattr(config, setting, 1.0)) if setting else 1.0
                source = (setting or field, None)
            if not (math.isfinite(weight) and weight >= 0):
                raise FlagError(*source, f"weight {weight} of {part} must be a finite number >= 0")
            weights[part] = weight
    total = sum(weights.values())
    if total <= 0:
        raise FlagError(field, repr(given), f"the weights of {', '.join(weights)} are all 0")
    return {name: weight / total for name, weight in weights.items()}


NO_GROUP = "an evaluation has one picture per prompt, and no group to compare; name rewards that score single pictures"


def reward_settings(config: Any, evaluation: bool, field: str = "reward_model") -> dict[str, Any]:
    """All that decides the scores of the rewards named in `field`, except checkpoint files: flat, unchanged by JSON.

    A reward server and its clients each make it from their own settings; where these differ, scores may differ.
    """
    spec = resolve_reward_spec(config, field)
    settings: dict[str, Any] = {"evaluation": evaluation, "reward_model": sorted(spec)}
    for key, weight in spec.items():
        entry = REWARDS.get(key, Reward(key))
        components = entry.scored_components(config, evaluation)
        settings[f"{key}.weight"] = round(weight, 9)  # a sum in another order rounds differently
        settings[f"{key}.components"] = list(components)
        settings[f"{key}.checks"] = list(entry.checks)
        settings[f"{key}.details"] = list(entry.details)
        if components:
            settings[f"{key}.start_weights"] = list(config.granular_start_weights)
        if components and not evaluation:  # an evaluation scores with the start weights
            settings[f"{key}.end_weights"] = list(config.granular_end_weights)
            settings[f"{key}.schedule"] = config.granular_schedule
            settings[f"{key}.gamma"] = config.granular_gamma
        settings |= {f"{key}.{argument}": getattr(config, entry.arguments[argument]) for argument in entry.decisive}
    return settings

"""CLIP score (arXiv 2104.08718, unscaled): the cosine of picture and prompt features of any open_clip model.

The default is Apple's DFN5B ViT-H/14 at 378 pixels (hf-hub:apple/DFN5B-CLIP-ViT-H-14-384).

    python fastvideo/models/reward_model/clip_score.py --device cpu --http_proxy http://... --https_proxy http://...
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from fastvideo.models.reward_model.clip_base import OpenCLIPReward
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.loading import bad_file, downloading, load_weights, read_checkpoint
from fastvideo.models.reward_model.spec import RewardConfig

import torch

DEFAULT_MODEL = RewardConfig.clip_score_path
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def _load_local(path: Path, architecture: str) -> tuple[torch.nn.Module, Any, Any]:
    """(model, preprocessing, tokenizer) from the folder of a hub repository, or from a weight file.

    open_clip_config.json beside the weights describes the architecture; without this file, `architecture` names it.
    """
    import open_clip

    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise bad_file("clip_score_path", path, f"none of {', '.join(WEIGHT_FILES)} in this folder")
        path = found[0]
    preprocess = {}
    if (folder / CONFIG_FILE).is_file():
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            model_config = json.dumps(config["model_cfg"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise bad_file("clip_score_path", folder / CONFIG_FILE, f"no open_clip configuration: {error!r}") from error
        # open_clip 2 builds models from named configurations only, and reads new ones from files only.
        with tempfile.TemporaryDirectory() as scratch:
            architecture = f"local-{folder.resolve().name}"
            config_file = Path(scratch) / f"{architecture}.json"
            config_file.write_text(model_config)
            open_clip.add_model_config(config_file)
        names = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
        names["resize_mode"] = "image_resize_mode"
        preprocess = {names[k]: v for k, v in config.get("preprocess_cfg", {}).items() if k in names}
    model, _, transform = open_clip.create_model_and_transforms(architecture, **preprocess)
    state = read_checkpoint(path, "clip_score_path")
    load_weights(model, state.get("state_dict", state), path, "clip_score_path")
    return model, transform, open_clip.get_tokenizer(architecture)


class CLIPScoreRewardModel(OpenCLIPReward):
    """CLIP score of images against prompts: cosines, about 0.2 to 0.45 for real weights.

    model_path: an `hf-hub:owner/name`, a downloaded copy of such a repository, or a weight file.
    architecture: open_clip's name of the model in a weight file without open_clip_config.json beside it.
    """

    name = "CLIPScoreRewardModel"

    def __init__(
        self,
        model_path: str = DEFAULT_MODEL,
        device: str = "cpu",
        http_proxy: str | None = None,
        https_proxy: str | None = None,
        batch_size: int = 8,
        dtype: str = "fp32",
        architecture: str = "ViT-H-14-378-quickgelu",
    ) -> None:
        import open_clip

        if model_path.startswith("hf-hub:"):
            try:
                with downloading("clip_score_path", model_path, http_proxy, https_proxy):
                    model, preprocess = open_clip.create_model_from_pretrained(model_path)
                    tokenizer = open_clip.get_tokenizer(model_path)
            except RuntimeError as error:  # from open_clip, for a repository without the expected files
                raise bad_file("clip_score_path", model_path, str(error).splitlines()[0]) from error
        elif Path(model_path).exists():
            model, preprocess, tokenizer = _load_local(Path(model_path), architecture)
        else:
            raise bad_file("clip_score_path", model_path, "no such file, and not an hf-hub: name")
        super().__init__(model, tokenizer, preprocess, device, batch_size, dtype)


if __name__ == "__main__":
    parser = demo_parser("Score pictures with a CLIP model.")
    parser.add_argument("--model_path", default=DEFAULT_MODEL)
    run_demo(CLIPScoreRewardModel, parser)

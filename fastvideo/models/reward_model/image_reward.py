"""ImageReward (arXiv 2304.05977), and the granular reward made of the three other scorers in its package.

mode "granular": BLIP (does the picture match the prompt? a cosine), CLIP (the same question to another model, a cosine)
and Aesthetic (does the picture look good? about 3 to 7, without the prompt), as a sum whose weights move during
training: first broad agreement, later detail and looks. mode "overall": the plain ImageReward score, about -2 to 2.

The scales differ: cosines vary by hundredths, aesthetic scores by whole numbers. So the aesthetic score decides the
plain sum, whatever the weights. `--granular_mix advantage` puts the three on one scale.

    python fastvideo/models/reward_model/image_reward.py --device cpu --mode overall --http_proxy http://...
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, choose_from
from fastvideo.io.pictures import open_picture
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.granular import GranularRewardModel, SmoothFunc
from fastvideo.models.reward_model.image_reward_compat import import_image_reward, tokenizer_source
from fastvideo.models.reward_model.loading import (
    bad_file,
    check_file,
    cosine,
    downloading,
    in_batches,
    load_openai_clip,
    load_weights,
    prepare,
    read_checkpoint,
    scoring,
)
from fastvideo.models.reward_model.spec import MODES, REWARDS, RewardSpecConfig

import numpy as np
import torch
from PIL import Image

ENTRY = REWARDS["image_reward"]
COMPONENTS = ENTRY.components
SCORE_FILES = [file for file in ENTRY.files if file.mode == "granular"]  # in the order of COMPONENTS
MED_CONFIG_FILE = "med_config.json"
DEFAULTS = RewardSpecConfig()
HUB_NAME = DEFAULTS.image_reward_path
MAX_TOKENS = 35  # of BLIP's text encoder, as in the package


class ComponentScorer:
    """One component of an ImageRewardModel, called as a scorer of the image-reward package is.

    A call computes all components and returns one: the model's `score_components` gives all three in the same time.
    """

    def __init__(self, model: "ImageRewardModel", component: str) -> None:
        self.model, self.component = model, component

    def inference_rank(self, prompt: str, images: Sequence[Image.Image | str | Path]) -> tuple[list[int], list[float]]:
        """(ranks, 1 for the highest score; scores) of pictures or their files against one prompt, in their order.

        Two lists always; the package gives two numbers for a single picture.
        """
        pictures = [image if isinstance(image, Image.Image) else open_picture(Path(image)) for image in images]
        scores = self.model.score_components(pictures, prompt)[self.component]
        ranks = np.argsort(np.argsort(-scores, kind="stable")) + 1
        return ranks.tolist(), scores.tolist()


class ImageRewardModel(GranularRewardModel):
    """ImageReward's scorers on lists of PIL images and prompts.

    model_name: the ImageReward checkpoint of mode "overall": a file, or "ImageReward-v1.0" to download it to score_dir;
    None means this name.
    med_config: BERT's configuration file for BLIP; None: med_config.json in score_dir, downloaded if it isn't there.
    score_dir: folder of SCORE_FILES (mode "granular") and, for machines without network, of `bert-base-uncased`.
    start_weights ... gamma: see GranularRewardModel. Only models that the mode needs are loaded.
    """

    name = "ImageRewardModel"

    def __init__(
        self,
        model_name: str | None = HUB_NAME,
        device: str = "cpu",
        http_proxy: str | None = None,
        https_proxy: str | None = None,
        med_config: str | None = None,
        start_weights: Sequence[float] = tuple(DEFAULTS.granular_start_weights),
        end_weights: Sequence[float] = tuple(DEFAULTS.granular_end_weights),
        schedule: str = DEFAULTS.granular_schedule,
        gamma: float | None = DEFAULTS.granular_gamma,
        mode: str = DEFAULTS.image_reward_mode,
        score_dir: str = DEFAULTS.image_reward_score_dir,
        batch_size: int = 8,
        dtype: str = "fp32",
    ) -> None:
        if mode not in MODES:
            raise FlagError("image_reward_mode", repr(mode), choose_from(MODES, mode))
        self.mode, self.device, self.dtype, self.batch_size = mode, device, dtype, batch_size
        self.model_name, self.med_config, self.score_dir = model_name or HUB_NAME, med_config, Path(score_dir)
        self.http_proxy, self.https_proxy = http_proxy, https_proxy
        self.component_names = COMPONENTS if mode == "granular" else ()
        if mode == "granular":
            super().__init__(start_weights, end_weights, schedule, gamma)
        self.build_reward_model()

    def build_reward_model(self) -> None:
        """Loads the models that the mode needs. The constructor calls it."""
        with downloading("image_reward_score_dir", self.score_dir, self.http_proxy, self.https_proxy):
            package = import_image_reward(tokenizer_source(self.score_dir))
            if self.mode == "granular":
                self._load_granular(package)
            else:
                self._load_overall(package)

    @property
    def blip_rm(self) -> ComponentScorer:
        """BLIP's cosine of picture and prompt."""
        return ComponentScorer(self, "blip")

    @property
    def clip_rm(self) -> ComponentScorer:
        """CLIP's cosine of picture and prompt."""
        return ComponentScorer(self, "clip")

    @property
    def aesthetic_rm(self) -> ComponentScorer:
        """The aesthetic score; it ignores the prompt."""
        return ComponentScorer(self, "aesthetic")

    aesthtic_rm = aesthetic_rm  # spelled so in the fork that first had the three scorers

    def _load_granular(self, package: Any) -> None:
        from ImageReward.models.AestheticScore import MLP

        for file in SCORE_FILES:
            check_file(file, str(self.score_dir))
        blip_file, clip_file, aesthetic_file = (self.score_dir / file.name for file in SCORE_FILES)
        scorer = package.BLIPScore(med_config=_med_config(package, self.med_config, self.score_dir))
        state = read_checkpoint(blip_file, "image_reward_score_dir")
        load_weights(scorer.blip, state.get("model", state), blip_file, "image_reward_score_dir")
        self.preprocess = scorer.preprocess
        self.blip = prepare(scorer.blip, self.device, self.dtype)

        # One CLIP model serves both CLIP and Aesthetic. Their preprocessing is the same as BLIP's: 224 pixels,
        # normalised with the same mean and deviation.
        clip_model, _, self.tokenize = load_openai_clip(clip_file, "image_reward_score_dir")
        self.clip = prepare(clip_model, self.device, self.dtype)
        aesthetic = MLP(clip_model.text_projection.shape[1])
        state = read_checkpoint(aesthetic_file, "image_reward_score_dir")
        load_weights(aesthetic, state, aesthetic_file, "image_reward_score_dir")
        self.aesthetic = prepare(aesthetic, self.device, "fp32")

    def _load_overall(self, package: Any) -> None:
        file: str | Path = self.model_name
        if file == HUB_NAME:
            local = self.score_dir / "ImageReward.pt"
            file = local if local.is_file() else _download(package, "ImageReward.pt", self.score_dir)
        state = read_checkpoint(file, "image_reward_path")
        med_config = _med_config(package, self.med_config, self.score_dir)
        model = package.ImageReward(med_config=med_config, device=self.device)
        for part in ("blip", "mlp"):
            weights = {k[len(part) + 1 :]: v for k, v in state.items() if k.startswith(f"{part}.")}
            load_weights(getattr(model, part), weights, file, "image_reward_path")
        self.preprocess = model.preprocess
        self.blip = prepare(model.blip, self.device, self.dtype)
        self.head = prepare(model.mlp, self.device, "fp32")
        self.mean, self.std = model.mean, model.std

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([self.preprocess(image) for image in images]).to(self.device)

    def _blip_tokens(self, texts: list[str]) -> Any:
        return self.blip.tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)

    def _blip_text(self, texts: list[str]) -> torch.Tensor:
        tokens = self._blip_tokens(texts)
        hidden = self.blip.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask, mode="text")
        return self.blip.text_proj(hidden.last_hidden_state[:, 0])

    def _clip_text(self, texts: list[str]) -> torch.Tensor:
        return self.clip.encode_text(self.tokenize(texts, truncate=True).to(self.device))

    def _score_components(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """[n, 3] in the order of COMPONENTS."""
        pixels = self._pixels(images)
        with scoring(self.device, self.dtype):
            seen = self.blip.vision_proj(self.blip.visual_encoder(pixels.to(self.blip.vision_proj.weight.dtype))[:, 0])
            blip = cosine(seen, prompts, self._blip_text)
            seen = self.clip.encode_image(pixels)
            clip = cosine(seen, prompts, self._clip_text)
        with scoring(self.device, "fp32"):
            aesthetic = self.aesthetic(torch.nn.functional.normalize(seen.float())).squeeze(-1)
            return torch.stack([blip, clip, aesthetic], dim=1)

    def _score_overall(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels, tokens = self._pixels(images), self._blip_tokens(prompts)
        with scoring(self.device, self.dtype):
            seen = self.blip.visual_encoder(pixels.to(self.blip.vision_proj.weight.dtype))
            joint = self.blip.text_encoder(
                tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
                return_dict=True,
            )
        with scoring(self.device, "fp32"):
            return ((self.head(joint.last_hidden_state[:, 0].float()) - self.mean) / self.std).squeeze(-1)

    def score_components(self, images: list[Image.Image], prompts: str | list[str]) -> dict[str, np.ndarray]:
        """{"blip": [N], "clip": [N], "aesthetic": [N]}, float64; mode "granular" only. One str is the prompt of all."""
        if self.mode != "granular":
            raise ValueError('image_reward has components in mode "granular" only')
        scores = in_batches(self._score_components, images, prompts, self.batch_size).reshape(-1, len(COMPONENTS))
        return {component: scores[:, i] for i, component in enumerate(COMPONENTS)}

    def score(
        self,
        images: list[Image.Image],
        prompts: str | list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(score [N], components): the weighted sum and its components; in mode "overall" the plain score and {}."""
        if self.mode == "overall":
            return in_batches(self._score_overall, images, prompts, self.batch_size), {}
        return super().score(images, prompts, curr_step, total_steps)

    def get_dynamic_weights(
        self, curr_step: float | np.ndarray, total_steps: float, smooth_func: SmoothFunc | str | None = None
    ) -> list[float] | np.ndarray:
        """See GranularRewardModel. Mode "overall" has no components, so no weights: [] or [N, 0]."""
        if self.mode == "overall":
            return np.zeros((*np.shape(curr_step), 0)) if np.ndim(curr_step) else []
        return super().get_dynamic_weights(curr_step, total_steps, smooth_func)

    def __call__(
        self,
        images: list[Image.Image],
        prompts: str | list[str] | None = None,
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
        *,
        texts: str | list[str] | None = None,
    ) -> list[float]:
        """See GranularRewardModel. texts: another name of prompts; one of the two must be given."""
        if (prompts is None) == (texts is None):
            raise TypeError("give either prompts or texts")
        return super().__call__(images, texts if prompts is None else prompts, curr_step, total_steps)

    def component_weights(
        self, curr_step: float | np.ndarray | None, total_steps: float | None, n: int
    ) -> dict[str, np.ndarray]:
        """See GranularRewardModel. In mode "overall" the plain score enters the advantage, with weight 1."""
        if self.mode == "overall":
            return {self.name: np.ones(n)}
        return super().component_weights(curr_step, total_steps, n)


def _download(package: Any, file: str, folder: Path) -> str:
    with downloading("image_reward_score_dir", folder / file):
        return package.ImageReward_download(f"https://huggingface.co/THUDM/ImageReward/blob/main/{file}", str(folder))


def _med_config(package: Any, path: str | None, score_dir: Path) -> str:
    if path is None:
        local = score_dir / MED_CONFIG_FILE
        path = str(local) if local.is_file() else _download(package, MED_CONFIG_FILE, score_dir)
    if not os.path.isfile(path):
        raise bad_file("image_reward_med_config", path, "no such file")
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_file("image_reward_med_config", path, f"not a readable JSON file: {error}") from error
    return path


if __name__ == "__main__":
    parser = demo_parser("Score pictures with ImageReward or with its package's BLIP, CLIP and Aesthetic scorers.")
    parser.add_argument("--mode", default=DEFAULTS.image_reward_mode, choices=MODES)
    parser.add_argument("--model_name", default=HUB_NAME)
    parser.add_argument("--med_config", default=None)
    parser.add_argument("--score_dir", default=DEFAULTS.image_reward_score_dir)
    run_demo(ImageRewardModel, parser)

"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a head that rates a picture with its prompt.

The last hidden state at the token <|Reward|>, which follows picture, rating guide and prompt, goes through the head's
three linear layers. They give the mean μ of the score, which is the reward, and log σ: σ is the score's uncertainty.

    python fastvideo/models/reward_model/hpsv3.py --model_path MizzenAI/HPSv3 --device cuda

What the checkpoint was trained with is kept, as published in the package hpsv3 1.0.0: the guide, which
download_checkpoints.sh reads from that package, the picture's size, Qwen2-VL's chat format, bf16 in all but the head,
rotary frequencies rounded to bf16, and tokens that are numbered from left to right, where Qwen2-VL numbers those of a
picture by row and column.
"""

import re
from pathlib import Path

from fastvideo.io.devices import torch_dtype
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.detailed import DetailedReward
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.loading import (
    bad_file,
    check_tokenizer,
    downloading,
    fitting,
    in_batches,
    load_weights,
    read_checkpoint,
)
from fastvideo.models.reward_model.spec import RewardConfig

import numpy as np
import torch
from PIL import Image

DEFAULT_MODEL, DEFAULT_GUIDE = RewardConfig.hpsv3_path, RewardConfig.hpsv3_guide_path
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # has the configuration and the tokenizer
WEIGHTS = "HPSv3.safetensors"
REWARD = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of every picture, about
FIELD, GUIDE_FIELD = "hpsv3_path", "hpsv3_guide_path"
PROMPT = "{text_prompt}"  # in the guide
# In the checkpoint, which transformers 4 wrote -> in the model of transformers 5. The language model's head isn't used.
NAMES = {"visual.": "model.visual.", "model.": "model.language_model.", "rm_head.": "rm_head."}


class Rater(torch.nn.Module):
    """Qwen2-VL without its language head, and HPSv3's head."""

    def __init__(self, config: "transformers.Qwen2VLConfig") -> None:  # noqa: F821
        super().__init__()
        from transformers import Qwen2VLModel

        self.model = Qwen2VLModel(config)
        self.rm_head = torch.nn.Sequential(
            torch.nn.Linear(config.text_config.hidden_size, 1024),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.05),
            torch.nn.Linear(1024, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 2),
        )

    def forward(self, at: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """μ and log σ, float32 [n, 2]. at: bool [n, tokens], the place of REWARD. inputs: of Qwen2VLModel."""
        return self.rm_head(self.model(**inputs, use_cache=False).last_hidden_state[at].float())


def read_guide(path: str) -> str:
    """The rating guide in a file. Raises FlagError for one without PROMPT or REWARD."""
    try:
        guide = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise bad_file(GUIDE_FIELD, path, getattr(error, "strerror", None) or "not UTF-8 text") from None
    for part in (PROMPT, REWARD):
        if guide.count(part) != 1:
            raise bad_file(GUIDE_FIELD, path, f"no rating guide: {part} must be in it once")
    return guide


class HPSv3RewardModel(DetailedReward):
    """HPSv3's score μ of images against prompts, about 0 to 12 for real weights, and its uncertainty σ.

    model_path: hub name, or a folder with HPSv3.safetensors and, unless they come from the hub, the configuration and
    the tokenizer of Qwen2-VL-7B-Instruct. guide_path: text file with PROMPT and REWARD in it. number_format: "fp32",
    "bf16" or "fp16"; it was trained in bf16, so --reward_dtype doesn't change it.
    """

    name = "HPSv3RewardModel"
    detail_names = ("uncertainty",)

    def __init__(
        self,
        model_path: str = DEFAULT_MODEL,
        guide_path: str = DEFAULT_GUIDE,
        device: str = "cpu",
        batch_size: int = 4,
        number_format: str = "bf16",
    ) -> None:
        from accelerate import init_empty_weights
        from huggingface_hub import hf_hub_download
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessor

        self.guide = read_guide(guide_path)
        folder = Path(model_path)
        source = model_path if (folder / "config.json").is_file() else BASE
        with downloading(FIELD, model_path):
            path = folder / WEIGHTS if folder.is_dir() else Path(hf_hub_download(model_path, WEIGHTS))
            config = Qwen2VLConfig.from_pretrained(source)
            self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
            check_tokenizer(self.tokenizer, source)
            self.image_processor = Qwen2VLImageProcessor.from_pretrained(source)
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        config.text_config.vocab_size = len(self.tokenizer)  # the checkpoint has no row beyond
        state = read_checkpoint(path, FIELD, device)  # 16 GB in the memory of every process would be much
        state = {
            renamed: state.pop(name)
            for name in list(state)
            if (renamed := next((new + name[len(old) :] for old, new in NAMES.items() if name.startswith(old)), None))
        }
        with init_empty_weights(include_buffers=False):  # 16 GB needn't be filled with random numbers first
            self.model = Rater(config)
        load_weights(self.model, state, path, FIELD)
        del state
        self.model.model.to(torch_dtype(number_format))  # the rotary frequencies too, as in the training
        self.model.rm_head.float()
        self.model.to(device).eval().requires_grad_(False)
        self.device, self.batch_size = device, batch_size
        self.factor = self.image_processor.patch_size * self.image_processor.merge_size
        self.reward_token = self.tokenizer.convert_tokens_to_ids(REWARD)

    def _text(self, prompt: str, image_tokens: int) -> str:
        """The chat that the model reads. Control tokens in the prompt would be taken for the chat's own."""
        prompt = re.sub(r"<\|\w+\|>", " ", prompt)
        picture = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>"
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{picture}{self.guide.replace(PROMPT, prompt)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def _resized(self, image: Image.Image) -> Image.Image:
        """The picture with about PIXELS pixels, and sides that Qwen2-VL's patches fit into."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        height, width = smart_resize(image.height, image.width, self.factor, min_pixels=PIXELS, max_pixels=PIXELS)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    @torch.inference_mode()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """μ and σ, [n, 2]."""
        pictures = self.image_processor([self._resized(i) for i in images], do_resize=False, return_tensors="pt")
        tokens = (pictures["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        texts = [self._text(prompt, count) for prompt, count in zip(prompts, tokens, strict=True)]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = inputs["input_ids"].to(self.device)
        places = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)  # not Qwen2-VL's own, see above
        output = self.model(
            ids == self.reward_token,
            input_ids=ids,
            attention_mask=inputs["attention_mask"].to(self.device),
            position_ids=places,
            pixel_values=pictures["pixel_values"].to(self.device),
            image_grid_thw=pictures["image_grid_thw"].to(self.device),
        )
        return torch.stack([output[:, 0], output[:, 1].exp()], 1)

    def score(self, images: list[Image.Image], prompts: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(μ [N], {"uncertainty": σ [N]}), float64; NaN for a picture that is too elongated."""
        prompts = prompt_per_image(prompts, len(images))
        fits = fitting(images, "HPSv3")
        found = np.full((len(images), 2), np.nan)
        if any(fits):
            chosen = ([x for x, fit in zip(given, fits, strict=True) if fit] for given in (images, prompts))
            found[fits] = in_batches(self._score, *chosen, self.batch_size)
        return found[:, 0], {"uncertainty": found[:, 1]}


if __name__ == "__main__":
    parser = demo_parser("Score pictures with HPSv3.")
    parser.add_argument("--model_path", default=DEFAULT_MODEL)
    parser.add_argument("--guide_path", default=DEFAULT_GUIDE)
    run_demo(HPSv3RewardModel, parser)

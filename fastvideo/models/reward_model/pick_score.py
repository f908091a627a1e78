"""PickScore (arXiv 2305.01569): CLIP ViT-H/14 fine-tuned on people's choices between two pictures.

s = logit_scale * cosine is about 18 to 24. Training uses (s - 18) / 8, evaluation s / 100.

    python fastvideo/models/reward_model/pick_score.py --device cpu --http_proxy http://... --https_proxy http://...
"""

from pathlib import Path

from fastvideo.io.weights import loading_problem
from fastvideo.models.reward_model.clip_base import CLIPReward
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.loading import bad_file, check_tokenizer, downloading
from fastvideo.models.reward_model.spec import RewardConfig

import torch
from PIL import Image

DEFAULT_MODEL = RewardConfig.pick_score_path
DEFAULT_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # as saved by transformers 4 and 5


class PickScoreRewardModel(CLIPReward):
    """PickScore of images against prompts: about 0 to 0.75 in training, 0.18 to 0.24 in evaluation.

    model_path: hub name or local folder. processor_path: hub name or folder of tokenizer and image processor; None: the
    model's folder if it has them, else the model card's choice. evaluation: report s / 100 instead of (s - 18) / 8.
    """

    name = "PickScoreRewardModel"

    def __init__(
        self,
        model_path: str = DEFAULT_MODEL,
        device: str = "cpu",
        http_proxy: str | None = None,
        https_proxy: str | None = None,
        evaluation: bool = False,
        batch_size: int = 8,
        dtype: str = "fp32",
        processor_path: str | None = None,
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor

        if processor_path is None:
            local = any((Path(model_path) / file).is_file() for file in PROCESSOR_FILES)
            processor_path = model_path if local else DEFAULT_PROCESSOR
        with downloading("pick_score_path", model_path, http_proxy, https_proxy):
            self.processor = CLIPProcessor.from_pretrained(processor_path)
            check_tokenizer(self.processor.tokenizer, processor_path)
            model, report = CLIPModel.from_pretrained(
                model_path, output_loading_info=True, ignore_mismatched_sizes=True
            )
        report["missing_keys"] = [key for key in report["missing_keys"] if not key.endswith("position_ids")]
        if problem := loading_problem(model, report, strict=False):
            raise bad_file("pick_score_path", model_path, f"wrong checkpoint for CLIPModel: {problem}")
        super().__init__(model, device, batch_size, dtype)
        self.scale, self.shift = (100.0, 0.0) if evaluation else (8.0, 18.0)

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def _encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return _features(self.model.get_image_features(pixel_values=pixels))

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        inputs = self.processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return _features(self.model.get_text_features(**inputs.to(self.device)))

    def _finish(self, cosines: torch.Tensor) -> torch.Tensor:
        return (self.logit_scale * cosines - self.shift) / self.scale


def _features(output: object) -> torch.Tensor:
    """Features [n, d]: transformers 4 returns the tensor, transformers 5 an object that holds it."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


if __name__ == "__main__":
    parser = demo_parser("Score pictures with PickScore.")
    parser.add_argument("--model_path", default=DEFAULT_MODEL)
    parser.add_argument("--evaluation", action="store_true", help="report s / 100 instead of (s - 18) / 8")
    run_demo(PickScoreRewardModel, parser)

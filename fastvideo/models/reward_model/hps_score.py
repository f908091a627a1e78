"""HPSv2 (arXiv 2306.09341): cosine of a fine-tuned CLIP ViT-H/14. Good pictures score about 0.25 to 0.35.

HPS_v2.1_compressed.pt and HPS_v2_compressed.pt have open_clip's weight names, so open_clip builds the model. The
preprocessing is HPS's own: it shrinks the whole picture and pads it to a square, where open_clip's crops.

    python fastvideo/models/reward_model/hps_score.py --device cpu --checkpoint hps_ckpt/HPS_v2.1_compressed.pt
"""

from fastvideo.models.reward_model.common import (
    cosine,
    demo_parser,
    in_batches,
    load_weights,
    prepare,
    print_scores,
    read_checkpoint,
    scoring,
)

import numpy as np
import torch
from PIL import Image


def hps_preprocess(image: Image.Image, size: int = 224) -> torch.Tensor:
    """RGB picture -> float [3, size, size]: longest side to `size`, black bars to a square, then CLIP's mean and std.

    Bicubic and antialiased on the float tensor, as in hpsv2. Bars are added before normalising.
    """
    import torchvision.transforms.functional as F
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pixels = F.to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    if scale != 1:
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.resize(pixels, [new_height, new_width], F.InterpolationMode.BICUBIC, antialias=True)
        left, top = (size - new_width) // 2, (size - new_height) // 2
        pixels = F.pad(pixels, [left, top, size - new_width - left, size - new_height - top])
    return F.normalize(pixels, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


class HPSClipRewardModel:
    """HPSv2 score of images against prompts.

    checkpoint: a {"state_dict": weights} file. architecture: its open_clip name. dtype: "fp32", "bf16" or "fp16".
    Raises ValueError when the file is missing or isn't a checkpoint of this architecture.
    """

    name = "HPSClipRewardModel"

    def __init__(
        self,
        checkpoint: str,
        device: str = "cpu",
        batch_size: int = 8,
        dtype: str = "fp32",
        architecture: str = "ViT-H-14",
    ) -> None:
        import open_clip

        state = read_checkpoint(checkpoint, "hps_path")
        model = open_clip.create_model(architecture)
        load_weights(model, state.get("state_dict", state), checkpoint, "hps_path")
        self.model = prepare(model, device, dtype)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.image_size = model.visual.image_size[0]
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))

    def _score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = torch.stack([hps_preprocess(image, self.image_size) for image in images]).to(self.device)
        with scoring(self.device, self.dtype):
            features = self.model.encode_image(pixels.to(self.model.logit_scale.dtype))
            return cosine(features, prompts, self._encode_text)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N], about 0.2 to 0.35 for real weights."""
        return in_batches(self._score, images, prompts, self.batch_size)


if __name__ == "__main__":
    parser = demo_parser("Score pictures with HPSv2.")
    parser.add_argument("--checkpoint", default="hps_ckpt/HPS_v2.1_compressed.pt")
    args = parser.parse_args()
    print_scores(HPSClipRewardModel(args.checkpoint, args.device, dtype=args.dtype), args)

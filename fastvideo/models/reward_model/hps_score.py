"""HPSv2 (arXiv 2306.09341): cosine of a fine-tuned CLIP ViT-H/14. Good pictures score about 0.25 to 0.35.

HPS_v2.1_compressed.pt and HPS_v2_compressed.pt have open_clip's weight names, so open_clip builds the model. The
preprocessing is HPS's own: it shrinks the whole picture and pads it to a square. open_clip's preprocessing would crop.

    python fastvideo/models/reward_model/hps_score.py --device cpu --checkpoint hps_ckpt/HPS_v2.1_compressed.pt
"""

from functools import partial

from fastvideo.models.reward_model.clip_base import OpenCLIPReward
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.loading import load_weights, read_checkpoint
from fastvideo.models.reward_model.spec import RewardConfig

import torch
from PIL import Image

DEFAULT_CHECKPOINT = RewardConfig.hps_path


def hps_preprocess(image: Image.Image, size: int = 224) -> torch.Tensor:
    """RGB picture -> float [3, size, size]: longest side to `size`, black bars to a square, then CLIP's mean and std.

    Resizing is bicubic and antialiased, on the float tensor, as in hpsv2. Bars are added before normalising.
    """
    import torchvision.transforms.functional as F
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pixels = F.to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = F.resize(pixels, [height, width], F.InterpolationMode.BICUBIC, antialias=True)
    # hpsv2 adds no bars to a picture whose longest side already has the right size, and then fails.
    left, top = (size - width) // 2, (size - height) // 2
    pixels = F.pad(pixels, [left, top, size - width - left, size - height - top])
    return F.normalize(pixels, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


class HPSClipRewardModel(OpenCLIPReward):
    """HPSv2 score of images against prompts: cosines, about 0.2 to 0.35 for real weights.

    checkpoint: a {"state_dict": weights} file. architecture: its open_clip name. dtype: "fp32", "bf16" or "fp16".
    Raises FlagError if the file is missing or isn't a checkpoint of this architecture.
    """

    name = "HPSClipRewardModel"

    def __init__(
        self,
        checkpoint: str = DEFAULT_CHECKPOINT,
        device: str = "cpu",
        batch_size: int = 8,
        dtype: str = "fp32",
        architecture: str = "ViT-H-14",
    ) -> None:
        import open_clip

        state = read_checkpoint(checkpoint, "hps_path")
        model = open_clip.create_model(architecture)
        load_weights(model, state.get("state_dict", state), checkpoint, "hps_path")
        preprocess = partial(hps_preprocess, size=model.visual.image_size[0])
        super().__init__(model, open_clip.get_tokenizer(architecture), preprocess, device, batch_size, dtype)


if __name__ == "__main__":
    parser = demo_parser("Score pictures with HPSv2.")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT)
    run_demo(HPSClipRewardModel, parser)

"""Random-weight checkpoints of the reward models in their real formats and under their real file names, but narrow."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a look-up on the hub is a mistake here: fail, don't retry

import fastvideo  # noqa: F401  mends torchvision, before transformers looks for it

import numpy as np
import torch
from PIL import Image

SMALL_OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,  # ImageReward's head takes 768 features, whatever the depth
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 128,
    "encoder_width": 32,
    "add_cross_attention": True,
}
PROMPTS = [
    "a small red circle",
    "",
    "ein Bild von Straße und Café, 猫と犬, кошка",
    "a very long prompt " * 60,
    "a small red circle",
]


def pictures() -> list[Image.Image]:
    """Five pictures of different sizes and modes, one for each of PROMPTS."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 4), dtype=np.uint8)
    return [
        Image.fromarray(noise[:300, :200, :3]),
        Image.new("L", (1, 1), 90),
        Image.fromarray(noise[:100, :250]),  # RGBA
        Image.fromarray(noise[:64, :64, :3]).convert("P"),
        Image.fromarray(noise[..., :3]),
    ]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fresh modules give nearly constant scores (zero biases, tiny weights); make every weight count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def make_bert_tokenizer(folder: Path) -> None:
    """`bert-base-uncased` with letters only."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")


def use_small_blip(monkeypatch) -> None:
    """image-reward's BLIP has a fixed ViT-L; give it one of width 32 and depth 2."""
    from fastvideo.models.reward_model.image_reward_compat import import_image_reward

    import_image_reward()
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    def create_vit(vit: str, image_size: int, *args: object) -> tuple[torch.nn.Module, int]:
        return VisionTransformer(img_size=image_size, patch_size=32, embed_dim=32, depth=2, num_heads=2), 32

    monkeypatch.setattr(blip_pretrain, "create_vit", create_vit)


def make_image_reward_files(folder: Path) -> None:
    """ImageReward.pt, med_config.json, model_large.pth, ViT-L-14.pt, the aesthetic head and a BERT tokenizer."""
    from fastvideo.models.reward_model.image_reward_compat import import_image_reward

    from clip.model import CLIP

    folder.mkdir(parents=True, exist_ok=True)
    make_bert_tokenizer(folder / "bert-base-uncased")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    package = import_image_reward(str(folder / "bert-base-uncased"))
    med_config = str(folder / "med_config.json")
    torch.save(randomize(package.ImageReward(med_config=med_config), 1).state_dict(), folder / "ImageReward.pt")
    blip = randomize(package.BLIPScore(med_config=med_config), 2).blip.state_dict()
    # The real file is a pretraining checkpoint: it holds the momentum encoder and the queues as well.
    momentum = {"vision_proj_m.weight": torch.zeros(2, 2), "image_queue": torch.zeros(2), "temp": torch.zeros(())}
    torch.save({"model": {**blip, **momentum}}, folder / "model_large.pth")
    from ImageReward.models.AestheticScore import MLP

    aesthetic = randomize(MLP(768), 3)
    torch.save(aesthetic.state_dict(), folder / "sac%2Blogos%2Bava1-l14-linearMSE.pth")
    # The real file is a TorchScript archive.
    clip_model = randomize(CLIP(768, 224, 2, 64, 32, 77, 49408, 64, 1, 2), 4)
    archive = torch.jit.trace(clip_model, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)))
    torch.jit.save(archive, folder / "ViT-L-14.pt")


def make_open_clip_config(folder: Path, name: str) -> Path:
    """A model config file of open_clip's (and hpsv2's) format, for `add_model_config`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(SMALL_OPEN_CLIP))
    return path


def make_hps_file(path: Path, architecture: str) -> None:
    import open_clip

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": randomize(open_clip.create_model(architecture)).state_dict()}, path)


def make_clip_score_folder(folder: Path, architecture: str) -> None:
    """A downloaded hf-hub repository of open_clip."""
    import open_clip

    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": SMALL_OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = randomize(open_clip.create_model(architecture), 5).state_dict()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")


def make_pick_score_folder(folder: Path) -> None:
    """PickScore_v1: a transformers CLIPModel with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokens),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**tower, "image_size": 224, "patch_size": 32},
        projection_dim=32,
    )
    model = randomize(CLIPModel(config), 6)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)
    model.save_pretrained(folder)

"""Random-weight checkpoints of the reward models, in their real formats and under their real file names.

With `full` the models have the real architecture, else a quarter of its width and a few layers, which takes a second.
The packages only know the names of the real architectures: `narrow_architectures` makes these names mean small models.
"""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a look-up on the hub is a mistake here and must fail at once

import fastvideo.torchvision_repair  # noqa: F401  (before transformers)

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

HPS_FILE = "HPS_v2.1_compressed.pt"
CLIP_SCORE_FOLDER = "DFN5B-CLIP-ViT-H-14-384"
CLIP_SCORE_ARCHITECTURE = "ViT-H-14-378-quickgelu"
PICK_SCORE_FOLDER = "PickScore_v1"
HPSV3_FOLDER = "HPSv3"
HPSV3_GUIDE = """Look at the picture and say how much people would like it, from 0 (not at all) to 10 (very much).

First how it looks: are bodies and things formed as they should be, is it sharp where it should be, are there details to
discover, do colours, light and composition please?

Then how it fits its text: does it show who and what the text names, in the right number, with the right colours, doing
the right things, in the right place and manner, and nothing that speaks against the text?
The text: {text_prompt}

The mark of this picture: <|Reward|>
"""
DETECTOR_FOLDER = "mask2former-swin-small-coco-instance"
PROMPTS = [
    "a small red circle",
    "",
    "ein Bild von Straße und Café, 猫と犬, кошка",
    "a very long prompt " * 60,
    "a small red circle",
    "THE SAME   in capitals, with  spaces",
    "🦊\n\ttab and line",
]


def pictures() -> list[Image.Image]:
    """Pictures of different sizes and modes, one per prompt in PROMPTS."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 4), dtype=np.uint8)
    return [
        Image.fromarray(noise[:300, :200, :3]),
        Image.fromarray(noise[:1, :1, :3]),  # one pixel
        Image.fromarray(noise[:100, :250]),  # RGBA
        Image.fromarray(noise[:64, :64, :3]).convert("P"),
        Image.fromarray(noise[..., :3]),
        Image.fromarray(noise[:210, :90, 0]),  # grey
        Image.fromarray(noise[:30, :40, :3]).resize((3000, 2000)),
    ]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that all affect the score. Default initialisation would give nearly constant scores."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, device=parameter.device))
    return module.eval()


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """An open_clip model configuration at a quarter of its width, two layers deep."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return {
        **config,
        "embed_dim": config["embed_dim"] // 4,
        "vision_cfg": {**vision, "width": vision["width"] // 4, "layers": 2},
        "text_cfg": {**text, "width": text["width"] // 4, "heads": text["heads"] // 4, "layers": 2},
    }


def narrow_architectures(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes open_clip's ViT-H and image-reward's ViT-L narrow until `patch` is undone; writes files into `folder`."""
    from fastvideo.models.reward_model.image_reward_compat import import_image_reward

    import_image_reward()
    import open_clip
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    for name in ("ViT-H-14", CLIP_SCORE_ARCHITECTURE):
        (folder / f"{name}.json").write_text(json.dumps(narrow(open_clip.get_model_config(name))))
    # open_clip reads the files again whenever a configuration is added; later folders win.
    patch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS, folder])
    open_clip.factory._rescan_model_configs()

    def create_vit(vit: str, image_size: int, *args: object) -> tuple[torch.nn.Module, int]:
        return VisionTransformer(img_size=image_size, patch_size=16, embed_dim=256, depth=2, num_heads=4), 256

    patch.setattr(blip_pretrain, "create_vit", create_vit)


def make_bert_tokenizer(folder: Path, size: int) -> None:
    """A `bert-base-uncased` folder whose vocabulary has only letters and fillers, `size` tokens."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")


def _med_config(full: bool) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,  # ImageReward's head takes 768 features, whatever the depth
        "initializer_range": 0.02,
        "intermediate_size": 3072 if full else 768,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12 if full else 1,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30524 if full else 128,
        "encoder_width": 768,
        "add_cross_attention": True,
    }


def _image_reward_package(folder: Path, full: bool) -> tuple[Any, str]:
    """The package and the path of med_config.json. Makes med_config.json and the tokenizer unless they exist."""
    from fastvideo.models.reward_model.image_reward_compat import import_image_reward

    folder.mkdir(parents=True, exist_ok=True)
    med_config, tokenizer = folder / "med_config.json", folder / "bert-base-uncased"
    if not med_config.exists():
        med_config.write_text(json.dumps(_med_config(full)))
        make_bert_tokenizer(tokenizer, 30522 if full else 100)
    return import_image_reward(str(tokenizer)), str(med_config)


def make_image_reward(folder: Path, full: bool = False) -> None:
    """ImageReward.pt, med_config.json and a BERT tokenizer in image_reward_ckpt."""
    folder = folder / "image_reward_ckpt"
    package, med_config = _image_reward_package(folder, full)
    torch.save(randomize(package.ImageReward(med_config=med_config), 1).state_dict(), folder / "ImageReward.pt")


def make_granular(folder: Path, full: bool = False) -> None:
    """model_large.pth, ViT-L-14.pt, the aesthetic head, med_config.json and a BERT tokenizer in image_reward_ckpt."""
    folder = folder / "image_reward_ckpt"
    package, med_config = _image_reward_package(folder, full)
    from ImageReward.models.AestheticScore import MLP

    blip = randomize(package.BLIPScore(med_config=med_config), 2).blip.state_dict()
    # The real file is a pretraining checkpoint: it holds the momentum encoder and the queues as well.
    momentum = {"vision_proj_m.weight": torch.zeros(2, 2), "image_queue": torch.zeros(2), "temp": torch.zeros(())}
    torch.save({"model": {**blip, **momentum}}, folder / "model_large.pth")
    torch.save(randomize(MLP(768), 3).state_dict(), folder / "sac%2Blogos%2Bava1-l14-linearMSE.pth")
    make_openai_clip(folder / "ViT-L-14.pt", full)


def make_openai_clip(path: Path, full: bool) -> None:
    """OpenAI's ViT-L-14.pt."""
    from clip.model import CLIP

    vision, text = ((24, 1024), (768, 12, 12)) if full else ((2, 256), (192, 3, 2))
    clip_model = randomize(CLIP(768, 224, *vision, 14, 77, 49408, *text), 4)
    # The real file is a TorchScript archive.
    archive = torch.jit.trace(clip_model, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)))
    torch.jit.save(archive, path)


def make_hps(folder: Path, full: bool = False) -> None:
    """HPS_v2.1_compressed.pt in hps_ckpt."""
    import open_clip

    (folder / "hps_ckpt").mkdir(exist_ok=True)
    torch.save(
        {"state_dict": randomize(open_clip.create_model("ViT-H-14")).state_dict()}, folder / "hps_ckpt" / HPS_FILE
    )


def make_clip_score(folder: Path, full: bool = False) -> None:
    """A downloaded hub repository of open_clip. Its preprocessing differs from the named architecture's."""
    import open_clip

    folder = folder / CLIP_SCORE_FOLDER
    folder.mkdir()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2], "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": open_clip.get_model_config(CLIP_SCORE_ARCHITECTURE), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = randomize(open_clip.create_model(CLIP_SCORE_ARCHITECTURE), 5).state_dict()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")


def make_pick_score(folder: Path, full: bool = False) -> None:
    """PickScore_v1: a transformers CLIPModel with its processor. The tokenizer is CLIP's own, from open_clip's file."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = folder / PICK_SCORE_FOLDER
    folder.mkdir()
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)
    share = 1 if full else 4

    def tower(width: int, layers: int, **others: int) -> dict[str, Any]:
        width //= share
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 16 // share}
        return {**sizes, "num_hidden_layers": layers if full else 2, "hidden_act": "gelu", **others}

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=tower(1024, 24, vocab_size=len(tokens), **ends),
        vision_config=tower(1280, 32, image_size=224, patch_size=14),
        projection_dim=1024 // share,
    )
    model = randomize(CLIPModel(config), 6)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)
    model.save_pretrained(folder)


def make_geneval(folder: Path, full: bool = False) -> None:
    """GenEval's detector, a Mask2Former with COCO's labels, and ViT-L-14.pt in image_reward_ckpt.

    Its class probabilities are near 0 and 1, else no random detector would find anything.
    """
    from fastvideo.models.reward_model.geneval import RENAMED, without_scipy
    from fastvideo.models.reward_model.geneval_rules import CLASSES

    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = {"out_features": [f"stage{i}" for i in range(1, 5)], "window_size": 7}
    labels = {i: RENAMED.get(name, name) for i, name in enumerate(CLASSES)}
    if full:
        backbone = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], **stages)
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=100, id2label=labels)
    else:
        backbone = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], **stages)
        sizes = dict.fromkeys("hidden_dim mask_feature_size feature_size dim_feedforward".split(), 32)
        sizes |= {"encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2}
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=20, id2label=labels, **sizes)
    torch.manual_seed(0)
    with without_scipy():
        model = randomize(Mask2FormerForUniversalSegmentation(config), 9)
    with torch.no_grad():
        model.class_predictor.weight.mul_(20)
    model.save_pretrained(folder / DETECTOR_FOLDER)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder / DETECTOR_FOLDER)
    (folder / "image_reward_ckpt").mkdir(exist_ok=True)
    make_openai_clip(folder / "image_reward_ckpt/ViT-L-14.pt", full)


def make_byte_level_bpe(texts: list[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a byte-level BPE that is trained on the texts, in the form of GPT-2's files."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=256 + merges, min_frequency=1, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def make_hpsv3(folder: Path, full: bool = False, guide: str = HPSV3_GUIDE) -> None:
    """HPSv3: HPSv3.safetensors under transformers 4's names, a guide, and Qwen2-VL's configuration and tokenizer."""
    from fastvideo.models.reward_model import hpsv3

    from transformers import Qwen2Tokenizer, Qwen2VLConfig

    folder = folder / HPSV3_FOLDER
    folder.mkdir()
    (folder / "rating_guide.txt").write_text(guide, encoding="utf-8", newline="")
    vocabulary, merges = make_byte_level_bpe([guide.replace(hpsv3.PROMPT, "{prompt}")], 400)
    specials = "im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end".split()
    specials += "vision_start vision_end vision_pad image_pad video_pad".split()
    size = 151643 if full else len(vocabulary)  # the tokens before the special ones
    vocabulary |= {f"[unused{i}]": i for i in range(len(vocabulary), size)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|endoftext|>")
    tokenizer.add_tokens([f"<|{name}|>" for name in specials], special_tokens=True)
    tokenizer.save_pretrained(folder)
    ids = {name: size + 1 + i for i, name in enumerate(specials)}  # <|endoftext|> is before them
    text, vision, layers = (
        ((3584, 18944, 28, 28, 4), (1280, 32, 16), [16, 24, 24]) if full else ((32, 64, 2, 2, 1), (32, 1, 2), [2, 3, 3])
    )
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": text[0],
        "intermediate_size": text[1],
        "num_hidden_layers": text[2],
        "num_attention_heads": text[3],
        "num_key_value_heads": text[4],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": text[2],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": layers},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": size + (421 if full else 20),
        "bos_token_id": size,
        "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_config": {
            "embed_dim": vision[0],
            "depth": vision[1],
            "num_heads": vision[2],
            "mlp_ratio": 4,
            "in_chans": 3,
            "hidden_size": text[0],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    preprocessing = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 16384 * 28 * 28,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    loaded = Qwen2VLConfig.from_pretrained(folder)
    loaded.text_config.vocab_size = len(tokenizer) + 1  # with <|Reward|>
    torch.manual_seed(0)  # biases start from random numbers
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as published; 8 billion parameters in fp32 would take 33 GB
    try:
        with torch.device("cuda" if full and torch.cuda.is_available() else "cpu"):  # a CPU draws them in minutes
            model = randomize(hpsv3.Rater(loaded), 8)
    finally:
        torch.set_default_dtype(before)
    old_names = {new: old for old, new in hpsv3.NAMES.items()}
    state = {
        next(old + name[len(new) :] for new, old in old_names.items() if name.startswith(new)): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    state = {name: tensor.float() if name.startswith("rm_head") else tensor for name, tensor in state.items()}
    state["lm_head.weight"] = torch.zeros(state["model.embed_tokens.weight"].shape, dtype=torch.bfloat16)
    save_file(state, folder / "HPSv3.safetensors", {"format": "pt"})


MAKERS: dict[str, Callable[..., None]] = {
    "granular": make_granular,
    "image_reward": make_image_reward,
    "hps": make_hps,
    "clip_score": make_clip_score,
    "pick_score": make_pick_score,
    "hpsv3": make_hpsv3,
    "geneval": make_geneval,
}


@pytest.fixture(scope="session")
def all_narrow_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    with pytest.MonkeyPatch.context() as patch:
        narrow_architectures(patch, tmp_path_factory.mktemp("architectures"))
        for kind, make in MAKERS.items():
            if kind not in ("hpsv3", "geneval"):
                make(folder)
    return folder


@pytest.fixture(scope="session")
def narrow_hpsv3(tmp_path_factory) -> dict[str, str]:
    """The settings that name HPSv3's narrow model and its guide."""
    folder = tmp_path_factory.mktemp("hpsv3")
    make_hpsv3(folder)
    return hpsv3_settings(folder / HPSV3_FOLDER)


def hpsv3_settings(folder: Path) -> dict[str, str]:
    """The settings that name a folder of `make_hpsv3`."""
    return {"hpsv3_path": str(folder), "hpsv3_guide_path": str(folder / "rating_guide.txt")}


@pytest.fixture(scope="session")
def narrow_geneval(tmp_path_factory) -> dict[str, str]:
    """The settings that name GenEval's narrow detector and CLIP."""
    folder = tmp_path_factory.mktemp("geneval")
    make_geneval(folder)
    clip = folder / "image_reward_ckpt/ViT-L-14.pt"
    return {"geneval_detector_path": str(folder / DETECTOR_FOLDER), "geneval_clip_path": str(clip)}


@pytest.fixture
def narrow_rewards(all_narrow_files, tmp_path_factory, monkeypatch) -> Path:
    """A folder with the narrow checkpoints of all models, and the packages set up for them."""
    narrow_architectures(monkeypatch, tmp_path_factory.mktemp("architectures"))
    return all_narrow_files

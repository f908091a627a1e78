"""The real reward models on random-weight files: batched scores equal the upstream packages' single-image scores."""

import gzip
import io
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from reward_checkpoints import (
    PROMPTS,
    make_clip_score_folder,
    make_hps_file,
    make_image_reward_files,
    make_open_clip_config,
    make_pick_score_folder,
    pictures,
    use_small_blip,
)

TOLERANCE = dict(rtol=0, atol=1e-5)


def check_order_and_batch_size(model, expected):
    """Neither changes a score; `expected` are the scores of pictures() in one batch."""
    images = pictures()
    order = [3, 1, 4, 0, 2]
    mixed = model([images[i] for i in order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(mixed, np.asarray(expected)[order], **TOLERANCE)
    model.batch_size = 2
    np.testing.assert_allclose(model(images, PROMPTS), expected, **TOLERANCE)
    assert np.std(expected) > 1e-4  # random weights, yet not a constant
    assert len(model([], [])) == 0


@pytest.fixture(scope="module")
def image_reward_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward_ckpt")
    with pytest.MonkeyPatch.context() as patch:
        use_small_blip(patch)
        make_image_reward_files(folder)
        yield folder


def upstream_scorer(monkeypatch, folder, name):
    import clip
    from ImageReward import utils

    monkeypatch.setattr(utils, "ImageReward_download", lambda url, root: str(folder / url.rsplit("/", 1)[1]))
    # random weights don't have the SHA-256 that clip asks for
    monkeypatch.setattr(clip.clip, "_download", lambda url, root: str(folder / url.rsplit("/", 1)[1]))
    return utils.load_score(name, device="cpu", download_root=str(folder))


@pytest.mark.parametrize("component,upstream", [("blip", "BLIP"), ("clip", "CLIP"), ("aesthetic", "Aesthetic")])
def test_granular_components_equal_the_image_reward_package(
    image_reward_dir, monkeypatch, tmp_path, component, upstream
):
    from fastvideo.models.reward_model.image_reward import ImageRewardModel

    model = ImageRewardModel(med_config=str(image_reward_dir / "med_config.json"), score_dir=str(image_reward_dir))
    scorer = upstream_scorer(monkeypatch, image_reward_dir, upstream)
    images = [image.convert("RGB") for image in pictures()]
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        image.save(tmp_path / "image.png")
        with torch.no_grad():
            expected.append(scorer.score(prompt, str(tmp_path / "image.png")))
    np.testing.assert_allclose(model.score_components(images, PROMPTS)[component], expected, **TOLERANCE)


def test_granular_reward_is_the_weighted_sum_and_loads_one_clip(image_reward_dir):
    from fastvideo.models.reward_model.image_reward import ImageRewardModel
    from fastvideo.models.reward_model.utils import compute_reward

    model = ImageRewardModel(score_dir=str(image_reward_dir))
    rewards, successes, scores, _ = compute_reward(
        pictures(), PROMPTS, {model.name: model}, {model.name: 1.0}, curr_step=150, total_steps=300
    )
    parts = [scores[f"ImageRewardModel_{c}"] for c in ("blip", "clip", "aesthetic")]
    np.testing.assert_allclose(rewards, 0.35 * parts[0] + 0.4 * parts[1] + 0.25 * parts[2], rtol=1e-12)
    assert successes.all()
    modules = [v for v in vars(model).values() if isinstance(v, torch.nn.Module)]
    assert len(modules) == 3  # BLIP, one CLIP for two scorers, the aesthetic head; no ImageReward
    check_order_and_batch_size(model, model(pictures(), PROMPTS))


def test_overall_mode_equals_the_image_reward_package(image_reward_dir):
    from fastvideo.models.reward_model.image_reward import ImageRewardModel

    from ImageReward.utils import load

    files = str(image_reward_dir / "ImageReward.pt"), str(image_reward_dir / "med_config.json")
    model = ImageRewardModel(files[0], med_config=files[1], mode="overall", score_dir=str(image_reward_dir))
    upstream = load(files[0], device="cpu", med_config=files[1])
    images = [image.convert("RGB") for image in pictures()]
    with torch.no_grad():
        expected = [upstream.score(prompt, image) for image, prompt in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(model(images, PROMPTS), expected, **TOLERANCE)
    check_order_and_batch_size(model, expected)
    assert model.component_weights(3, 10, 2).keys() == {"ImageRewardModel"}
    assert not hasattr(model, "clip")


def test_a_wrong_image_reward_file_is_named(image_reward_dir, tmp_path):
    from fastvideo.models.reward_model.image_reward import ImageRewardModel

    with pytest.raises(ValueError, match="--image_reward_score_dir .*: no model_large.pth"):
        ImageRewardModel(score_dir=str(tmp_path))
    aesthetic = image_reward_dir / "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    med_config = str(image_reward_dir / "med_config.json")
    with pytest.raises(ValueError, match="--image_reward_path .* is missing"):
        ImageRewardModel(str(aesthetic), med_config=med_config, mode="overall", score_dir=str(image_reward_dir))


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    open_clip.add_model_config(make_open_clip_config(folder, "tiny-open-clip"))
    return folder


def import_hpsv2(monkeypatch):
    """hpsv2's wheel lacks its tokenizer's vocabulary (open_clip has the same) and imports turtle, so tkinter."""
    import open_clip

    vocabulary = open_clip.tokenizer.default_bpe()
    real_open = gzip.open
    monkeypatch.setattr(gzip, "open", lambda path, *a: real_open(vocabulary if "hpsv2" in str(path) else path, *a))
    turtle = ModuleType("turtle")
    turtle.forward = None
    monkeypatch.setitem(sys.modules, "turtle", turtle)
    import hpsv2.img_score

    return hpsv2


def test_hps_equals_the_hpsv2_package(tiny_open_clip, monkeypatch, tmp_path):
    from fastvideo.models.reward_model.hps_score import HPSClipRewardModel, hps_preprocess

    checkpoint = tmp_path / "HPS_v2.1_compressed.pt"
    make_hps_file(checkpoint, "tiny-open-clip")
    model = HPSClipRewardModel(str(checkpoint), architecture="tiny-open-clip")

    hpsv2 = import_hpsv2(monkeypatch)
    import hpsv2.src.open_clip as upstream_clip

    upstream_clip.add_model_config(tiny_open_clip / "tiny-open-clip.json")
    upstream, _, preprocess = upstream_clip.create_model_and_transforms(
        "tiny-open-clip", light_augmentation=True, output_dict=True
    )
    monkeypatch.setattr(hpsv2.img_score, "model_dict", {"model": upstream, "preprocess_val": preprocess})
    images = [image.convert("RGB") for image in pictures()]
    for image in images:
        torch.testing.assert_close(hps_preprocess(image), preprocess(image), rtol=0, atol=1e-6)
    expected = [
        hpsv2.img_score.score(image, prompt, cp=str(checkpoint))[0]
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    np.testing.assert_allclose(model(images, PROMPTS), expected, **TOLERANCE)
    check_order_and_batch_size(model, expected)


def test_hps_refuses_other_files(tiny_open_clip, tmp_path):
    from fastvideo.models.reward_model.hps_score import HPSClipRewardModel

    with pytest.raises(ValueError, match="--hps_path .*: no such file"):
        HPSClipRewardModel(str(tmp_path / "nothing.pt"), architecture="tiny-open-clip")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="--hps_path .*page.pt: not a readable checkpoint"):
        HPSClipRewardModel(str(tmp_path / "page.pt"), architecture="tiny-open-clip")
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"--hps_path .*part.pt: wrong checkpoint .* is missing \(and \d+ more\)"):
        HPSClipRewardModel(str(tmp_path / "part.pt"), architecture="tiny-open-clip")


@pytest.mark.parametrize("kind", ["granular", "overall", "hps", "clip_score", "pick_score"])
def test_half_precision_scores_are_close(kind, tiny_open_clip, image_reward_dir, tmp_path):
    from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel
    from fastvideo.models.reward_model.hps_score import HPSClipRewardModel
    from fastvideo.models.reward_model.image_reward import ImageRewardModel
    from fastvideo.models.reward_model.pick_score import PickScoreRewardModel

    def build(dtype):
        if kind == "hps":
            return HPSClipRewardModel(str(tmp_path / "hps.pt"), dtype=dtype, architecture="tiny-open-clip")
        if kind == "clip_score":
            return CLIPScoreRewardModel(str(tmp_path / "clip"), dtype=dtype)
        if kind == "pick_score":
            return PickScoreRewardModel(str(tmp_path / "pick"), evaluation=True, dtype=dtype)
        path = str(image_reward_dir / "ImageReward.pt")
        return ImageRewardModel(path, mode=kind, score_dir=str(image_reward_dir), dtype=dtype)

    make_hps_file(tmp_path / "hps.pt", "tiny-open-clip")
    make_clip_score_folder(tmp_path / "clip", "tiny-open-clip")
    make_pick_score_folder(tmp_path / "pick")
    half = build("bf16")(pictures(), PROMPTS)
    np.testing.assert_allclose(half, build("fp32")(pictures(), PROMPTS), rtol=0, atol=0.03)


def test_an_unknown_number_format_is_refused(image_reward_dir):
    from fastvideo.models.reward_model.image_reward import ImageRewardModel

    with pytest.raises(ValueError, match="--reward_dtype 'int8': choose from fp32, bf16, fp16"):
        ImageRewardModel(score_dir=str(image_reward_dir), dtype="int8")


def test_clip_score_equals_open_clip_with_the_repository_s_own_preprocessing(tiny_open_clip, tmp_path):
    from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel

    import open_clip

    folder = tmp_path / "DFN5B-CLIP-ViT-H-14-384"
    make_clip_score_folder(folder, "tiny-open-clip")
    model = CLIPScoreRewardModel(str(folder))
    upstream, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-open-clip",
        pretrained=str(folder / "open_clip_pytorch_model.bin"),
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.2, 0.3, 0.2),
        image_resize_mode="squash",
    )
    tokenizer = open_clip.get_tokenizer("tiny-open-clip")
    images, expected = [image.convert("RGB") for image in pictures()], []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            seen = upstream.encode_image(preprocess(image)[None], normalize=True)
            expected.append((seen @ upstream.encode_text(tokenizer([prompt]), normalize=True).T).item())
    np.testing.assert_allclose(model(images, PROMPTS), expected, **TOLERANCE)
    check_order_and_batch_size(model, expected)
    weights = str(folder / "open_clip_pytorch_model.bin")
    np.testing.assert_allclose(CLIPScoreRewardModel(weights)(images, PROMPTS), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="--clip_score_path nowhere.bin: no such file"):
        CLIPScoreRewardModel("nowhere.bin")


def test_pick_score_equals_its_model_card(tmp_path):
    from fastvideo.models.reward_model.pick_score import PickScoreRewardModel

    from transformers import AutoModel, AutoProcessor

    make_pick_score_folder(tmp_path / "PickScore_v1")
    path = str(tmp_path / "PickScore_v1")
    processor, upstream = AutoProcessor.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    images, expected = [image.convert("RGB") for image in pictures()], []
    with torch.no_grad():
        for image, prompt in zip(images, PROMPTS, strict=True):
            text = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            output = upstream(**processor(images=image, return_tensors="pt"), **text)
            expected.append((upstream.logit_scale.exp() * (output.image_embeds @ output.text_embeds.T)).item())
    expected = np.array(expected)
    model = PickScoreRewardModel(path)
    np.testing.assert_allclose(model(images, PROMPTS), (expected - 18) / 8, rtol=0, atol=1e-4)
    evaluation = PickScoreRewardModel(path, evaluation=True)
    np.testing.assert_allclose(evaluation(images, PROMPTS), expected / 100, **TOLERANCE)
    check_order_and_batch_size(evaluation, evaluation(images, PROMPTS))


def test_proxies_last_for_the_download_only(monkeypatch):
    import os

    from fastvideo.models.reward_model.common import proxies

    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with proxies("http://mine:2", None):
        assert os.environ["HTTP_PROXY"] == "http://mine:2" and os.environ["HTTPS_PROXY"] == "http://other:1"
    assert "HTTP_PROXY" not in os.environ and os.environ["HTTPS_PROXY"] == "http://other:1"


def test_a_model_file_runs_by_itself(tmp_path, capsys):
    import runpy
    from pathlib import Path

    make_pick_score_folder(tmp_path / "PickScore_v1")
    picture = tmp_path / "picture.png"
    pictures()[0].save(picture)
    script = Path(__file__).parents[1] / "fastvideo/models/reward_model/pick_score.py"
    arguments = ["--device", "cpu", "--model_path", str(tmp_path / "PickScore_v1"), "--image", str(picture)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments, "--prompt", "a cat"])
        runpy.run_path(str(script), run_name="__main__")
    assert f"{picture}: PickScoreRewardModel " in capsys.readouterr().out


def test_the_demo_picture_is_there():
    from fastvideo.models.reward_model.common import DEMO_IMAGE

    assert Image.open(io.BytesIO(DEMO_IMAGE.read_bytes())).size == (512, 512)

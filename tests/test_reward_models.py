"""The real reward models on random-weight files: batched scores equal the upstream packages' single-image scores.

The comparisons run at a quarter of the width, and with `scripts/test.sh --long` at full architecture.
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from fastvideo import train_grpo_flux
from fastvideo.cli import FlagError
from fastvideo.models.reward_model import image_reward_compat
from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel
from fastvideo.models.reward_model.hps_score import HPSClipRewardModel, hps_preprocess
from fastvideo.models.reward_model.image_reward import COMPONENTS, ImageRewardModel
from fastvideo.models.reward_model.pick_score import PickScoreRewardModel
from fastvideo.models.reward_model.spec import RewardSpecConfig
from fastvideo.models.reward_model.utils import build_reward_models

import numpy as np
import pytest
import torch
from conftest import TIME_LIMIT
from PIL import Image
from reward_checkpoints import (
    CLIP_SCORE_ARCHITECTURE,
    CLIP_SCORE_FOLDER,
    HPS_FILE,
    MAKERS,
    PICK_SCORE_FOLDER,
    PROMPTS,
    narrow,
    pictures,
)
from reward_servers import QuietHandler
from safetensors.torch import load_file, save_file

TOLERANCE = dict(rtol=0, atol=1e-5)
RGB = [image.convert("RGB") for image in pictures()]


# One after the other: a test in full size takes 13 GB.
FULL = pytest.param("full", marks=[pytest.mark.long, pytest.mark.xdist_group("full size")])


@pytest.fixture(params=["narrow", FULL])
def make(request, tmp_path):
    """make(kind) -> a folder with the kind's files, narrow or with the full architecture."""
    if request.param == "narrow":
        folder = request.getfixturevalue("narrow_rewards")
        yield lambda kind: folder
    else:

        def make_full(kind):
            MAKERS[kind](tmp_path, full=True)
            return tmp_path

        yield make_full
        shutil.rmtree(tmp_path)  # gigabytes


def check_scores(model, expected, scores=None):
    """Asserts that batched scores equal `expected` for any order and batch size."""
    expected = np.asarray(expected)
    images = pictures()
    found = np.asarray(model(images, PROMPTS)) if scores is None else scores
    parameters = sum(p.numel() for m in vars(model).values() if isinstance(m, torch.nn.Module) for p in m.parameters())
    print(
        f"{type(model).__name__}, {parameters / 1e6:.0f} M parameters: {len(found)} scores, "
        f"standard deviation {expected.std():.4f}, largest difference {np.abs(found - expected).max():.1e}"
    )
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    assert np.std(expected) > 1e-4  # random weights don't give a constant
    if scores is not None or parameters > 1e8:  # order and batches are checked on the narrow models, 50 times faster
        return
    order = [3, 1, 6, 4, 0, 5, 2]
    mixed = model([images[i] for i in order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(mixed, expected[order], **TOLERANCE)
    for model.batch_size in (1, 2):
        np.testing.assert_allclose(model(images, PROMPTS), expected, **TOLERANCE)
    assert len(model([], [])) == 0


def build(kind, folder, dtype="fp32"):
    """A model that reads the files of `make`."""
    if kind == "hps":
        return HPSClipRewardModel(str(folder / "hps_ckpt" / HPS_FILE), dtype=dtype)
    if kind == "clip_score":
        return CLIPScoreRewardModel(str(folder / CLIP_SCORE_FOLDER), dtype=dtype)
    if kind == "pick_score":
        return PickScoreRewardModel(str(folder / PICK_SCORE_FOLDER), evaluation=True, dtype=dtype)
    mode = "granular" if kind == "granular" else "overall"
    return ImageRewardModel(mode=mode, score_dir=str(folder / "image_reward_ckpt"), dtype=dtype)


def upstream_scorer(monkeypatch, folder, name):
    import clip
    from ImageReward import utils

    monkeypatch.setattr(utils, "ImageReward_download", lambda url, root: str(folder / url.rsplit("/", 1)[1]))
    # random weights don't have the SHA-256 that clip asks for
    monkeypatch.setattr(clip.clip, "_download", lambda url, root: str(folder / url.rsplit("/", 1)[1]))
    return utils.load_score(name, device="cpu", download_root=str(folder))


def test_granular_components_equal_the_image_reward_package(make, monkeypatch, tmp_path):
    folder = make("granular")
    model = build("granular", folder)
    scores = model.score_components(pictures(), PROMPTS)
    for component, upstream in zip(COMPONENTS, ("BLIP", "CLIP", "Aesthetic"), strict=True):
        scorer = upstream_scorer(monkeypatch, folder / "image_reward_ckpt", upstream)
        expected = []
        for image, prompt in zip(RGB, PROMPTS, strict=True):
            image.save(tmp_path / "image.bmp")
            with torch.no_grad():
                expected.append(scorer.score(prompt, str(tmp_path / "image.bmp")))
        print(component, end=" of ")
        check_scores(model, expected, scores[component])
    check_scores(model, model(pictures(), PROMPTS))


def test_granular_reward_is_the_weighted_sum_and_loads_one_clip(narrow_rewards):
    from fastvideo.models.reward_model.utils import compute_reward

    model = build("granular", narrow_rewards)
    rewards, successes, scores, _ = compute_reward(
        pictures(), PROMPTS, {model.name: model}, {model.name: 1.0}, curr_step=150, total_steps=300
    )
    parts = [scores[f"ImageRewardModel_{c}"] for c in COMPONENTS]
    np.testing.assert_allclose(rewards, 0.35 * parts[0] + 0.4 * parts[1] + 0.25 * parts[2], rtol=1e-12)
    assert successes.all()
    modules = [v for v in vars(model).values() if isinstance(v, torch.nn.Module)]
    assert len(modules) == 3  # BLIP, one CLIP for two scorers, the aesthetic head; no ImageReward


def test_components_rank_pictures_as_the_scorers_of_the_package_do(narrow_rewards, monkeypatch, tmp_path):
    model, images = build("granular", narrow_rewards), RGB[:4]
    files = [str(tmp_path / f"{i}.png") for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    scorers = [("BLIP", model.blip_rm), ("CLIP", model.clip_rm), ("Aesthetic", model.aesthtic_rm)]
    for name, scorer in scorers:
        package = upstream_scorer(monkeypatch, narrow_rewards / "image_reward_ckpt", name)
        with torch.no_grad():
            ranks, expected = package.inference_rank("a cat", files)
        for given in (images, files):
            found = scorer.inference_rank("a cat", given)
            assert found[0] == ranks and type(found[1]) is list
            np.testing.assert_allclose(found[1], expected, **TOLERANCE)
        assert scorer.inference_rank("a cat", images[2:3]) == ([1], pytest.approx(expected[2:3], abs=1e-5))
    assert ImageRewardModel.aesthetic_rm is ImageRewardModel.aesthtic_rm


def test_a_script_in_the_words_of_the_fork_s_readme_runs(narrow_rewards, monkeypatch):
    from fastvideo.models.reward_model.utils import compute_reward

    monkeypatch.chdir(narrow_rewards)
    checkpoint, config = "./image_reward_ckpt/ImageReward.pt", "./image_reward_ckpt/med_config.json"
    model = ImageRewardModel(checkpoint, "cpu", None, None, config, [0.5, 0.3, 0.2], [0.2, 0.5, 0.3])
    assert (model.model_name, model.device, model.med_config) == (checkpoint, "cpu", config)
    blip_weight, clip_weight, aesthetic_weight = model.get_dynamic_weights(3, 10, smooth_func=model._exponential_smooth)
    assert [blip_weight, clip_weight, aesthetic_weight] == pytest.approx([0.473, 0.318, 0.209])
    blip_weight, clip_weight, aesthetic_weight = model.get_dynamic_weights(curr_step=3, total_steps=10)
    images, expected = RGB[:3], []
    for image, text in zip(images, PROMPTS[:3], strict=True):
        _, reward_blip = model.blip_rm.inference_rank(text, [image])
        _, reward_clip = model.clip_rm.inference_rank(text, [image])
        _, reward_aes = model.aesthtic_rm.inference_rank(text, [image])
        expected.append(blip_weight * reward_blip[0] + clip_weight * reward_clip[0] + aesthetic_weight * reward_aes[0])
    np.testing.assert_allclose(model(images, texts=PROMPTS[:3], curr_step=3, total_steps=10), expected, **TOLERANCE)
    rewards, successes, rewards_dict, successes_dict = compute_reward(
        images, PROMPTS[:3], [model], {"ImageRewardModel": 1.0}, curr_step=3, total_steps=10
    )
    np.testing.assert_allclose(rewards, expected, **TOLERANCE)
    assert successes.all() and "ImageRewardModel" in rewards_dict and successes_dict["ImageRewardModel"].all()


def test_build_reward_model_loads_again_what_the_mode_needs(narrow_rewards):
    for mode, parts in [("granular", {"blip", "clip", "aesthetic"}), ("overall", {"blip", "head"})]:
        folder = str(narrow_rewards / "image_reward_ckpt")
        model = ImageRewardModel(None, "cpu", mode=mode, score_dir=folder)
        assert model.model_name == "ImageReward-v1.0" and model.med_config is None
        expected = model(RGB[:2], PROMPTS[:2])
        with torch.no_grad():
            model.blip.visual_encoder.pos_embed.zero_()
        assert model(RGB[:2], PROMPTS[:2]) != pytest.approx(expected)
        assert model.build_reward_model() is None
        assert model(RGB[:2], PROMPTS[:2]) == pytest.approx(expected)
        assert {name for name, part in vars(model).items() if isinstance(part, torch.nn.Module)} == parts
    with pytest.raises(ValueError, match="components in mode"):
        model.blip_rm.inference_rank("a cat", RGB)
    assert model.get_dynamic_weights(1, 10) == []


@pytest.mark.parametrize("kind", list(MAKERS))
def test_one_text_is_the_prompt_of_all_pictures(kind, narrow_rewards):
    model = build(kind, narrow_rewards)
    np.testing.assert_allclose(model(RGB[:3], "cat"), model(RGB[:3], ["cat"] * 3), **TOLERANCE)
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        model(RGB[:3], ["cat"] * 2)


def test_image_reward_takes_its_prompts_as_prompts_or_texts(narrow_rewards):
    model, one = build("granular", narrow_rewards), RGB[:1]
    assert model(one, texts="cat") == model(one, prompts="cat") == model(one, ["cat"])
    for given in ({}, {"prompts": "cat", "texts": "cat"}):
        with pytest.raises(TypeError, match="give either prompts or texts"):
            model(one, **given)


def test_overall_mode_equals_the_image_reward_package(make):
    folder = make("image_reward")
    model = build("image_reward", folder)
    from ImageReward.utils import load

    folder = folder / "image_reward_ckpt"
    upstream = load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
    with torch.no_grad():
        expected = [upstream.score(prompt, image) for image, prompt in zip(RGB, PROMPTS, strict=True)]
    check_scores(model, expected)
    assert model.component_weights(3, 10, 2).keys() == {"ImageRewardModel"}
    assert not hasattr(model, "clip")


def test_a_wrong_image_reward_file_is_named(narrow_rewards, tmp_path):
    folder = narrow_rewards / "image_reward_ckpt"
    with pytest.raises(ValueError, match="image_reward_score_dir .*model_large.pth: no such file; BLIP"):
        ImageRewardModel(score_dir=str(tmp_path))
    aesthetic = folder / "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    with pytest.raises(ValueError, match="image_reward_path .* is missing"):
        ImageRewardModel(str(aesthetic), mode="overall", score_dir=str(folder))


def import_hpsv2(monkeypatch):
    """hpsv2. Its wheel lacks the tokenizer's vocabulary (open_clip has the file), and imports turtle, hence tkinter."""
    import open_clip

    vocabulary = open_clip.tokenizer.default_bpe()
    real_open = gzip.open
    monkeypatch.setattr(gzip, "open", lambda path, *a: real_open(vocabulary if "hpsv2" in str(path) else path, *a))
    turtle = ModuleType("turtle")
    turtle.forward = None
    monkeypatch.setitem(sys.modules, "turtle", turtle)
    import hpsv2.img_score

    return hpsv2


def test_hps_equals_the_hpsv2_package(make, monkeypatch, request):
    folder = make("hps")
    model = build("hps", folder)
    hpsv2 = import_hpsv2(monkeypatch)
    import hpsv2.src.open_clip as upstream_clip

    if request.node.callspec.params["make"] == "narrow":
        configs = upstream_clip.factory._MODEL_CONFIGS
        monkeypatch.setitem(configs, "ViT-H-14", narrow(configs["ViT-H-14"]))
    upstream, _, preprocess = upstream_clip.create_model_and_transforms(
        "ViT-H-14", light_augmentation=True, output_dict=True
    )
    monkeypatch.setattr(hpsv2.img_score, "model_dict", {"model": upstream, "preprocess_val": preprocess})
    for image in RGB:
        torch.testing.assert_close(hps_preprocess(image), preprocess(image), rtol=0, atol=1e-6)
    checkpoint = str(folder / "hps_ckpt" / HPS_FILE)
    expected = [
        hpsv2.img_score.score(image, prompt, cp=checkpoint)[0] for image, prompt in zip(RGB, PROMPTS, strict=True)
    ]
    check_scores(model, expected)


def test_hps_pads_a_picture_that_needs_no_resizing():
    picture = Image.new("RGB", (90, 224), "red")
    square = Image.new("RGB", (224, 224))
    square.paste(picture, (67, 0))
    torch.testing.assert_close(hps_preprocess(picture), hps_preprocess(square))


def test_hps_refuses_other_files(narrow_rewards, tmp_path):
    with pytest.raises(ValueError, match="hps_path .*: no such file"):
        HPSClipRewardModel(str(tmp_path / "nothing.pt"))
    (tmp_path / "page.pt").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="hps_path .*page.pt: not a readable checkpoint"):
        HPSClipRewardModel(str(tmp_path / "page.pt"))
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"hps_path .*part.pt: wrong checkpoint .* is missing \(and \d+ more\)"):
        HPSClipRewardModel(str(tmp_path / "part.pt"))


DAMAGE = {
    "truncated": lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "NaN": lambda path, state: store(path, {k: v * torch.nan if v.ndim > 1 else v for k, v in state.items()}),
    "a prefix": lambda path, state: store(path, {f"module.{k}": v for k, v in state.items()}),
    "another width": lambda path, state: store(path, {k: v[..., :3] if v.ndim > 1 else v for k, v in state.items()}),
    "no tensors": lambda path, state: store(path, {k: "x" for k in state}),
    "code": lambda path, state: torch.save({k: Path(k) for k in state}, path),
}


def store(path: Path, state: dict) -> None:
    if path.suffix == ".safetensors":
        if all(isinstance(value, torch.Tensor) for value in state.values()):
            save_file({k: v.contiguous() for k, v in state.items()}, path, {"format": "pt"})
        else:
            path.write_text(json.dumps(state))
    else:
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["hps", "clip_score", "pick_score", "granular", "overall"])
def test_damaged_weights_of_a_reward_are_one_line_not_random_numbers(kind, narrow_rewards, tmp_path):
    file = {
        "hps": f"hps_ckpt/{HPS_FILE}",
        "clip_score": f"{CLIP_SCORE_FOLDER}/open_clip_pytorch_model.bin",
        "pick_score": f"{PICK_SCORE_FOLDER}/model.safetensors",
        "granular": "image_reward_ckpt/model_large.pth",
        "overall": "image_reward_ckpt/ImageReward.pt",
    }[kind]
    for damage, apply in DAMAGE.items():
        folder = tmp_path / damage
        shutil.copytree((narrow_rewards / file).parent, folder / Path(file).parent)
        path = folder / file
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        apply(path, state.get("state_dict", state.get("model", state)))
        with pytest.raises(FlagError) as refusal:
            build(kind, folder)
        assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value), damage
        assert len(str(refusal.value)) < 500 + len(str(path)), refusal.value
        shutil.rmtree(folder)


def test_the_file_of_hps_2_0_loads_under_its_name(narrow_rewards, tmp_path):
    older = tmp_path / "HPS_v2_compressed.pt"
    older.symlink_to(narrow_rewards / "hps_ckpt" / HPS_FILE)
    models, _ = build_reward_models(RewardSpecConfig(reward_model="hpsv2", hps_path=str(older)), "cpu")
    (model,) = models.values()
    np.testing.assert_allclose(model(RGB[:2], PROMPTS[:2]), build("hps", narrow_rewards)(RGB[:2], PROMPTS[:2]))


def test_what_transformers_still_has_for_image_reward_is_left_alone(monkeypatch):
    from transformers import modeling_utils

    names = ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices")
    for name in names:
        monkeypatch.setattr(modeling_utils, name, "its own", raising=False)
    bert = type("Bert", (), dict.fromkeys(methods := ("get_head_mask", "invert_attention_mask"), "its own"))
    image_reward_compat._add_missing_imports()
    image_reward_compat._add_missing_methods(bert)
    assert {getattr(modeling_utils, name) for name in names} | {getattr(bert, name) for name in methods} == {"its own"}
    assert bert.all_tied_weights_keys == {}  # the class lacked it


@pytest.mark.parametrize("kind", list(MAKERS))
def test_half_precision_scores_are_close(kind, narrow_rewards):
    half = build(kind, narrow_rewards, "bf16")(pictures(), PROMPTS)
    np.testing.assert_allclose(half, build(kind, narrow_rewards)(pictures(), PROMPTS), rtol=0, atol=0.03)


def test_an_unknown_number_format_is_refused(narrow_rewards):
    with pytest.raises(ValueError, match="reward_dtype 'int8': choose from fp32, bf16, fp16"):
        build("granular", narrow_rewards, "int8")


def test_clip_score_equals_open_clip_with_the_repository_s_own_preprocessing(make):
    import open_clip

    folder = make("clip_score") / CLIP_SCORE_FOLDER
    weights = str(folder / "open_clip_pytorch_model.bin")
    model = build("clip_score", folder.parent)
    upstream, _, preprocess = open_clip.create_model_and_transforms(
        CLIP_SCORE_ARCHITECTURE,
        pretrained=weights,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.2, 0.3, 0.2),
        image_resize_mode="squash",
    )
    tokenizer = open_clip.get_tokenizer(CLIP_SCORE_ARCHITECTURE)
    expected = []
    with torch.no_grad():
        for image, prompt in zip(RGB, PROMPTS, strict=True):
            seen = upstream.eval().encode_image(preprocess(image)[None], normalize=True)
            expected.append((seen @ upstream.encode_text(tokenizer([prompt]), normalize=True).T).item())
    check_scores(model, expected)


def test_clip_score_takes_a_weight_file_and_names_a_missing_one(narrow_rewards):
    folder = narrow_rewards / CLIP_SCORE_FOLDER
    expected = CLIPScoreRewardModel(str(folder))(pictures(), PROMPTS)
    weights = str(folder / "open_clip_pytorch_model.bin")
    np.testing.assert_allclose(CLIPScoreRewardModel(weights)(pictures(), PROMPTS), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="clip_score_path nowhere.bin: no such file"):
        CLIPScoreRewardModel("nowhere.bin")


def test_pick_score_equals_its_model_card(make):
    from transformers import AutoModel, AutoProcessor

    path = str(make("pick_score") / PICK_SCORE_FOLDER)
    processor, upstream = AutoProcessor.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    expected = []
    with torch.no_grad():
        for image, prompt in zip(RGB, PROMPTS, strict=True):
            text = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
            output = upstream(**processor(images=image, return_tensors="pt"), **text)
            expected.append((upstream.logit_scale.exp() * (output.image_embeds @ output.text_embeds.T)).item())
    expected = np.array(expected)
    check_scores(PickScoreRewardModel(path, evaluation=True), expected / 100)
    check_scores(PickScoreRewardModel(path), (expected - 18) / 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings,message",
    [
        ("hpsv2 hps_path {}/a.pt", "no such file"),
        ("hpsv2 hps_path {}/half.pt", "not a readable checkpoint"),
        ("hpsv2 hps_path {}/other.pt", "wrong checkpoint"),
        ("clip_score clip_score_path {}", "none of open_clip_model.safetensors"),
        ("clip_score clip_score_path hf-hub:no/thing", ""),
        ("pick_score pick_score_path data/PickScore", "no such file"),
        ("pick_score pick_score_path a/b/c", "no such file"),
        ("pick_score pick_score_path no/thing", ""),
        ("image_reward image_reward_score_dir {}", "no such file"),
        (
            "image_reward image_reward_path {}/half.pt image_reward_mode overall image_reward_score_dir {good}",
            "not a readable checkpoint",
        ),
        ("image_reward image_reward_score_dir {} image_reward_mode overall", ""),
    ],
)
def test_a_missing_or_wrong_file_is_refused_with_flag_file_and_the_command_that_gets_it(
    settings, message, narrow_rewards, tmp_path, monkeypatch, flags, capsys
):
    monkeypatch.chdir(Path(__file__).parents[1])
    good = (narrow_rewards / "hps_ckpt" / HPS_FILE).read_bytes()
    (tmp_path / "half.pt").write_bytes(good[: len(good) // 2])
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "other.pt")
    reward, *given = settings.format(tmp_path, good=narrow_rewards / "image_reward_ckpt").split()
    argv = flags(reward_model=reward, **dict(zip(given[::2], given[1::2], strict=True)))
    with pytest.raises(SystemExit) as stop:
        train_grpo_flux.main(argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    part = {"hpsv2": "hps", "clip_score": "clip", "pick_score": "pick"}.get(reward, reward)
    (line, *_) = [line for line in lines if re.search(f"--{given[0]} {re.escape(given[1])}.*: .*{message}", line)]
    assert f"`bash scripts/huggingface/download_checkpoints.sh {part}`" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_damaged_clip_file_of_the_granular_reward_is_named(narrow_rewards, tmp_path):
    folder = tmp_path / "image_reward_ckpt"
    shutil.copytree(narrow_rewards / "image_reward_ckpt", folder)
    damaged = folder / "ViT-L-14.pt"
    damaged.write_bytes(damaged.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="image_reward_score_dir .*ViT-L-14.pt: not a readable CLIP checkpoint"):
        ImageRewardModel(score_dir=str(folder))


def test_pick_score_without_its_tokenizer_is_refused(narrow_rewards, tmp_path):
    """transformers would make an empty tokenizer, which gives all prompts the same tokens."""
    folder = tmp_path / PICK_SCORE_FOLDER
    shutil.copytree(
        narrow_rewards / PICK_SCORE_FOLDER, folder,
        ignore=shutil.ignore_patterns("tokenizer.json", "vocab.json", "merges.txt"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"pick_score_path {folder}: .*no vocabulary .*download_checkpoints.sh pick"):
        PickScoreRewardModel(str(folder))


@pytest.mark.parametrize("missing", ["med_config.json", "bert-base-uncased"])
def test_a_small_file_of_the_granular_reward_that_can_t_be_downloaded_is_named(missing, narrow_rewards, tmp_path):
    folder = tmp_path / "image_reward_ckpt"
    shutil.copytree(narrow_rewards / "image_reward_ckpt", folder, ignore=shutil.ignore_patterns(missing))
    with pytest.raises(ValueError, match=f"image_reward_score_dir .*{missing}.*download_checkpoints.sh image_reward"):
        ImageRewardModel(score_dir=str(folder))


def test_proxies_last_for_the_download_only(monkeypatch):
    import os

    from fastvideo.models.reward_model.loading import proxies

    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with proxies("http://mine:2", None):
        assert os.environ["HTTP_PROXY"] == "http://mine:2" and os.environ["HTTPS_PROXY"] == "http://other:1"
    assert "HTTP_PROXY" not in os.environ and os.environ["HTTPS_PROXY"] == "http://other:1"


THROUGH_PROXIES = """
import json, sys
from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel
from fastvideo.models.reward_model.image_reward import ImageRewardModel
from fastvideo.models.reward_model.pick_score import PickScoreRewardModel
first, second, third, folder = sys.argv[1:]
builds = {
    "clip": lambda: CLIPScoreRewardModel("hf-hub:no/thing", https_proxy=first),
    "pick": lambda: PickScoreRewardModel("no/thing", https_proxy=second),
    "image_reward": lambda: ImageRewardModel(mode="overall", score_dir=folder, https_proxy=third),
}
for name, build in builds.items():
    try:
        build()
    except ValueError as error:
        print(json.dumps([name, str(error)]), flush=True)
"""


class Proxy(QuietHandler):
    """Refuses every connection, and adds its target to the server's `asked`."""

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        self.send_error(403)


@pytest.mark.slow
def test_each_model_downloads_through_its_own_proxy_and_names_what_it_could_not_get(
    http_server, subprocess_environment, tmp_path
):
    proxies = [http_server(Proxy, asked=[]) for _ in range(3)]
    environment = {k: v for k, v in subprocess_environment.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_PROXIES, *(p.url for p in proxies), str(tmp_path / "folder")],
        env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=True,
    )  # fmt: skip
    errors = dict(json.loads(line) for line in done.stdout.splitlines())
    for name, flag in {
        "clip": "clip_score_path hf-hub:no/thing",
        "pick": "pick_score_path no/thing",
        "image_reward": f"image_reward_score_dir {tmp_path / 'folder' / 'ImageReward.pt'}",
    }.items():
        assert errors[name].startswith(f"{flag}: ") and "403" in errors[name]
        assert errors[name].endswith(f"`bash scripts/huggingface/download_checkpoints.sh {name}` gets it")
    assert [set(p.asked) for p in proxies] == [{"huggingface.co:443"}] * 3


DEMOS = {
    "hps_score": ("HPSClipRewardModel", ["--checkpoint", f"hps_ckpt/{HPS_FILE}"]),
    "clip_score": ("CLIPScoreRewardModel", ["--model_path", CLIP_SCORE_FOLDER]),
    "pick_score": ("PickScoreRewardModel", ["--model_path", PICK_SCORE_FOLDER]),
    "image_reward": ("ImageRewardModel_aesthetic", ["--score_dir", "image_reward_ckpt"]),
    "image_reward overall": ("ImageRewardModel", ["--score_dir", "image_reward_ckpt", "--mode", "overall"]),
}


def run_demo(monkeypatch, file, *arguments):
    import runpy

    script = Path(__file__).parents[1] / f"fastvideo/models/reward_model/{file}.py"
    proxies = ["--http_proxy", "http://proxy:1", "--https_proxy", "http://proxy:1"]
    monkeypatch.setattr(sys, "argv", [str(script), "--device", "cpu", *proxies, *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("demo", DEMOS)
def test_every_model_file_runs_by_itself(demo, narrow_rewards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(narrow_rewards)
    name, arguments = DEMOS[demo]
    pictures()[0].save(tmp_path / "a.png")
    run_demo(monkeypatch, demo.split()[0], *arguments)
    assert f"reward_demo.png: {name.split('_')[0]} " in capsys.readouterr().out
    run_demo(monkeypatch, demo.split()[0], *arguments, "--image", str(tmp_path / "a.png"), "--prompt", "a cat")
    assert f"a.png: {name.split('_')[0]} " in (out := capsys.readouterr().out) and f"{name} " in out


def test_unified_reward_runs_by_itself_and_through_its_proxy(chat_server, monkeypatch, capsys):
    proxy = chat_server(lambda content: (200, "Final Score: 3.5"))
    url = ["--url", "http://reward.invalid:8080", "--question_type", "score"]
    run_demo(monkeypatch, "unified_reward", *url, "--http_proxy", proxy.url, "--prompt", "a cat")
    assert "reward_demo.png: UnifiedRewardModel 3.5000" in capsys.readouterr().out
    assert proxy.requests[0][0] == "http://reward.invalid:8080/v1/chat/completions"  # proxies get the full URL
    with pytest.raises(SystemExit) as stop:
        run_demo(monkeypatch, "unified_reward", "--url", "reward.invalid")
    assert stop.value.code == 2
    assert "--unified_reward_url reward.invalid: must start with http" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_file_names_a_missing_checkpoint_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_demo(monkeypatch, "hps_score", "--checkpoint", "nowhere.pt")
    assert stop.value.code == 2
    assert "--hps_path nowhere.pt: no such file" in capsys.readouterr().err.splitlines()[-1]


def test_the_demo_picture_is_there():
    from fastvideo.models.reward_model.demo import DEMO_IMAGE

    assert Image.open(io.BytesIO(DEMO_IMAGE.read_bytes())).size == (512, 512)

import json
from pathlib import Path

from fastvideo.models.reward_model.shapes import ShapesRewardModel, all_scenes, color_and_shape_correct, parse_caption
from fastvideo.models.tiny_flux import CLIP_LENGTH, MAX_BYTES, T5_LENGTH, build_tiny_flux, main, sample

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

DATA = Path(__file__).parents[1] / "data"
SHIPPED = DATA / "tiny_flux"


@pytest.fixture(scope="module")
def shipped() -> FluxPipeline:
    return FluxPipeline.from_pretrained(SHIPPED, dtype=torch.float32)


def lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def test_the_shipped_pipeline_is_small_complete_and_stored_in_16_bit():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert not [file for file in files if file.suffix not in (".json", ".safetensors")]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        assert (SHIPPED / part).is_dir(), part
    for file in files:
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            header.pop("__metadata__", None)
            assert {entry["dtype"] for entry in header.values()} == {"F16"}, file
        else:
            assert '"_name_or_path"' not in file.read_text(), f"{file} names the machine it was made on"


def test_the_shipped_pipeline_has_fluxs_interfaces(shipped):
    assert shipped.transformer.config.guidance_embeds
    assert shipped.transformer.config.in_channels == 64
    assert shipped.vae.config.latent_channels == 16
    assert shipped.vae.config.scaling_factor != 1 and shipped.vae.config.shift_factor != 0
    assert shipped.tokenizer.model_max_length == CLIP_LENGTH
    assert shipped.tokenizer_2.model_max_length == T5_LENGTH


def test_shipped_samples_match_their_captions(shipped):
    captions = lines("prompts.txt")[:24]
    images = sample(shipped, captions, seed=5)
    # 17 of 24 is far below the measured share, and far above chance (1 in 144).
    assert color_and_shape_correct(images, captions).sum() >= 17
    scores = ShapesRewardModel([1, 1, 1], [1, 1, 1]).score_components(images, captions)
    assert scores["color"].mean() > 0.8 and scores["form"].mean() > 0.5


def test_other_captions_give_other_pictures_from_the_same_noise(shipped):
    caption = "a large red circle in the center on a white background"
    images = [np.asarray(sample(shipped, [c], seed=1)[0]) for c in (caption, caption, caption.replace("red", "blue"))]
    assert (images[0] == images[1]).all()
    assert abs(images[0].astype(int) - images[2]).max() > 60


def test_latents_have_unit_scale_after_the_configs_shift_and_scale(shipped):
    from fastvideo.models.tiny_flux import PictureBank

    bank = PictureBank(copies=1, seed=9)
    with torch.no_grad():
        posterior = shipped.vae.encode(bank.float_pixels(torch.arange(0, 1100, 5))).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(0))
    latents = (latents - shipped.vae.config.shift_factor) * shipped.vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


def test_every_caption_word_is_one_token_and_no_caption_is_cut(shipped):
    for scene in all_scenes(withheld=False) + all_scenes(withheld=True):
        caption = scene.caption()
        words = len(caption.split())
        t5_ids, clip_ids = shipped.tokenizer_2(caption).input_ids, shipped.tokenizer(caption).input_ids
        assert len(t5_ids) == words + 1 <= T5_LENGTH and shipped.tokenizer_2.unk_token_id not in t5_ids
        assert len(clip_ids) == words + 2 <= CLIP_LENGTH
    assert shipped.tokenizer("Zürich!").input_ids.count(shipped.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_untrained_pipelines_load_and_draw(tmp_path, guidance_embeds):
    build_tiny_flux(tmp_path, guidance_embeds=guidance_embeds, seed=3, single_layers=1)
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert pipe.transformer.config.guidance_embeds is guidance_embeds
    has_embedder = any("guidance_embedder" in name for name, _ in pipe.transformer.named_parameters())
    assert has_embedder is guidance_embeds
    images = sample(pipe, ["a small red circle at the top on a blue background", "an unknown zebra"], seed=0, steps=2)
    assert [image.size for image in images] == [(32, 32)] * 2


def test_the_seed_decides_the_random_weights(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny_flux(tmp_path / name, seed=seed, single_layers=1)
        weights.append((tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_training_through_the_command_line_saves_a_pipeline_that_can_be_measured(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--vae_steps", "2", "--steps", "2", "--check_every", "2", "--threads", str(threads)]
    main(["--output_dir", str(tmp_path / "pipe"), *arguments])
    assert "saved" in capsys.readouterr().out
    pipe = FluxPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.float32)
    assert pipe.vae.config.scaling_factor != 1


def test_measuring_a_missing_directory_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--evaluate", str(tmp_path / "nothing")])
    assert "no model_index.json" in capsys.readouterr().err


def test_training_prompts_belong_to_the_training_distribution():
    prompts = lines("prompts.txt")
    scenes = [parse_caption(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) == 200
    assert all(scene and not scene.withheld and scene.caption() == p for scene, p in zip(scenes, prompts, strict=True))


def test_test_prompts_are_new_and_many_of_them_withheld_combinations():
    prompts = lines("prompts_test.txt")
    scenes = [parse_caption(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) == 384 and not set(prompts) & set(lines("prompts.txt"))
    assert sum(scene.withheld for scene in scenes) == 144


def test_general_prompts_are_not_of_the_shapes_world():
    prompts = lines("prompts_general.txt")
    assert len(set(prompts)) == 40 and all(prompt.strip() for prompt in prompts)
    assert not any(parse_caption(prompt) for prompt in prompts)

"""The shipped pipeline, the script that makes it, and the prompt files of its world."""

import json
import re
from pathlib import Path

from fastvideo.data_preprocess.preprocess_flux_embedding import PreprocessConfig
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.flux2 import Flux2Klein
from fastvideo.models.reward_model.shapes import (
    COLORS,
    RELATIONS,
    SHAPES,
    ShapesRewardModel,
    all_scenes,
    draw,
    parse_caption,
)
from fastvideo.sample.sample_flux import SampleConfig

import make_tiny_flux
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import Flux2KleinPipeline, FluxPipeline
from make_tiny_flux import (
    CLIP_LENGTH,
    FAMILIES,
    MAX_BYTES,
    T5_LENGTH,
    PictureBank,
    build_tiny_flux,
    lying_captions,
    main,
    sample,
)
from PIL import Image
from tiny_flux2 import TinyFlux2

DATA = ROOT / "data"
SHIPPED = DATA / "tiny_flux"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shipped() -> FluxPipeline:
    return FluxPipeline.from_pretrained(SHIPPED, dtype=torch.float32)


def lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


# --- the shipped pipeline ---------------------------------------------------------------------------------------------


def test_the_shipped_pipeline_is_small_complete_and_stored_in_16_bit():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES == 6_000_000
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


def test_the_shipped_pipeline_draws_withheld_scenes_right_less_than_half_of_the_time(shipped):
    """Enough right scenes to learn from, and room to learn: promised are 30 to 45 %, allowed two standard errors."""
    captions = [scene.caption() for scene in all_scenes(withheld=True)]
    found = make_tiny_flux.check(sample(shipped, captions, seed=5), captions)
    right = found["right"].mean()
    error = np.sqrt(right * (1 - right) / len(captions))
    assert 0.30 - 2 * error <= right <= 0.45 + 2 * error
    # Pictures show valid objects. The mistakes are in colours, shapes and places, as in the false captions.
    assert found["clean"].mean() > 0.75 and found["binding"].mean() > 0.5 and found["form"].mean() > 0.5


def test_other_captions_give_other_pictures_from_the_same_noise(shipped):
    caption = "a red circle left of a blue square on a white background"
    now = [caption, caption, caption.replace("red", "green"), caption.replace("white", "black")]
    images = [np.asarray(sample(shipped, [c], seed=1)[0]).astype(int) for c in now]
    assert (images[0] == images[1]).all()
    assert all(abs(images[0] - other).max() > 60 for other in images[2:])


def test_latents_have_unit_scale_after_the_configs_shift_and_scale(shipped):
    bank = PictureBank(copies=1, seed=9, device=CPU)
    with torch.no_grad():
        posterior = shipped.vae.encode(bank.float_pixels(torch.arange(0, 1890, 9))).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(0))
    latents = (latents - shipped.vae.config.shift_factor) * shipped.vae.config.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


def test_drawings_survive_the_shipped_vae(shipped):
    """So mistakes in pictures come from the transformer, also in scenes that the VAE has never seen."""
    scenes = all_scenes(withheld=True)
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
    with torch.no_grad():
        redrawn = shipped.vae(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).sample
    images = [Image.fromarray(array) for array in make_tiny_flux._bytes(redrawn)]
    assert make_tiny_flux.check(images, [scene.caption() for scene in scenes])["right"].mean() > 0.95


def test_every_caption_word_is_one_token_and_no_caption_is_cut(shipped):
    for scene in all_scenes(withheld=False) + all_scenes(withheld=True):
        caption = scene.caption()
        words = len(caption.split())
        t5_ids, clip_ids = shipped.tokenizer_2(caption).input_ids, shipped.tokenizer(caption).input_ids
        assert len(t5_ids) == words + 1 <= T5_LENGTH and shipped.tokenizer_2.unk_token_id not in t5_ids
        assert len(clip_ids) == words + 2 <= CLIP_LENGTH
    assert shipped.tokenizer("Zürich!").input_ids.count(shipped.tokenizer.eos_token_id) == 1


# --- untrained pipelines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_untrained_pipelines_load_and_draw(tmp_path, guidance_embeds):
    build_tiny_flux(tmp_path, guidance_embeds=guidance_embeds, seed=3, single_layers=1)
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert pipe.transformer.config.guidance_embeds is guidance_embeds
    has_embedder = any("guidance_embedder" in name for name, _ in pipe.transformer.named_parameters())
    assert has_embedder is guidance_embeds
    images = sample(pipe, [all_scenes(withheld=False)[0].caption(), "an unknown zebra"], seed=0, steps=2)
    assert [image.size for image in images] == [(32, 32)] * 2


def test_the_seed_decides_the_random_weights(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny_flux(tmp_path / name, seed=seed, single_layers=1)
        weights.append((tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_pictures_show_training_scenes_only_each_with_jitter_of_its_own():
    bank = PictureBank(copies=2, seed=4, device=CPU)
    assert bank.scenes == all_scenes(withheld=False) and len(bank.pixels) == 2 * len(bank.scenes)
    captions = [scene.caption() for scene in bank.scenes] * 2
    images = [Image.fromarray(array) for array in bank.pixels.permute(0, 2, 3, 1).numpy()]
    assert make_tiny_flux.check(images[::3], captions[::3])["right"].mean() >= 0.97
    first, second = bank.pixels.chunk(2)
    assert (first != second).flatten(1).any(1).all()
    assert torch.equal(bank.pixels, PictureBank(copies=2, seed=4, device=CPU).pixels)
    pixels = bank.float_pixels(torch.tensor([0, 1]))
    assert pixels.shape == (2, 3, 32, 32) and -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1


def test_batches_show_every_picture_once_an_epoch():
    bank = PictureBank(copies=1, seed=4, device=CPU)
    batches = bank.batches(189, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(10)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(1890)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_lying_captions_are_of_training_and_never_true():
    scenes = all_scenes(withheld=False)
    lies = lying_captions(scenes)
    assert lies.shape == (len(scenes), 4)
    withheld = set(all_scenes(withheld=True))
    for scene, chosen in zip(scenes, lies.tolist(), strict=True):
        named = {scenes[n] for n in chosen}
        assert not named & {scene, scene.mirrored} and not named & withheld
        # The false captions are all possible mistakes of a scene, except withheld scenes.
        assert named == set(scene.mistakes().values()) - withheld


@pytest.fixture
def run(monkeypatch):
    """run(*arguments) is a fast main(): one picture per scene instead of eight, and 8 samples per measurement."""

    def few(pipe: FluxPipeline, captions: list[str], *rest, **given) -> list[Image.Image]:
        return (sample(pipe, captions[:8], *rest, **given) * len(captions))[: len(captions)]

    monkeypatch.setattr(make_tiny_flux, "PictureBank", lambda copies, seed, device: PictureBank(1, seed, device))
    monkeypatch.setattr(make_tiny_flux, "sample", few)
    return lambda *arguments: main([*map(str, arguments), "--threads", str(torch.get_num_threads()), "--device", "cpu"])


@pytest.mark.long
@pytest.mark.parametrize(("family", "pipeline"), [("flux1", FluxPipeline), ("flux2", Flux2KleinPipeline)])
def test_training_through_the_command_line_saves_a_pipeline_that_can_be_measured(
    run, tmp_path, capsys, family, pipeline
):
    small = "--vae_steps 2 --steps 2 --check_every 1 --seed 0".split()
    run("--family", family, "--output_dir", tmp_path, *small)
    captured = capsys.readouterr()
    assert f"saved {tmp_path}" in captured.out
    for step in (1, 2):
        assert f"step {step}: loss" in captured.out + captured.err
    pipe, untrained = pipeline.from_pretrained(tmp_path, dtype=torch.float32), FAMILIES[family].make(0)
    for name in ("transformer", "vae", *FAMILIES[family].text_encoders):
        before, after = (dict(getattr(p, name).named_parameters()) for p in (untrained, pipe))
        assert not all(torch.equal(after[key], before[key].half().float()) for key in after), name

    run("--evaluate", tmp_path, "--guidance_scale", 1)
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith(f"python scripts/make_tiny_flux.py --evaluate {tmp_path}")
    assert "MB on disk; guidance 1.0" in report[1] and len(report) == 3 + 2 * 5
    assert all("right in everything" in line for line in report[2:])


@pytest.mark.long
def test_the_same_flags_train_the_same_weights_and_lies_change_them(run, tmp_path):
    found = []
    for name, lies in (("a", ()), ("b", ()), ("none", ("--lies", 0))):
        run("--output_dir", tmp_path / name, "--vae_steps", 1, "--steps", 2, "--check_every", 2, *lies)
        weights = {path.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        assert len(weights) == 4
        found.append(weights)
    assert found[0] == found[1]
    assert all(weights["vae"] == found[0]["vae"] for weights in found)
    assert found[2]["transformer"] != found[0]["transformer"]


def test_the_tiny_flux_2_learns_and_its_training_calls_the_model_as_the_trainer_does(monkeypatch, tmp_path):
    family, bank, trained = TinyFlux2(), PictureBank(1, 0, CPU), Flux2Klein()
    bank.pixels = bank.pixels[:48]

    def few(pipe: Flux2KleinPipeline, captions: list[str], **given) -> list[Image.Image]:
        return sample(pipe, captions[:1], **given) * len(captions)

    monkeypatch.setattr(make_tiny_flux, "sample", few)
    pipe = family.make(seed=0)
    make_tiny_flux.train_vae(pipe, bank, 2, batch_size=8)
    mean, _ = make_tiny_flux.encode_bank(pipe.vae, bank)
    clean = family.pack(pipe.vae, mean)
    torch.testing.assert_close(trained.to_vae(pipe.vae, clean, 32, 32), mean)
    assert clean.mean((0, 1)).abs().max() < 0.5 and clean.std() < 1.1  # means alone spread less than samples
    make_tiny_flux.train_flow(pipe, bank, 10, tmp_path, check_every=10, batch_size=8, lr=3e-2)

    pipe = Flux2KleinPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    captions = [scene.caption() for scene in bank.scenes[: len(clean)]]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 0.9, len(clean))
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    with torch.no_grad():
        v = family.velocity(pipe, noisy, sigma, *family.tokens(pipe, captions))
        text, ids = (trained.encode_prompts(pipe, captions)[name] for name in trained.embeddings)
        given = Conditioning(text, None, ids, trained.image_ids(LatentShape.of(pipe.vae, 32, 32), CPU), 1.0)
        torch.testing.assert_close(trained.velocity(pipe.transformer, noisy, sigma, torch.arange(len(v)), given), v)
    target = noise - clean
    assert (v - target).square().mean() < 0.95 * target.square().mean()  # an untrained model's v is 0
    assert [image.size for image in sample(pipe, [captions[0], ""], seed=0, steps=2)] == [(32, 32)] * 2


def test_measuring_a_missing_directory_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--evaluate", str(tmp_path / "nothing")])
    assert "no model_index.json" in capsys.readouterr().err


# --- prompt files -----------------------------------------------------------------------------------------------------


def test_the_prompt_files_are_those_that_the_script_writes(tmp_path):
    main(["--prompts", str(tmp_path), "--threads", str(torch.get_num_threads())])
    names = ["tiny_prompts.txt", "tiny_prompts_test.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_training_prompts_are_training_scenes_with_all_words():
    prompts = lines("tiny_prompts.txt")
    scenes = [parse_caption(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) == 240
    assert all(scene and not scene.withheld and scene.caption() == p for scene, p in zip(scenes, prompts, strict=True))
    objects = {
        pair for scene in scenes for pair in ((scene.color, scene.shape), (scene.other_color, scene.other_shape))
    }
    assert objects == {(color, shape) for color in COLORS for shape in SHAPES}
    assert {scene.relation for scene in scenes} == set(RELATIONS)


def test_test_prompts_are_the_withheld_scenes_and_no_picture_of_training():
    prompts = lines("tiny_prompts_test.txt")
    scenes = [parse_caption(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts) == 270
    assert set(scenes) == set(all_scenes(withheld=True)) and scenes != all_scenes(withheld=True)  # in mixed order
    training = {parse_caption(prompt) for prompt in lines("tiny_prompts.txt")}
    assert not training & {*scenes, *(scene.mirrored for scene in scenes)}


def test_general_prompts_are_many_and_no_test_prompt_trains():
    train, test = lines("prompts.txt"), lines("prompts_test.txt")
    assert len(train) == 404 and len(test) == 100
    both = [" ".join(prompt.lower().split()) for prompt in (*train, *test)]
    assert len(set(both)) == len(both) and all(prompt == prompt.strip() != "" for prompt in (*train, *test))


@pytest.mark.parametrize(("name", "least"), [("prompts.txt", 80), ("prompts_test.txt", 40)])
def test_general_prompts_vary(name, least):
    """`least`: different first words. Kinds of pictures, counts, relations and texts in pictures are all there."""
    prompts = lines(name)
    lengths = [len(prompt.split()) for prompt in prompts]
    assert len({prompt.split()[0].lower() for prompt in prompts}) >= least
    assert min(lengths) <= 6 and max(lengths) >= 25 and len(set(lengths)) >= 15
    for words in (
        "photograph", "anime", "painting|watercolour|gouache", "concept art|illustration", "3D", "sketch|drawing",
        "two|three|five|seven", "beside|above|behind|between|left|right|under", "portrait|woman|man|children",
        "cat|fox|dog|bear", "red|blue|green", "night|dusk|dawn|sunrise", "tea|bread|noodle|ramen|bowl",
    ):  # fmt: skip
        assert any(re.search(rf"\b({words})\b", prompt) for prompt in prompts), words
    assert sum('"' in prompt for prompt in prompts) >= 3


def test_general_prompts_are_not_of_the_shapes_world():
    prompts = [*lines("prompts.txt"), *lines("prompts_test.txt")]
    assert not any(parse_caption(prompt) for prompt in prompts)
    blank = [Image.new("RGB", (32, 32))] * len(prompts)
    assert np.isnan(ShapesRewardModel([1, 1, 1], [1, 1, 1])(blank, prompts)).all()


def test_prompts_of_the_tiny_world_are_named_by_no_script_for_flux():
    """Checks every script and default. Scripts for the tiny model have `tiny` in their name."""
    named = []
    for folder, pattern in (("scripts", "*.sh"), ("scripts", "*.py"), ("fastvideo", "*.py")):
        for path in sorted(Path(ROOT / folder).rglob(pattern)):
            if "tiny_prompts" in path.read_text(encoding="utf-8"):
                named.append(str(path.relative_to(ROOT)))
    tiny = {"scripts/make_tiny_flux.py", "scripts/quickstart.sh", "scripts/finetune/finetune_tiny_flux.sh"}
    assert set(named) <= tiny
    training, sampling = PreprocessConfig(), SampleConfig(baseline=True)
    assert (training.prompt_dir, sampling.prompts_file) == ("data/prompts.txt", "data/prompts_test.txt")
    assert training.model_path == "data/flux"

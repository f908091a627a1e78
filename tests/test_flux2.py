"""FLUX.2 [klein], the second family: the same commands on its own classes, with guidance in two passes."""

import json
from pathlib import Path

from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.family_defaults import flux_2_shift
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.flux2 import Flux2Klein
from fastvideo.models.pretrained import decode_latents, load_transformer, load_vae
from fastvideo.models.speed import compile_transformer

import numpy as np
import pytest
import torch
from conftest import PROMPTS, same_weights
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from make_tiny_flux import build_tiny_flux2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RATIO = "ratio_mean"
GUIDANCE = 4.0


@pytest.fixture(scope="module")
def flux2(tmp_path_factory) -> str:
    """An untrained FLUX.2 [klein] base pipeline."""
    folder = tmp_path_factory.mktemp("flux2")
    build_tiny_flux2(folder, seed=1, single_layers=2)
    transformer = load_transformer(str(folder))
    with torch.no_grad():  # a new VAE's norm has mean 0 and variance 1, which would hide a wrong one
        vae = load_vae(str(folder))
        vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        vae.half().save_pretrained(folder / "vae")
    del transformer
    return str(folder)


@pytest.fixture(scope="module")
def embedded2(tmp_path_factory, flux2, prompts_file) -> Path:
    return embed_prompts(flux2, prompts_file, tmp_path_factory.mktemp("embeddings2"))


@pytest.fixture
def train2(train, flux2, embedded2):
    return lambda **given: train(
        pretrained_model_name_or_path=flux2,
        **{} if "prompts_file" in given else {"data_json_path": embedded2},
        **given,
    )


@pytest.fixture(scope="module")
def pipe(flux2) -> Flux2KleinPipeline:
    found = Flux2KleinPipeline.from_pretrained(flux2, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def conditioning(pipe: Flux2KleinPipeline, guidance_scale: float, shape: LatentShape) -> Conditioning:
    found = Flux2Klein().encode_prompts(pipe, [*PROMPTS[:2], ""])
    embeds, ids = found["prompt_embeds"], Flux2Klein().image_ids(shape, torch.device("cpu"))
    return Conditioning(embeds[:2], None, found["text_ids"], ids, guidance_scale, negative_prompt_embeds=embeds[2])


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
def test_velocity_positions_and_decoding_are_those_of_the_pipeline(pipe, guidance_scale):
    height, width, steps, family = 32, 48, 3, Flux2Klein()
    shape = LatentShape.of(pipe.vae, height, width)
    given, latents = conditioning(pipe, guidance_scale, shape), torch.empty(2, shape.tokens, shape.channels)
    latents.normal_(generator=torch.Generator().manual_seed(0))
    unpacked = latents.transpose(1, 2).unflatten(2, (shape.height // 2, shape.width // 2))
    expected = pipe(
        prompt=list(PROMPTS[:2]),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=unpacked,
        max_sequence_length=pipe.tokenizer.model_max_length,
    ).images
    shift = flux_2_shift(*(size * 16 / 8 for size in (height, width)), steps)  # a 4x VAE: cells of 8 pixels, not 16
    times = [1 - i / steps for i in range(steps + 1)]
    sigmas = [shift * t / (1 + (shift - 1) * t) for t in times]
    family.prepare_attention(pipe.transformer)
    with torch.no_grad():
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            v = family.velocity(pipe.transformer, latents, torch.full((2,), sigma), torch.arange(2), given)
            latents = latents + (after - sigma) * v
    found = decode_latents(family, pipe.vae, latents, height, width, 2)
    for mine, theirs in zip(found, expected, strict=True):
        difference = np.abs(np.asarray(mine, int) - np.asarray(theirs, int))
        assert difference.max() <= 1 and np.asarray(mine).std() > 1


def test_the_shift_of_the_schedule_is_the_pipeline_s():
    for size, steps in ((1024, 50), (720, 25), (512, 4), (2048, 25)):
        mu = compute_empirical_mu(size * size // 256, steps)
        assert flux_2_shift(size, size, steps) == pytest.approx(np.exp(mu), rel=1e-6)


def test_attention_gives_the_numbers_and_gradients_of_diffusers_bit_for_bit(flux2, pipe):
    transformer, family = load_transformer(flux2), Flux2Klein()
    shape = LatentShape.of(pipe.vae, 32, 32)
    given = conditioning(pipe, GUIDANCE, shape)
    latents = torch.randn(2, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))

    def numbers() -> torch.Tensor:
        v = family.velocity(transformer, latents, torch.tensor([0.9, 0.4]), torch.tensor([1, 0]), given)
        v.square().mean().backward()
        found = torch.cat([v.flatten(), *(p.grad.flatten() for p in transformer.parameters())]).detach()
        transformer.zero_grad()
        return found

    theirs = numbers()
    family.prepare_attention(transformer)
    assert torch.equal(numbers(), theirs) and theirs.isfinite().all()


@pytest.mark.long  # C++ is compiled for a minute
def test_compiled_blocks_give_the_numbers_of_uncompiled_ones(flux2, pipe):
    transformer, family, shape = load_transformer(flux2), Flux2Klein(), LatentShape.of(pipe.vae, 32, 32)
    given = conditioning(pipe, GUIDANCE, shape)
    latents = torch.randn(2, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))
    family.prepare_attention(transformer)
    rows = (latents, torch.tensor([0.9, 0.4]), torch.tensor([1, 0]), given)
    plain = family.velocity(transformer, *rows)
    family.prepare_compile(transformer)
    compile_transformer(transformer)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(family.velocity(transformer, *rows), plain, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_operations_are_counted_as_torch_counts_them(flux2):
    with torch.device("meta"):
        config = load_transformer(flux2).config
    transformer = load_transformer(flux2)
    image, text = 1024, 256
    given = Conditioning(
        torch.zeros(1, text, config.joint_attention_dim), None, torch.zeros(text, 4), torch.zeros(image, 4), 1.0
    )
    latents = torch.zeros(1, image, config.in_channels)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        Flux2Klein().velocity(transformer, latents, torch.ones(1), torch.zeros(1, dtype=torch.long), given)
    assert Flux2Klein().forward_flops(transformer, image, text) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_embeddings_are_the_pipeline_s_and_the_empty_prompt_is_beside_them(embedded2, pipe):
    entries = json.loads(embedded2.read_text())
    names = {"prompt_embed_path", "text_ids", "caption", "negative_prompt_embed_path"}
    assert [set(entry) for entry in entries] == [names] * len(PROMPTS)
    assert not (embedded2.parent / "pooled_prompt_embeds").exists()
    for entry, key in ((entries[0], "prompt_embed_path"), (entries[3], "negative_prompt_embed_path")):
        stored = torch.load(embedded2.parent / "prompt_embed" / entry[key], weights_only=True)
        text = entry["caption"] if key == "prompt_embed_path" else ""
        expected, _ = pipe.encode_prompt(text, max_sequence_length=pipe.tokenizer.model_max_length)
        torch.testing.assert_close(stored, expected[0], rtol=1e-4, atol=1e-4)


ALGORITHMS = {
    "mix_grpo": {},
    "mix_grpo_flash": {"dpm_algorithm_type": "dpmsolver++"},
    "dance_grpo": {"sampling_steps": 6},
    "e_grpo": {},
    "granular_grpo": {},
    "branch_grpo": {},
    "v_grpo": {"init_same_noise": False},
    "diffusion_nft": {"init_same_noise": False},
}


@pytest.mark.parametrize("guidance_scale", [1.0, None])
def test_the_first_ratios_are_one_and_all_parts_train(train2, flux2, guidance_scale):
    given = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    run = train2(max_train_steps=1, learning_rate=1e-4, **given)
    assert json.loads((run.folder / "args.json").read_text())["guidance_scale"] == (guidance_scale or GUIDANCE)
    (line,) = run.metrics
    assert line["ratio_first_deviation"] == 0 and line["grad_norm"] > 0
    assert not same_weights(run.weights(), load_transformer(flux2).state_dict())

"""The FLUX model as the trainer calls it: gradients, operations, random weights, pictures."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

from fastvideo.models import speed
from fastvideo.models.family import Conditioning, LatentShape, vae_scale_factor
from fastvideo.models.flux import Flux1
from fastvideo.models.pretrained import decode_latents, load_transformer, load_vae, random_transformer
from fastvideo.models.speed import compile_decoder, compile_transformer, cudnn_attention, group_norm, rotary_embedding

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def velocity(transformer: FluxTransformer2DModel, rows: int, image_tokens: int, text_tokens: int) -> torch.Tensor:
    """A prediction from random inputs. A row's inputs don't depend on the number of rows."""
    config, generator, device = transformer.config, torch.Generator().manual_seed(0), transformer.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    conditioning = Conditioning(
        random(1, text_tokens, config.joint_attention_dim),
        random(1, config.pooled_projection_dim),
        torch.zeros(text_tokens, 3, device=device),
        torch.arange(3.0 * image_tokens, device=device).reshape(-1, 3),  # different positions
        3.5,
    )
    latents = torch.stack([random(image_tokens, config.in_channels) for _ in range(rows)])
    index = torch.zeros(rows, dtype=torch.long, device=device)
    return Flux1().velocity(transformer, latents, 1 / (1.5 + torch.arange(rows, device=device)), index, conditioning)


def test_blocks_give_the_numbers_and_gradients_of_diffusers_bit_for_bit(tiny_flux):
    transformer = load_transformer(tiny_flux)

    def numbers() -> torch.Tensor:
        output = velocity(transformer, rows=2, image_tokens=18, text_tokens=8)
        output.square().mean().backward()
        found = torch.cat([output.flatten(), *(p.grad.flatten() for p in transformer.parameters())])
        transformer.zero_grad()
        return found

    theirs = numbers()
    Flux1().prepare_blocks(transformer)
    assert torch.equal(numbers(), theirs)


def test_attention_gets_gradients_without_gaps(tiny_flux, monkeypatch):
    """cuDNN's backward pass needs such gradients on a GPU."""
    transformer = load_transformer(tiny_flux)
    Flux1().prepare_blocks(transformer)
    seen, dispatch = [], speed.dispatch_attention_fn

    def watched(*args, **kwargs) -> torch.Tensor:
        output = dispatch(*args, **kwargs)
        output.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
        return output

    def without_gaps() -> int:
        seen.clear()
        velocity(transformer, rows=2, image_tokens=18, text_tokens=8).square().mean().backward()
        return sum(seen)

    monkeypatch.setattr(speed, "dispatch_attention_fn", watched)
    double, single = transformer.config.num_layers, transformer.config.num_single_layers
    assert without_gaps() == len(seen) == double + single
    monkeypatch.setattr(speed._ContiguousGradient, "apply", lambda x: x)
    assert without_gaps() == len(seen) - single  # without our function, single blocks have gaps


@pytest.mark.long
def test_compiled_blocks_are_whole_graphs_that_return_no_views(tiny_flux):
    """Gradients of views would be computed outside the graph, and a second graph would cost copies."""
    transformer = load_transformer(tiny_flux)
    Flux1().prepare_blocks(transformer)
    compile_transformer(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    returned = []
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: returned.extend(output))
    torch._dynamo.utils.counters.clear()
    velocity(transformer, rows=2, image_tokens=18, text_tokens=8)
    assert len(returned) == 2 * len(blocks) and not any(tensor._is_view() for tensor in returned)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.long
def test_a_row_rounds_alike_in_compiled_graphs_of_two_or_more_rows(device):
    """Else the first ratio of a sample would not be 1 if it is sampled and trained in parts of different sizes."""
    sizes, image_tokens, text_tokens = {}, 2025, 512  # FLUX.1's width, 720x720
    if device == "cpu":
        sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
        sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 16}
        image_tokens, text_tokens = 16, 8
    torch.manual_seed(1)
    with torch.device(device):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True, **sizes)
    Flux1().prepare_blocks(transformer.bfloat16())
    compile_transformer(transformer)
    attention = cudnn_attention() if device == "cuda" else nullcontext()
    with torch.autocast(device, torch.bfloat16), attention:
        two, *more = [velocity(transformer, rows, image_tokens, text_tokens)[:2] for rows in (2, 4, 5)]
    assert all(torch.equal(rows, two) for rows in more)


@pytest.mark.long  # C++ is compiled for a minute
def test_a_compiled_block_follows_the_choice_of_attention(tiny_flux):
    """The attention can change between calls. cuDNN is missing on a CPU, so an error shows that the block chose it."""
    transformer = load_transformer(tiny_flux)
    Flux1().prepare_blocks(transformer)
    compile_transformer(transformer)
    with torch.no_grad():
        plain = velocity(transformer, rows=1, image_tokens=18, text_tokens=8)
        with pytest.raises(RuntimeError, match="viable backend"), cudnn_attention():
            velocity(transformer, rows=1, image_tokens=18, text_tokens=8)
        assert torch.equal(velocity(transformer, rows=1, image_tokens=18, text_tokens=8), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_in_a_graph_is_that_of_diffusers_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(x.shape, generator=generator)
    angles = torch.randn(7, 4, generator=generator).repeat_interleave(2, 1)
    found = []
    in_graph = torch.compile(rotary_embedding, backend="eager")
    for rotate in (partial(apply_rotary_emb, sequence_dim=1), in_graph):
        rotated = rotate(x, (angles.cos(), angles.sin()))
        (gradient,) = torch.autograd.grad((rotated * weight).sum(), x)
        found.append((rotated, gradient))
    assert found[0][0].dtype == dtype
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_operations_of_a_forward_pass_are_those_that_torch_counts():
    sizes = {"attention_head_dim": 128, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 8}
    transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=True, **sizes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity(transformer, rows=1, image_tokens=1024, text_tokens=256)
    assert Flux1().forward_flops(transformer, 1024, 256) == pytest.approx(counter.get_total_flops(), rel=0.02)


@torch.no_grad()
def test_decoded_pictures_are_rounded_as_diffusers_rounds_them(tiny_flux):
    vae = load_vae(tiny_flux)
    shape = LatentShape.of(vae, 32, 48)
    latents = torch.randn(3, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))
    unpacked = FluxPipeline._unpack_latents(latents, 32, 48, vae_scale_factor(vae))
    pixels = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    expected = VaeImageProcessor().postprocess(pixels, output_type="pil")
    for mine, theirs in zip(decode_latents(Flux1(), vae, latents, 32, 48, 3), expected, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("shape", [(3, 64, 9, 7), (3, 64, 50), (1, 32, 4, 4)])
def test_statistics_by_channel_give_the_group_norm_also_far_from_zero(shape):
    norm = torch.nn.GroupNorm(32, shape[1], eps=1e-6).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    # Channels of a group differ in mean and spread, and their means are some 1,000 times their spreads.
    channels = torch.rand(2, shape[1], *[1] * (len(shape) - 2), generator=generator) + 0.5
    x = torch.randn(shape, generator=generator) * channels[0] + 1000 * channels[1]
    exact = norm(x.double()).detach()
    with torch.no_grad():
        norm.float()
        theirs = (norm(x) - exact).abs().max()
        assert (group_norm(norm, x) - exact).abs().max() <= max(2 * theirs, 1e-5)
        norm.bfloat16()
        assert (group_norm(norm, x.bfloat16()) - norm(x.bfloat16())).abs().max() < 0.1


def test_a_decoder_made_ready_for_compilation_decodes_as_before(tiny_flux, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    vae = load_vae(str(tiny_flux))
    latents = torch.randn(2, vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.decode(latents, return_dict=False)[0]
        compile_decoder(vae.decoder)
        norms = [module for module in vae.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert len(norms) > 5 and all(norm.forward.__func__ is group_norm for norm in norms)
        after = vae.decode(latents, return_dict=False)[0]
    assert compiled == [vae.decoder] and before.std() > 0.01
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pictures_that_do_not_fit_into_memory_together_are_decoded_one_at_a_time(tiny_flux, monkeypatch, warned):
    vae, decode, sizes = load_vae(tiny_flux), AutoencoderKL.decode, []

    def with_little_memory(self, latents, **kwargs):
        sizes.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no more")
        return decode(self, latents, **kwargs)

    shape = LatentShape.of(vae, 32, 32)
    latents = torch.randn(3, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))
    expected = decode_latents(Flux1(), vae, latents, 32, 32, 1)
    monkeypatch.setattr(AutoencoderKL, "decode", with_little_memory)
    with warned("3 pictures don't fit"):
        found = decode_latents(Flux1(), vae, latents, 32, 32, 3)
    decode_latents(Flux1(), vae, latents, 32, 32, 3)  # doesn't try 3 at once again
    assert sizes == [3, 1, 1, 1, 1, 1, 1] and vae.use_tiling
    for mine, theirs in zip(found, expected, strict=True):  # too small to be cut into tiles
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_random_weights_need_config_json_alone_and_follow_from_the_seed(tiny_flux, tmp_path):
    FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer").save_config(tmp_path / "transformer")
    one, same, other = (random_transformer(str(tmp_path), torch.float32, seed, "cpu") for seed in (1, 1, 2))
    v = velocity(one, 2, 16, 8)
    assert torch.isfinite(v).all() and v.std() > 0.01
    assert torch.equal(v, velocity(same, 2, 16, 8)) and not torch.equal(v, velocity(other, 2, 16, 8))


def test_the_model_sees_the_noise_level_itself_not_rounded_to_thousandths():
    seen = {}

    class Transformer:
        config = SimpleNamespace(guidance_embeds=True)

        def __call__(self, **given) -> tuple[torch.Tensor]:
            seen.update(given)
            return (given["hidden_states"],)

    sigma, one = torch.tensor([0.123456789, 0.9876543]), torch.zeros(1, 1, 1)
    conditioning = Conditioning(one, one[0], one[0], one[0], 3.5)
    Flux1().velocity(Transformer(), torch.zeros(2, 1, 4), sigma, torch.tensor([0, 0]), conditioning)
    assert torch.equal(seen["timestep"], sigma)

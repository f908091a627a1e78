"""FLUX.1: two text encoders, of which CLIP's pooled embedding joins the timestep; guidance is a number among its inputs
(dev, Krea, Kontext) or not there (schnell)."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.models.family import Conditioning, Family, LatentShape, vae_scale_factor
from fastvideo.models.float8 import Modulated, activated_product, gelu, shared
from fastvideo.models.speed import StreamwiseAttnProcessor

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from transformers import CLIPTextModel, T5EncoderModel


def _norm(
    norm: AdaLayerNormZero | AdaLayerNormZeroSingle, x: torch.Tensor, emb: torch.Tensor
) -> tuple[Modulated | torch.Tensor, ...]:
    """diffusers' adaptive norm with the same results, in the compute format. (Under autocast diffusers' is float32, and
    each linear layer after a compiled norm would write a copy.) The first result is computed where its use is known.
    """
    modulation = norm.linear(norm.silu(emb))
    shift, scale, *rest = modulation.chunk(modulation.shape[-1] // x.shape[-1], dim=1)
    return Modulated(x, scale, shift, norm.norm.eps), *rest


def _single_block(
    block: FluxSingleTransformerBlock,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, ...]:
    """diffusers' forward pass of a single block, with the same results.

    The outputs are separate tensors. If they were views of one, their gradients would be assembled outside the compiled
    block, from zeros, copies and a sum. (A forward hook would be compiled separately, and would copy.)
    """
    tokens = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
    joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    norm, gate = block.norm(joined, emb=temb)
    norm = shared(norm, block.proj_mlp, block.attn.to_q, block.attn.to_k, block.attn.to_v)
    raw = block.proj_mlp(norm)
    attention = block.attn(hidden_states=norm, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    change = activated_product(block.proj_out, attention, raw, gelu)
    parts = (joined + gate.unsqueeze(1) * change).split(tokens, dim=1)
    return tuple(part.clone() for part in parts) if torch.compiler.is_compiling() else parts


def _feed_forward(layers: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """diffusers' forward pass of a double block's MLP, with the same results."""
    return activated_product(layers.net[2], None, layers.net[0].proj(x), gelu)


class Flux1(Family):
    """FLUX.1-dev and its relatives, all as text-to-image models."""

    pipelines = (FluxPipeline, FluxKontextPipeline)
    transformer, vae = FluxTransformer2DModel, AutoencoderKL
    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    tokenizers = ("tokenizer", "tokenizer_2")
    position_axes = 3

    @torch.no_grad()
    def encode_prompts(
        self, pipe: FluxPipeline, prompts: Sequence[str], max_sequence_length: int = 512
    ) -> dict[str, torch.Tensor]:
        names = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
        length = self.max_sequence_length(pipe, max_sequence_length)
        found = pipe.encode_prompt(prompt=list(prompts), prompt_2=None, max_sequence_length=length)
        return dict(zip(names, found, strict=True))

    def widths(self, transformer: FluxTransformer2DModel) -> dict[str, int]:
        config = transformer.config
        embeds = {"prompt_embeds": config.joint_attention_dim, "pooled_prompt_embeds": config.pooled_projection_dim}
        return embeds | {"text_ids": self.position_axes}

    def image_ids(self, shape: LatentShape, device: torch.device) -> torch.Tensor:
        return FluxPipeline._prepare_latent_image_ids(1, shape.height // 2, shape.width // 2, device, torch.float32)

    def velocity(
        self,
        transformer: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt_index: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        takes_guidance = getattr(transformer, "module", transformer).config.guidance_embeds
        prediction = transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=torch.full_like(sigma, conditioning.guidance_scale) if takes_guidance else None,
            pooled_projections=conditioning.pooled_prompt_embeds[prompt_index],
            encoder_hidden_states=conditioning.prompt_embeds[prompt_index],
            txt_ids=conditioning.text_ids,
            img_ids=conditioning.image_ids,
            return_dict=False,
        )[0]
        return prediction.float()

    def prepare_blocks(self, transformer: FluxTransformer2DModel) -> None:
        transformer.set_attn_processor(StreamwiseAttnProcessor())
        for block in transformer.transformer_blocks:
            for layers in (block.ff, block.ff_context):
                layers.forward = MethodType(_feed_forward, layers)
            for norm in (block.norm1, block.norm1_context):
                norm.forward = MethodType(_norm, norm)
        for block in transformer.single_transformer_blocks:
            block.forward, block.norm.forward = MethodType(_single_block, block), MethodType(_norm, block.norm)

    def forward_flops(self, transformer: FluxTransformer2DModel, image_tokens: int, text_tokens: int) -> float:
        """Family.forward_flops. Each token passes 12 d² weights per block, double or single.

        Attention over all S tokens adds 4 S² d per block.
        """
        config = transformer.config
        width, tokens = config.num_attention_heads * config.attention_head_dim, image_tokens + text_tokens
        return (config.num_layers + config.num_single_layers) * (24 * width**2 * tokens + 4 * tokens**2 * width)

    def to_vae(self, vae: AutoencoderKL, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        unpacked = FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor(vae))
        return unpacked / vae.config.scaling_factor + vae.config.shift_factor

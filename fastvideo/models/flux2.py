"""FLUX.2 [klein]: one text encoder, no pooled embedding, classifier-free guidance, modulation shared by all blocks."""

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.models.family import Conditioning, Family, LatentShape, vae_scale_factor
from fastvideo.models.float8 import activated_product, swiglu
from fastvideo.models.speed import ParallelAttnProcessor, StreamwiseAttnProcessor

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2FeedForward
from transformers import Qwen3ForCausalLM


def _feed_forward(layers: Flux2FeedForward, x: torch.Tensor) -> torch.Tensor:
    """diffusers' forward pass of a double block's MLP, with the same results."""
    return activated_product(layers.linear_out, None, layers.linear_in(x), swiglu)


class Flux2Klein(Family):
    """FLUX.2-klein-base, and step-distilled klein models, which take no guidance."""

    pipelines = (Flux2KleinPipeline,)
    transformer, vae = Flux2Transformer2DModel, AutoencoderKLFlux2
    text_encoders = {"text_encoder": Qwen3ForCausalLM}
    tokenizers = ("tokenizer",)
    position_axes = 4
    embeddings = ("prompt_embeds", "text_ids")
    alpha_tensors = False

    def __init__(self, index: Mapping[str, Any] | None = None) -> None:
        distilled = bool((index or {}).get("is_distilled"))
        self.classifier_free, self.step_distilled = not distilled, distilled

    @torch.no_grad()
    def encode_prompts(
        self, pipe: Flux2KleinPipeline, prompts: Sequence[str], max_sequence_length: int = 512
    ) -> dict[str, torch.Tensor]:
        embeds, ids = pipe.encode_prompt(
            list(prompts), max_sequence_length=self.max_sequence_length(pipe, max_sequence_length)
        )
        return {"prompt_embeds": embeds, "text_ids": ids[0]}

    def count_tokens(self, pipe: Flux2KleinPipeline, prompts: Sequence[str]) -> list[int]:
        """Family.count_tokens, with those of the chat around a prompt."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        form = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        texts = [pipe.tokenizer.apply_chat_template(chat, **form) for chat in chats]
        return super().count_tokens(pipe, texts)

    def widths(self, transformer: Flux2Transformer2DModel) -> dict[str, int]:
        return {"prompt_embeds": transformer.config.joint_attention_dim, "text_ids": self.position_axes}

    def image_ids(self, shape: LatentShape, device: torch.device) -> torch.Tensor:
        cells = torch.empty(1, 0, shape.height // 2, shape.width // 2)
        return Flux2KleinPipeline._prepare_latent_ids(cells)[0].to(device, torch.float32)

    def velocity(
        self,
        transformer: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt_index: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Family.velocity. With guidance w, v = v₀ + w·(v₁ − v₀), of both passes in one batch of 2N rows."""
        embeds, scale = conditioning.prompt_embeds[prompt_index], conditioning.guidance_scale
        if guided := self.guided(scale):
            embeds = torch.cat([embeds, conditioning.negative_prompt_embeds.expand_as(embeds)])
            latents, sigma = torch.cat([latents, latents]), torch.cat([sigma, sigma])
        v = transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=conditioning.text_ids[None],
            img_ids=conditioning.image_ids[None],
            return_dict=False,
        )[0].float()
        if not guided:
            return v
        with_prompt, without = v.chunk(2)
        return without + scale * (with_prompt - without)

    def prepare_blocks(self, transformer: Flux2Transformer2DModel) -> None:
        for module in transformer.modules():
            if hasattr(module, "set_processor"):
                two_streams = isinstance(module, Flux2Attention)
                module.set_processor(StreamwiseAttnProcessor() if two_streams else ParallelAttnProcessor())
            elif isinstance(module, Flux2FeedForward):
                module.forward = MethodType(_feed_forward, module)

    def forward_flops(self, transformer: Flux2Transformer2DModel, image_tokens: int, text_tokens: int) -> float:
        """Family.forward_flops. Each token passes (4 + 3r) d² weights per block, r the MLP's ratio (SwiGLU)."""
        config = transformer.config
        width, tokens = config.num_attention_heads * config.attention_head_dim, image_tokens + text_tokens
        products = 2 * (4 + 3 * config.mlp_ratio) * width**2 * tokens
        return (config.num_layers + config.num_single_layers) * (products + 4 * tokens**2 * width)

    def to_vae(self, vae: AutoencoderKLFlux2, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Family.to_vae. The VAE's batch norm holds mean and variance of the packed channels."""
        norm = vae.bn
        std = torch.sqrt(norm.running_var.float() + vae.config.batch_norm_eps)
        return FluxPipeline._unpack_latents(
            latents * std + norm.running_mean.float(), height, width, vae_scale_factor(vae)
        )

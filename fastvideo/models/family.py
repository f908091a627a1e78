"""What differs between families of models, behind one interface. flux.py and flux2.py implement it.

Shapes: N rows, L = (height / f / 2) · (width / f / 2) packed latent tokens of C = 4 · latent_channels values, where f
is the VAE's down-scaling factor (8 in FLUX.1 and FLUX.2).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.cli import FlagError

import torch
from diffusers import DiffusionPipeline, ModelMixin


def vae_scale_factor(vae: ModelMixin) -> int:
    """Pixels per latent cell and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class LatentShape:
    """The packed latents of one picture size."""

    tokens: int  # L
    channels: int  # C
    height: int  # in latent cells, unpacked
    width: int

    @classmethod
    def of(cls, vae: ModelMixin, height: int, width: int, prefix: str = "") -> "LatentShape":
        """Raises FlagError, about {prefix}h or {prefix}w, unless the picture divides into 2×2 patches of latent cells.

        height, width: in pixels.
        """
        patch = 2 * vae_scale_factor(vae)
        for field, size in {"h": height, "w": width}.items():
            if size % patch:
                raise FlagError(f"{prefix}{field}", size, f"must be a multiple of {patch}")
        rows, columns = 2 * (height // patch), 2 * (width // patch)
        return cls(rows * columns // 4, 4 * vae.config.latent_channels, rows, columns)


@dataclass
class Conditioning:
    """The transformer's inputs other than latents and σ, for the P prompts of one rank."""

    prompt_embeds: torch.Tensor  # [P, text length, D]
    pooled_prompt_embeds: torch.Tensor | None  # [P, D'], in families that have it
    text_ids: torch.Tensor  # [text length, axes of positions]
    image_ids: torch.Tensor  # [L, axes of positions]
    guidance_scale: float
    shape: LatentShape | None = None  # of the latents; None: that of training
    negative_prompt_embeds: torch.Tensor | None = None  # [text length, D], of the empty prompt, for `Family.guided`

    def of(self, begin: int, end: int) -> "Conditioning":
        """The conditioning of prompts `begin` to `end` − 1."""
        pooled = self.pooled_prompt_embeds
        return replace(
            self,
            prompt_embeds=self.prompt_embeds[begin:end],
            pooled_prompt_embeds=None if pooled is None else pooled[begin:end],
        )


class Family(ABC):
    """A family of models: its classes in diffusers and transformers, and how they are called.

    pipelines: classes whose model_index.json may name them; the first loads them all. text_encoders: part of the
    pipeline -> class. tokenizers: parts of the pipeline; the last one's length limits a prompt. position_axes: numbers
    that place a token. embeddings: what `encode_prompts` returns. classifier_free: whether guidance takes a second pass
    of the transformer with the empty prompt (arXiv 2207.12598). alpha_tensors: whether the pipeline's load_lora_weights
    reads alpha from tensors of a LoRA file. step_distilled: whether the model needs few steps and takes no guidance.
    """

    pipelines: ClassVar[Sequence[type[DiffusionPipeline]]]
    transformer: ClassVar[type[ModelMixin]]
    vae: ClassVar[type[ModelMixin]]
    text_encoders: ClassVar[Mapping[str, type]]
    tokenizers: ClassVar[Sequence[str]]
    position_axes: ClassVar[int]
    embeddings: ClassVar[Sequence[str]] = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")
    classifier_free: bool = False
    alpha_tensors: ClassVar[bool] = True
    step_distilled: bool = False

    def __init__(self, index: Mapping[str, Any] | None = None) -> None:  # noqa: B027  (not all families need it)
        """index: model_index.json of the pipeline, which says what differs between models of the family."""

    # --- prompts ----------------------------------------------------------------------------------------------------

    def max_sequence_length(self, pipe: DiffusionPipeline, wanted: int) -> int:
        """Tokens of a prompt: `wanted`, or fewer if the tokenizer declares fewer."""
        return min(wanted, getattr(pipe, self.tokenizers[-1]).model_max_length)

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, however many the model takes."""
        return [len(ids) for ids in getattr(pipe, self.tokenizers[-1])(list(prompts), verbose=False).input_ids]

    @abstractmethod
    def encode_prompts(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int = 512
    ) -> dict[str, torch.Tensor]:
        """What the transformer takes of N prompts, computed by the pipeline.

        Returns the `embeddings` of the family: prompt_embeds [N, text length, D], pooled_prompt_embeds [N, D'],
        text_ids [text length, axes].
        """

    @abstractmethod
    def widths(self, transformer: ModelMixin) -> dict[str, int]:
        """Last dimensions of what `encode_prompts` returns, as the transformer takes it."""

    # --- the transformer --------------------------------------------------------------------------------------------

    @abstractmethod
    def image_ids(self, shape: LatentShape, device: torch.device) -> torch.Tensor:
        """Positions of the latent tokens, float32 [L, axes]."""

    def guided(self, guidance_scale: float) -> bool:
        """Whether a velocity takes two passes of the transformer, with the prompt and with the empty one."""
        return self.classifier_free and guidance_scale > 1

    @abstractmethod
    def velocity(
        self,
        transformer: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompt_index: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """v = model(x, σ) in float32, [N, L, C].

        Args:
            latents: [N, L, C]. sigma: [N], the timestep, as in diffusers. prompt_index: [N], rows of `conditioning`.
        """

    def blocks(self, transformer: ModelMixin) -> list[torch.nn.Module]:
        """The blocks, in order: each is sharded, compiled and recomputed by itself, and holds nearly all weights."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @abstractmethod
    def prepare_blocks(self, transformer: ModelMixin) -> None:
        """Replaces attention, and blocks' parts that FP8 computes in another order, by forms with the same results."""

    @abstractmethod
    def forward_flops(self, transformer: ModelMixin, image_tokens: int, text_tokens: int) -> float:
        """Floating point operations of one row's forward pass. Counts the blocks' matrix products, 2 per multiply-add.

        Embedders, modulation and the last layer are below 1 % at full size and left out.
        """

    # --- pictures ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def to_vae(self, vae: ModelMixin, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Unpacks latents [N, L, C] to what the VAE decodes, [N, C / 4, height / f, width / f]; sizes in pixels."""

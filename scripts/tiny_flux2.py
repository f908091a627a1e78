"""The tiny FLUX.2 [klein]: FLUX.2's own classes at the sizes of make_tiny_flux.py, which trains and saves it."""

import json

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.models.family import LatentShape
from fastvideo.models.flux2 import Flux2Klein
from fastvideo.models.reward_model.shapes import all_scenes

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

LENGTH = 24  # tokens: a caption's 12 or 13, and those of the chat around it
LATENT_CHANNELS = 16
TEXT_LAYERS = (9, 18, 27)  # whose outputs Flux2KleinPipeline takes; there are no more
# The roles and the empty thoughts that Qwen3's own template writes around a prompt, one token each.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if not (enable_thinking | default(true)) %}<|no_thoughts|>{% endif %}"
)


def caption_words() -> list[str]:
    """All words of captions."""
    captions = [scene.caption() for withheld in (False, True) for scene in all_scenes(withheld)]
    return sorted(set(" ".join(captions).split()))


def make_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE with one token per caption word; any other word is spelt."""
    words = caption_words()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([f" {word}" for word in words] * 2 + words * 2, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        model_max_length=LENGTH,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|assistant|>", "<|no_thoughts|>"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_flux2_pipeline(seed: int = 0, single_layers: int = 3, distilled: bool = False) -> Flux2KleinPipeline:
    """The pipeline with random float32 weights."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=TEXT_LAYERS[-1],
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        transformer = Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=single_layers,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=3 * 32,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=1,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        is_distilled=distilled,
    )


class TinyFlux2:
    """What the training of the tiny FLUX.2 has of its own, as TinyFlux1 of make_tiny_flux.py has.

    Guidance compares the caption's velocity with the empty caption's, so a tenth of the training shows that one.
    """

    guidance, empty = 4.0, 0.1
    text_encoders = ("text_encoder",)

    def make(self, seed: int) -> Flux2KleinPipeline:
        return make_flux2_pipeline(seed)

    def length(self, pipe: Flux2KleinPipeline) -> int:
        return pipe.tokenizer.model_max_length

    def normalise(self, vae: AutoencoderKLFlux2, latents: torch.Tensor) -> None:
        """The batch norm holds mean and variance of each packed channel."""
        packed = Flux2KleinPipeline._patchify_latents(latents)
        vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        vae.bn.running_var.copy_(packed.var((0, 2, 3)))

    def pack(self, vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        packed = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))
        return (packed - vae.bn.running_mean) / std

    def tokens(self, pipe: Flux2KleinPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the chats around the captions, and which of them aren't padding."""
        chats = [[{"role": "user", "content": caption}] for caption in captions]
        form = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        texts = [pipe.tokenizer.apply_chat_template(chat, **form) for chat in chats]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = pipe.tokenizer(texts, max_length=LENGTH, **options)
        return found.input_ids, found.attention_mask

    def velocity(
        self,
        pipe: Flux2KleinPipeline,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        states = pipe.text_encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        embeds = torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1)
        return pipe.transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds[:1]).to(latents.device),
            img_ids=Flux2Klein().image_ids(LatentShape(16, 64, 8, 8), latents.device)[None],
            return_dict=False,
        )[0]

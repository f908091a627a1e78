"""The tiny FLUX.2 [klein]: FLUX.2's own classes at the sizes of make_tiny_flux.py, which trains and saves it."""

import json

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

LENGTH = 24  # tokens: a caption's 12 or 13, and those of the chat around it
LATENT_CHANNELS = 16
TEXT_LAYERS = 27  # the last of the three layers that Flux2KleinPipeline takes: 9, 18 and 27
# The roles and the empty thoughts that Qwen3's own template writes around a prompt, one token each.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if not (enable_thinking | default(true)) %}<|no_thoughts|>{% endif %}"
)


def make_tokenizer(words: list[str]) -> Qwen2Tokenizer:
    """Byte-level BPE with one token per caption word; any other word is spelt."""
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


def make_flux2_pipeline(words: list[str], single_layers: int = 3, distilled: bool = False) -> Flux2KleinPipeline:
    """The pipeline with random float32 weights. words: of the captions."""
    tokenizer = make_tokenizer(words)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=TEXT_LAYERS,
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

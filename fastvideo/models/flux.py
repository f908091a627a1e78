"""FLUX models: loading, LoRA, prompt embeddings, velocity prediction, decoding. All sizes come from config files.

Shapes: N rows, L = (height / f / 2) · (width / f / 2) packed latent tokens of C = 4 · latent_channels values, where f
is the VAE's down-scaling factor (8 in FLUX.1).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.cli import FlagError
from fastvideo.io.messages import warn
from fastvideo.io.weights import loading_problem, mismatch, stored_shapes
from fastvideo.io.words import counted
from fastvideo.models.lora import Adapters, find_lora, read_adapters

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPTextModel, T5EncoderModel

BASE = "pretrained_model_name_or_path"  # the setting that names the base model


class ModelNotFoundError(FlagError):
    """The setting `field` names neither a local folder with the model nor a hub id that can be read."""


def _load(cls: type, path: str, field: str = BASE, **kwargs):
    """`cls.from_pretrained`. Raises ModelNotFoundError, one clear line about `field`, for the usual mistakes."""
    if Path(path).is_dir() and kwargs.get("subfolder") and not (Path(path) / kwargs["subfolder"]).is_dir():
        raise ModelNotFoundError(field, path, f"no folder {kwargs['subfolder']}/ in it")
    if not Path(path).exists() and (path.count("/") != 1 or path.startswith((".", "/", "data/", "outputs/"))):
        raise ModelNotFoundError(
            field,
            path,
            "no such folder; give a diffusers FLUX pipeline folder such as data/tiny_flux, or a hub id such as "
            "black-forest-labs/FLUX.1-dev",
        )
    try:
        return cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, KeyError, AttributeError) as error:
        # The last two say nothing by themselves: an index without its metadata, a pickle that holds no dict.
        text = f"{error!r} in its files" if isinstance(error, KeyError | AttributeError) else str(error)
        cause = " ".join(text.split())[:300]
        if Path(path).exists():
            raise ModelNotFoundError(field, path, cause) from error
        raise ModelNotFoundError(
            field,
            path,
            "the hub did not give it. For a gated repository such as FLUX.1-dev, accept the licence on its page and "
            f"set HF_TOKEN; without a network give a local folder. Cause: {cause}",
        ) from error


def _load_weights(cls: type, path: str, field: str = BASE, **kwargs) -> torch.nn.Module:
    """`_load` of a model. Raises ModelNotFoundError too if weights are missing, unknown or not finite."""
    own = issubclass(cls, ModelMixin)  # of diffusers, whose errors name a weight of another size by themselves
    sizes = {} if own else {"ignore_mismatched_sizes": True}  # then the report names it
    model, report = _load(cls, path, field, output_loading_info=True, **sizes, **kwargs)
    if problem := loading_problem(model, report, strict=own):  # text encoders come with parts that FLUX doesn't use
        raise ModelNotFoundError(field, path, f"wrong weights in {kwargs.get('subfolder', 'it')}: {problem}")
    return model


def _transformer_place(path: str) -> dict[str, str]:
    """Arguments with which from_pretrained finds the transformer, in a pipeline or in a checkpoint folder."""
    return {} if any(Path(path).glob("diffusion_pytorch_model*.safetensors")) else {"subfolder": "transformer"}


def load_transformer(path: str, dtype: torch.dtype = torch.float32, field: str = BASE) -> FluxTransformer2DModel:
    """The transformer of the pipeline at `path`, or of a checkpoint folder that holds only a transformer.

    Raises ModelNotFoundError about the setting `field`.
    """
    transformer = _load_weights(FluxTransformer2DModel, path, field, dtype=dtype, **_transformer_place(path))
    # Without a dtype conversion, weights are views of the file with any alignment. CPU kernels round differently on
    # unaligned tensors, so a resumed run would differ from an uninterrupted run.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()
    return transformer


def meta_transformer(path: str, dtype: torch.dtype = torch.float32, field: str = BASE) -> FluxTransformer2DModel:
    """The transformer without weights, on the meta device. Costs neither time nor memory."""
    transformer = _meta_model(FluxTransformer2DModel, path, field, **_transformer_place(path))
    axes, width = transformer.config.axes_dims_rope, transformer.config.attention_head_dim
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):  # no weight tells that they are wrong
        problem = f"its config.json has axes_dims_rope {list(axes)}, not 3 even numbers that add up to {width}"
        raise ModelNotFoundError(field, path, problem)
    return torch.nn.Module.to(transformer, dtype)  # ModelMixin.to warns


def _meta_model(cls: type, path: str, field: str = BASE, **place: str) -> torch.nn.Module:
    config = _load(_Config, path, field, **place)
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except Exception as error:  # a constructor raises nearly anything for a value that it doesn't expect
        problem = f"its config.json doesn't describe a {cls.__name__}: {type(error).__name__} {error}"
        raise ModelNotFoundError(field, path, " ".join(problem.split())[:300]) from error


def check_transformer(path: str, field: str = BASE) -> FluxTransformer2DModel:
    """`meta_transformer`, whose weights fit its config.json as far as the headers of local files tell.

    Raises ModelNotFoundError about the setting `field`.
    """
    transformer = meta_transformer(path, field=field)
    check_files(path, Path(path, _transformer_place(path).get("subfolder", "")), field, transformer)
    return transformer


def check_files(path: str, place: Path, field: str = BASE, model: torch.nn.Module | None = None) -> None:
    """Raises ModelNotFoundError about the setting `field` = `path` for damaged weights, or weights of another model.

    place: a .safetensors file, or a folder with a part of the model at `path`. Nothing there: nothing to check.
    """
    try:
        stored = stored_shapes(place)
    except ValueError as error:
        raise ModelNotFoundError(field, path, str(error)) from error
    if model is None or stored is None or any(".proj_attn." in name for name in stored):
        return  # diffusers renames the attention weights of VAEs that are as old as this name
    if problem := mismatch({name: tensor.shape for name, tensor in model.state_dict().items()}, stored):
        raise ModelNotFoundError(field, path, f"wrong weights in {place.name or 'it'}: {problem}")


def check_pipeline(path: str, prompts: bool = True) -> None:
    """Raises ModelNotFoundError for a pipeline with damaged files, before anything slow: reads headers, not weights.

    Loading checks the rest, and pipelines of a hub. prompts: whether the text encoders are needed too.
    """
    check_transformer(path)
    check_files(path, Path(path, "vae"), model=meta_vae(path))
    if prompts and Path(path).is_dir():
        load_tokenizers(path)
        for part in ("text_encoder", "text_encoder_2"):
            check_files(path, Path(path, part))


def random_transformer(path: str, dtype: torch.dtype, seed: int, device: torch.device | str) -> FluxTransformer2DModel:
    """The transformer with random weights, equal for equal seeds on one kind of device. Reads only config.json."""
    transformer = meta_transformer(path, dtype).to_empty(device=device)
    on = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU would take minutes for 12 B numbers
    generator = torch.Generator(on).manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(name.endswith("weight"))  # weight of a norm: 1; bias: 0
        else:
            values = torch.randn(parameter.shape, generator=generator, device=on)
            parameter.data.copy_(values / math.sqrt(3 * parameter.shape[1]))  # as wide as torch's own initialisation
    return transformer


class _Config:
    """Lets `_load` read only the configuration."""

    @staticmethod
    def from_pretrained(path: str, **kwargs) -> dict:
        return FluxTransformer2DModel.load_config(path, **kwargs)  # of any model


# --- LoRA -------------------------------------------------------------------------------------------------------------


def check_lora_targets(transformer: FluxTransformer2DModel, targets: Sequence[str]) -> None:
    """Raises FlagError with the choices, unless every target is the end of a linear layer's name."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            blocks = (name.split(".", 2) for name in linear if "transformer_blocks." in name)
            choices = ", ".join(dict.fromkeys(inside for _, _, inside in blocks))
            raise FlagError("lora_target_modules", target, f"no linear layer of that name; choose from {choices}")


def add_lora(transformer: FluxTransformer2DModel, rank: int, alpha: int, targets: Sequence[str], seed: int) -> None:
    """Freezes the transformer and adds float32 adapters, W + alpha / rank · B A. B is 0, so outputs stay the same."""
    check_lora_targets(transformer, targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # adapters are initialised on the CPU
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def read_lora_init(
    transformer: FluxTransformer2DModel, path: str, rank: int, alpha: int, targets: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The weights from which adapters start that `add_lora` adds, from a LoRA file or a folder with one.

    transformer: without adapters; may be on the meta device. Raises FlagError unless the file has the same layers and
    rank.
    """
    adapters = read_adapters(find_lora(path, "lora_init"), "lora_init")
    adapters.check_fit(transformer)
    linear = (name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear))
    layers = {name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)}
    return adapters.start_of(layers, rank, alpha)


def load_with_lora(
    base: str, lora: str | Path, dtype: torch.dtype = torch.float32, field: str = "model_path"
) -> FluxTransformer2DModel:
    """The transformer of the pipeline `base` with the adapters of a LoRA file, or of a folder with one.

    Raises FlagError about the setting `field`, before weights of `base` are loaded, for adapters that aren't understood
    in full or don't fit.
    """
    adapters = check_lora(base, lora, field)
    transformer = load_transformer(base, dtype)
    adapters.put_into(transformer)
    return transformer


def check_lora(base: str, lora: str | Path, field: str = "model_path") -> Adapters:
    """The adapters of a LoRA file, or of a folder with one. Raises FlagError unless they fit the pipeline `base`."""
    adapters = read_adapters(find_lora(lora, field), field)
    adapters.check_fit(meta_transformer(base))
    return adapters


def load_vae(path: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    return _load_weights(AutoencoderKL, path, subfolder="vae", dtype=dtype).eval().requires_grad_(False)


def meta_vae(path: str) -> AutoencoderKL:
    """The VAE without weights, on the meta device."""
    return _meta_model(AutoencoderKL, path, subfolder="vae")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def load_tokenizers(path: str) -> FluxPipeline:
    """The pipeline without its models: tokenizers and scheduler, quickly.

    Raises FlagError if a tokenizer has no vocabulary: transformers 5 then makes one that encodes all prompts alike.
    """
    models = ("transformer", "vae", "text_encoder", "text_encoder_2")
    with _without_progress_bar():  # three small parts
        pipe = _load(FluxPipeline, path, **dict.fromkeys(models))
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, part)
        # Its warning about long texts is wrong here, because the pipeline cuts them.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:  # an empty T5 tokenizer still has the space
            raise FlagError(BASE, path, f"no vocabulary in its {part}")
    return pipe


def load_text_encoders(path: str, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """The pipeline without transformer and VAE, for embedding prompts."""
    # It would repeat the rest of each long prompt, also of those that CLIP alone doesn't see; see CutPrompts.
    logging.getLogger(pipeline_flux.__name__).setLevel(logging.ERROR)
    pipe = load_tokenizers(path)
    for part, cls in {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}.items():
        pipe.register_modules(**{part: _load_weights(cls, path, subfolder=part, dtype=dtype)})
    return pipe


def text_tokens(pipe: FluxPipeline, max_sequence_length: int) -> int:
    """T5 tokens of a prompt's embedding: the limit, but no more than the tokenizer's own (FLUX.1-dev: 512)."""
    return min(max_sequence_length, pipe.tokenizer_2.model_max_length)


class CutPrompts:
    """The prompts, of all that a program encodes, that have more T5 tokens than the model takes.

    CLIP takes 77 tokens, but only for the pooled embedding: what comes later still reaches the model through T5.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}  # prompt -> its T5 tokens
        self.limit = 0

    def look(self, pipe: FluxPipeline, prompts: Sequence[str], max_sequence_length: int) -> None:
        """Counts the tokens of prompts that are encoded now."""
        self.limit = text_tokens(pipe, max_sequence_length)
        ids = pipe.tokenizer_2(list(prompts), verbose=False).input_ids
        self.tokens |= {p: len(found) for p, found in zip(prompts, ids, strict=True) if len(found) > self.limit}

    def warn(self) -> None:
        """Says in one line how many prompts were cut, if any, and which is the longest."""
        if self.tokens:
            longest, tokens = max(self.tokens.items(), key=lambda item: item[1])
            warn(
                f"the model takes {self.limit} tokens of a prompt and doesn't see what follows in "
                f"{counted(len(self.tokens), 'prompt')}; the longest has {tokens} tokens: {longest[:80]!r}"
            )


@torch.no_grad()
def encode_prompts(pipe: FluxPipeline, prompts: Sequence[str], max_sequence_length: int = 512) -> tuple:
    """T5 embeddings [N, L, D], pooled CLIP embeddings [N, D'] and text ids [L, 3], computed by FluxPipeline.

    max_sequence_length: see `text_tokens`.
    """
    length = text_tokens(pipe, max_sequence_length)
    return pipe.encode_prompt(prompt=list(prompts), prompt_2=None, max_sequence_length=length)


def vae_scale_factor(vae: AutoencoderKL) -> int:
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
    def of(cls, vae: AutoencoderKL, height: int, width: int, prefix: str = "") -> "LatentShape":
        """Raises FlagError, about {prefix}h or {prefix}w, unless the picture divides into 2×2 patches of latent cells.

        height, width: in pixels.
        """
        patch = 2 * vae_scale_factor(vae)
        for field, size in {"h": height, "w": width}.items():
            if size % patch:
                raise FlagError(f"{prefix}{field}", size, f"must be a multiple of {patch}")
        rows, columns = 2 * (height // patch), 2 * (width // patch)
        return cls(rows * columns // 4, 4 * vae.config.latent_channels, rows, columns)

    def image_ids(self, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Positions of the latent tokens, [L, 3]."""
        return FluxPipeline._prepare_latent_image_ids(1, self.height // 2, self.width // 2, device, dtype)


@dataclass
class Conditioning:
    """The transformer's inputs other than latents and σ, for the P prompts of one rank."""

    prompt_embeds: torch.Tensor  # [P, text length, D]
    pooled_prompt_embeds: torch.Tensor  # [P, D']
    text_ids: torch.Tensor  # [text length, 3]
    image_ids: torch.Tensor  # [L, 3]
    guidance_scale: float
    shape: LatentShape | None = None  # of the latents; None: that of training

    def of(self, begin: int, end: int) -> "Conditioning":
        """The conditioning of prompts `begin` to `end` − 1."""
        return replace(
            self,
            prompt_embeds=self.prompt_embeds[begin:end],
            pooled_prompt_embeds=self.pooled_prompt_embeds[begin:end],
        )


def predict_velocity(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    prompt_index: torch.Tensor,
    conditioning: Conditioning,
    guidance_embeds: bool,
) -> torch.Tensor:
    """v = model(x, σ) in float32.

    Args:
        latents: [N, L, C]. sigma: [N], the timestep, as in diffusers. prompt_index: [N], rows of `conditioning`.
        guidance_embeds: whether the model takes a guidance scale (FLUX.1-dev does, schnell does not).
    """
    guidance = torch.full_like(sigma, conditioning.guidance_scale) if guidance_embeds else None
    prediction = transformer(
        hidden_states=latents,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=conditioning.pooled_prompt_embeds[prompt_index],
        encoder_hidden_states=conditioning.prompt_embeds[prompt_index],
        txt_ids=conditioning.text_ids,
        img_ids=conditioning.image_ids,
        return_dict=False,
    )[0]
    return prediction.float()


def forward_flops(transformer: FluxTransformer2DModel, image_tokens: int, text_tokens: int) -> float:
    """Floating point operations of one row's forward pass. Counts the blocks' matrix products, 2 per multiply-add.

    Each token passes 12 d² weights per block, double or single. Attention over all S tokens adds 4 S² d per block.
    Embedders, modulation and the last layer are below 1 % at FLUX's size and left out.
    """
    config = transformer.config
    width, tokens = config.num_attention_heads * config.attention_head_dim, image_tokens + text_tokens
    return (config.num_layers + config.num_single_layers) * (24 * width**2 * tokens + 4 * tokens**2 * width)


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKL, latents: torch.Tensor, height: int, width: int, batch_size: int
) -> list[Image.Image]:
    """Decodes packed latents [N, L, C] to N PIL pictures of height × width pixels, `batch_size` pictures at a time.

    After the first out-of-memory error, decodes one picture at a time, large ones in tiles with blended seams.
    """
    factor = vae_scale_factor(vae)
    unpacked = FluxPipeline._unpack_latents(latents, height, width, factor)
    unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor

    def decode(size: int) -> list[torch.Tensor]:
        return [vae.decode(part.to(vae.dtype), return_dict=False)[0].float() for part in unpacked.split(size)]

    pixels: list[torch.Tensor] = []
    if not vae.use_tiling:
        try:
            pixels = decode(batch_size)
        except torch.OutOfMemoryError:
            warn(f"{batch_size} pictures don't fit into memory: decoding one at a time in tiles")
            vae.enable_tiling()
    pixels = pixels or decode(1)  # outside the except block, because the exception keeps the full memory alive
    # VaeImageProcessor's rounding, but on the GPU: the copy to the CPU is a quarter of the size.
    rounded = (VaeImageProcessor.denormalize(torch.cat(pixels)) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in rounded.permute(0, 2, 3, 1).cpu().numpy()]


def check_sequence_split(path: str, height: int, width: int, text_tokens: int, parts: int) -> None:
    """Raises FlagError unless `parts` divides the numbers of heads and tokens of the pipeline at `path`."""
    counts = {
        "attention heads": meta_transformer(path).config.num_attention_heads,
        f"image tokens (--h {height} --w {width})": LatentShape.of(meta_vae(path), height, width).tokens,
        "text tokens": text_tokens,
    }
    for name, count in counts.items():
        if count % parts:
            raise FlagError("sp_size", parts, f"must divide the {count} {name}")

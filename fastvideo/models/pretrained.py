"""Models on disk or on a hub: which family they are of, checks before anything is loaded, loading, LoRA, decoding.

All sizes come from config files.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.cli import FlagError, choose_from
from fastvideo.io.messages import warn
from fastvideo.io.model_index import model_index
from fastvideo.io.weights import (
    GGUF,
    loading_problem,
    mismatch,
    not_finite,
    stored_shapes,
    variant_of,
    weight_files,
)
from fastvideo.io.words import counted
from fastvideo.models.family import Family, LatentShape
from fastvideo.models.flux import Flux1
from fastvideo.models.flux2 import Flux2Klein
from fastvideo.models.lora import Adapters, find_lora, lora_file, read_adapters
from fastvideo.models.original import open_transformer, original_prefix, original_shapes

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError

BASE = "pretrained_model_name_or_path"  # the setting that names the base model
FAMILIES = (Flux1, Flux2Klein)
FETCHED = {"data/flux": "flux", "data/flux2_klein": "klein"}  # folder -> part of download_checkpoints.sh


class ModelNotFoundError(FlagError):
    """The setting `field` names neither a local folder with the model nor a hub id that can be read."""


def family_of(path: str, field: str = BASE) -> Family:
    """The family of the pipeline at `path`, by its model_index.json. FLUX.1 if there is none, as loading will say.

    Raises ModelNotFoundError about the setting `field` for a pipeline of another family.
    """
    index = model_index(path)
    names = {pipeline.__name__: family for family in FAMILIES for pipeline in family.pipelines}
    name = index.get("_class_name", next(iter(names)))
    if name not in names:
        problem = f"its model_index.json names {name}; choose a model of {', '.join(names)}"
        raise ModelNotFoundError(field, path, problem)
    return names[name](index)


def misplaced(path: str, field: str = BASE) -> str | None:
    """Why a path is no model's folder although something is there, and what to do. None: it may be one, or a hub id."""
    if Path(path).suffix == ".gguf":
        return GGUF
    if lora_file(path, field):
        where = "as --lora_init in training, or as --model_path in sampling and merging"
        return f"these are LoRA adapters; give their base model here, and them {where}"
    if field == BASE and Path(path).is_dir() and Path(path).name in model_index(str(Path(path).parent)):
        return f"this is a part of a pipeline; give the pipeline's folder, {Path(path).parent}"
    if not Path(path).is_file():
        return None
    try:
        stored_shapes(Path(path))
    except ValueError as error:
        return str(error)
    where = "in the folder transformer/ of a diffusers pipeline, beside config.json and without other weights"
    return f"is one file, without VAE and text encoders; lay it {where}, and give the pipeline's folder"


def may_be_hub_id(path: str) -> bool:
    """Whether a path that isn't there may be a hub id, owner/name."""
    local = path.startswith((".", "/", "~", "data/", "outputs/", "ckpt/")) or Path(path).parent.is_dir()
    return path.count("/") == 1 and not local


def no_folder(path: str) -> str:
    """What to say of a path that is no folder, and no hub id either."""
    if part := FETCHED.get(str(Path(path))):
        return f"no such folder; `bash scripts/huggingface/download_checkpoints.sh {part}` gets it"
    return (
        "no such folder; give a diffusers FLUX pipeline folder such as data/tiny_flux, or a hub id such as "
        "black-forest-labs/FLUX.1-dev"
    )


def _load(cls: type, path: str, field: str = BASE, **kwargs):
    """`cls.from_pretrained`. Raises ModelNotFoundError, one clear line about `field`, for the usual mistakes."""
    if problem := misplaced(path, field):
        raise ModelNotFoundError(field, path, problem)
    if Path(path).is_dir() and kwargs.get("subfolder") and not (Path(path) / kwargs["subfolder"]).is_dir():
        raise ModelNotFoundError(field, path, f"no folder {kwargs['subfolder']}/ in it")
    if not Path(path).exists() and not may_be_hub_id(path):
        raise ModelNotFoundError(field, path, no_folder(path))
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
    variant = variant_of(Path(path, kwargs.get("subfolder", ".")))
    own = issubclass(cls, ModelMixin)  # of diffusers, whose errors name a weight of another size by themselves
    sizes = {} if own else {"ignore_mismatched_sizes": True}  # then the report names it
    model, report = _load(cls, path, field, output_loading_info=True, variant=variant, **sizes, **kwargs)
    if problem := loading_problem(model, report, strict=own):  # text encoders come with parts that FLUX doesn't use
        raise ModelNotFoundError(field, path, f"wrong weights in {kwargs.get('subfolder', 'it')}: {problem}")
    return model


def _transformer_place(path: str) -> dict[str, str]:
    """Arguments with which from_pretrained finds the transformer, in a pipeline or in a checkpoint folder."""
    return {} if any(Path(path).glob("diffusion_pytorch_model*.safetensors")) else {"subfolder": "transformer"}


def _transformer_class(config: dict, path: str, field: str) -> type[ModelMixin]:
    """The class of a transformer by its config.json, which a checkpoint folder has without any model_index.json."""
    classes = {family.transformer.__name__: family.transformer for family in FAMILIES}
    name = config["_class_name"] or next(iter(classes))
    if name not in classes:
        problem = f"its config.json names {name}; choose a model with a {' or a '.join(classes)}"
        raise ModelNotFoundError(field, path, problem)
    return classes[name]


def stored_transformer(path: str, field: str = BASE) -> tuple[ModelMixin, Path]:
    """The transformer without weights, and the folder with its files, whose headers fit. Fetches those of a hub id.

    Raises ModelNotFoundError about the setting `field`, also if there are no .safetensors files.
    """
    transformer, place = meta_transformer(path, field=field), _transformer_place(path).get("subfolder", ".")
    folder = Path(path) if Path(path).is_dir() else Path(_load(_Snapshot, path, field, allow_patterns=f"{place}/*"))
    check_files(path, folder / place, field, transformer)
    if not weight_files(folder / place):
        raise ModelNotFoundError(field, path, "its transformer has no .safetensors files")
    return transformer, folder / place


def load_transformer(path: str, dtype: torch.dtype = torch.float32, field: str = BASE) -> ModelMixin:
    """The transformer of the pipeline at `path`, or of a checkpoint folder that holds only a transformer.

    Raises ModelNotFoundError about the setting `field`.
    """
    place = _transformer_place(path)
    cls, folder = _transformer_class(_load(_Config, path, field, **place), path, field), Path(path, *place.values())
    check_files(path, folder, field)
    if original_prefix(stored_shapes(folder) or {}) is not None:
        return load_weights_of(meta_transformer(path, dtype, field), folder, path, field)
    transformer = _load_weights(cls, path, field, dtype=dtype, **place)
    # Without a dtype conversion, weights are views of the file with any alignment. CPU kernels round differently on
    # unaligned tensors, so a resumed run would differ from an uninterrupted run.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()
    return transformer


def load_weights_of(transformer: ModelMixin, place: Path, path: str, field: str) -> ModelMixin:
    """`transformer`, from the meta device, with the weights of a file or folder, in diffusers' or the original names.

    Raises ModelNotFoundError about the setting `field` = `path` for weights that don't fit or aren't finite.
    """
    check_files(path, place, field, transformer)
    with open_transformer(place, transformer) as read:
        weights = {name: read(name).to(p.dtype, copy=True) for name, p in transformer.state_dict().items()}
    if name := not_finite(weights):
        raise ModelNotFoundError(field, path, f"{name} has values that aren't finite")
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def meta_transformer(path: str, dtype: torch.dtype = torch.float32, field: str = BASE) -> ModelMixin:
    """The transformer without weights, on the meta device. Costs neither time nor memory."""
    config = _load(_Config, path, field, **_transformer_place(path))
    cls = _transformer_class(config, path, field)
    transformer = _meta_model(cls, config, path, field)
    axes, width = transformer.config.axes_dims_rope, transformer.config.attention_head_dim
    count = next(family.position_axes for family in FAMILIES if family.transformer is cls)
    if (
        len(axes) != count or sum(axes) != width or any(axis % 2 for axis in axes)
    ):  # no weight tells that they are wrong
        problem = f"its config.json has axes_dims_rope {list(axes)}, not {count} even numbers that add up to {width}"
        raise ModelNotFoundError(field, path, problem)
    return torch.nn.Module.to(transformer, dtype)  # ModelMixin.to warns


def _meta_model(cls: type, config: dict, path: str, field: str = BASE) -> ModelMixin:
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except Exception as error:  # a constructor raises nearly anything for a value that it doesn't expect
        problem = f"its config.json doesn't describe a {cls.__name__}: {type(error).__name__} {error}"
        raise ModelNotFoundError(field, path, " ".join(problem.split())[:300]) from error


def check_transformer(path: str, field: str = BASE) -> ModelMixin:
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
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if isinstance(model, Flux1.transformer) and (prefix := original_prefix(stored)) is not None:
        wanted = original_shapes(model)
        stored = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    if problem := mismatch(wanted, stored):
        raise ModelNotFoundError(field, path, f"wrong weights in {place.name or 'it'}: {problem}")


def check_pipeline(path: str, prompts: bool = True) -> None:
    """Raises ModelNotFoundError for a pipeline with damaged files, before anything slow: reads headers, not weights.

    Loading checks the rest, and pipelines of a hub. prompts: whether the text encoders are needed too.
    """
    check_transformer(path)
    check_files(path, Path(path, "vae"), model=meta_vae(path))
    if prompts and Path(path).is_dir():
        load_tokenizers(path)
        for part in family_of(path).text_encoders:
            check_files(path, Path(path, part))


def random_transformer(path: str, dtype: torch.dtype, seed: int, device: torch.device | str) -> ModelMixin:
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
        config = dict(FAMILIES[0].transformer.load_config(path, **kwargs))  # of any model
        # FSDP2 puts its own name before that of a class, also in checkpoints of earlier versions.
        return config | {"_class_name": config.get("_class_name", "").removeprefix("FSDP")}


class _Snapshot:
    """Lets `_load` fetch files of a hub id."""

    from_pretrained = staticmethod(snapshot_download)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def check_lora_targets(transformer: ModelMixin, targets: Sequence[str]) -> None:
    """Raises FlagError with the choices, unless every target is the end of a linear layer's name."""
    modules = dict(transformer.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if others := [name for name in modules.keys() - {*linear} if f".{name}".endswith(f".{target}")]:
            problem = f"also names {min(others)}, which is no linear layer; give more of the name"
            raise FlagError("lora_target_modules", target, problem)
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            blocks = (name.split(".", 2) for name in linear if "transformer_blocks." in name)
            choices = dict.fromkeys(inside for _, _, inside in blocks)
            problem = f"no linear layer of that name; {choose_from(choices, target)}"
            raise FlagError("lora_target_modules", target, problem)


def add_lora(transformer: ModelMixin, rank: int, alpha: int, targets: Sequence[str], seed: int) -> None:
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
    transformer: ModelMixin, path: str, rank: int, alpha: int, targets: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The weights from which adapters start that `add_lora` adds, from a LoRA file or a folder with one.

    transformer: without adapters; may be on the meta device. Raises FlagError unless the file has the same layers and
    rank.
    """
    family = next(family for family in FAMILIES if isinstance(transformer, family.transformer))
    adapters = read_adapters(find_lora(path, "lora_init"), family, "lora_init")
    adapters.check_fit(transformer)
    linear = (name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear))
    layers = {name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)}
    return adapters.start_of(layers, rank, alpha)


def load_with_lora(
    base: str, lora: str | Path, dtype: torch.dtype = torch.float32, field: str = "model_path"
) -> ModelMixin:
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
    adapters = read_adapters(find_lora(lora, field), family_of(base), field)
    adapters.check_fit(meta_transformer(base))
    return adapters


def load_vae(path: str, dtype: torch.dtype = torch.float32) -> ModelMixin:
    return _load_weights(family_of(path).vae, path, subfolder="vae", dtype=dtype).eval().requires_grad_(False)


def meta_vae(path: str) -> ModelMixin:
    """The VAE without weights, on the meta device."""
    return _meta_model(family_of(path).vae, _load(_Config, path, subfolder="vae"), path)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def few_steps(path: str) -> bool:
    """Whether the model at `path` was distilled for few steps, as FLUX.1-schnell and FLUX.2-klein were."""
    family = family_of(path)
    if isinstance(family, Flux1):  # schnell is the one that takes no guidance
        return not _load(_Config, path, subfolder="transformer").get("guidance_embeds")
    return family.step_distilled


def longest_prompt(path: str) -> float:
    """Tokens of the prompts that the model at `path` was trained with, if its tokenizer may declare more."""
    try:
        return 256 if isinstance(family_of(path), Flux1) and few_steps(path) else math.inf
    except ModelNotFoundError:  # a folder with the text encoders alone
        return math.inf


def load_tokenizers(path: str) -> DiffusionPipeline:
    """The pipeline without its models: tokenizers and scheduler, quickly. Prompts are limited to `longest_prompt`.

    Raises FlagError if a tokenizer has no vocabulary: transformers 5 then makes one that encodes all prompts alike.
    """
    family = family_of(path)
    with _without_progress_bar():  # a few small parts
        pipe = _load(family.pipelines[0], path, **dict.fromkeys(("transformer", "vae", *family.text_encoders)))
    for part in family.tokenizers:
        tokenizer = getattr(pipe, part)
        # Its warning about long texts is wrong here, because the pipeline cuts them.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:  # an empty T5 tokenizer still has the space
            raise FlagError(BASE, path, f"no vocabulary in its {part}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_prompt(path))  # of the last, see `Family`
    return pipe


def load_text_encoders(path: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline without transformer and VAE, for embedding prompts."""
    # It would repeat the rest of each long prompt, also of those that CLIP alone doesn't see; see CutPrompts.
    logging.getLogger(family_of(path).pipelines[0].__module__).setLevel(logging.ERROR)
    pipe = load_tokenizers(path)
    for part, cls in family_of(path).text_encoders.items():
        pipe.register_modules(**{part: _load_weights(cls, path, subfolder=part, dtype=dtype)})
    return pipe


class CutPrompts:
    """The prompts, of all that a program encodes, that have more tokens than the model takes.

    FLUX.1's CLIP takes 77 tokens, but only for the pooled embedding: what comes later still reaches the model through
    T5.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tokens: dict[str, int] = {}  # prompt -> its tokens
        self.limit = 0

    def look(self, pipe: DiffusionPipeline, prompts: Sequence[str], max_sequence_length: int) -> None:
        """Counts the tokens of prompts that are encoded now."""
        self.limit = self.family.max_sequence_length(pipe, max_sequence_length)
        counts = zip(prompts, self.family.count_tokens(pipe, prompts), strict=True)
        self.tokens |= {prompt: count for prompt, count in counts if count > self.limit}

    def warn(self) -> None:
        """Says in one line how many prompts were cut, if any, and which is the longest."""
        if self.tokens:
            longest, tokens = max(self.tokens.items(), key=lambda item: item[1])
            warn(
                f"the model takes {self.limit} tokens of a prompt and doesn't see what follows in "
                f"{counted(len(self.tokens), 'prompt')}; the longest has {tokens} tokens: {longest[:80]!r}"
            )


@torch.no_grad()
def decode_latents(
    family: Family, vae: ModelMixin, latents: torch.Tensor, height: int, width: int, batch_size: int
) -> list[Image.Image]:
    """Decodes packed latents [N, L, C] to N PIL pictures of height × width pixels, `batch_size` pictures at a time.

    After the first out-of-memory error, decodes one picture at a time, large ones in tiles with blended seams.
    """
    unpacked = family.to_vae(vae, latents, height, width)

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

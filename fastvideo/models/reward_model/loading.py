"""Checkpoints of the reward models: the right files, downloads, number formats; and scoring in batches."""

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before transformers and open_clip)
from fastvideo.cli import FlagError, choose_from
from fastvideo.io.devices import DTYPES, torch_dtype
from fastvideo.io.weights import not_finite
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.spec import REWARDS, File, Reward, RewardConfig

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

logger = logging.getLogger(__name__)

# The longer side is at most this many times the shorter one: Qwen2-VL's limit. GenEval's detector would shrink the
# shorter side to nothing.
MOST_ELONGATED = 200

# Matches paths of files and folders, but no names on a hub: "hf-hub:owner/name", "owner/name", "ImageReward-v1.0".
_LOCAL_PATH = re.compile(r"^[./~]|/.*/|\.(pt|pth|bin|safetensors|json|ckpt)$")


def _is_local(path: str) -> bool:
    """Whether a path means a file or folder here. data/x does if there is a folder data; owner/name doesn't."""
    return bool(_LOCAL_PATH.search(path)) or ("/" in path and Path(path).parent.is_dir())


def bad_file(field: str, path: str | Path, problem: str) -> FlagError:
    """An error with the setting, the file, the problem, and the command that gets the right file, if there is one."""
    parts = {file.field: entry.download for entry in REWARDS.values() for file in entry.files}
    if parts.get(field):
        problem = f"{problem.rstrip('.')}; `bash scripts/huggingface/download_checkpoints.sh {parts[field]}` gets it"
    return FlagError(field, path, problem)


def check_file(file: File, setting: str | None) -> None:
    """Raises FlagError if a file is not where its setting says. Names on a hub are not looked up.

    setting: the value of the setting `file.field`.
    """
    if file.optional and setting is None:
        return
    path = os.path.join(setting or "", file.name) if file.name else setting
    if not path:
        raise FlagError(file.field, None, f"not given; {file.what} belongs there")
    if not Path(path).exists() and (_is_local(path) or not file.hub):
        raise bad_file(file.field, path, f"no such file; {file.what} belongs there")
    if file.inside and Path(path).exists() and not Path(path, file.inside).is_file():
        raise bad_file(file.field, path, f"has no {file.inside}; {file.what} belongs there")


def on_the_hub_only(path: str, inside: str | None = None) -> bool:
    """Whether `path` names a repository of a hub, owner/name or hf-hub:owner/name, that isn't in the hub's cache.

    inside: a file of the repository; None: its configuration.
    """
    name = path.removeprefix("hf-hub:")
    if Path(path).exists() or _is_local(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    known = (inside,) if inside else ("config.json", "open_clip_config.json")
    return not any(isinstance(try_to_load_from_cache(name, file), str) for file in known)


def to_download(entry: Reward, config: Any, mode: str | None) -> list[tuple[str, str]]:
    """(setting, path) of the files that a reward will download from a hub: neither here nor in the hub's cache."""
    found = [
        (file.field, getattr(config, file.field))
        for file in entry.files
        if file.hub and file.mode in (None, mode) and on_the_hub_only(getattr(config, file.field), file.inside)
    ]
    for item in entry.downloads:
        chosen = getattr(config, item.instead) if item.instead else None
        needed = item.mode in (None, mode) and chosen in (None, RewardConfig.image_reward_path)
        path = Path(config.image_reward_score_dir, item.name)
        folder_or_file = Path(config.image_reward_score_dir, Path(item.name).parts[0])
        here = folder_or_file.exists() or isinstance(try_to_load_from_cache(item.repository, path.name), str)
        if needed and not here:
            found.append(("image_reward_score_dir", str(path)))
    return found


def check_device(device: str | None) -> None:
    """Raises FlagError if the setting reward_device is no device of this machine; None: the process's own device."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if device is not None and device not in choices:
        raise FlagError("reward_device", device, choose_from(choices, device))


@contextmanager
def proxies(http_proxy: str | None, https_proxy: str | None) -> Iterator[None]:
    """Sets the environment's proxies, and restores it at the end: each model's proxies are for its downloads only."""
    given = {"HTTP_PROXY": http_proxy, "HTTPS_PROXY": https_proxy}
    wanted = {key: value for name, value in given.items() if value for key in (name, name.lower())}
    if not wanted:
        yield
        return
    from huggingface_hub import close_session  # the hub's client keeps the proxies that it was opened with

    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    close_session()
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        close_session()


def _hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions of a failed download, and of a damaged file.

    A proxy's refusal is an error of the HTTP client that the hub uses.
    """
    from huggingface_hub import get_session

    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return OSError, client.HTTPError, SafetensorError


@contextmanager
def downloading(
    field: str, path: str | Path, http_proxy: str | None = None, https_proxy: str | None = None
) -> Iterator[None]:
    """For code that may ask a hub: sets the proxies, and turns a failed download into the error of `bad_file`."""
    with proxies(http_proxy, https_proxy):
        try:
            yield
        except Exception as error:
            if isinstance(error, _hub_errors()):
                raise bad_file(field, path, (str(error) or repr(error)).splitlines()[0]) from error
            raise


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises OSError for a tokenizer without a vocabulary: transformers 5 makes one if it finds no vocabulary file."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"{source}: no vocabulary of its tokenizer found")


def read_checkpoint(path: str | Path, field: str, device: str = "cpu") -> dict[str, Any]:
    """The dict in a .pt, .pth, .bin or .safetensors file, tensors on the device. Code in the file is never run.

    Raises FlagError, naming the setting `field`, if there is no such file or it isn't a checkpoint.
    """
    if not Path(path).is_file():
        raise bad_file(field, path, "no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path, device)
        loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen types for a damaged file
        cause = (str(error) or repr(error)).splitlines()[0]
        raise bad_file(field, path, f"not a readable checkpoint ({cause[:200]})") from error
    if not isinstance(loaded, dict):
        raise bad_file(field, path, f"holds a {type(loaded).__name__}, expected a dict of weights")
    return loaded


def load_openai_clip(path: str | Path, field: str) -> tuple[torch.nn.Module, Callable, Callable]:
    """OpenAI's CLIP ViT-L/14 in a file of OpenAI's format: (model, preprocessing of a picture, tokenizer of texts).

    Raises FlagError, naming the setting `field`, for another file.
    """
    import clip

    try:  # clip.load reads a given file without checking its sum
        model, preprocess = clip.load(str(path), device="cpu", jit=False)
    except Exception as error:  # half a dozen types for another file
        raise bad_file(field, path, "not a readable CLIP checkpoint") from error
    if model.visual.input_resolution != 224:
        raise bad_file(field, path, "a CLIP for 224 pixel pictures is needed")
    if name := not_finite(model.state_dict()):
        raise bad_file(field, path, f"{name} has values that aren't finite")
    return model, preprocess, clip.tokenize


def load_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path, field: str) -> None:
    """Loads weights by name.

    Raises FlagError for a weight that is missing, of another shape, unknown to the module or not finite.
    Weights of whole parts that the module doesn't have, for example a momentum encoder, are left out and logged.
    """
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise bad_file(field, path, "holds other things than named weights")
    wanted = module.state_dict()
    parts = {name.split(".")[0] for name in wanted}
    # position_ids are always 0, 1, 2, ...; only some versions of the packages store them.
    known = {k: v for k, v in state.items() if k.split(".")[0] in parts and not k.endswith("position_ids")}
    needed = {k for k in wanted if not k.endswith("position_ids")}
    problems = [f"{k} is missing" for k in sorted(needed - known.keys())]
    problems += [f"{k} is not part of the model" for k in sorted(known.keys() - needed)]
    problems += [
        f"{k} has shape {tuple(known[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in sorted(known.keys() & needed)
        if known[k].shape != wanted[k].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise bad_file(field, path, f"wrong checkpoint for {type(module).__name__}: {problems[0]}{more}")
    if name := not_finite({k: known[k] for k in needed}):
        raise bad_file(field, path, f"{name} has values that aren't finite")
    left_out = sorted({k.split(".")[0] for k in state} - parts)
    if left_out:
        logger.info("%s: not needed and left out: %s", path, ", ".join(left_out))
    # A module on the device "meta" has no memory to copy into.
    module.load_state_dict(known, strict=False, assign=next(module.parameters()).is_meta)


def prepare(module: torch.nn.Module, device: str, dtype: str) -> torch.nn.Module:
    """The module ready to score: on the device, no gradients, no dropout, weights in dtype ("fp32", "bf16" or "fp16").

    Norm layers stay in fp32. For a dtype other than fp32 call the module under `scoring(device, dtype)`.
    """
    if dtype not in DTYPES:
        raise FlagError("reward_dtype", repr(dtype), choose_from(DTYPES, dtype))
    module.float()
    for part in module.modules():
        if not isinstance(part, torch.nn.LayerNorm):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(torch_dtype(dtype))
    return module.to(device).eval().requires_grad_(False)


@contextmanager
def scoring(device: str, dtype: str) -> Iterator[None]:
    """Inference mode, with autocast if the weights aren't fp32."""
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch_dtype(dtype), enabled=dtype != "fp32"):
        yield


def fitting(images: Sequence[Image.Image], name: str) -> list[bool]:
    """Whether each picture isn't too elongated for a reward. How many are is logged. name: of the reward."""
    fits = [max(image.size) <= MOST_ELONGATED * min(image.size) for image in images]
    if not all(fits):
        logger.warning("%s: %d of %d pictures are too elongated", name, len(fits) - sum(fits), len(fits))
    return fits


def in_batches(
    score: Callable[[list[Image.Image], list[str]], torch.Tensor],
    images: Sequence[Image.Image],
    prompts: str | Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """The scores of all images, float64 [N] or [N, components], in batches of at most batch_size images.

    prompts: one per image, or one str for all. score: (RGB images, prompts) of a batch -> [n] or [n, components].
    """
    prompts = prompt_per_image(prompts, len(images))
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [image.convert("RGB") for image in images[start : start + batch_size]]
        parts.append(score(batch, prompts[start : start + batch_size]).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def cosine(
    image_features: torch.Tensor, prompts: list[str], encode_text: Callable[[list[str]], torch.Tensor]
) -> torch.Tensor:
    """Cosine [n], in fp32, of image features [n, d] and the features of the images' prompts.

    encode_text: texts -> features [texts, d]; it gets each different prompt once.
    """
    unique = list(dict.fromkeys(prompts))
    text_features = encode_text(unique)[[unique.index(prompt) for prompt in prompts]]
    return torch.nn.functional.cosine_similarity(image_features.float(), text_features.float(), dim=-1)

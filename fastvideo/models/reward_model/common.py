"""What the neural reward models share: loading, batching, number formats and a command line."""

import argparse
import importlib
import inspect
import logging
import os
import pickle
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fastvideo.torchvision_repair  # noqa: F401  (before transformers and open_clip)

import numpy as np
import torch
from PIL import Image

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The part of scripts/huggingface/download_checkpoints.sh that gets the file of a flag.
DOWNLOADS = {
    "hps_path": "hps",
    "clip_score_path": "clip",
    "image_reward_path": "image_reward",
    "image_reward_med_config": "image_reward",
    "image_reward_score_dir": "image_reward",
    "pick_score_path": "pick",
}
DEMO_IMAGE = Path(__file__).parents[3] / "assets" / "reward_demo.png"
DEMO_PROMPT = "a large red circle and a small yellow square on a blue background"


@contextmanager
def proxies(http_proxy: str | None, https_proxy: str | None) -> Iterator[None]:
    """Sets the proxies for a download and puts back what was there, so that one model's don't reach the others."""
    given = {"HTTP_PROXY": http_proxy, "HTTPS_PROXY": https_proxy}
    wanted = {key: value for name, value in given.items() if value for key in (name, name.lower())}
    if not wanted:
        yield
        return
    from huggingface_hub import close_session  # its one client keeps the proxies that it was opened with

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
    """What a failed download raises; what a proxy refuses comes as an error of the hub's own HTTP client."""
    from huggingface_hub import get_session

    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return OSError, client.HTTPError


@contextmanager
def downloading(
    flag: str, path: str | Path, http_proxy: str | None = None, https_proxy: str | None = None
) -> Iterator[None]:
    """Around what may ask a hub: through the given proxies; a failure is bad_file's error."""
    with proxies(http_proxy, https_proxy):
        try:
            yield
        except Exception as error:
            if isinstance(error, _hub_errors()):
                raise bad_file(flag, path, (str(error) or repr(error)).splitlines()[0]) from error
            raise


def bad_file(flag: str, path: str | Path, problem: str) -> ValueError:
    """An error that names flag, file, problem and the command that gets the right file."""
    command = f"bash scripts/huggingface/download_checkpoints.sh {DOWNLOADS[flag]}"
    return ValueError(f"--{flag} {path}: {problem}; `{command}` gets it")


def check_device(device: str | None) -> None:
    """Raises ValueError when --reward_device is no device of this machine."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if device is not None and device not in choices:
        raise ValueError(f"--reward_device {device}: choose from {', '.join(choices)}")


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises OSError for a tokenizer of special tokens alone, as transformers 5 makes where it finds no vocabulary."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"{source}: no vocabulary of its tokenizer found")


def read_checkpoint(path: str | Path, flag: str) -> dict[str, Any]:
    """The dict in a .pt, .pth, .bin or .safetensors file, tensors on the CPU; code in it is never run.

    Raises ValueError naming the flag when there is no such file or it isn't a checkpoint.
    """
    if not Path(path).is_file():
        raise bad_file(flag, path, "no such file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise bad_file(flag, path, f"not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(loaded, dict):
        raise bad_file(flag, path, f"holds a {type(loaded).__name__}, expected a dict of weights")
    return loaded


def load_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path, flag: str) -> None:
    """Loads weights by name. Raises ValueError when one is missing, has another shape or isn't known to the module.

    Weights of parts that the module doesn't have (a training run's momentum encoder, say) are left out, and logged.
    """
    wanted = module.state_dict()
    parts = {name.split(".")[0] for name in wanted}
    # position_ids are 0, 1, 2, ...: some versions of the packages store them, some don't.
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
        raise bad_file(flag, path, f"wrong checkpoint for {type(module).__name__}: {problems[0]}{more}")
    left_out = sorted({k.split(".")[0] for k in state} - parts)
    if left_out:
        logger.info("%s: not needed and left out: %s", path, ", ".join(left_out))
    module.load_state_dict(known, strict=False)


def prepare(module: torch.nn.Module, device: str, dtype: str) -> torch.nn.Module:
    """A module for scoring: on the device, no gradients, no dropout, weights in dtype ("fp32", "bf16" or "fp16").

    Norm layers stay in fp32. With another dtype than fp32 call the module under `scoring(device, dtype)`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--reward_dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    module.float()
    for part in module.modules():
        if not isinstance(part, torch.nn.LayerNorm):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(DTYPES[dtype])
    return module.to(device).eval().requires_grad_(False)


@contextmanager
def scoring(device: str, dtype: str) -> Iterator[None]:
    """Inference mode, with autocast when the weights aren't fp32."""
    with torch.inference_mode(), torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "fp32"):
        yield


def in_batches(
    score: Callable[[list[Image.Image], list[str]], torch.Tensor],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """score(images, prompts) -> [n] or [n, components], called on at most batch_size RGB images; float64, joined."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    parts = []
    for start in range(0, len(images), batch_size):
        batch = [image.convert("RGB") for image in images[start : start + batch_size]]
        parts.append(score(batch, list(prompts[start : start + batch_size])).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def cosine(
    image_features: torch.Tensor, prompts: list[str], encode_text: Callable[[list[str]], torch.Tensor]
) -> torch.Tensor:
    """Cosine [n] of image features [n, d] and their prompts' features, in fp32. Equal prompts are encoded once."""
    unique = list(dict.fromkeys(prompts))
    text_features = encode_text(unique)[[unique.index(prompt) for prompt in prompts]]
    return torch.nn.functional.cosine_similarity(image_features.float(), text_features.float(), dim=-1)


def server_urls(urls: str, flag: str) -> list[str]:
    """The URLs of a comma-separated flag. Raises ValueError where one isn't the address of an HTTP server."""
    import httpx  # not at the top: most rewards need no network

    found = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
    for url in found:
        shown = url.rpartition("@")[2]  # what stands before it may be a password
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--{flag} {shown}: must start with http:// or https://")
        try:
            httpx.URL(url)
        except httpx.InvalidURL:
            raise ValueError(f"--{flag} {shown}: not a URL; write @ : / # ? in a password as %40 and so on") from None
    return found


def public_url(url: str) -> str:
    """A URL for messages and logs: without user, password, and the query, which may hold a key."""
    import httpx

    return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None))


def ask_in_turn(
    send: Callable[[str], Answer], urls: Sequence[str], first: int, retries: int, backoff: float
) -> tuple[Answer | None, str]:
    """(send(url), "") of the first server that answers, or (None, what went wrong last).

    Begins at urls[first] (counted round) and goes to the next at each of `retries` further attempts. Before it asks a
    server again it waits backoff seconds, twice as long each time, give or take half, so that many clients don't come
    back at the same moment. A server that refuses (a 4xx but 408 and 429: asking again can't mend it) isn't asked
    again. An answer that `send` can't read counts as a failure.
    """
    import httpx

    turn = deque(urls)
    turn.rotate(-first)
    asked, problem = set(), ""
    for _ in range(retries + 1):
        if not turn:  # all have refused
            break
        url = turn.popleft()
        if url in asked:
            time.sleep(backoff * random.uniform(0.5, 1.5))
            backoff *= 2
        asked.add(url)
        try:
            return send(url), ""
        except httpx.HTTPStatusError as error:
            # httpx writes the whole URL, password included, into the message.
            status, text = error.response.status_code, error.response.text[:300]
            problem, refused = f"HTTP {status} {text}", status < 500 and status not in (408, 429)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
            problem, refused = repr(error), False
        problem = f"{public_url(url)}: {problem}".splitlines()[0]
        if not refused:
            turn.append(url)
    return None, problem


def demo_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every model file has when it is run by itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    for proxy in ("--http_proxy", "--https_proxy"):
        parser.add_argument(proxy, default=None, help="for models that download their weights")
    parser.add_argument("--image", nargs="+", default=[str(DEMO_IMAGE)], help="pictures to score")
    parser.add_argument("--prompt", default=DEMO_PROMPT, help="their prompt")
    return parser


def print_scores(model: Any, args: argparse.Namespace) -> None:
    """Scores args.image against args.prompt and prints a line an image, components of granular models included."""
    images = [Image.open(path) for path in args.image]
    from fastvideo.models.reward_model.utils import compute_reward

    _, _, scores, _ = compute_reward(images, [args.prompt] * len(images), {model.name: model}, {model.name: 1.0})
    for i, path in enumerate(args.image):
        print(f"{path}: " + ", ".join(f"{name} {values[i]:.4f}" for name, values in scores.items()))


def run_demo(build: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Parses the command line, builds a model from the flags that it has parameters for, and prints its scores."""
    args = parser.parse_args()
    known = inspect.signature(build).parameters
    try:
        print_scores(build(**{name: value for name, value in vars(args).items() if name in known}), args)
    except (ValueError, OSError) as error:
        parser.error(str(error).splitlines()[0])

"""A reward server: any --reward_model over HTTP. With it rewards run on other GPUs than training.

    python fastvideo/models/reward_model/server.py --reward_model multi_reward --device cuda:0
    python fastvideo/train_grpo_flux.py --reward_model multi_reward --reward_server http://127.0.0.1:8100 ...

Start it with the reward flags of the run (with --evaluation for eval_reward.py); clients compare them. It listens on
the loopback and asks for no password, so reach it from other machines through an SSH tunnel or a private network.

    GET  /health   {"status", "settings", "models", "limits", "judge", "groupwise"}: names, weights, parts, schedule;
                   always answers
    POST /score    {"settings", "model", "images": [base64 PNG or JPEG], "prompts", "curr_step", "total_steps",
                    "metadata": [object], "groups": [number of each picture's group]}
                   the last two may be missing; models in "groupwise" need groups
                   -> {"scores": {name: [number, or null for failed], f"{name}_{component or check}": [...]}}

400: malformed request; 409: settings differ; 413: over a limit; 415: not JSON; 500: the model raised an error.
"""

import asyncio
import base64
import errno
import io
import json
import logging
import math
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass, parse_first
from fastvideo.models.reward_model.spec import RewardSpecConfig, resolve_reward_spec, reward_settings


@dataclass
class ServerConfig(RewardSpecConfig):
    """Settings of a reward server."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets every machine in the network score")
    port: int = flag(8100, "port to listen on; 0: any free one", at_least=0, below=65536)
    device: str = flag("auto", "cpu, cuda, cuda:1, ... or auto; --reward_device goes before it")
    evaluation: bool = flag(False, "score as eval_reward.py does: ImageReward overall, PickScore's report scale")
    max_body_mb: int = flag(128, "largest request in MB", at_least=1)
    max_images: int = flag(64, "most pictures per request", at_least=1)
    max_pixels: int = flag(2**26, "most pixels per request, all pictures together", at_least=1)

    def __post_init__(self) -> None:
        if self.reward_server:
            raise FlagError("reward_server", self.reward_server, "a server scores by itself; leave it out")
        check_fields(self)
        resolve_reward_spec(self)


if __name__ == "__main__":  # before torch, which takes seconds: --help and a refused flag answer at once
    parse_first(ServerConfig, doc=__doc__)

from fastvideo.io.devices import resolve_device
from fastvideo.models.reward_model.granular import RewardModel
from fastvideo.models.reward_model.groups import is_groupwise
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files, compute_reward, judge_of

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG")  # of pictures; a training run sends PNG, which loses nothing


def _need(condition: bool, status: int, detail: str) -> None:
    if not condition:
        raise HTTPException(status, detail)


def decode(texts: Sequence[str], max_pixels: int) -> list[Image.Image]:
    """PIL images of PNGs and JPEGs in base64. All sizes are read and added up before the first pixel is unpacked.

    Raises HTTPException 400 for a text that is no such picture or a broken one, 413 for more than max_pixels together.
    """
    images, pixels = [], 0
    for i, text in enumerate(texts):
        try:
            images.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=FORMATS))
        except Image.DecompressionBombError:
            raise HTTPException(413, f"image {i}: too many pixels for one picture") from None
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise HTTPException(400, f"image {i}: not a PNG or JPEG in base64 ({type(error).__name__})") from None
        pixels += images[-1].width * images[-1].height
        _need(pixels <= max_pixels, 413, f"image {i}: with it the request has more than {max_pixels} pixels")
    for i, image in enumerate(images):
        try:
            image.load()
        except Exception as error:  # a broken file raises nearly anything
            raise HTTPException(400, f"image {i}: broken ({type(error).__name__})") from None
    return images


def _check_progress(curr_step: Any, total_steps: Any, n: int) -> None:
    def number(value: Any) -> bool:
        return type(value) in (int, float) and -1e15 < value < 1e15

    many = isinstance(curr_step, list) and len(curr_step) == n and all(map(number, curr_step))
    _need(curr_step is None or number(curr_step) or many, 400, "curr_step: expected null, a number or one per image")
    total = number(total_steps) and total_steps > 0
    _need(total or (curr_step is None and total_steps is None), 400, "total_steps: expected a number above 0")


def answer(
    body: bytes, config: ServerConfig, models: dict[str, RewardModel], settings: dict[str, Any]
) -> dict[str, list[float | None]]:
    """Scores a request: {key of compute_reward's rewards_dict: one number per image, None where a score failed}."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None
    _need(isinstance(asked, dict), 400, "expected a JSON object")
    theirs = asked.get("settings")
    _need(isinstance(theirs, dict), 400, "settings: expected an object as /health shows it")
    for key in [*settings, *theirs]:
        _need(settings.get(key) == theirs.get(key), 409, f"this server has {key[:80]} {settings.get(key)!r}, not yours")
    name, images, prompts = asked.get("model"), asked.get("images"), asked.get("prompts")
    _need(isinstance(name, str) and name in models, 400, f"model: choose from {', '.join(models)}")
    for part in (images, prompts):
        texts = isinstance(part, list) and all(isinstance(text, str) for text in part)
        _need(texts and len(part) > 0, 400, "images, prompts: expected lists of texts")
    _need(len(images) == len(prompts), 400, f"{len(images)} images but {len(prompts)} prompts")
    _need(len(images) <= config.max_images, 413, f"{len(images)} images: at most {config.max_images} per request")
    metadata = asked.get("metadata")
    objects = isinstance(metadata, list) and all(isinstance(entry, dict) for entry in metadata)
    _need(metadata is None or (objects and len(metadata) == len(images)), 400, "metadata: expected an object per image")
    groups = asked.get("groups")
    numbers = isinstance(groups, list) and len(groups) == len(images) and all(type(group) is int for group in groups)
    _need(numbers or (groups is None and not is_groupwise(models[name])), 400, "groups: expected one number per image")
    curr_step, total_steps = asked.get("curr_step"), asked.get("total_steps")
    _check_progress(curr_step, total_steps, len(images))
    pictures = decode(images, config.max_pixels)
    step = np.array(curr_step) if isinstance(curr_step, list) else curr_step
    try:
        one = {name: models[name]}, {name: 1.0}
        scores = compute_reward(pictures, prompts, *one, step, total_steps, metadata=metadata, groups=groups)[2]
    except Exception as error:  # the server keeps running; the client counts failed samples
        logger.exception("%s could not score %d images", name, len(images))
        raise HTTPException(500, f"{name} raised {type(error).__name__}") from error
    return {key: [v if math.isfinite(v) else None for v in values.tolist()] for key, values in scores.items()}


def build_app(config: ServerConfig, models: dict[str, RewardModel]) -> Starlette:
    """The web application. models: the result of build_reward_models for this config."""
    settings = reward_settings(config, config.evaluation)
    names = dict(zip(resolve_reward_spec(config), models, strict=True))
    limit = config.max_body_mb * 2**20
    limits = {"body_bytes": limit, "images": config.max_images, "pixels": config.max_pixels}
    worker, turn = ThreadPoolExecutor(1, thread_name_prefix="scoring"), asyncio.Lock()

    async def health(request: Request) -> Response:
        state = "scoring" if turn.locked() else "idle"
        served = {"settings": settings, "models": names, "limits": limits, "judge": judge_of(models)}
        served["groupwise"] = [name for name, model in models.items() if is_groupwise(model)]
        return JSONResponse({"status": state, **served})

    async def score(request: Request) -> Response:
        # A web page open in a browser on this machine can't send this type without permission.
        kind = request.headers.get("content-type", "").split(";")[0].strip()
        _need(kind == "application/json", 415, "expected Content-Type: application/json")
        body = bytearray()
        too_large = f"the request is larger than {limit} bytes"
        length = request.headers.get("content-length", "0")
        _need(length.isdigit() and int(length) <= limit, 413, too_large)
        async for part in request.stream():
            body += part
            _need(len(body) <= limit, 413, too_large)
        async with turn:
            if await request.is_disconnected():  # the client gave up while other requests were scored
                return Response(status_code=400)
            loop = asyncio.get_running_loop()
            scores = await loop.run_in_executor(worker, answer, bytes(body), config, models, settings)
        return JSONResponse({"scores": scores})

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the address, and doesn't listen yet. Raises FlagError if the address can't be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        known = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        field, value = ("port", port) if known else ("host", host)
        raise FlagError(field, value, getattr(error, "strerror", None) or str(error)) from error
    return listener


@flag_errors("server.py")
def main(argv: Sequence[str] | None = None) -> None:
    """The command line: loads the rewards, prints the address and serves until it is stopped."""
    config = parse_dataclass(ServerConfig, argv, __doc__)
    check_reward_files(config, config.evaluation)
    # The port is bound before the slow part, so that a port in use is an error at once. Until the server listens,
    # clients are refused.
    listener = bound_socket(config.host, config.port)
    models, weights = build_reward_models(config, resolve_device(config.device), config.evaluation)
    web = uvicorn.Config(build_app(config, models), log_level="warning", access_log=False)
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"rewards: {', '.join(f'{name} {weight:.4g}' for name, weight in weights.items())}")
    print(f"listening on http://{host}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(web).run(sockets=[listener])


if __name__ == "__main__":
    main()

"""Rewards scored by other processes, `--reward_server URL[,URL...]`: the client of server.py.

Pictures go out as lossless PNG and scores come back as the numbers that they are, so a run scores the same as with the
models in its own process. A request that still fails after its retries is failed samples (NaN), never a score.
"""

import base64
import io
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastvideo.models.reward_model.common import ask_in_turn, public_url, server_urls
from fastvideo.models.reward_model.granular import GranularRewardModel
from fastvideo.models.reward_model.utils import RewardModel, resolve_reward_spec, reward_settings

import httpx
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

BACKOFF = 0.5  # seconds; doubles at each retry
PROMPT_BYTES = 8192  # allowed for a prompt when request sizes are checked before training
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def to_base64_png(image: Image.Image) -> str:
    """Lossless; compressed little, because the network is seldom what takes time."""
    buffer = io.BytesIO()
    image = image if image.mode in PNG_MODES else image.convert("RGB")
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def check_limits(limits: dict[str, int], config: Any) -> None:
    """Raises ValueError when a request of --reward_batch_size pictures may be over one of a server's limits.

    The size of pictures is known where the run makes them (config.h, config.w); an evaluation's may be any. Bytes are
    those of noise, which compresses least.
    """
    count, name = config.reward_batch_size, "--reward_batch_size"
    needed = [("images", "pictures", f"{name} {count}", count, "--max_images", 1)]
    if hasattr(config, "h"):
        given = f"{name} {count} with --h {config.h} --w {config.w}"
        noise = np.random.default_rng(0).integers(0, 256, (config.h, config.w, 3), dtype=np.uint8)
        size = len(to_base64_png(Image.fromarray(noise))) + PROMPT_BYTES
        needed += [
            ("pixels", "pixels", given, count * config.h * config.w, "--max_pixels", 1),
            ("body_bytes", "bytes", given, count * size, "--max_body_mb", 2**20),
        ]
    for key, what, given, amount, flag, unit in needed:
        limit = limits.get(key, 0)
        if amount > limit:
            raise ValueError(
                f"{given}: up to {amount} {what} a request, it takes {limit}; lower {name} or start the server with "
                f"{flag} {-(-amount // unit)}"
            )


def _read_scores(response: httpx.Response, keys: Sequence[str], n: int) -> dict[str, list[float | None]]:
    """The scores of an answer. Raises ValueError, LookupError or TypeError when they aren't n numbers for each key."""
    scores = dict(response.json(parse_int=float)["scores"])
    if scores.keys() != set(keys):
        raise ValueError(f"scores of {sorted(scores)}, expected {sorted(keys)}")
    for key, values in scores.items():
        if len(values) != n or not all(value is None or isinstance(value, float) for value in values):
            raise ValueError(f"{key}: expected {n} numbers")
    return scores


class Servers:
    """Reward servers that score the same: a batch is a request, and the requests are shared over the servers."""

    def __init__(self, urls: Sequence[str], settings: dict[str, Any], config: Any) -> None:
        self.urls, self.settings = urls, settings
        self.batch_size, self.retries = config.reward_batch_size, config.reward_server_retries
        self.client = httpx.Client(timeout=httpx.Timeout(config.reward_server_timeout))
        # Of the processes that share a picture (--sp_size) one scores; an evaluation's don't share any.
        self.first = int(os.environ.get("RANK", "0")) // getattr(config, "sp_size", 1)

    def health(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """({url: its settings, models and limits}, what is wrong with the servers that don't answer)."""

        def send(url: str) -> dict[str, Any]:
            response = self.client.get(f"{url}/health")
            response.raise_for_status()
            found = response.json()
            return {part: dict(found[part]) for part in ("settings", "models", "limits")}

        with ThreadPoolExecutor(len(self.urls)) as pool:
            answers = list(pool.map(lambda url: ask_in_turn(send, [url], 0, self.retries, BACKOFF), self.urls))
        alive = {url: found for url, (found, _) in zip(self.urls, answers, strict=True) if found is not None}
        return alive, [problem for _, problem in answers if problem]

    def score(
        self,
        name: str,
        parts: Sequence[str],
        images: list[Image.Image],
        prompts: list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
    ) -> dict[str, np.ndarray]:
        """{name: float64 [N], f"{name}_{part}": [N] ...}, NaN where failed. parts: components and checks."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        keys, step = [name, *(f"{name}_{part}" for part in parts)], None if curr_step is None else np.asarray(curr_step)

        def one(start: int) -> tuple[dict[str, list[float | None]] | None, str]:
            batch = slice(start, start + self.batch_size)
            body = {
                "settings": self.settings,
                "model": name,
                "images": [to_base64_png(image) for image in images[batch]],
                "prompts": list(prompts[batch]),
                "curr_step": None if step is None else step[batch].tolist() if step.ndim else step.item(),
                "total_steps": total_steps,
            }
            content = json.dumps(body).encode()

            def send(url: str) -> dict[str, list[float | None]]:
                response = self.client.post(
                    f"{url}/score", content=content, headers={"Content-Type": "application/json"}
                )
                response.raise_for_status()
                return _read_scores(response, keys, len(body["prompts"]))

            index = self.first + start // self.batch_size
            return ask_in_turn(send, self.urls, index, max(self.retries, len(self.urls) - 1), BACKOFF)

        scores = {key: np.full(len(images), np.nan) for key in keys}
        starts, problems = range(0, len(images), self.batch_size), []
        with ThreadPoolExecutor(len(self.urls)) as pool:
            for start, (found, problem) in zip(starts, pool.map(one, starts), strict=True):
                if found is None:
                    problems.append(problem)
                for key, values in (found or {}).items():
                    scores[key][start : start + len(values)] = np.array(values, dtype=np.float64)
        if problems:
            logger.warning("%s: %d of %d requests failed, e.g. %s", name, len(problems), len(starts), problems[0])
        return scores


class RemoteReward:
    """A model on the servers."""

    def __init__(self, name: str, servers: Servers) -> None:
        self.name, self.servers = name, servers

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N]; NaN for a failed sample."""
        return self.servers.score(self.name, (), images, prompts)[self.name]


class RemoteGranularReward(GranularRewardModel):
    """A granular model on the servers, which weight its components by the progress that goes along."""

    def __init__(
        self, name: str, servers: Servers, components: Sequence[str], checks: Sequence[str], config: Any
    ) -> None:
        self.name, self.servers = name, servers
        self.component_names, self.check_names = tuple(components), tuple(checks)
        super().__init__(
            config.granular_start_weights, config.granular_end_weights, config.granular_schedule, config.granular_gamma
        )

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(weighted sum [N], {component or check: [N]}), NaN where failed."""
        parts = (*self.component_names, *self.check_names)
        scores = self.servers.score(self.name, parts, images, prompts, curr_step, total_steps)
        return scores[self.name], {part: scores[f"{self.name}_{part}"] for part in parts}

    def score_components(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """{component or check: float64 [N]}."""
        return self.score(images, prompts)[1]


def connect(config: Any, evaluation: bool = False) -> tuple[dict[str, RewardModel], dict[str, float]]:
    """The rewards of `--reward_model` on `--reward_server`, as build_reward_models returns them.

    Servers that don't answer now are logged: they may come back. Raises ValueError, one line, when none answers, and
    when one would score something else than this run's flags ask for.
    """
    urls = server_urls(config.reward_server, "reward_server")
    if not urls:
        raise ValueError(f"--reward_server {config.reward_server!r}: no URL in it; give http://host:port")
    if not config.reward_server_timeout > 0:
        raise ValueError(f"--reward_server_timeout {config.reward_server_timeout}: must be above 0")
    if config.reward_server_retries < 0:
        raise ValueError(f"--reward_server_retries {config.reward_server_retries}: must not be negative")
    spec, settings = resolve_reward_spec(config), reward_settings(config, evaluation)
    servers = Servers(urls, settings, config)
    alive, problems = servers.health()
    if not alive:
        raise ValueError(f"--reward_server: no server answers, e.g. {problems[0]}; start server.py with these rewards")
    for problem in problems:
        logger.warning("--reward_server: %s; the others go on without it", problem)
    names = next(iter(alive.values()))["models"]
    for url, found in alive.items():
        theirs, where = found["settings"], f"--reward_server {public_url(url)}"
        for key in [*settings, *theirs]:
            if settings.get(key) != theirs.get(key):
                raise ValueError(
                    f"{where}: it has {key} {theirs.get(key)!r}, this run {settings.get(key)!r}; start the server "
                    "with the reward flags of the run (and --evaluation for evaluations)"
                )
        if found["models"] != names or names.keys() != spec.keys():
            raise ValueError(f"{where}: it serves {found['models']}, expected {names} for {', '.join(spec)}")
        try:
            check_limits(found["limits"], config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    models: dict[str, RewardModel] = {}
    for key in spec:
        name, components, checks = names[key], settings[f"{key}.components"], settings[f"{key}.checks"]
        granular = RemoteGranularReward(name, servers, components, checks, config) if components else None
        models[name] = granular or RemoteReward(name, servers)
    return models, {names[key]: weight for key, weight in spec.items()}

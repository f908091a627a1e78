"""Rewards scored by other processes, `--reward_server URL[,URL...]`: the client of server.py.

Pictures travel as lossless PNG and scores as exact numbers, so a run gets the same scores as from models in its own
process. If a request fails after all retries, its samples are failed samples (NaN), never scores.
"""

import base64
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastvideo.cli import FlagError, check_fields
from fastvideo.io.secrets import redact
from fastvideo.io.waiting import waiting
from fastvideo.models.reward_model.detailed import DetailedReward
from fastvideo.models.reward_model.granular import GranularRewardModel, RewardModel, prompt_per_image
from fastvideo.models.reward_model.groups import Group, joined, parted
from fastvideo.models.reward_model.network import ask_in_turn, below, http_client, server_urls
from fastvideo.models.reward_model.spec import REWARDS, resolve_reward_spec, reward_settings

import httpx
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

BACKOFF = 0.5  # seconds; doubles at each retry
PROMPT_BYTES = 8192  # assumed size of a prompt in the check of request sizes before training
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def to_base64_png(image: Image.Image) -> str:
    """The picture as a lossless PNG in base64, with little compression: the network is seldom the bottleneck."""
    buffer = io.BytesIO()
    image = image if image.mode in PNG_MODES else image.convert("RGB")
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def check_limits(url: str, limits: dict[str, int], config: Any, whole_groups: bool = False) -> None:
    """Raises FlagError if a request of --reward_batch_size pictures may exceed one of the limits of the server at url.

    whole_groups: whether a request may also have the pictures of a whole group, if these are more.
    A training run knows the size of its pictures (config.h, config.w); the pictures of an evaluation may have any size.
    Bytes are estimated from a picture of noise, which compresses least.
    """
    count, name = config.reward_batch_size, "--reward_batch_size"
    if whole_groups and (group := getattr(config, "num_generations", 0)) > count:
        count, name = group, "--num_generations"
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
            raise FlagError(
                "reward_server",
                url,
                f"{given}: up to {amount} {what} per request, the server takes {limit}; lower {name} or start the "
                f"server with {flag} {-(-amount // unit)}",
            )


def _read_scores(response: httpx.Response, keys: Sequence[str], n: int) -> dict[str, list[float | None]]:
    """The scores in an answer. Raises ValueError, LookupError or TypeError if they aren't n numbers for each key."""
    scores = dict(response.json(parse_int=float)["scores"])
    if scores.keys() != set(keys):
        raise ValueError(f"scores of {sorted(scores)}, expected {sorted(keys)}")
    for key, values in scores.items():
        if len(values) != n or not all(value is None or isinstance(value, float) for value in values):
            raise ValueError(f"{key}: expected {n} numbers")
    return scores


class Servers:
    """Reward servers that give the same scores. A batch is one request; the requests are shared over the servers."""

    def __init__(self, urls: Sequence[str], settings: dict[str, Any], config: Any) -> None:
        self.urls, self.settings = urls, settings
        self.batch_size, self.retries = config.reward_batch_size, config.reward_server_retries
        self.client = http_client(urls, "reward_server", timeout=config.reward_server_timeout)
        # One of the processes that compute a picture together (--sp_size) scores it; evaluation has no such setting.
        self.first = int(os.environ.get("RANK", "0")) // getattr(config, "sp_size", 1)

    def health(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """({url: what the server's /health says}, the problems of the servers that don't answer)."""

        def send(url: str) -> dict[str, Any]:
            response = self.client.get(below(url, "/health"))
            response.raise_for_status()
            found = response.json()
            parts = {part: dict(found[part]) for part in ("settings", "models", "limits")}
            return parts | {"judge": found.get("judge"), "groupwise": list(found.get("groupwise", []))}

        with ThreadPoolExecutor(len(self.urls)) as pool, waiting(redact(f"{', '.join(self.urls)} to answer")):
            answers = list(pool.map(lambda url: ask_in_turn(send, [url], 0, self.retries, BACKOFF), self.urls))
        alive = {url: found for url, (found, _) in zip(self.urls, answers, strict=True) if found is not None}
        return alive, [problem for _, problem in answers if problem]

    def _batches(self, count: int, groups: Sequence[int] | None) -> Iterator[slice]:
        """The pictures of each request; see `score`."""
        begin = 0
        while begin < count:
            end = min(begin + self.batch_size, count)
            if groups is not None and end < count and groups[end - 1] == groups[end]:
                first = groups.index(groups[end])
                end = first if first > begin else count - groups[::-1].index(groups[end])
            yield slice(begin, end)
            begin = end

    def score(
        self,
        name: str,
        parts: Sequence[str],
        images: list[Image.Image],
        prompts: list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        groups: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """{name: float64 [N], f"{name}_{part}": [N] ...}, NaN where a score failed. parts: components and checks.

        groups: ascending numbers, one per picture, for a groupwise model. Requests then have whole groups, as many as
        fit into a batch, and at least one.
        """
        prompts = prompt_per_image(prompts, len(images))
        keys, step = [name, *(f"{name}_{part}" for part in parts)], None if curr_step is None else np.asarray(curr_step)

        def one(index: int) -> tuple[dict[str, list[float | None]] | None, str]:
            batch = batches[index]
            body = {
                "settings": self.settings,
                "model": name,
                "images": [to_base64_png(image) for image in images[batch]],
                "prompts": prompts[batch],
                "curr_step": None if step is None else step[batch].tolist() if step.ndim else step.item(),
                "total_steps": total_steps,
            }
            if groups is not None:
                body["groups"] = groups[batch]
            if metadata is not None and any(metadata[batch]):
                body["metadata"] = metadata[batch]
            content = json.dumps(body).encode()

            def send(url: str) -> dict[str, list[float | None]]:
                kind = {"Content-Type": "application/json"}
                response = self.client.post(below(url, "/score"), content=content, headers=kind)
                response.raise_for_status()
                return _read_scores(response, keys, len(body["prompts"]))

            return ask_in_turn(send, self.urls, self.first + index, max(self.retries, len(self.urls) - 1), BACKOFF)

        scores = {key: np.full(len(images), np.nan) for key in keys}
        batches, problems = list(self._batches(len(images), groups)), []
        with ThreadPoolExecutor(len(self.urls)) as pool:
            for batch, (found, problem) in zip(batches, pool.map(one, range(len(batches))), strict=True):
                if found is None:
                    problems.append(problem)
                for key, values in (found or {}).items():
                    scores[key][batch] = np.array(values, dtype=np.float64)
        if problems:
            logger.warning("%s: %d of %d requests failed, e.g. %s", name, len(problems), len(batches), problems[0])
        return scores


class RemoteReward:
    """A reward model on the servers. judge: the id of the model behind --vlm_judge_url, if the reward asks it."""

    takes_metadata = True  # and passes it on; the server's model may take it

    def __init__(self, name: str, servers: Servers, judge: str | None = None) -> None:
        self.name, self.servers, self.judge = name, servers, judge

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """float64 [N]; NaN for a failed sample."""
        return self.servers.score(self.name, (), images, prompts, metadata=metadata)[self.name]


class RemoteGroupReward(RemoteReward):
    """A groupwise model on the servers."""

    groupwise = True

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """The scores of each group's pictures, NaN for a failed sample."""
        return parted(self.servers.score(self.name, (), **joined(groups))[self.name], groups)


class RemoteDetailedReward(DetailedReward):
    """A reward with details or checks on the servers."""

    takes_metadata = True

    def __init__(self, name: str, servers: Servers, details: Sequence[str], checks: Sequence[str]) -> None:
        self.name, self.servers = name, servers
        self.detail_names, self.check_names = tuple(details), tuple(checks)

    def score(
        self, images: list[Image.Image], prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(scores [N], {detail or check: [N]}), NaN where a score failed."""
        parts = (*self.detail_names, *self.check_names)
        scores = self.servers.score(self.name, parts, images, prompts, metadata=metadata)
        return scores[self.name], {part: scores[f"{self.name}_{part}"] for part in parts}


class RemoteGranularReward(GranularRewardModel):
    """A granular model on the servers. They weight the components by the progress in the request."""

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
        """(weighted sum [N], {component or check: [N]}), NaN where a score failed."""
        parts = (*self.component_names, *self.check_names)
        scores = self.servers.score(self.name, parts, images, prompts, curr_step, total_steps)
        return scores[self.name], {part: scores[f"{self.name}_{part}"] for part in parts}

    def score_components(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """{component or check: float64 [N]}."""
        return self.score(images, prompts)[1]


def connect(
    config: Any, evaluation: bool = False, field: str = "reward_model"
) -> tuple[dict[str, RewardModel], dict[str, float]]:
    """The rewards named in `field` on the servers of --reward_server, in the form of build_reward_models.

    A server that doesn't answer now is logged, because it may come back. Raises FlagError if no server answers, or if
    one has other settings than this run, so that its scores would differ.
    """
    urls = server_urls(config.reward_server, "reward_server")
    check_fields(config)
    spec, settings = resolve_reward_spec(config, field), reward_settings(config, evaluation, field)
    servers = Servers(urls, settings, config)
    alive, problems = servers.health()
    if not alive:
        problem = f"no server answers, e.g. {problems[0]}; start server.py with these rewards"
        raise FlagError("reward_server", None, problem)
    for problem in problems:
        logger.warning("--reward_server: %s; the others go on without it", problem)
    names, judge, groupwise = (next(iter(alive.values()))[part] for part in ("models", "judge", "groupwise"))
    for url, found in alive.items():
        theirs = found["settings"]
        for key in [*settings, *theirs]:
            if settings.get(key) != theirs.get(key):
                raise FlagError(
                    "reward_server",
                    url,
                    f"it has {key} {theirs.get(key)!r}, this run {settings.get(key)!r}; start the server with the "
                    "reward flags of the run (and --evaluation for evaluations)",
                )
        if found["models"] != names or names.keys() != spec.keys():
            problem = f"it serves {found['models']}, expected {names} for {', '.join(spec)}"
            raise FlagError("reward_server", url, problem)
        if found["judge"] != judge:
            problem = f"its judge is {found['judge']}, that of another server {judge}"
            raise FlagError("reward_server", url, problem)
        check_limits(url, found["limits"], config, bool(groupwise))
    models: dict[str, RewardModel] = {}
    for key in spec:
        name, components, checks = names[key], settings[f"{key}.components"], settings[f"{key}.checks"]
        if components:
            models[name] = RemoteGranularReward(name, servers, components, checks, config)
        elif checks or settings[f"{key}.details"]:
            models[name] = RemoteDetailedReward(name, servers, settings[f"{key}.details"], checks)
        else:
            asks = key in REWARDS and REWARDS[key].url == "vlm_judge_url"
            single = RemoteGroupReward if name in groupwise else RemoteReward
            models[name] = single(name, servers, judge if asks else None)
    return models, {names[key]: weight for key, weight in spec.items()}

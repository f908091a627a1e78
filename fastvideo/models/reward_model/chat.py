"""The client of OpenAI-compatible chat endpoints (vLLM, SGLang, a vendor) whose models judge pictures.

A request that fails after its retries, and a reply that can't be read, is a failed question (NaN), never a number.
"""

import base64
import io
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastvideo.cli import FlagError
from fastvideo.io.secrets import redact
from fastvideo.models.reward_model.loading import proxies
from fastvideo.models.reward_model.network import ask_in_turn, below, http_client, server_urls

import httpx
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
MOST_NAMES = 10  # of served models in a message; a vendor has hundreds


@dataclass(frozen=True, eq=False)
class Question:
    """One message to the model: pictures, then a text."""

    images: tuple[Image.Image, ...]
    text: str


@dataclass(frozen=True)
class Answer:
    """The model's reply; the name of the model that gave it, empty if the endpoint doesn't say; and for each token of
    the reply, if they were asked for, the log-probabilities of alternatives."""

    text: str
    logprobs: Any = None  # as the endpoint gave them
    model: str = ""


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _api(url: str) -> str:
    """The URL that ends in /v1, of a server's URL, of this URL itself, or of its /chat/completions."""
    base = httpx.URL(url)
    path = base.path.removesuffix("/chat/completions")
    if path != base.path or path.endswith("/v1"):
        return str(base.copy_with(path=path))
    return below(url, "/v1")


def _found(response: httpx.Response, read: Callable[[Any], Found]) -> Found:
    """read(the JSON of a response). Raises ValueError, which shows the response, for one that isn't of the protocol."""
    try:
        return read(response.json())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no answer of an OpenAI-compatible endpoint: {response.text[:200]!r}") from None


def _answer(body: Any) -> Answer:
    choice = body["choices"][0]
    return Answer(str(choice["message"]["content"] or ""), choice.get("logprobs"), str(body.get("model") or ""))


def _roots(body: Any) -> dict[str, str]:
    """Id of each model -> the name of its weights."""
    return {str(entry["id"]): str(entry.get("root") or entry["id"]) for entry in body["data"]}


def _headers(key: str, field: str) -> dict[str, str]:
    """The login of requests, from the environment variable `key`. Raises FlagError about the setting `field`."""
    value = os.environ.get(key, "").strip()  # a key read from a file ends in a line break
    if not (value.isascii() and value.isprintable()):
        problem = f"the environment variable {key} has characters that no key has, as letters with accents"
        raise FlagError(field, None, problem)
    return {"Authorization": f"Bearer {value}"} if value else {}


class ChatClient:
    """Asks questions at endpoints that give the same answers.

    Attributes:
        urls: of the APIs, as a rule ending in /v1. Ranks start at different ones; a retry goes to the next one.
        workers: requests at the same time. retries: further attempts after a failure.
        backoff: seconds of the first pause before an endpoint is asked again; pauses double.
        answered: names of the models that answered so far, such as a vendor's dated one behind the id that was asked.
    """

    def __init__(
        self,
        urls: str,
        field: str,
        key: str,
        workers: int = 1,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        http_proxy: str | None = None,
        https_proxy: str | None = None,
    ) -> None:
        """urls: comma-separated, the value of the setting `field`. key: environment variable that may hold a key.
        timeout: seconds per request. http_proxy, https_proxy: used instead of the environment's proxies."""
        self.field, self.key, self.urls = field, key, [_api(url) for url in server_urls(urls, field)]
        self.workers, self.retries, self.backoff = workers, retries, backoff
        with proxies(http_proxy, https_proxy):  # the client keeps them
            self.client = http_client(self.urls, field, timeout=timeout, headers=_headers(key, field))
        self.first, self.answered = int(os.environ.get("RANK", "0")), set[str]()

    def ask(
        self, model: str, questions: Sequence[Question], read: Callable[[Answer], float], name: str, **body: Any
    ) -> np.ndarray:
        """One number per question, float64 [N]; NaN where a question failed. Their count and a reason are logged, and
        so is a model that answers under another name than before.

        Args:
            model: the model's id at the endpoint. name: of the reward, for the log.
            read: the number in an answer. Raises ValueError, with the problem as message, for an answer without one.
                The question isn't asked again, because at temperature 0 it gets the same answer.
            body: further entries of the requests.
        """
        problems, now = [""] * len(questions), set[str]()

        def one(index: int) -> float:
            answer, problems[index] = self.ask_one(model, questions[index], index, pictures, **body)
            if answer is not None:
                now.add(answer.model)
                try:
                    return read(answer)
                except ValueError as error:
                    problems[index] = str(error)
            return float("nan")

        with ThreadPoolExecutor(self.workers) as pool:
            images = {id(image): image for question in questions for image in question.images}
            pictures = dict(zip(images, pool.map(_data_url, images.values()), strict=True))  # each is encoded once
            numbers = list(pool.map(one, range(len(questions))))
        if failed := list(filter(None, problems)):
            logger.warning("%s: %d of %d samples failed, e.g. %s", name, len(failed), len(questions), failed[0])
        if self.answered and (new := sorted(now - self.answered - {""})):
            told = "%s: %s answers now, before it was %s; scores of two models can't be compared"
            logger.warning(told, name, ", ".join(new), ", ".join(sorted(self.answered)))
        self.answered |= now - {""}
        return np.array(numbers, dtype=np.float64)

    def ask_one(
        self, model: str, question: Question, index: int = 0, pictures: dict[int, str] | None = None, **body: Any
    ) -> tuple[Answer | None, str]:
        """(the answer, "") to one question, or (None, the problem).

        index: chooses the endpoint that is asked first. pictures: id of each picture -> its data URL.
        """
        urls = [pictures[id(image)] if pictures else _data_url(image) for image in question.images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": question.text})
        message = {"role": "user", "content": content}
        request = {"model": model, "temperature": 0, "messages": [message], **body}

        def send(url: str) -> Answer:
            response = self.client.post(url, json=request)
            response.raise_for_status()
            return _found(response, _answer)

        endpoints = [below(url, "/chat/completions") for url in self.urls]
        answer, problem = ask_in_turn(send, endpoints, self.first + index, self.retries, self.backoff)
        return answer, problem + self._login_advice(problem)

    def _login_advice(self, problem: str) -> str:
        """What to do about a problem of `ask_in_turn`, if the login is wrong; else empty."""
        if not re.search(r": HTTP 40[13]\b", problem):
            return ""
        if os.environ.get(self.key, "").strip():
            return f"; the server refuses the key in the environment variable {self.key}"
        return f"; put the server's key into the environment variable {self.key}, which isn't set"

    def served(self, model: str | None, field: str) -> tuple[str, str]:
        """The id of the model that all endpoints serve, and the id with the name of its weights, if the first endpoint
        gives them another name (`root`, as vLLM does under --served-model-name).

        model: the id to look for, the value of the setting `field`; None: the only model that they serve.

        An endpoint that doesn't answer now is logged, because it may come back. If none says what it serves, as with
        vendors that have no /v1/models, a given `model` is taken as it is. Raises FlagError if none is given, or an
        endpoint serves no such model, or several where none is chosen.
        """

        def send(url: str) -> dict[str, str]:
            response = self.client.get(url)
            there.append(url)
            response.raise_for_status()
            return _found(response, _roots)

        found, problems, there = {}, [], list[str]()
        for url in self.urls:
            roots, problem = ask_in_turn(send, [below(url, "/models")], 0, self.retries, self.backoff)
            if roots is None:
                problems.append(problem + self._login_advice(problem))
            else:
                found[url] = roots
        if not found:
            unknown = f"no endpoint says what it serves, e.g. {problems[0]}"
            if model is None:
                if there and not self._login_advice(problems[0]):  # else a name doesn't help
                    unknown += f"; if it can't say it, name the model with --{field}"
                raise FlagError(self.field, None, unknown)
            logger.warning("--%s: %s; --%s %s is taken as it is", self.field, unknown, field, model)
            return model, model
        for problem in problems:
            logger.warning("--%s: %s; the others go on without it", self.field, problem)
        for url, roots in found.items():
            more = f" and {len(roots) - MOST_NAMES} more" if len(roots) > MOST_NAMES else ""
            serves = f"{redact(url)} serves {', '.join(list(roots)[:MOST_NAMES]) or 'no model'}{more}"
            if model is None and len(roots) != 1:
                raise FlagError(field, None, f"not given; {serves}")
            model = model or next(iter(roots))
            if model not in roots:
                raise FlagError(field, model, serves)
        root = next(iter(found.values()))[model]
        return model, model if root == model else f"{model} ({root})"

"""UnifiedReward (arXiv 2503.05236): a vision-language model asked for a score over an OpenAI-compatible chat endpoint.

Serve the model with vLLM or SGLang under the name UnifiedReward. The key of an endpoint that wants one is read from the
environment variable UNIFIED_REWARD_API_KEY. A request that fails after its retries, or a reply without a score from 1
to 5, is a failed sample (NaN), never a 0.

    python fastvideo/models/reward_model/unified_reward.py --url http://localhost:8080 --question_type score
"""

import base64
import io
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor

from fastvideo.models.reward_model.common import ask_in_turn, demo_parser, proxies, run_demo, server_urls

import httpx
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

MODEL = "UnifiedReward"
QUESTIONS = {
    "semantic": (
        "Here is a picture that was made from a text prompt. Judge only how well it shows what the prompt asks for: "
        "the things named, their number, colours, places and what they do. 1 means that it shows another thing, 5 that "
        "nothing is missing or wrong.\nPrompt: {prompt}\nEnd your reply with one line in exactly this form:\n"
        "Alignment Score (1-5): x"
    ),
    "score": (
        "Here is a picture that was made from a text prompt. Judge it as a whole: how well it fits the prompt, whether "
        "things and bodies are formed as they should be, and how good it looks. 1 means very poor, 5 excellent.\n"
        "Prompt: {prompt}\nEnd your reply with one line in exactly this form:\nFinal Score: x"
    ),
}
ANSWERS = {
    "semantic": re.compile(r"Alignment Score \(1-5\)[\s:*]*(\d+(?:\.\d+)?)", re.IGNORECASE),
    "score": re.compile(r"Final Score[\s:*]*(\d+(?:\.\d+)?)", re.IGNORECASE),
}


def parse_score(reply: str, question_type: str) -> float:
    """The last score in a reply; NaN when there is none or it lies outside 1 to 5."""
    found = ANSWERS[question_type].findall(reply)
    score = float(found[-1]) if found else float("nan")
    return score if 1 <= score <= 5 else float("nan")


def _endpoint(url: str) -> str:
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class UnifiedRewardModel:
    """UnifiedReward's score, 1 to 5, of images against prompts.

    urls: one endpoint or several, comma-separated; ranks start at different ones, and a retry goes to the next.
    question_type: "semantic" (does the picture match) or "score" (as a whole). num_workers: requests at the same time.
    timeout: seconds for one request. retries: further attempts, with pauses that double from backoff seconds. Proxies:
    instead of the environment's.
    """

    name = "UnifiedRewardModel"

    def __init__(
        self,
        urls: str,
        question_type: str = "semantic",
        num_workers: int = 1,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        http_proxy: str | None = None,
        https_proxy: str | None = None,
    ) -> None:
        if question_type not in QUESTIONS:
            raise ValueError(
                f"--unified_reward_default_question_type {question_type!r}: choose from {', '.join(QUESTIONS)}"
            )
        self.urls = [_endpoint(url) for url in server_urls(urls, "unified_reward_url")]
        if not self.urls:
            raise ValueError("--unified_reward_url is empty: unified_reward needs the URL of a chat endpoint")
        self.question_type, self.num_workers = question_type, num_workers
        self.retries, self.backoff = retries, backoff
        key = os.environ.get("UNIFIED_REWARD_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with proxies(http_proxy, https_proxy):  # the client keeps them
            self.client = httpx.Client(timeout=timeout, headers=headers)
        self.first = int(os.environ.get("RANK", "0"))

    def _ask(self, index: int, image: Image.Image, prompt: str) -> tuple[float, str]:
        """(score, "") or (NaN, what went wrong) for one image; index spreads a batch over the endpoints."""
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": QUESTIONS[self.question_type].format(prompt=prompt)},
        ]
        body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": content}]}

        def send(url: str) -> str:
            response = self.client.post(url, json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])

        reply, problem = ask_in_turn(send, self.urls, self.first + index, self.retries, self.backoff)
        if reply is None:
            return float("nan"), problem
        score = parse_score(reply, self.question_type)
        # At temperature 0 the same question gets the same answer: asking again would not help.
        return score, "" if np.isfinite(score) else f"no score from 1 to 5 in {reply[-80:]!r}"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N], 1 to 5; NaN for a failed sample (the number of them and one reason are logged)."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        with ThreadPoolExecutor(self.num_workers) as pool:
            answers = list(pool.map(self._ask, range(len(images)), images, prompts))
        problems = [problem for _, problem in answers if problem]
        if problems:
            logger.warning("UnifiedReward: %d of %d samples failed, e.g. %s", len(problems), len(images), problems[0])
        return np.array([score for score, _ in answers], dtype=np.float64)


if __name__ == "__main__":
    parser = demo_parser("Score pictures with a UnifiedReward server.")
    parser.add_argument("--url", required=True, dest="urls", metavar="URL[,URL...]")
    parser.add_argument("--question_type", default="semantic", choices=list(QUESTIONS))
    run_demo(UnifiedRewardModel, parser)

"""A vision-language model as judge of pictures, behind an OpenAI-compatible endpoint (vLLM, SGLang, a vendor).

A template asks the question. It is a text file, or one of those in templates/. Its first line says how the answer is
read, and {prompt} in the lines after it is replaced by the picture's prompt:

    answer: yes or no                                  the probability of yes, 0 to 1, by log-probabilities
    answer: number 1 to 10 after "Rating:"             the number after the last "Rating:"; without `after` the last one
                                                       that says its scale (8/10), or else the last one
    answer: number 1 to 5 after "Content:" "Style:"    the mean of several numbers
    answer: image 1 or 2 after "Better:"               which of two pictures is better, or tie (for pairwise)

If the endpoint asks for a key, put it into the environment variable VLM_JUDGE_API_KEY. The judge's id is read from
/v1/models and recorded, because a judge that changes unnoticed makes a run's rewards incomparable.
"""

import functools
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.messages import say
from fastvideo.io.secrets import redact
from fastvideo.io.waiting import waiting
from fastvideo.models.reward_model.chat import Answer, ChatClient, Question
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.spec import RewardConfig

import numpy as np
from PIL import Image

TEMPLATES = Path(__file__).with_name("templates")
FORMS = 'answer: yes or no; answer: number 1 to 10 after "Rating:"; answer: image 1 or 2 after "Better:"'
ALTERNATIVES = 20  # the most tokens per place whose log-probabilities vLLM and OpenAI give
# A number with a decimal point or comma, and the end of its scale if it names one: 8/10, **8** out of 10, 8 of 10.
_DECIMAL = r"\d+(?:[.,]\d+)?"
NUMBER = rf"([-+]?{_DECIMAL})(?:[\s*]*(?:/|out\s+of|of)[\s*]*({_DECIMAL}))?"
STRAIGHT = str.maketrans("“”„", '"""')  # what word processors make of quotation marks
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # Chinese and Japanese forms of ASCII: ：８
NO_LOGPROBS = "gives no log-probabilities (logprobs, top_logprobs), which a template with `answer: yes or no` needs"


@dataclass(frozen=True)
class Template:
    """A question and how its answer is read. Attributes: kind, a key of KINDS; bounds, of a number; labels, the texts
    before what is read."""

    question: str
    kind: str
    bounds: tuple[float, float] = (-math.inf, math.inf)
    labels: tuple[str, ...] = ()

    def ask(self, images: Sequence[Image.Image], prompt: str) -> Question:
        """The question about one picture, or two in order."""
        return Question(tuple(images), self.question.replace("{prompt}", prompt))

    @property
    def body(self) -> dict[str, Any]:
        """Entries of the request that this kind of answer needs."""
        if self.kind != "yes or no":
            return {}
        return {"logprobs": True, "top_logprobs": ALTERNATIVES, "max_tokens": 1}

    def read(self, answer: Answer) -> float:
        """The answer as a number. `image 1 or 2`: 1 if the first picture is better, 0 if the second, ½ for a tie.

        Raises ValueError, with the problem as message, for an answer that can't be read.
        """
        return KINDS[self.kind](self, answer)

    def _matches(self, answer: Answer, label: str, pattern: str) -> list[re.Match[str]]:
        """All that matches `pattern` in the reply, right after the label."""
        text = answer.text if label else answer.text.rpartition("</think>")[2]
        text, label = text.translate(HALF_WIDTH), label.translate(HALF_WIDTH)
        wanted = re.escape(label) + r"[\s:=*_\"'`|$<{\[(]*" * bool(label) + pattern
        if found := list(re.finditer(wanted, text, re.IGNORECASE)):
            return found
        raise ValueError(f"nothing to read{f' after {label!r}' if label else ''} in {answer.text[-80:]!r}")

    def _one_number(self, answer: Answer, label: str) -> float:
        low, high = self.bounds
        found = [
            tuple(float(text.replace(",", ".")) if text else None for text in match.groups())
            for match in self._matches(answer, label, NUMBER)
        ]
        scaled = [] if label else [(number, scale) for number, scale in found if scale == high]
        number, scale = (scaled or found)[-1]
        if not low <= number <= high or scale not in (None, high):
            raise ValueError(f"no number from {low:g} to {high:g} in {answer.text[-80:]!r}")
        return number

    def _number(self, answer: Answer) -> float:
        numbers = [self._one_number(answer, label) for label in self.labels or [""]]
        return sum(numbers) / len(numbers)

    def _better(self, answer: Answer) -> float:
        found = self._matches(answer, self.labels[0], r"(?:image|picture)?\s*\b(1|2|tie)\b(?!/)")
        return {"1": 1.0, "2": 0.0, "tie": 0.5}[found[-1][1].lower()]

    def _yes(self, answer: Answer) -> float:
        """p(yes) / (p(yes) + p(no)) of the reply's first token, all spellings of the two words together."""
        try:
            tokens = [(str(t["token"]), float(t["logprob"])) for t in answer.logprobs["content"][0]["top_logprobs"]]
        except (LookupError, TypeError, ValueError):
            tokens = []
        if not tokens:
            raise ValueError(f"the endpoint {NO_LOGPROBS}")
        yes, no = (
            sum(math.exp(logprob) for token, logprob in tokens if token.strip(" \n\t▁Ġ.*\"'").lower() == word)
            for word in ("yes", "no")
        )
        if not yes + no > 0:
            words = f"neither yes nor no among the likely first words {[token for token, _ in tokens]}"
            raise ValueError(f"{words}; if the model thinks before it answers, switch that off at the server")
        return yes / (yes + no)


KINDS = {"yes or no": Template._yes, "number": Template._number, "image 1 or 2": Template._better}
SINGLE, PAIR = ("yes or no", "number"), ("image 1 or 2",)


def read_template(value: str, field: str, kinds: Sequence[str]) -> Template:
    """The template in a file, or the shipped one of that name, such as yes_no.

    Raises FlagError about the setting `field` for a template that can't be read or used, or whose kind isn't in kinds.
    """
    shipped = TEMPLATES / f"{value}.txt"
    try:
        text = (shipped if shipped.is_file() else Path(value)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.txt")))
        problem = f"{getattr(error, 'strerror', None) or 'not UTF-8 text'}; give a text file, or choose from {names}"
        raise FlagError(field, value, problem) from None
    first, _, question = text.partition("\n")
    first = first.strip().translate(STRAIGHT)
    form = re.fullmatch(r"answer: *(yes or no|number +(\S+) +to +(\S+)|image 1 or 2)(?: +after +(.+))?", first)
    try:
        labels = tuple(shlex.split(form[4] or ""))
        bounds = tuple(map(float, form.group(2, 3))) if form[2] else Template.bounds
        fits = bounds[0] < bounds[1] and not (labels and form[1] == "yes or no")
        fits = fits and (form[1] != "image 1 or 2" or len(labels) == 1)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise FlagError(field, value, f"its first line is {first[:80]!r}, not of the form {FORMS}")
    if "{prompt}" not in question:
        raise FlagError(field, value, "no {prompt} in it; write it where the picture's prompt belongs")
    kind = "number" if form[2] else form[1]
    if kind not in kinds:
        raise FlagError(field, value, f"its answer is {kind}; this reward needs {' or '.join(kinds)}")
    return Template(question.strip(), kind, bounds, labels)


def judge_client(urls: str, workers: int, timeout: float, retries: int) -> ChatClient:
    """The client of the judge's endpoints, comma-separated."""
    return ChatClient(urls, "vlm_judge_url", "VLM_JUDGE_API_KEY", workers, timeout, retries)


def served_by(config: Any) -> str:
    """The judge that the endpoints in the settings serve, as in `ChatClient.served`. Raises FlagError as that."""
    client = judge_client(config.vlm_judge_url, 1, config.vlm_judge_timeout, config.vlm_judge_retries)
    return client.served(config.vlm_judge_model, "vlm_judge_model")[1]


def check_judge(config: Any) -> None:
    """Asks the judge of the settings about one grey picture, before anything loads.

    Raises FlagError for a template that can't be used, and endpoints that don't answer, serve another model, or give no
    log-probabilities where the template needs them.
    """
    template = read_template(config.vlm_judge_template, "vlm_judge_template", SINGLE)
    try_judge(config, template, "; or ask for a number, as --vlm_judge_template rating_10 does")


def try_judge(config: Any, template: Template, instead: str = "") -> None:
    """Asks the template's question about grey pictures. Raises FlagError as `check_judge`.

    instead: what to do if the endpoint's log-probabilities can't be used, the end of the message.
    """
    timeout, retries = config.vlm_judge_timeout, config.vlm_judge_retries
    _try(config.vlm_judge_url, config.vlm_judge_model, template, instead, timeout, retries)


@functools.cache  # a run checks its rewards, and later builds them
def _try(urls: str, model: str | None, template: Template, instead: str, timeout: float, retries: int) -> None:
    client, grey = judge_client(urls, 1, timeout, retries), Image.new("RGB", (256, 256), "grey")
    question = template.ask([grey] * (2 if template.kind in PAIR else 1), "a grey square")
    with waiting("the judge of --vlm_judge_url"):
        answer, problem = client.ask_one(client.served(model, "vlm_judge_model")[0], question, **template.body)
    if answer is None:
        instead *= template.kind == "yes or no" and "logprobs" in problem
        raise FlagError("vlm_judge_url", None, f"a question about a grey picture failed: {problem}{instead}")
    try:
        template.read(answer)
    except ValueError as error:
        if template.kind == "yes or no":
            raise FlagError("vlm_judge_url", redact(urls), f"{error}{instead}") from None
        say(f"note: the judge's answer about a grey picture can't be read as the template says: {error}")


class VLMJudgeModel:
    """The judge's answers about single pictures: the probability of yes, or a number.

    Attributes: model, the id of the judge at the endpoint; judge, the id with the name of its weights.
    """

    name = "VLMJudgeModel"

    def __init__(
        self,
        urls: str,
        model: str | None = None,
        template: str = RewardConfig.vlm_judge_template,
        num_workers: int = RewardConfig.vlm_judge_num_workers,
        timeout: float = RewardConfig.vlm_judge_timeout,
        retries: int = RewardConfig.vlm_judge_retries,
    ) -> None:
        """urls: endpoints, comma-separated. model: its id at the endpoint; None: the only one served. template: a file,
        or the name of one in templates/. num_workers: requests at the same time. timeout: seconds per request. retries:
        further attempts after a failed request, at the next endpoint."""
        self.template = read_template(template, "vlm_judge_template", SINGLE)
        self.client = judge_client(urls, num_workers, timeout, retries)
        self.model, self.judge = self.client.served(model, "vlm_judge_model")

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N]; NaN for a failed sample. The number of failed samples and one reason are logged."""
        prompts = prompt_per_image(prompts, len(images))
        questions = [self.template.ask([image], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return self.client.ask(self.model, questions, self.template.read, "the judge", **self.template.body)

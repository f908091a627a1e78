"""Yes/no questions about a picture, answered by the judge behind --vlm_judge_url: the share that is answered with yes.

The questions come with the prompt, in its metadata (see io/prompts.py), as in DPG-Bench (arXiv 2403.05135):

    {"prompt": "a red cat on a mat", "questions": [{"id": 1, "question": "Is there a cat?"},
        {"id": 2, "question": "Is the cat red?", "parents": [1]}]}

A question counts as answered with no if one of its parents was: a cat that isn't there has no colour.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.spec import RewardConfig
from fastvideo.models.reward_model.vlm_judge import SINGLE, judge_client, read_template, try_judge

import numpy as np
from PIL import Image


def check_questions(config: Any) -> None:
    """As check_judge of vlm_judge.py, with the template of questions."""
    try_judge(config, read_template("question", "vlm_judge_url", SINGLE))


def questions_of(metadata: Mapping[str, Any]) -> list[tuple[Any, str, list[Any]]]:
    """(id, question, ids of its parents) of each question of a prompt; empty for a prompt without usable questions.

    A question may be a text, or an object whose "question" is one; without "id" its place, from 1, is its id.
    """
    entries = metadata.get("questions")
    found = []
    for place, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        entry = {"question": entry} if isinstance(entry, str) else entry
        parents = entry.get("parents", []) if isinstance(entry, dict) else None
        if not isinstance(parents, list) or not isinstance(entry.get("question"), str):
            return []
        found.append((entry.get("id", place), entry["question"], parents))
    return found


def can_score(prompt: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the prompt has questions."""
    return bool(questions_of(metadata))


class VLMQuestionsModel:
    """Share of a prompt's questions that the judge answers with yes, 0 to 1. Attributes: those of VLMJudgeModel.

    NaN: the prompt has no questions, or one of them has no answer.
    """

    name = "VLMQuestionsModel"
    takes_metadata = True

    def __init__(
        self,
        urls: str,
        model: str | None = None,
        num_workers: int = RewardConfig.vlm_judge_num_workers,
        timeout: float = RewardConfig.vlm_judge_timeout,
        retries: int = RewardConfig.vlm_judge_retries,
    ) -> None:
        """The arguments are those of VLMJudgeModel."""
        self.template = read_template("question", "vlm_judge_url", SINGLE)
        self.client = judge_client(urls, num_workers, timeout, retries)
        self.model, self.judge = self.client.served(model, "vlm_judge_model")

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """float64 [N]. An answer is yes if yes is more probable than no."""
        prompts = prompt_per_image(prompts, len(images))
        asked = [questions_of(entry) for entry in ([{}] * len(images) if metadata is None else metadata)]
        each = [
            self.template.ask([image], question)
            for image, questions in zip(images, asked, strict=True)
            for _, question, _ in questions
        ]
        answers = iter(self.client.ask(self.model, each, self.template.read, "the judge", **self.template.body))
        return np.array([self._score(questions, [next(answers) for _ in questions]) for questions in asked])

    @staticmethod
    def _score(questions: list[tuple[Any, str, list[Any]]], chances: list[float]) -> float:
        """The share of yes. chances: probability of yes per question, NaN without an answer."""
        if not questions or not np.isfinite(chances).all():
            return float("nan")
        yes = {number: chance > 0.5 for (number, _, _), chance in zip(questions, chances, strict=True)}
        for number, _, parents in questions:
            yes[number] = yes[number] and all(yes.get(parent, True) for parent in parents)
        return sum(yes.values()) / len(yes)

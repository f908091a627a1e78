"""UnifiedReward (arXiv 2503.05236): a vision-language model gives the score, over an OpenAI-compatible chat endpoint.

Serve the model with vLLM or SGLang under the name UnifiedReward. If the endpoint asks for a key, put it into the
environment variable UNIFIED_REWARD_API_KEY. A request that fails after its retries, or a reply without a score from 1
to 5, is a failed sample (NaN), never a 0.

    python fastvideo/models/reward_model/unified_reward.py --url http://localhost:8080 --question_type score
"""

from fastvideo.cli import FlagError, choose_from
from fastvideo.models.reward_model.chat import ChatClient
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.spec import RewardConfig
from fastvideo.models.reward_model.vlm_judge import Template

import numpy as np
from PIL import Image

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
LABELS = {"semantic": "Alignment Score (1-5)", "score": "Final Score"}  # before the score in a reply


class UnifiedRewardModel:
    """UnifiedReward's score, 1 to 5, of images against prompts.

    urls: one or more endpoints, comma-separated. Ranks start at different endpoints; a retry goes to the next one.
    question_type: "semantic" (does the picture match the prompt?) or "score" (how good is it as a whole?).
    num_workers: requests at the same time. timeout: seconds per request. retries: further attempts after a failure.
    backoff: seconds of the first pause before a server is asked again; pauses double. http_proxy, https_proxy: used
    instead of the environment's proxies.
    """

    name = "UnifiedRewardModel"

    def __init__(
        self,
        urls: str,
        question_type: str = RewardConfig.unified_reward_default_question_type,
        num_workers: int = RewardConfig.unified_reward_num_workers,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        http_proxy: str | None = None,
        https_proxy: str | None = None,
    ) -> None:
        if question_type not in QUESTIONS:
            setting = "unified_reward_default_question_type"
            raise FlagError(setting, repr(question_type), choose_from(QUESTIONS, question_type))
        self.template = Template(QUESTIONS[question_type], "number", (1, 5), (LABELS[question_type],))
        self.client = ChatClient(
            urls,
            "unified_reward_url",
            "UNIFIED_REWARD_API_KEY",
            num_workers,
            timeout,
            retries,
            backoff,
            http_proxy,
            https_proxy,
        )

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N], 1 to 5; NaN for a failed sample. The number of failed samples and one reason are logged."""
        prompts = prompt_per_image(prompts, len(images))
        questions = [self.template.ask([image], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return self.client.ask(MODEL, questions, self.template.read, "UnifiedReward")


if __name__ == "__main__":
    parser = demo_parser("Score pictures with a UnifiedReward server.")
    parser.add_argument("--url", required=True, dest="urls", metavar="URL[,URL...]")
    default = RewardConfig.unified_reward_default_question_type
    parser.add_argument("--question_type", default=default, choices=list(QUESTIONS))
    run_demo(UnifiedRewardModel, parser)

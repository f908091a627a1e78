"""Text in pictures: how much of the text that a prompt has in quotation marks can be read in its picture.

RapidOCR (package rapidocr-onnxruntime, whose wheel holds PP-OCRv4's models) reads the picture on the CPU. A text of N
characters whose best match in the picture is E edits away scores max(0, 1 - E/N), as in Flow-GRPO (arXiv 2505.05470); a
prompt with several texts gets their mean.

    python fastvideo/models/reward_model/ocr.py --image sign.png --prompt 'a shop sign that says "OPEN LATE"'
"""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.secrets import one_line
from fastvideo.models.reward_model.demo import demo_parser, run_demo
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.spec import RewardConfig

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

# A quotation mark that is also an apostrophe opens only after a space, a bracket or an Asian letter and before a text,
# and closes only before one of these or punctuation. One Latin letter between two of them is no text: rock 'n' roll. A
# straight double mark after a digit means inches and doesn't open. A pair may be half straight, half curly.
_ASIAN = "\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef"  # with their punctuation
_BEFORE, _AFTER = rf"(?<![^\s(\[{{:,;—{_ASIAN}-])", rf"(?=$|[\s)\]}}.,:;!?—{_ASIAN}-])"
_QUOTES = re.compile(
    "|".join(
        [
            r'(?<!\d)"([^"“”\n]+)”',
            r'(?<!\d)"([^"\n]*)"',
            "“([^“”\n]+)”",
            r'“([^“”"\n]+)"',
            "＂([^＂\n]+)＂",
            "„([^„“”\n]+)[“”]",
            "«([^«»\n]+)»",
            "「([^「」\n]+)」",
            "『([^『』\n]+)』",
            rf"{_BEFORE}'(?=\S[^'\n]|[{_ASIAN}])([^'\n]*?(?:\w'\w[^'\n]*?)*)(?<=\S)'{_AFTER}",
            rf"‘(?=\S[^’\n]|[{_ASIAN}])([^‘\n]*?)(?<=\S)’{_AFTER}",
        ]
    )
)


def quoted_texts(prompt: str) -> list[str]:
    """The texts of a prompt in quotation marks ("…", “…”, „…“, «…», 「…」, 『…』, '…', ‘…’), in order, each once."""
    # A backslash before the second mark is what a file with escapes too many has.
    found = (next(filter(None, match.groups()), "").strip(" \t\\") for match in _QUOTES.finditer(prompt))
    return [text for text in dict.fromkeys(found) if any(map(str.isalnum, text))]


def can_score(prompt: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the prompt has a text in quotation marks."""
    return bool(quoted_texts(prompt))


# Marks that a prompt has curly or long, and OCR reads straight or short.
_PLAIN = str.maketrans(dict.fromkeys("‘’", "'") | dict.fromkeys("“”„", '"') | dict.fromkeys("–—", "-"))


def _letters(text: str) -> str:
    """The text without white space, which OCR often loses, and without differences of case, width and typography."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN).split())


def text_score(wanted: str, lines: Sequence[str]) -> float:
    """max(0, 1 - E/N) of one text: 1 where it was read exactly.

    E is the least edit distance (Levenshtein) between the text and any run of consecutive words in the lines that were
    read, so that further text in the picture costs nothing. N is the text's length. White space and case don't count.
    """
    from rapidfuzz.distance import Levenshtein

    text = _letters(wanted)
    words = [letters for line in lines for word in line.split() if (letters := _letters(word))]
    least = len(text)
    for start in range(len(words)):
        run = ""
        for word in words[start:]:
            run += word
            if len(run) >= len(text) + least:  # at least as many edits as the best so far
                break
            least = min(least, Levenshtein.distance(text, run, score_cutoff=least))
    return 1 - least / len(text)


def check_engine(config: Any) -> None:
    """Raises FlagError if the packages are installed but can't be imported, as OpenCV where a system library lacks."""
    try:
        import rapidocr_onnxruntime  # noqa: F401  (imports OpenCV and onnxruntime)
    except ImportError as error:
        problem = f"{one_line(error)}; OpenCV needs the system's libGL (Debian: libgl1)"
        raise FlagError("reward_model", "ocr", problem) from error


class OCRRewardModel:
    """The share of a prompt's quoted text that can be read in its picture, 0 to 1.

    A picture in which nothing, or something else, is read scores 0: that is its fault. A picture has no score, NaN, if
    the engine raises an error, or if its prompt has no text in quotation marks.

    num_workers: CPU threads; each reads one picture at a time. Their number changes no score.
    """

    name = "OCRRewardModel"

    def __init__(self, num_workers: int = RewardConfig.ocr_num_workers) -> None:
        import cv2
        from rapidocr_onnxruntime import RapidOCR

        cv2.setNumThreads(1)  # the workers share the cores; nothing else here uses OpenCV
        # An engine keeps the settings of its last picture, so each worker has its own.
        self.engines = [RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1) for _ in range(num_workers)]

    def read(self, image: Image.Image, worker: int = 0) -> list[str]:
        """The lines of text in a picture, from top to bottom and from left to right."""
        pixels = np.asarray(image.convert("RGB"))[..., ::-1]  # RapidOCR takes arrays for BGR, as OpenCV does
        found, _ = self.engines[worker](np.ascontiguousarray(pixels))
        return [text for _, text, _ in found or []]

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """float64 [N]. The number of pictures at which the engine failed and one reason are logged."""
        prompts = prompt_per_image(prompts, len(images))
        scores, problems = np.full(len(images), np.nan), []

        def work(worker: int) -> None:
            for index in range(worker, len(images), len(self.engines)):
                wanted = quoted_texts(prompts[index])
                if not wanted:
                    continue
                try:
                    lines = self.read(images[index], worker)
                except Exception as error:  # of OpenCV, onnxruntime or RapidOCR
                    problems.append(one_line(error))
                else:
                    scores[index] = np.mean([text_score(text, lines) for text in wanted])

        with ThreadPoolExecutor(len(self.engines)) as pool:
            list(pool.map(work, range(len(self.engines))))
        if problems:
            logger.warning("OCR failed at %d of %d pictures, e.g. %s", len(problems), len(images), problems[0])
        return scores


if __name__ == "__main__":
    run_demo(OCRRewardModel, demo_parser("Score pictures by the text in them."))

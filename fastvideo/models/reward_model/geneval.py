"""GenEval as a reward (arXiv 2310.11513): whether a picture shows the things that its prompt's metadata names, in their
number, colour and place.

Mask2Former, trained on COCO, finds objects and their outlines; OpenAI's CLIP ViT-L/14 names an object's colour, from a
crop in which all but the object is grey. geneval_rules.py has the decision rules and the metadata's format.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from fastvideo.io.devices import torch_dtype
from fastvideo.io.weights import loading_problem
from fastvideo.models.reward_model.detailed import DetailedReward
from fastvideo.models.reward_model.geneval_rules import CLASSES, COLORS, THRESHOLD, Found, check_wants, judge
from fastvideo.models.reward_model.granular import prompt_per_image
from fastvideo.models.reward_model.loading import bad_file, downloading, fitting, load_openai_clip, prepare, scoring
from fastvideo.models.reward_model.spec import RewardConfig

import numpy as np
import torch
from PIL import Image

DETECTOR = "geneval_detector_path"
CLIP = "geneval_clip_path"
RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # in COCO
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = "#999"  # of all that isn't the object
MOST_PAIRS = 100  # of a query and a class that are looked at per picture
SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # of a picture for the detector, in pixels


def can_score(prompt: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata says what the picture shall show. Raises ValueError if it isn't in GenEval's format."""
    check_wants(metadata)
    return bool(metadata.get("include") or metadata.get("exclude"))


@contextmanager
def without_scipy() -> Iterator[None]:
    """Lets transformers build Mask2Former where scipy isn't installed, which only its training needs."""
    from transformers.models.mask2former import modeling_mask2former as module

    check = module.requires_backends
    module.requires_backends = lambda *_: None
    try:
        yield
    finally:
        module.requires_backends = check


class Detector:
    """Mask2Former for COCO's 80 classes. path: folder or hub id. device, dtype: as in `prepare`."""

    def __init__(self, path: str, device: str, dtype: str) -> None:
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

        with downloading(DETECTOR, path), without_scipy():
            self.processor = Mask2FormerImageProcessor.from_pretrained(path, size=SIZE)
            model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True
            )
        if problem := loading_problem(model, report, strict=False):
            raise bad_file(DETECTOR, path, f"wrong checkpoint for Mask2Former: {problem}")
        labels = {label: number for number, label in model.config.id2label.items()}
        lost = [name for name in CLASSES if RENAMED.get(name, name) not in labels]
        if lost:
            raise bad_file(DETECTOR, path, f"its labels have no {', '.join(lost[:3])}; a model for COCO is needed")
        self.names = {labels[RENAMED.get(name, name)]: name for name in CLASSES}
        self.model, self.device, self.dtype = prepare(model, device, dtype), device, dtype

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, list[Found]]]:
        """Per picture, class -> objects with a confidence above THRESHOLD. The pictures are RGB and of one size."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        with scoring(self.device, self.dtype):
            output = self.model(pixel_values=pixels.to(self.device, torch_dtype(self.dtype)))
        logits, masks = output.class_queries_logits.float(), output.masks_queries_logits.float()
        size = (images[0].height, images[0].width)
        return [self._objects(*one, pixels.shape[-2:], size) for one in zip(logits, masks, strict=True)]

    def _objects(
        self, logits: torch.Tensor, masks: torch.Tensor, seen: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, list[Found]]:
        """The objects in one picture. The confidence is the class's probability times the mask's mean probability.

        logits: [queries, classes + 1]. masks: logits [queries, h, w]. seen, size: height and width of the picture as
        the detector saw it, and as it is.
        """
        classes = logits.shape[-1] - 1
        shares = logits.softmax(-1)[:, :-1].flatten()
        shares, pairs = shares.topk(min(MOST_PAIRS, len(shares)))
        pairs = pairs[shares > THRESHOLD]  # the other factor is at most 1
        objects: dict[str, list[Found]] = {}
        if not len(pairs):
            return objects
        masks = masks[pairs // classes][None]
        for step in (seen, size):
            masks = torch.nn.functional.interpolate(masks, step, mode="bilinear", align_corners=False)
        inside = masks[0] > 0
        sure = (masks[0].sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        confidences = (shares[: len(pairs)] * sure).tolist()
        for label, confidence, mask in zip((pairs % classes).tolist(), confidences, inside.cpu().numpy(), strict=True):
            if confidence > THRESHOLD and label in self.names:
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                objects.setdefault(self.names[label], []).append(Found(tuple(map(int, box)), confidence, mask))
        return objects


class GenEvalRewardModel(DetailedReward):
    """The share of what its metadata wants that a picture shows, 0 to 1, and GenEval's verdict as the check `right`.

    A prompt without metadata in GenEval's format has no score, NaN.
    """

    name = "GenEvalRewardModel"
    check_names = ("right",)
    takes_metadata = True

    def __init__(
        self,
        detector_path: str = RewardConfig.geneval_detector_path,
        clip_path: str = RewardConfig.geneval_clip_path,
        device: str = "cpu",
        batch_size: int = 8,
        dtype: str = "fp32",
    ) -> None:
        self.detector = Detector(detector_path, device, dtype)
        clip_model, self.preprocess, self.tokenize = load_openai_clip(clip_path, CLIP)
        self.clip = prepare(clip_model, device, dtype)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self._colors = lru_cache(len(CLASSES))(self._color_features)

    def _color_features(self, name: str) -> torch.Tensor:
        """The direction of each of COLORS for a class, [colors, d]: the mean of the TEMPLATES' directions."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        with scoring(self.device, self.dtype):
            features = self.clip.encode_text(self.tokenize(texts).to(self.device)).float()
        features = torch.nn.functional.normalize(features, dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return torch.nn.functional.normalize(features.mean(1), dim=-1)

    def colors(self, image: Image.Image, name: str, objects: Sequence[Found]) -> list[str]:
        """The colour of each object of a class."""
        grey = Image.new("RGB", image.size, GREY)
        crops = [Image.composite(image, grey, Image.fromarray(found.mask)).crop(found.box) for found in objects]
        pixels = torch.stack([self.preprocess(crop) for crop in crops]).to(self.device, torch_dtype(self.dtype))
        with scoring(self.device, self.dtype):
            features = self.clip.encode_image(pixels).float()
        return [COLORS[place] for place in (features @ self._colors(name).T).argmax(-1).tolist()]

    def score(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(share of the wants [N], {"right": 0 or 1 [N]}), float64; NaN without wants and for a picture that is too
        elongated."""
        prompts = prompt_per_image(prompts, len(images))
        wants = metadata or [{}] * len(images)
        fits = fitting(images, "GenEval")
        known = [place for place, want in enumerate(wants) if can_score(prompts[place], want) and fits[place]]
        shares, right = np.full((2, len(images)), np.nan)
        by_size: dict[tuple[int, int], list[int]] = {}  # padding would change what is seen at a picture's edges
        for place in known:
            by_size.setdefault(images[place].size, []).append(place)
        batches = ((p[i : i + self.batch_size]) for p in by_size.values() for i in range(0, len(p), self.batch_size))
        for places in batches:
            batch = [images[place].convert("RGB") for place in places]
            for place, image, objects in zip(places, batch, self.detector(batch), strict=True):
                right[place], shares[place] = judge(objects, wants[place], partial(self.colors, image))
        return shares, {"right": right}

"""Base of the rewards made of one CLIP: scores from the cosine of a picture's features and its prompt's, in batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fastvideo.io.devices import torch_dtype
from fastvideo.models.reward_model.loading import cosine, in_batches, prepare, scoring

import numpy as np
import torch
from PIL import Image


class CLIPReward(ABC):
    """A reward from cosines. A subclass sets `name` and makes pixels and features.

    model: a CLIP with a `logit_scale`. device, dtype ("fp32", "bf16" or "fp16"): where and in which format it scores.
    batch_size: pictures per forward pass.
    """

    name = ""

    def __init__(self, model: torch.nn.Module, device: str, batch_size: int, dtype: str) -> None:
        # Read before the weights are rounded: bf16 would move exp(logit_scale) by a hundredth.
        self.logit_scale = model.logit_scale.exp().item()
        self.model = prepare(model, device, dtype)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    @abstractmethod
    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB pictures -> normalised [n, 3, height, width] on the CPU."""

    def _encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, height, width] -> features [n, d]."""
        return self.model.encode_image(pixels)

    @abstractmethod
    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        """Features [n, d]."""

    def _finish(self, cosines: torch.Tensor) -> torch.Tensor:
        """Cosines [n] -> scores [n]."""
        return cosines

    def _score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = self._pixels(images).to(self.device, torch_dtype(self.dtype))
        with scoring(self.device, self.dtype):
            return self._finish(cosine(self._encode_image(pixels), prompts, self._encode_text))

    def image_features(self, images: list[Image.Image]) -> np.ndarray:
        """Features of N pictures, not normalised, float64 [N, d]."""

        def encode(batch: list[Image.Image], _: list[str]) -> torch.Tensor:
            pixels = self._pixels(batch).to(self.device, torch_dtype(self.dtype))
            with scoring(self.device, self.dtype):
                return self._encode_image(pixels)

        return in_batches(encode, images, [""] * len(images), self.batch_size)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        """Scores of N images against N prompts, float64 [N]."""
        return in_batches(self._score, images, prompts, self.batch_size)


class OpenCLIPReward(CLIPReward):
    """A CLIPReward on an open_clip model; preprocess turns an RGB picture into a [3, height, width] tensor."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        preprocess: Callable[[Image.Image], torch.Tensor],
        device: str,
        batch_size: int,
        dtype: str,
    ) -> None:
        super().__init__(model, device, batch_size, dtype)
        self.tokenizer, self.preprocess = tokenizer, preprocess

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([self.preprocess(image) for image in images])

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))

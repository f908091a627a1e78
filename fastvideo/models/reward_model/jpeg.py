"""JPEG size as a reward: DDPO's two tasks without prompts (arXiv 2305.13301). They need no weights and no network."""

import io

from PIL import Image

QUALITY = 95


def jpeg_kilobytes(image: Image.Image) -> float:
    """Size in kB (1000 bytes) of the picture as an RGB JPEG of quality 95."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class JpegCompressibilityRewardModel:
    """Minus the JPEG size in kB: plain pictures score high. Prompts are ignored."""

    name = "JpegCompressibilityRewardModel"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """One score (kB, negative) for each of N images."""
        return [-jpeg_kilobytes(image) for image in images]


class JpegIncompressibilityRewardModel:
    """The JPEG size in kB: detailed and noisy pictures score high. Prompts are ignored."""

    name = "JpegIncompressibilityRewardModel"

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """One score (kB, positive) for each of N images."""
        return [jpeg_kilobytes(image) for image in images]

import io

from fastvideo.models.reward_model.jpeg import JpegCompressibilityRewardModel, JpegIncompressibilityRewardModel

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [Image.new("RGB", (64, 64), (200, 30, 30)), Image.fromarray(noise)]


def test_scores_are_the_kilobytes_of_a_quality_95_jpeg(pictures):
    for image, score in zip(pictures, JpegIncompressibilityRewardModel()(pictures, ["a", "b"]), strict=True):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        assert score == len(file.getvalue()) / 1000


def test_plain_pictures_are_compressible_and_noise_is_not(pictures):
    plain, noisy = JpegCompressibilityRewardModel()(pictures, ["a", "b"])
    assert noisy < plain - 3 and plain < 0


def test_the_two_rewards_are_opposites_and_ignore_the_prompt(pictures):
    less = JpegCompressibilityRewardModel()(pictures, ["a", "b"])
    more = JpegIncompressibilityRewardModel()(pictures, ["", "c"])
    assert less == [-size for size in more]


def test_pictures_with_transparency_are_scored_as_rgb(pictures):
    scorer = JpegCompressibilityRewardModel()
    assert scorer([pictures[0].convert("RGBA")], [""]) == scorer([pictures[0]], [""])

"""What shows that a model has learned to please a reward rather than people, besides the rewards it wasn't trained on.

Rewards are pleased cheaply by glaring colours, hard edges and fine texture, and by drawing one good picture over and
over. So each picture is measured by its saturation, sharpness and share of high frequencies, and by how far it lies
from the other pictures of its prompt. All are to be read against the base model's pictures of the same seeds.
"""

from collections.abc import Sequence
from typing import Any

from fastvideo.models.reward_model.clip_base import CLIPReward

import numpy as np
from PIL import Image

APPEARANCE = ("saturation", "sharpness", "high_frequency")
THUMBNAIL = 32  # pixels a side
# With fewer prompts bootstrap intervals are too short: without any change they leave out 0 half of the time with 2
# prompts, one time in four with 3, in nine with 8 (normal values, simulated).
MIN_PROMPTS = 8


def appearance(image: Image.Image) -> dict[str, float]:
    """Measures of one picture.

    saturation: mean of (max − min) / max over R, G, B, 0 grey to 1. sharpness: variance of the Laplacian (4 neighbours)
    of the luma in 0…1. high_frequency: share of the luma's spectral power, without its mean and under a Hann window, at
    more than a quarter of a cycle a pixel, half of what pixels can hold; 0 for a picture of one colour.
    """
    rgb = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    top = rgb.max(axis=2)
    saturation = (top - rgb.min(axis=2)) / np.where(top > 0, top, 1)
    luma = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    edged = np.pad(luma, 1, mode="edge")
    laplacian = edged[2:, 1:-1] + edged[:-2, 1:-1] + edged[1:-1, 2:] + edged[1:-1, :-2] - 4 * luma
    height, width = luma.shape
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    power = np.abs(np.fft.fft2(window * (luma - np.average(luma, weights=window)))) ** 2
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    total = power.sum()
    share = power[frequency > 0.25].sum() / total if total > 1e-9 * luma.size else 0.0
    return {
        "saturation": float(saturation.mean()),
        "sharpness": float(laplacian.var()),
        "high_frequency": float(share),
    }


def mean_distances(distances: np.ndarray) -> np.ndarray:
    """Mean distance of each of N >= 2 pictures to the others, from their [N, N] distances with a zero diagonal.

    The mean over a prompt's pictures is the mean over its pairs.
    """
    return distances.sum(axis=1) / (len(distances) - 1)


def pixel_distances(images: Sequence[Image.Image]) -> np.ndarray:
    """[N, N] root mean squares of the differences between thumbnails in 0…1: sees layout and colour, needs no model."""
    small = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    features = np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])
    return np.sqrt(np.square(features[:, None] - features[None]).mean(axis=2))


def clip_distances(images: list[Image.Image], model: CLIPReward) -> np.ndarray:
    """[N, N] of 1 − cosine of the features that a reward made of a CLIP sees."""
    features = model.image_features(images)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(np.eye(len(features), dtype=bool), 0, 1 - features @ features.T)


def diversity(images: list[Image.Image], model: CLIPReward | None) -> dict[str, np.ndarray]:
    """{measure: mean distance [N] of each of the N >= 2 pictures of a prompt to the others}; model: a CLIP, if any."""
    found = {"diversity_pixels": mean_distances(pixel_distances(images))}
    if model is not None:
        found["diversity_clip"] = mean_distances(clip_distances(images, model))
    return found


def signs(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on what changed against the baseline by more than chance (95 % interval) and hints at reward hacking.

    rows: those of a summary; with pairs of fewer than MIN_PROMPTS prompts they give no sign. With many prompts one in
    twenty harmless measures leaves 0 out by chance, with few more.
    """
    found = []
    for name, row in rows.items():
        low, high = row.get("difference_interval") or (None, None)
        if low is None or low <= 0 <= high or row["pair_prompts"] < MIN_PROMPTS:
            continue
        change = f"{row['difference_mean']:+.4g} (95 % interval {low:+.4g} to {high:+.4g})"
        if row["kind"] == "reward" and row["held_out"] and high < 0:
            found.append(f"{name}, not trained on, fell: {change}")
        elif name.startswith("diversity") and high < 0:
            found.append(f"{name}: pictures of a prompt are more alike: {change}")
        elif name in APPEARANCE:
            found.append(f"{name} changed: {change}, from {row['baseline_mean']:.4g}")
    return found

"""Measures of pictures: colour, sharpness, fine texture, and how much the pictures of a prompt differ."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

APPEARANCE = ("saturation", "sharpness", "high_frequency")
THUMBNAIL = 32  # pixels per side


def appearances(images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """The measures of APPEARANCE for N pictures, each float64 [N]. Each picture is measured on its own.

    saturation: mean over the pixels of (max − min) / max of R, G and B; 0 for grey, at most 1.
    sharpness: variance of the Laplacian (4 neighbours) of the luma in 0…1.
    high_frequency: share of the luma's spectral power above a quarter of a cycle per pixel, half of the highest
        frequency. The mean is subtracted and a Hann window applied first; 0 for a picture of one colour.
    """
    found = {name: np.zeros(len(images)) for name in APPEARANCE}
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(image.size, []).append(place)
    for (width, height), places in by_size.items():
        at_once = max(1, 2**19 // (width * height))  # pictures that fit into a CPU cache; bounds the memory too
        for start in range(0, len(places), at_once):
            chosen = places[start : start + at_once]
            pixels = np.stack([np.asarray(images[place].convert("RGB")) for place in chosen])
            for name, values in zip(APPEARANCE, _appearances(pixels), strict=True):
                found[name][chosen] = values
    return found


def appearance(image: Image.Image) -> dict[str, float]:
    """The measures of APPEARANCE for one picture."""
    return {name: float(values[0]) for name, values in appearances([image]).items()}


def _appearances(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Saturation, sharpness and high_frequency [N] of uint8 [N, height, width, 3]."""
    red, green, blue = np.ascontiguousarray(np.moveaxis(pixels, 3, 0))
    top = np.maximum(np.maximum(red, green), blue)
    spread = top - np.minimum(np.minimum(red, green), blue)
    saturation = spread / np.maximum(top, 1).astype(np.float32)

    weighted = ((0.299, red), (0.587, green), (0.114, blue))
    luma = sum(np.multiply(band, weight / 255, dtype=np.float32) for weight, band in weighted)
    laplacian = np.zeros_like(luma)
    for axis in (1, 2):  # as if the picture's border pixels were repeated outside
        rise = np.diff(luma, axis=axis)
        there, next_to = (slice(None),) * axis + (slice(-1),), (slice(None),) * axis + (slice(1, None),)
        laplacian[there] += rise
        laplacian[next_to] -= rise

    window, count, high = _spectrum(*luma.shape[1:])
    mean = (luma * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    spectrum = np.fft.rfft2(window * (luma - mean))
    power = (np.square(spectrum.real) + np.square(spectrum.imag)) * count
    total, above = _mean(power), _mean(power * high)
    share = np.where(total > 1e-9, above / np.maximum(total, 1e-9), 0.0)
    return _mean(saturation), _mean(np.square(laplacian)), share  # the Laplacian's mean is 0


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean per picture: [N, height, width] -> float64 [N]."""
    return values.reshape(len(values), -1).mean(1, dtype=np.float64)


@lru_cache(2)
def _spectrum(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pictures of one size: the Hann window; how often each entry of `rfft2` occurs in the full spectrum (1 or 2
    times); whether its frequency is above a quarter of a cycle per pixel.
    """
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    across = np.fft.rfftfreq(width)
    twice = np.where((across > 0) & (across < 0.5), 2, 1)
    return window, twice, np.hypot(np.fft.fftfreq(height)[:, None], across) > 0.25


def mean_distances(distances: np.ndarray) -> np.ndarray:
    """Mean distance [N] of each of N >= 2 pictures to the others. distances: [N, N] with a zero diagonal.

    The mean of the result is the mean distance over all pairs.
    """
    return distances.sum(axis=1) / (len(distances) - 1)


def pixel_distances(images: Sequence[Image.Image]) -> np.ndarray:
    """Distances [N, N]: root mean square of the difference between thumbnails with values in 0…1.

    Thumbnails compare layout and colour without a model.
    """
    small = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    features = np.stack([np.asarray(image, dtype=np.float64).ravel() for image in small])
    products = features @ features.T  # exact, because the features are whole numbers
    own = np.diag(products)
    return np.sqrt((own[:, None] + own - 2 * products) / features.shape[1]) / 255


def group_measures(groups: Sequence[Sequence[Image.Image]]) -> dict[str, np.ndarray]:
    """Measures of P groups of pictures, one group per prompt, all groups of one size. Each is a mean per group, [P].

    Has the measures of APPEARANCE, and diversity: the mean of `pixel_distances` over the pairs of a group, NaN for a
    group of one picture. float64. Without pictures there is no measure.
    """
    if not any(groups):
        return {}
    looks = appearances([image for group in groups for image in group])
    found = {name: values.reshape(len(groups), -1).mean(1) for name, values in looks.items()}
    pairs = [mean_distances(pixel_distances(group)).mean() if len(group) > 1 else np.nan for group in groups]
    return found | {"diversity": np.array(pairs)}

"""A picture world small enough to verify: one coloured shape on a plain background, its captions, and its scorer.

`Scene` is a caption's meaning; `draw` makes its picture; `parse_caption` reads it back from text. `ShapesRewardModel`
needs no weights: it measures the shape in a picture (colours, area, centre, outline) and compares it with the caption.
It serves as the granular reward of the tiny FLUX, with the components `color`, `form` and `clean`.
"""

import itertools
import re
from dataclasses import dataclass

from fastvideo.models.reward_model.granular import GranularRewardModel

import numpy as np
from PIL import Image

IMAGE_SIZE = 32  # pixels; pictures of any other size are resized to it before scoring
PALETTE = {  # RGB 0-255, close to the corners of the colour cube so that no two are easily confused
    "red": (225, 45, 45),
    "green": (45, 165, 65),
    "blue": (45, 75, 225),
    "yellow": (250, 220, 50),
    "purple": (190, 55, 205),
    "cyan": (60, 215, 225),
    "black": (25, 25, 25),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS = tuple(PALETTE)
SIZES = {"small": 4.0, "large": 6.5}  # pixels: radius of the circle of equal area, so size does not depend on shape
PLACES = {  # centre of the shape's bounding box, x and y in pixels, and the caption's words
    "center": ((16.0, 16.0), "in the center"),
    "left": ((10.0, 16.0), "at the left"),
    "right": ((22.0, 16.0), "at the right"),
    "top": ((16.0, 10.0), "at the top"),
    "bottom": ((16.0, 22.0), "at the bottom"),
}
JITTER = 0.75  # pixels by which a drawn shape may lie off its place, in x and y
_RGB = np.array(list(PALETTE.values()), dtype=np.float64) / 255
_COLOR_INDEX = {name: i for i, name in enumerate(PALETTE)}
# Half extents over the equal-area radius: square half side, triangle half base and half height (equilateral).
_SQUARE = np.sqrt(np.pi) / 2
_BASE = np.sqrt(np.pi / np.sqrt(3))
_HEIGHT = _BASE * np.sqrt(3) / 2
_PIXELS_Y, _PIXELS_X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5


@dataclass(frozen=True)
class Scene:
    """What a caption says: every field is a key of the tables above."""

    size: str
    color: str
    shape: str
    place: str
    background: str

    def caption(self) -> str:
        """The scene in words, for instance "a small red circle at the left on a blue background"."""
        return f"a {self.size} {self.color} {self.shape} {PLACES[self.place][1]} on a {self.background} background"

    @property
    def withheld(self) -> bool:
        """Whether the combination of shape, colour and background is kept out of training (1 in 8, all words seen)."""
        shape, color = SHAPES.index(self.shape), COLORS.index(self.color)
        return (5 * shape + 3 * color + BACKGROUNDS.index(self.background)) % 8 == 0


def all_scenes(withheld: bool) -> list[Scene]:
    """All scenes of the training distribution (`withheld=False`) or all withheld ones, in a fixed order."""
    fields = itertools.product(SIZES, COLORS, SHAPES, PLACES, BACKGROUNDS)
    scenes = (Scene(*field) for field in fields)
    return [scene for scene in scenes if scene.color != scene.background and scene.withheld == withheld]


_CAPTION = re.compile(
    rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    rf"(?:,? ({'|'.join(words for _, words in PLACES.values())}))?,? on an? ({'|'.join(BACKGROUNDS)}) background\.?"
)
_PLACE_OF_WORDS = {words: place for place, (_, words) in PLACES.items()}


def parse_caption(caption: str) -> Scene | None:
    """The scene a caption describes, or None for a caption of another world.

    Upper case, extra spaces, commas around the place and a final full stop are fine; without a place it is the center.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        return None
    size, color, shape, words, background = match.groups()
    place = _PLACE_OF_WORDS[words] if words else "center"
    return Scene(size, color, shape, place, background) if color != background else None


def _outline_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels [N, 32, 32] to the outline, negative inside; x, y (centre) and radius are [N]."""
    dx = _PIXELS_X - x[:, None, None]
    dy = _PIXELS_Y - y[:, None, None]
    radius = radius[:, None, None]
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - _SQUARE * radius
    # Upright equilateral triangle: the base below, and two sides whose normals are (±cos 30°, -sin 30°).
    side = abs(dx) * np.cos(np.pi / 6) - (dy + _HEIGHT * radius) * 0.5
    return np.maximum(side, dy - _HEIGHT * radius)


def draw(scene: Scene, jitter: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """The antialiased 32×32 picture of a scene, its shape moved by `jitter` pixels (x, y)."""
    (x, y), _ = PLACES[scene.place]
    center = np.array([[x + jitter[0]], [y + jitter[1]]])
    distance = _outline_distance(scene.shape, *center, np.array([SIZES[scene.size]]))[0]
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    color, background = (np.array(PALETTE[name], dtype=np.float64) for name in (scene.color, scene.background))
    return Image.fromarray(np.round(background + coverage * (color - background)).astype(np.uint8))


def _closeness(error: np.ndarray, scale: float) -> np.ndarray:
    """1 at no error, 1/2 at `scale`, with a long tail so that even a wrong picture can get better by degrees."""
    return 1 / (1 + (error / scale) ** 2)


@dataclass
class Measurement:
    """What is in N pictures, whatever their captions say. Colours are RGB in 0-1, lengths in pixels."""

    background: np.ndarray  # [N, 3]
    color: np.ndarray  # [N, 3] of the shape's core
    presence: np.ndarray  # [N] 0 (a blank picture) to 1 (a shape that stands out)
    radius: np.ndarray  # [N] of the circle of equal area
    centers: np.ndarray  # [N, 3, 2] bounding-box centre (x, y) if it is a circle, square, triangle
    overlap: np.ndarray  # [N, 3] intersection over union with a circle, square, triangle of that area and centroid
    residue: np.ndarray  # [N] RMS colour error against the flat best-fitting shape on a flat background, off the edge


def measure(images: list[Image.Image]) -> Measurement:
    """Find background, shape colour, area, centroid and outline in each picture.

    The background is the median of the border; the shape is what differs from it by over half the greatest difference.
    """
    pictures = (image.convert("RGB") for image in images)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = np.stack([np.asarray(p if p.size == size else p.resize(size, Image.BICUBIC)) for p in pictures]) / 255
    count = len(pixels)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(border, axis=1)
    difference = np.linalg.norm(pixels - background[:, None, None], axis=-1)
    # The greatest difference of 2×2 means: a single odd pixel is no shape.
    means = (difference[:, 1:, 1:] + difference[:, :-1, 1:] + difference[:, 1:, :-1] + difference[:, :-1, :-1]) / 4
    contrast = means.reshape(count, -1).max(1)
    relative = difference / np.maximum(contrast, 1e-6)[:, None, None]
    core = np.clip((relative - 0.7) / 0.2, 1e-6, 1)
    color = np.einsum("nhw,nhwc->nc", core, pixels) / core.sum((1, 2))[:, None]
    mask = np.clip((relative - 0.25) / 0.5, 1e-9, 1)  # antialiased edge: half a difference is half a pixel
    area = mask.sum((1, 2))
    radius = np.sqrt(area / np.pi)
    x, y = ((mask * axis).sum((1, 2)) / area for axis in (_PIXELS_X, _PIXELS_Y))
    centers, overlap, residue = [], [], []
    for shape in SHAPES:
        center_y = y - _HEIGHT * radius / 3 if shape == "triangle" else y  # its centroid lies at a third of its height
        distance = _outline_distance(shape, x, center_y, radius)
        template = np.clip(0.5 - distance, 0, 1)
        centers.append(np.stack([x, center_y], axis=-1))
        overlap.append(np.minimum(mask, template).sum((1, 2)) / np.maximum(mask, template).sum((1, 2)))
        flat = np.where(distance[..., None] < 0, color[:, None, None], background[:, None, None])
        off_edge = abs(distance) > 1.25
        squares = ((pixels - flat) ** 2).sum(-1) * off_edge
        residue.append(np.sqrt(squares.sum((1, 2)) / np.maximum(off_edge.sum((1, 2)), 1)))
    return Measurement(
        background=background,
        color=color,
        presence=np.clip((contrast - 0.1) / 0.2, 0, 1),
        radius=radius,
        centers=np.stack(centers, axis=1),
        overlap=np.stack(overlap, axis=1),
        residue=np.min(residue, axis=0),
    )


def hard_checks(images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
    """Yes-or-no answers for measuring: bool [N] each for color, background, shape, size, place.

    Colours and shape: the nearest one is the caption's (the overlap with the shape at least 0.6); size: nearer than the
    other; place: nearest of the five. A blank picture or an unknown caption fails all.
    """
    scenes = [parse_caption(prompt) for prompt in prompts]
    found = measure(images)
    names = list(PALETTE)
    result = {key: np.zeros(len(images), dtype=bool) for key in ("color", "background", "shape", "size", "place")}
    for n, scene in enumerate(scenes):
        if scene is None or found.presence[n] < 0.5:
            continue
        best = int(found.overlap[n].argmax())
        offsets = [np.linalg.norm(found.centers[n, best] - np.array(center)) for center, _ in PLACES.values()]
        log_ratios = [abs(np.log(found.radius[n] / radius)) for radius in SIZES.values()]
        result["color"][n] = names[np.linalg.norm(_RGB - found.color[n], axis=1).argmin()] == scene.color
        nearest_background = names[np.linalg.norm(_RGB - found.background[n], axis=1).argmin()]
        result["background"][n] = nearest_background == scene.background
        result["shape"][n] = SHAPES[best] == scene.shape and found.overlap[n, best] >= 0.6
        result["size"][n] = list(SIZES)[int(np.argmin(log_ratios))] == scene.size
        result["place"][n] = list(PLACES)[int(np.argmin(offsets))] == scene.place
    return result


def color_and_shape_correct(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """bool [N]: the shape's colour, the background's colour and the shape are all the caption's."""
    checks = hard_checks(images, prompts)
    return checks["color"] & checks["background"] & checks["shape"]


class ShapesRewardModel(GranularRewardModel):
    """Verifiable granular reward of the shapes world; every component is soft, in 0-1, and NaN for unknown captions.

    - `color`: mean closeness of the shape's and the background's colour to the caption's.
    - `form`: mean of shape (outline), size (area) and place (centre).
    - `clean`: flat fill, flat background, nothing else in the picture. A blank picture is not clean: it is empty.
    """

    name = "ShapesRewardModel"
    component_names = ("color", "form", "clean")

    def score_components(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Scores `{component: float64 [N]}` of N images against their N captions."""
        scores = {name: np.full(len(images), np.nan) for name in self.component_names}
        scenes = [parse_caption(prompt) for prompt in prompts]
        known = np.array([n for n, scene in enumerate(scenes) if scene is not None], dtype=int)
        if len(known) == 0:
            return scores
        scenes = [scenes[n] for n in known]
        found = measure([images[n] for n in known])
        rows = np.arange(len(known))

        color = _RGB[[_COLOR_INDEX[scene.color] for scene in scenes]]
        background = _RGB[[_COLOR_INDEX[scene.background] for scene in scenes]]
        color_match = found.presence * _closeness(np.linalg.norm(found.color - color, axis=1), 0.3)
        background_match = _closeness(np.linalg.norm(found.background - background, axis=1), 0.3)

        wanted = np.array([SHAPES.index(scene.shape) for scene in scenes])
        likelihood = np.exp((found.overlap - found.overlap.max(1, keepdims=True)) / 0.04)
        likelihood /= likelihood.sum(1, keepdims=True)
        shape_match = likelihood[rows, wanted] * np.clip((found.overlap[rows, wanted] - 0.5) / 0.45, 0, 1)
        radius = np.array([SIZES[scene.size] for scene in scenes])
        size_match = _closeness(np.log(found.radius / radius), 0.2)
        place = np.array([PLACES[scene.place][0] for scene in scenes])
        center = np.einsum("ns,nsc->nc", likelihood, found.centers)
        # What training pictures do by themselves (jitter in x and y) costs nothing.
        place_match = _closeness(np.maximum(np.linalg.norm(center - place, axis=1) - np.sqrt(2) * JITTER, 0), 2.0)

        scores["color"][known] = (color_match + background_match) / 2
        scores["form"][known] = found.presence * (shape_match + size_match + place_match) / 3
        scores["clean"][known] = found.presence * _closeness(found.residue, 0.1)
        return scores

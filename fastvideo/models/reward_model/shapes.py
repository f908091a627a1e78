"""A picture world small enough to verify: two coloured shapes on a plain background, their captions and their scorer.

`Scene` is the meaning of a caption, `draw` makes the picture of a scene, `parse_caption` reads a scene from text.
`ShapesRewardModel` needs no weights: it looks for the caption's two colours in a picture, measures amount, place and
outline of each, and everything else in the picture. It is the granular reward of the tiny FLUX, with the components
`binding`, `form` and `clean`, and it answers one yes/no question: is the picture right in everything?
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastvideo.models.reward_model.granular import GranularRewardModel
from fastvideo.models.reward_model.spec import REWARDS

import numpy as np
from PIL import Image

IMAGE_SIZE = 32  # pixels; pictures of any other size are resized to it before scoring
PALETTE = {  # RGB 0-255, close to the corners of the colour cube, so that no two colours are easily confused
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
BACKGROUNDS = ("black", "white")
NEAR, MIDDLE, FAR = 9.5, 16.0, 22.5  # pixels from the left or upper edge
RELATIONS = {  # centroids (x, y) of the first and the second object
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
}
_FORWARD = ("left of", "above")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RADIUS = 4.6  # pixels: radius of the circle of equal area; all shapes have the same area
JITTER = 0.75  # pixels: largest distance of a drawn shape from its place, in x and in y
_AREA = np.pi * RADIUS**2
_RGB = {name: np.array(color, dtype=np.float32) / 255 for name, color in PALETTE.items()}
# Half extents over the equal-area radius: square half side, triangle half base and height (equilateral).
_SQUARE = math.sqrt(math.pi) / 2
_BASE = math.sqrt(math.pi / math.sqrt(3))
_HEIGHT = _BASE * math.sqrt(3)
_PIXELS_Y, _PIXELS_X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + np.float32(0.5)


@dataclass(frozen=True)
class Scene:
    """The meaning of a caption. Every field is a key of the tables above."""

    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str
    background: str

    def caption(self) -> str:
        """The scene in words, for instance "a red circle left of a blue square on a white background"."""
        other = f"a {self.other_color} {self.other_shape} on a {self.background} background"
        return f"a {self.color} {self.shape} {self.relation} {other}"

    @property
    def objects(self) -> tuple[tuple[str, str, tuple[float, float]], ...]:
        """(colour, shape, centroid in pixels) of both objects."""
        first, second = RELATIONS[self.relation]
        return (self.color, self.shape, first), (self.other_color, self.other_shape, second)

    @property
    def mirrored(self) -> "Scene":
        """The scene of the same picture's other caption: "A left of B" is "B right of A"."""
        return Scene(
            self.other_color, self.other_shape, OPPOSITE[self.relation], self.color, self.shape, self.background
        )

    @property
    def withheld(self) -> bool:
        """Whether the picture is kept out of training, with both its captions: 1 in 8. Training sees every word."""
        scene = self if self.relation in _FORWARD else self.mirrored
        others = [color for color in COLORS if color != scene.color]
        number = 0
        for values, value in (
            (COLORS, scene.color),
            (others, scene.other_color),
            (SHAPES, scene.shape),
            (SHAPES, scene.other_shape),
            (_FORWARD, scene.relation),
            (BACKGROUNDS, scene.background),
        ):
            number = number * len(values) + values.index(value)
        return number * 923 % 1080 < 135  # 923 has no common factor with 1080 and spreads the scenes over all words

    def mistakes(self) -> dict[str, "Scene"]:
        """Scenes that differ from this one in one thing: a model trained on false captions draws them instead."""

        def next_shape(shape: str) -> str:
            return SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]

        return {
            "colors exchanged": replace(self, color=self.other_color, other_color=self.color),
            "objects exchanged": replace(self, relation=OPPOSITE[self.relation]),
            "shape changed": replace(self, shape=next_shape(self.shape)),
            "other shape changed": replace(self, other_shape=next_shape(self.other_shape)),
        }


def all_scenes(withheld: bool) -> list[Scene]:
    """The 1,890 scenes of the training distribution (`withheld=False`) or the 270 withheld ones, in a fixed order."""
    fields = itertools.product(COLORS, SHAPES, RELATIONS, COLORS, SHAPES, BACKGROUNDS)
    scenes = (Scene(*field) for field in fields)
    return [scene for scene in scenes if scene.color != scene.other_color and scene.withheld == withheld]


_OBJECT = rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_OBJECT},? ({'|'.join(RELATIONS)}) {_OBJECT},? on an? ({'|'.join(BACKGROUNDS)}) background\.?"
)


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption describes; None for a caption of another world.

    Upper case, extra spaces, commas between the parts and a final full stop are allowed.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    scene = Scene(*match.groups()) if match else None
    return scene if scene and scene.color != scene.other_color else None


def _outline_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels [..., 32, 32] to the outline, negative inside. x, y: centroid [...]; radius: [...]."""
    dx = _PIXELS_X - x[..., None, None]
    dy = _PIXELS_Y - y[..., None, None]
    radius = radius[..., None, None]
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - _SQUARE * radius
    # Upright equilateral triangle: the base lies a third of the height below the centroid; the normals of the two other
    # sides are (±cos 30°, -sin 30°).
    side = abs(dx) * math.cos(math.pi / 6) - (dy + _HEIGHT * radius * 2 / 3) * 0.5
    return np.maximum(side, dy - _HEIGHT * radius / 3)


def draw(scene: Scene, jitter: Sequence[Sequence[float]] = ((0.0, 0.0), (0.0, 0.0))) -> Image.Image:
    """The antialiased 32×32 picture of a scene. jitter: (x, y) in pixels by which each of the two objects is moved."""
    picture = np.broadcast_to(np.array(PALETTE[scene.background], dtype=np.float64), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for (color, shape, (x, y)), (move_x, move_y) in zip(scene.objects, jitter, strict=True):
        distance = _outline_distance(shape, np.array(x + move_x), np.array(y + move_y), np.array(RADIUS))
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = picture + coverage * (np.array(PALETTE[color]) - picture)
    return Image.fromarray(np.round(picture).astype(np.uint8))


def _closeness(error: np.ndarray, scale: float) -> np.ndarray:
    """1 at no error, 1/2 at `scale`. The long tail lets even a very wrong picture get better by degrees."""
    return 1 / (1 + (error / scale) ** 2)


@dataclass
class Measurement:
    """What N pictures show of the two colours in their captions. Lengths are in pixels."""

    amount: np.ndarray  # [N, 2] area of each colour, divided by the area of a drawn object
    offset: np.ndarray  # [N, 2] distance of the colour's centroid from its place in the caption, less the jitter
    overlap: np.ndarray  # [N, 2, 3] intersection over union with a circle, square, triangle of equal area and centroid
    residue: np.ndarray  # [N] RMS colour error against flat best-fitting shapes on a flat background, off the edges


def measure(images: list[Image.Image], scenes: list[Scene]) -> Measurement:
    """Finds the caption's two colours in each picture, and the part that neither they nor the background explain.

    Each pixel is taken as a mixture of the background and the nearer one of the two colours, because edges are
    antialiased. A pixel far from all such mixtures counts little, as does a pixel with less than a quarter of a colour.
    """
    pictures = (image.convert("RGB") for image in images)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = np.stack([np.asarray(p if p.size == size else p.resize(size, Image.BICUBIC)) for p in pictures])
    pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255  # [N, 3, 32, 32]
    background = np.stack([_RGB[scene.background] for scene in scenes])[..., None, None]
    colors = np.stack([[_RGB[color] for color, _, _ in scene.objects] for scene in scenes])[..., None, None]
    wanted = np.array([[place for _, _, place in scene.objects] for scene in scenes])  # [N, 2, (x, y)]

    towards = colors - background[:, None]  # [N, 2, 3, 1, 1]
    away = (pixels - background)[:, None]  # [N, 1, 3, 32, 32]
    share = np.clip((away * towards).sum(2) / np.square(towards).sum(2), 0, 1)  # [N, 2, 32, 32]
    error = np.square(away - share[:, :, None] * towards).sum(2)
    nearer = error == error.min(axis=1, keepdims=True)
    mask = np.clip(2 * share - 0.5, 0, 1) * nearer / (1 + error / 0.2**2)

    area = np.maximum(mask.sum((2, 3)), 1e-6)
    x, y = ((mask * axis).sum((2, 3)) / area for axis in (_PIXELS_X, _PIXELS_Y))
    radius = np.sqrt(area / math.pi)
    distances = np.stack([_outline_distance(shape, x, y, radius) for shape in SHAPES], axis=2)  # [N, 2, 3, 32, 32]
    template = np.clip(0.5 - distances, 0, 1)
    both = np.minimum(mask[:, :, None], template).sum((3, 4))
    overlap = both / np.maximum(area[..., None] + template.sum((3, 4)) - both, 1e-6)

    best = overlap.argmax(2)[..., None, None, None]
    distance = np.take_along_axis(distances, best, axis=2)[:, :, 0]  # [N, 2, 32, 32]
    flat = np.where(distance[:, :1] < 0, colors[:, 0], background)
    flat = np.where(distance[:, 1:] < 0, colors[:, 1], flat)
    off_edge = (abs(distance) > 1.25).all(axis=1)
    squares = (np.square(pixels - flat).sum(1) * off_edge).sum((1, 2)) / np.maximum(off_edge.sum((1, 2)), 1)
    offset = np.maximum(np.hypot(x - wanted[..., 0], y - wanted[..., 1]) - math.sqrt(2) * JITTER, 0)
    return Measurement(area / _AREA, offset, overlap, np.sqrt(squares))


class ShapesRewardModel(GranularRewardModel):
    """Verifiable granular reward of the world. Every component is soft, from 0 to 1; NaN for unknown captions.

    - `binding`: each colour covers the area of one object, at the place that the caption gives to its object.
    - `form`: each colour has the outline of its object, at any place.
    - `clean`: nothing is there but flat shapes in the caption's two colours, on a flat background of the caption's
      colour. The shapes may be missing: an empty picture is clean, so this component alone rewards leaving things out.
      A background in one of the two colours counts as one huge shape and is clean too; the other components are low.

    The check `right` is 1 if the picture is right in everything, else 0: both objects have the right colour, shape and
    place, and nothing else is there. It is reported and never trained on.
    """

    name = "ShapesRewardModel"
    component_names = REWARDS["shapes"].components
    check_names = REWARDS["shapes"].checks

    def score_components(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Scores `{component or check: float64 [N]}` of N images against their N captions."""
        scores = {name: np.full(len(images), np.nan) for name in (*self.component_names, *self.check_names)}
        scenes = [parse_caption(prompt) for prompt in prompts]
        known = np.array([n for n, scene in enumerate(scenes) if scene is not None], dtype=int)
        if len(known) == 0:
            return scores
        scenes = [scenes[n] for n in known]
        found = measure([images[n] for n in known], scenes)

        wanted = np.array([[SHAPES.index(shape) for _, shape, _ in scene.objects] for scene in scenes])[..., None]
        likelihood = np.exp((found.overlap - found.overlap.max(2, keepdims=True)) / 0.04)
        likelihood /= likelihood.sum(2, keepdims=True)
        overlap, likelihood = (np.take_along_axis(x, wanted, axis=2)[..., 0] for x in (found.overlap, likelihood))
        presence = np.clip((found.amount - 0.1) / 0.3, 0, 1)
        amount = abs(np.log(found.amount))

        scores["binding"][known] = (_closeness(amount, 0.4) * _closeness(found.offset, 3.0)).mean(1)
        scores["form"][known] = (presence * likelihood * np.clip((overlap - 0.5) / 0.4, 0, 1)).mean(1)
        scores["clean"][known] = _closeness(found.residue, 0.1)
        # Drawn shapes differ in overlap by at least 0.095; the own outline must be nearer than others by half of it.
        others = np.where(np.arange(len(SHAPES)) == wanted, 0, found.overlap).max(2)
        outline = (overlap > 0.9) & (overlap - others > 0.05)
        objects = outline & (amount < np.log(1.5)) & (found.offset < 2.5)
        scores["right"][known] = objects.all(1) & (found.residue < 0.05)
        return scores

"""The command line of a model file that is run by itself: it scores pictures against one prompt."""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.devices import DTYPES, resolve_device
from fastvideo.io.pictures import open_picture
from fastvideo.models.reward_model.granular import GranularRewardModel, as_scores

from PIL import Image

DEMO_IMAGE = Path(__file__).parents[3] / "assets" / "reward_demo.png"
DEMO_PROMPT = "a large red circle and a small yellow square on a blue background"


def demo_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every model file that is run by itself."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default=resolve_device())
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    for proxy in ("--http_proxy", "--https_proxy"):
        parser.add_argument(proxy, default=None, help="for models that download their weights")
    parser.add_argument("--image", nargs="+", default=[str(DEMO_IMAGE)], help="pictures to score")
    parser.add_argument("--prompt", default=DEMO_PROMPT, help="their prompt")
    return parser


def _open(path: str) -> Image.Image:
    try:
        return open_picture(Path(path))
    except (FileNotFoundError, ValueError) as error:
        raise FlagError(
            "image", path, "no such file" if isinstance(error, FileNotFoundError) else str(error)
        ) from error


def print_scores(model: Any, images: list[Image.Image], args: argparse.Namespace) -> None:
    """Scores args.image against args.prompt and prints one line per image, with the components of a granular model."""
    prompts = [args.prompt] * len(images)
    components: dict[str, Any] = {}
    if isinstance(model, GranularRewardModel):
        values, components = model.score(images, prompts)
    else:
        values = model(images, prompts)
    scores = {model.name: as_scores(values, len(images), model.name)}
    scores |= {f"{model.name}_{component}": found for component, found in components.items()}
    for i, path in enumerate(args.image):
        print(f"{path}: " + ", ".join(f"{name} {values[i]:.4f}" for name, values in scores.items()))


def run_demo(build: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Parses the command line, builds a model from the flags that `build` has parameters for, and prints its scores."""
    args = parser.parse_args()
    known = inspect.signature(build).parameters
    try:
        images = [_open(path) for path in args.image]
        print_scores(build(**{name: value for name, value in vars(args).items() if name in known}), images, args)
    except FlagError as error:  # it names the trainer's flag; this command line may call it differently
        parser.error(f"--{error}".splitlines()[0])
    except (ValueError, OSError) as error:
        parser.error(str(error).splitlines()[0])

"""Rewards of the user's own, `--reward_model package.module:function`: a function of images and prompts."""

import copy
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, choose_from
from fastvideo.io.secrets import one_line
from fastvideo.io.waiting import waiting
from fastvideo.models.reward_model.granular import as_scores
from fastvideo.models.reward_model.groups import Group, joined, parted

import numpy as np
from PIL import Image

IMPORT_LIMIT = 600.0  # seconds in which a module must be imported; it may load a large model
PROMPTS = ("a red circle", "a blue square")  # of the probe's pictures


class FunctionReward:
    """A custom reward: returns one number per image. A function with an argument `metadata` gets compute_reward's.

    A function with an argument `groups` is groupwise (see groups.py): it gets the pictures of whole groups, and the
    number of each picture's group.

    Raises FlagError, naming the setting `field`, if there is no such function.
    """

    def __init__(self, path: str, field: str = "reward_model") -> None:
        module_name, _, function_name = path.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # the module exists, but something that it imports doesn't
            raise FlagError(field, path, f"no module {error.name!r} (is it on PYTHONPATH?)") from None
        function = getattr(module, function_name, None)
        if function is None:
            functions = inspect.getmembers(module, inspect.isfunction)
            own = [name for name, f in functions if f.__module__ == module_name and not name.startswith("_")]
            advice = f"; {choose_from(own, function_name)}" if own else ""
            raise FlagError(field, path, f"{module_name} has no {function_name!r}{advice}")
        if not callable(function):
            raise FlagError(field, path, f"{function_name} is not callable")
        self.function = function
        self.name = function_name
        self.takes_metadata, self.groupwise = _takes(function, "metadata"), _takes(function, "groups")

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        groups: Sequence[int] | None = None,
    ) -> Sequence[float]:
        given = {"metadata": [{}] * len(images) if metadata is None else metadata} if self.takes_metadata else {}
        if self.groupwise:
            given["groups"] = groups
        # If it empties or changes its lists, others still have theirs.
        return self.function(list(images), list(prompts), **copy.deepcopy(given))

    def score_groups(self, groups: Sequence[Group]) -> list[Sequence[float]]:
        """The scores of each group's pictures. All groups together are one call."""
        given = joined(groups)
        return parted(as_scores(self(**given), len(given["images"]), self.name), groups)


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C have no signature
        return False


@functools.cache  # a run checks its rewards, and later builds them
def probe(path: str, field: str, size: tuple[int, int], limit: float) -> None:
    """Calls a custom reward once, with two pictures of noise, before anything slow is loaded.

    Another process does it. So the run itself begins with a fresh module, whose counters, random numbers and memory are
    untouched, and a function that never returns or ends its process does no harm.

    size: of the pictures, (width, height). limit: seconds for the call.

    Raises FlagError, naming the setting `field`, if there is no such function, or it gives no scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        program = "import sys; sys.path.pop(0); from fastvideo.models.reward_model.custom import main; main()"
        given = (path, *map(str, size), str(limit), str(answer))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        child = subprocess.Popen([sys.executable, "-c", program, *given], env=environment, **quiet)
        try:
            with waiting(f"the scores of two pictures by {path}"):
                status = child.wait(IMPORT_LIMIT + limit)
            problem = json.loads(answer.read_text()) if answer.exists() else f"ended its process, status {status}"
        except subprocess.TimeoutExpired:
            problem = f"not imported within {IMPORT_LIMIT:g} seconds"
        finally:
            child.kill()
            child.wait()
    if problem:
        raise FlagError(field, path, problem)


def main() -> None:
    """The other process of `probe`. Writes the problem, or null, as JSON."""
    path, width, height, limit, answer = sys.argv[1:]

    def end(problem: str | None) -> None:
        part = Path(answer).with_suffix(".part")
        part.write_text(json.dumps(problem))
        os.replace(part, answer)
        os._exit(0)

    def too_slow() -> None:
        end(f"gave no scores of two pictures within {float(limit):g} seconds")

    noise = np.random.default_rng(0)
    try:
        reward = FunctionReward(path)
        timer = threading.Timer(float(limit), too_slow)
        timer.daemon = True
        timer.start()
        pixels = noise.integers(0, 256, (len(PROMPTS), int(height), int(width), 3), dtype=np.uint8)
        images = [Image.fromarray(picture) for picture in pixels]
        if reward.groupwise:
            (scores,) = reward.score_groups([Group(images, PROMPTS[0])])
        else:
            scores = reward(images, list(PROMPTS))
    except FlagError as error:
        end(error.problem)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        end(f"asked to score two pictures, it raised {one_line(error)} ({place})")
    try:
        as_scores(scores, len(PROMPTS), reward.name)
    except ValueError as error:
        end(str(error))
    end(None)

"""Runs the reward models in a separate thread, and computes the scores' weights in the advantage and their metrics."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from fastvideo.config import GRPOConfig
from fastvideo.io.messages import warn
from fastvideo.io.secrets import one_line
from fastvideo.io.waiting import WaitedTooLong, result_of, waiting
from fastvideo.models.reward_model.granular import GranularRewardModel, RewardModel
from fastvideo.models.reward_model.groups import is_groupwise
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward, judge_of
from fastvideo.utils.advantages import reward_means
from fastvideo.utils.picture_measures import group_measures
from fastvideo.utils.plan import Plan
from fastvideo.utils.scouting import Scouted

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")


class RewardFailed(RuntimeError):
    """Raised on all processes when a reward raised an error or did not answer in time on any of them."""


def _measure(groups: list[list[Image.Image]]) -> dict[str, np.ndarray]:
    try:
        return group_measures(groups)
    except Exception as error:  # no reason to end a run
        warn(f"how the pictures look can't be measured: {one_line(error)}")
        return {}


class Scoring:
    """Attributes: models, name -> reward model; weights, name -> share of the model in the reward; judge, see
    `judge_of`; current, the name of the model that scores now or was the last to score."""

    def __init__(self, config: GRPOConfig, device: torch.device) -> None:
        self.config = config
        self.models, self.weights = build_reward_models(config, str(device))
        self.judge = judge_of(self.models)
        self.current = ", ".join(self.models)
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> "Future[Result]":
        """Starts work(...) in the scoring thread and on its CUDA stream, while the next prompts are sampled."""

        def in_stream() -> Result:
            try:
                with torch.cuda.stream(self._stream):  # does nothing for None
                    return work(*args, **kwargs)
            except (Exception, SystemExit):
                raise
            except (
                BaseException
            ) as error:  # a KeyboardInterrupt in this thread comes from the reward, not from a signal
                raise RuntimeError(repr(error)) from error

        return self._thread.submit(in_stream)

    def compute(
        self, images: list[Image.Image], prompts: list[str], models: dict[str, RewardModel], **place: Any
    ) -> dict[str, np.ndarray]:
        """The scores of `compute_reward`, name -> float64 [N]. place: see `place`. `current` says whose turn it is."""

        def begins(name: str) -> None:
            self.current = name

        return compute_reward(images, prompts, models, dict.fromkeys(models, 1.0), **place, begins=begins)[2]

    def gather(self, futures: "Sequence[Future[Result]]") -> list[Result]:
        """The results of the work that `begin` has started on all processes, sorted by process. All must call it.

        Raises:
            RewardFailed: on all processes, if the work raised an error on any, or took longer than --reward_timeout.
        """
        found, failed = [], None
        try:
            for future in futures:
                found.append(result_of(future, f"the scores of {self.current}", self.config.reward_timeout))
        except (Exception, SystemExit) as error:  # a reward may call sys.exit
            late = isinstance(error, WaitedTooLong)
            problem = f"gave no scores within --reward_timeout {self.config.reward_timeout:g} seconds"
            failed = (f"{self.current} {problem if late else f'raised {one_line(error)}'}", error)
        with waiting("the scores of the other processes"):
            everywhere = gather_object([(found, failed and failed[0])])
        ranks = [f" (rank {rank})" if len(everywhere) > 1 else "" for rank in range(len(everywhere))]
        problems = [problem + rank for (_, problem), rank in zip(everywhere, ranks, strict=True) if problem]
        if problems:
            raise RewardFailed(f"the reward {problems[0]}") from (failed and failed[1])
        return [result for results, _ in everywhere for result in results]

    def gather_arrays(self, futures: "Sequence[Future[dict[str, np.ndarray]]]") -> dict[str, np.ndarray]:
        """`gather` for work that returns {name: array with a row per prompt}: the same with all prompts."""
        parts = self.gather(futures)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def begin_looks(self, plan: Plan, images: list[Image.Image]) -> "list[Future[dict[str, np.ndarray]]]":
        """Starts to measure how the trained pictures look (`group_measures`), while they are trained."""
        places = range(0, len(images), plan.pictures)
        groups = [images[i : i + plan.trained_pictures] for i in places]
        return [self.begin(_measure, groups)] if groups else []

    def looks(self, futures: "Sequence[Future[dict[str, np.ndarray]]]") -> dict[str, float]:
        """Means of what `begin_looks` has started on all processes: hacking_…, which may show reward hacking."""
        parts = [part for part in self.gather(futures) if part]
        found = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        return {f"hacking_{name}": float(values.mean()) for name, values in found.items()}

    def place(self, plan: Plan, prompts: int, iteration: int) -> dict[str, Any]:
        """What `compute_reward` must know about the pictures of `prompts` prompts: progress and groups."""
        step, total = self.progress(plan, prompts, iteration)
        return {"curr_step": step, "total_steps": total, "groups": plan.groups(prompts)}

    def progress(self, plan: Plan, prompts: int, iteration: int) -> tuple[int | np.ndarray, int]:
        """curr_step and total_steps of the granular weights.

        With --granular_progress train_step: the iteration and --max_train_steps. With batch_index: the place of each
        picture in its group, [prompts · pictures], and the group size.
        """
        if self.config.granular_progress == "batch_index":
            group = self.config.num_generations
            return np.tile(plan.group_places(group), prompts), group
        return iteration, self.config.max_train_steps

    def advantage_weights(self, plan: Plan, iteration: int) -> dict[str, np.ndarray]:
        """Weight of each score in the advantage: name -> [pictures of a prompt].

        With `--granular_mix advantage` a granular model is replaced by its components.
        """
        found: dict[str, np.ndarray] = {}
        for name, weight in self.weights.items():
            model = self.models[name]
            if self.config.granular_mix == "advantage" and isinstance(model, GranularRewardModel):
                parts = model.component_weights(*self.progress(plan, 1, iteration), plan.pictures)
                found |= {key: weight * part for key, part in parts.items()}
            else:
                found[name] = np.full(plan.pictures, weight)
        return found

    def metrics(
        self,
        plan: Plan,
        scores: dict[str, np.ndarray],
        iteration: int,
        scouted: Scouted | None = None,
    ) -> dict[str, float]:
        """Means of the weighted reward and of every model and component; the granular weights of this iteration; and
        what scouting adds.

        Pictures that train nothing (E-GRPO's noise-free anchors) have separate means, eval_reward…. They have no group,
        so groupwise models don't score them.

        Args:
            scores: name -> [P, pictures], NaN where failed.
        """
        trained = plan.trained_pictures
        metrics = reward_means({name: v[:, :trained] for name, v in scores.items()}, self.weights)
        if trained < plan.pictures:
            grouped = {name for name, model in self.models.items() if is_groupwise(model)}
            weights = {name: weight for name, weight in self.weights.items() if name not in grouped}
            alone = {name: v[:, trained:] for name, v in scores.items() if name not in grouped}
            total = sum(weights.values())  # 0: only groupwise models have a weight
            anchors = reward_means(alone, {name: weight / total for name, weight in weights.items()}) if total else {}
            metrics |= {f"eval_{name}": value for name, value in anchors.items()}
        for model in self.models.values():
            if isinstance(model, GranularRewardModel):
                step, total = self.progress(plan, 1, iteration)
                step = step[:trained] if isinstance(step, np.ndarray) else step
                mean = np.atleast_2d(model.get_dynamic_weights(step, total)).mean(0)
                metrics |= {f"granular_weight_{c}": w for c, w in zip(model.component_names, mean, strict=True)}
        if scouted:
            metrics |= scouted.metrics(self.config, scores, self.advantage_weights(plan, iteration), self.weights)
        return metrics

    def failures(self, metrics: dict[str, float]) -> tuple[int, bool]:
        """How many scores failed in an iteration with these `metrics`, and whether any sample can be trained."""
        failed = sum(metrics.get(f"{kind}failed_rewards", 0) for kind in ("", "eval_", "scout_"))
        # With advantage_aggr a model whose scores all failed adds 0; the other models still train.
        alone = self.weights if self.config.multi_reward_mix == "advantage_aggr" else ()
        return int(failed), any(math.isfinite(metrics[key]) for key in ["reward", *(f"reward_{n}" for n in alone)])

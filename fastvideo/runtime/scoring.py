"""What a run's pictures score and look like, what each score weighs in the advantage, and what is logged of it."""

from concurrent.futures import Future, ThreadPoolExecutor

from fastvideo.config import GRPOConfig
from fastvideo.models.reward_model.granular import GranularRewardModel
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward
from fastvideo.rollout_plan import Plan, group_places, leaf_columns, start_rows, trained_above
from fastvideo.utils.advantages import reward_means
from fastvideo.utils.picture_measures import group_measures

import numpy as np
import torch


class Scoring:
    """A run's reward models, in a thread and on a CUDA stream of their own. `weights`: name -> share in the reward."""

    def __init__(self, config: GRPOConfig, device: torch.device) -> None:
        self.config = config
        self.models, self.weights = build_reward_models(config, str(device))
        self._thread = ThreadPoolExecutor(1, "scorer")  # scores pictures while the next prompts' are sampled
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(
        self, images: list, captions: list[str], plan: Plan, iteration: int
    ) -> "Future[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]":
        """Begins to score the pictures of P prompts, a prompt's together.

        The future holds scores by name, [P, pictures], NaN where failed, and of the pictures that train what may show
        reward hacking, a mean a prompt, [P] (see `group_measures`).
        """
        places, trained = group_places(plan, self.config), self._trained(plan)
        groups = [images[begin : begin + trained] for begin in range(0, len(images), len(places))]
        prompts = [caption for caption in captions for _ in places]

        def score() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            step, total = self._progress(np.tile(places, len(captions)), iteration)
            with torch.cuda.stream(self._stream):  # which does nothing for None
                found = compute_reward(images, prompts, self.models, self.weights, curr_step=step, total_steps=total)[2]
            return {k: v.reshape(-1, len(places)) for k, v in found.items()}, group_measures(groups)

        return self._thread.submit(score)

    def _trained(self, plan: Plan) -> int:
        """How many of a prompt's pictures train. They come first."""
        columns = leaf_columns(plan, start_rows(self.config))
        return sum(c.stop - c.start for leaf, c in columns.items() if trained_above(plan, leaf))

    def _progress(self, places: np.ndarray, iteration: int) -> tuple[int | np.ndarray, int]:
        """curr_step and total_steps of the granular weights: over training, or each picture's place in its group."""
        if self.config.granular_progress == "batch_index":
            return places, self.config.num_generations
        return iteration, self.config.max_train_steps

    def advantage_weights(self, plan: Plan, iteration: int) -> dict[str, np.ndarray]:
        """Weight of each score in the advantage, [a prompt's pictures]. With `--granular_mix advantage` components
        stand for their model.
        """
        places = group_places(plan, self.config)
        found: dict[str, np.ndarray] = {}
        for name, weight in self.weights.items():
            model = self.models[name]
            if self.config.granular_mix == "advantage" and isinstance(model, GranularRewardModel):
                parts = model.component_weights(*self._progress(places, iteration), len(places))
                found |= {key: weight * part for key, part in parts.items()}
            else:
                found[name] = np.full(len(places), weight)
        return found

    def metrics(
        self, plan: Plan, scores: dict[str, np.ndarray], looks: dict[str, np.ndarray], iteration: int
    ) -> dict[str, float]:
        """Means of the weighted reward, of every model and component, of the looks (as hacking_…), and the granular
        weights of this iteration.

        scores: name -> [P, pictures]; looks: name -> [P]. The scores of pictures that train nothing (E-GRPO's anchors,
        the noise-free samples) are reported apart, as eval_reward….
        """
        trained = self._trained(plan)
        metrics = reward_means({name: v[:, :trained] for name, v in scores.items()}, self.weights)
        if trained < len(group_places(plan, self.config)):
            anchors = reward_means({name: v[:, trained:] for name, v in scores.items()}, self.weights)
            metrics |= {f"eval_{name}": value for name, value in anchors.items()}
        metrics |= {f"hacking_{name}": float(values.mean()) for name, values in looks.items()}
        for model in self.models.values():
            if isinstance(model, GranularRewardModel):
                progress = self._progress(group_places(plan, self.config)[:trained], iteration)
                mean = np.atleast_2d(model.get_dynamic_weights(*progress)).mean(0)
                metrics |= {f"granular_weight_{c}": w for c, w in zip(model.component_names, mean, strict=True)}
        return metrics

"""Builds the rewards that `--reward_model` names, and scores images with them in one function.

A reward model is a callable `model(images, prompts)` on lists of PIL images and prompts. It returns one float per image
(NaN: this image failed) and has a `name`, its key in metrics and manifests. groups.py describes models that compare
images. The registry is in spec.py; a model's module is imported when the model is built. `--reward_model
package.module:function` needs no entry there.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastvideo.cli import FlagError, FlagErrors, raised
from fastvideo.io.messages import is_first, say
from fastvideo.models.reward_model.custom import FunctionReward, probe
from fastvideo.models.reward_model.detailed import DetailedReward
from fastvideo.models.reward_model.granular import (
    GranularRewardModel,
    RewardModel,
    as_scores,
    check_schedule,
    prompt_per_image,
)
from fastvideo.models.reward_model.groups import is_groupwise, score_in_groups
from fastvideo.models.reward_model.loading import check_device, check_file
from fastvideo.models.reward_model.spec import REWARDS, SHARED, Reward, resolve_reward_spec

import numpy as np
from PIL import Image

PROBE_LIMIT = 600.0  # seconds for a custom reward's first call in programs without --reward_timeout


def check_custom_rewards(config: Any, field: str = "reward_model") -> None:
    """Raises FlagError if a function named in `field` can't be imported or does not score."""
    for key in resolve_reward_spec(config, field):
        if key not in REWARDS and not config.reward_server:
            for check in _checks(key, config, evaluation=False, field=field):
                check()


def check_reward_files(config: Any, evaluation: bool = False, field: str = "reward_model") -> None:
    """Raises FlagErrors for all `reward_problems`."""
    if found := [*reward_problems(config, evaluation, field)]:
        raise FlagErrors(found)


def reward_problems(config: Any, evaluation: bool = False, field: str = "reward_model") -> Iterator[FlagError]:
    """What the rewards named in `field` lack: files, a URL, weights of their components.

    Loads nothing, and looks up no name on a hub. The first process calls custom rewards once, see `probe`. With
    --reward_server nothing has to be on this machine; the servers are asked whether they give the same scores.
    """
    if config.reward_server:
        from fastvideo.models.reward_model.remote import connect  # imports the HTTP client, which few runs need

        checks = [lambda: connect(config, evaluation, field)]
    else:
        checks = [lambda: check_device(config.reward_device)]
        for key in resolve_reward_spec(config, field):
            checks += _checks(key, config, evaluation, field)
    yield from raised(checks)


def _checks(key: str, config: Any, evaluation: bool, field: str) -> list[Callable[[], object]]:
    """The checks of one reward. Each raises FlagError if something is missing."""
    if key not in REWARDS:
        size = (getattr(config, "w", 256), getattr(config, "h", 256))
        limit = getattr(config, "reward_timeout", PROBE_LIMIT)
        return [lambda: probe(key, field, size, limit)] if is_first() else []
    entry = REWARDS[key]
    mode = entry.chosen_mode(config, evaluation)

    def installed() -> None:
        if package := entry.missing_package():
            problem = f"{key} needs the package {package}; `pip install -e '.[{entry.extra}]'` installs it"
            raise FlagError(field, repr(getattr(config, field)), problem)

    def reachable() -> None:
        if entry.url and not getattr(config, entry.url):
            raise FlagError(entry.url, None, f"not given; {key} needs the URL of its server")
        if entry.check and is_first():
            _named(entry.check)(config)

    def schedule() -> None:
        if entry.components:
            check_schedule(
                config.granular_start_weights,
                config.granular_end_weights,
                config.granular_schedule,
                config.granular_gamma,
                entry.components,
            )

    files = [file for file in entry.files if file.mode in (None, mode)]
    return [*(lambda f=f: check_file(f, getattr(config, f.field)) for f in files), installed, reachable, schedule]


def _named(path: str) -> Any:
    """What "module:name" means in this package."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"fastvideo.models.reward_model.{module}"), name)


def check_needs(
    keys: Iterable[str], prompts: Sequence[tuple[str, Mapping[str, Any]]], field: str, value: object
) -> None:
    """Raises FlagError if one of the rewards can't score any of the prompts, or if metadata are malformed.

    Says it if a reward can't score some of the prompts. keys: names of rewards. prompts: with their metadata; the
    setting `field` with this value gave them.
    """
    for key in keys:
        if key not in REWARDS or not (needs := REWARDS[key].needs):
            continue
        can_score = _named(f"{REWARDS[key].model.partition(':')[0]}:can_score")
        lacking = []
        for prompt, metadata in prompts:
            try:
                if not can_score(prompt, metadata):
                    lacking.append(prompt)
            except ValueError as error:
                raise FlagError(field, value, f"{prompt[:60]!r}: {error}") from None
        if len(lacking) == len(prompts):
            problem = f"no prompt has {needs}, which the reward {key} needs; docs/rewards.md says what it looks for"
            raise FlagError(field, value, problem)
        if lacking:
            which = f"{len(lacking)} of {len(prompts)} prompts lack {needs}, such as {lacking[0][:60]!r}"
            say(f"note: --{field}: {which}; {key} gives their pictures no score, and they count as failed")


def _build(entry: Reward, config: Any, device: str, evaluation: bool) -> RewardModel:
    """The model of an entry. It gets the entry's own arguments, and of the shared ones those that it can take."""
    model = _named(entry.model)
    taken = inspect.signature(model).parameters
    shared = {argument: getattr(config, setting) for argument, setting in SHARED.items() if argument in taken}
    here = {"device": device, "evaluation": evaluation, "mode": entry.chosen_mode(config, evaluation)}
    own = {argument: getattr(config, setting) for argument, setting in entry.arguments.items()}
    return model(**shared, **{name: value for name, value in here.items() if name in taken}, **own)


def build_reward_models(
    config: Any, device: str, evaluation: bool = False, field: str = "reward_model"
) -> tuple[dict[str, RewardModel], dict[str, float]]:
    """Loads the rewards named in `field`: ({name: model}, {name: weight}), by the `name` of each model.

    device: where the models run, unless --reward_device names another device. evaluation: plain scores on the scales of
    reports (image_reward in mode overall, PickScore's s / 100). With --reward_server no model is loaded; the models
    returned ask the servers. Raises FlagError for missing files before the first model is loaded.
    """
    if config.reward_server:
        from fastvideo.models.reward_model.remote import connect  # imports the HTTP client, which few runs need

        return connect(config, evaluation, field)
    check_reward_files(config, evaluation, field)
    models: dict[str, RewardModel] = {}
    weights: dict[str, float] = {}
    for key, weight in resolve_reward_spec(config, field).items():
        if key in REWARDS:
            model = _build(REWARDS[key], config, str(config.reward_device or device), evaluation)
        else:
            model = FunctionReward(key, field)
        if model.name in models:
            raise FlagError(field, repr(getattr(config, field)), f"two rewards have the name {model.name}")
        models[model.name] = model
        weights[model.name] = weight
    return models, weights


def judge_of(models: Mapping[str, RewardModel]) -> str | None:
    """The model behind --vlm_judge_url, its id and the name of its weights, if one of the rewards asks it."""
    return next(filter(None, (getattr(model, "judge", None) for model in models.values())), None)


def served_judge(config: Any) -> str | None:
    """As `judge_of` the rewards of --reward_model, which need not be built: asks the endpoint, or the reward servers.

    Raises FlagError if these don't answer, or serve something else than the settings say.
    """
    entries = [REWARDS[key] for key in resolve_reward_spec(config) if key in REWARDS]
    if not any(entry.url == "vlm_judge_url" for entry in entries):
        return None
    if config.reward_server:
        return judge_of(build_reward_models(config, "cpu")[0])
    from fastvideo.models.reward_model.vlm_judge import served_by  # imports the HTTP client, which few runs need

    return served_by(config)


def _by_name(models: Sequence[RewardModel]) -> dict[str, RewardModel]:
    """{name: model}; a model without `name` has the name of its class, as in the reference."""
    names = [getattr(model, "name", type(model).__name__) for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"reward_models: {', '.join(names)} are not different names; give a dict")
    return dict(zip(names, models, strict=True))


def compute_reward(
    images: list[Image.Image],
    prompts: str | list[str],
    reward_models: dict[str, RewardModel] | Sequence[RewardModel],
    reward_weights: dict[str, float],
    curr_step: float | np.ndarray | None = None,
    total_steps: float | None = None,
    begins: Callable[[str], None] = lambda name: None,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    groups: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores N images with every model: (rewards, successes, rewards_dict, successes_dict).

    prompts: one per image, or one str for all. reward_models: {name: model}, or models with a `name`.
    rewards: float64 [N], the sum of the models' scores, weighted by reward_weights (normalised to sum 1); 0 where one
    of these models failed. successes: bool [N], whether every model of weight above 0 gave a finite score.
    rewards_dict: {name: float64 [N]}, NaN where a score failed. A granular model also has an entry
    `{name}_{component}` per component and check, a DetailedReward one per detail and check; these never enter
    `rewards`. successes_dict: the same keys, bool [N].
    curr_step, total_steps: training progress for granular models; curr_step may be an array with one entry per image.
    begins: called with the name of each model before it scores.
    metadata: one object per image, what the prompt file says about its prompt; None: empty ones. Models that set
    `takes_metadata` get it.
    groups: the number of each image's group, for groupwise models (see groups.py); an image that is alone in its group
    gets NaN from them.

    An exception of a model is not caught: a broken scorer is not a failed sample.
    """
    n = len(images)
    prompts = prompt_per_image(prompts, n)
    if not isinstance(reward_models, dict):
        reward_models = _by_name(reward_models)
    metadata = [{}] * n if metadata is None else metadata
    if len(metadata) != n:
        raise ValueError(f"{n} images but {len(metadata)} entries of metadata")
    missing = sorted(set(reward_weights) - set(reward_models))
    if missing:
        raise ValueError(f"reward_weights names {missing}, reward_models only has {sorted(reward_models)}")
    values = np.asarray(list(reward_weights.values()), dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise ValueError(f"reward_weights {reward_weights}: must be finite, >= 0 and not all 0")

    rewards_dict: dict[str, np.ndarray] = {}
    for name, model in reward_models.items():
        begins(name)
        given = {"metadata": list(metadata)} if getattr(model, "takes_metadata", False) else {}
        parts: dict[str, np.ndarray] = {}
        if isinstance(model, GranularRewardModel):
            scores, parts = model.score(images, prompts, curr_step, total_steps)
        elif isinstance(model, DetailedReward):
            scores, parts = model.score(images, prompts, **given)
        elif is_groupwise(model):
            scores = score_in_groups(model, images, prompts, groups, metadata)
        else:
            scores = model(images, prompts, **given)
        rewards_dict[name] = as_scores(scores, n, name)
        rewards_dict |= {f"{name}_{part}": as_scores(found, n, f"{name}_{part}") for part, found in parts.items()}
    successes_dict = {key: np.isfinite(found) for key, found in rewards_dict.items()}

    rewards = np.zeros(n)
    successes = np.ones(n, dtype=bool)
    for (name, _), weight in zip(reward_weights.items(), values / values.sum(), strict=True):
        if weight > 0:
            rewards += weight * rewards_dict[name]
            successes &= successes_dict[name]
    return np.where(successes, rewards, 0.0), successes, rewards_dict, successes_dict

"""Looks, before anything slow, whether all that a run needs is there: models, rewards, prompts, trackers, room for
checkpoints.

A real run and --dry_run check the same, and name everything that is missing, not only the first.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, FlagErrors, raised
from fastvideo.config import DRAWN, GRPOConfig
from fastvideo.dataset.latent_flux_rl_datasets import LatentFluxRLDataset, draws_per_epoch
from fastvideo.dataset.split import held_out
from fastvideo.io.fingerprint import local_folder
from fastvideo.io.messages import is_first, say, warn
from fastvideo.io.metrics import read_metrics
from fastvideo.io.prompts import read_prompts
from fastvideo.io.weights import GGUF
from fastvideo.io.words import counted, duration
from fastvideo.models.float8 import lacks_float8
from fastvideo.models.pretrained import (
    BASE,
    check_pipeline,
    family_of,
    few_steps,
    may_be_hub_id,
    meta_transformer,
    misplaced,
    no_folder,
    read_lora_init,
)
from fastvideo.models.reward_model.loading import bad_file, to_download
from fastvideo.models.reward_model.spec import REWARDS, resolve_reward_spec
from fastvideo.models.reward_model.utils import check_needs, reward_problems
from fastvideo.rollout_plan import make_plan
from fastvideo.runtime.checkpoint import checkpoints
from fastvideo.runtime.evaluation import takes_empty_prompt
from fastvideo.runtime.memory import checkpoint_size, describe_memory
from fastvideo.runtime.resume import check_output, to_resume
from fastvideo.utils.grpo_states import windows

from huggingface_hub import is_offline_mode

WEIGHTS = ("*.safetensors", "*.bin")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def check_run(config: GRPOConfig, world_size: int) -> None:
    """Prints the prediction of the memory. Warns if checkpoints won't fit on the disk. Loads no model.

    Raises:
        FlagErrors: all that is missing.
    """
    lack = lacks_float8() if config.rollout_precision == "fp8" else None
    if lack is not None and not config.dry_run:
        needed = "needs GPUs with FP8 products (compute capability 8.9 or more)"
        problem = f"{needed}, and {lack}; choose bf16, or for studies the slower fp8_emulated"
        raise FlagError("rollout_precision", "fp8", problem)
    if lack is not None and is_first():
        warn(f"--rollout_precision fp8 can't run here: {lack}")
    path = config.pretrained_model_name_or_path
    found, configs = [*_missing_trackers(config), *_missing_in_pipeline(config)], local_folder(path) is not None
    if configs and not found and not config.init_random_flux:
        found += raised([lambda: check_pipeline(path, bool(config.prompts_file or config.eval_prompts))])
    if configs and not found and is_first():
        _warn_of_few_steps(config)
    try:
        memory = describe_memory(config, world_size)
        _print("\n".join([*_describe_guidance(config), memory]))
    except FlagError as error:
        found += [] if found and error.field == BASE else [error]
        configs = False
    if config.dry_run and (time := _describe_time(config)):
        print(time, flush=True)
    _print(f"trackers: {', '.join(config.log_with) or 'none'}, beside metrics.jsonl in --output_dir")
    for rewards, field in ((config, "reward_model"), (config.held_out(), "eval_reward")):
        if getattr(config, field) is not None:
            found += reward_problems(rewards, field == "eval_reward", field)
            found += _not_downloaded(rewards, field)
    checks: list[Callable[[], object]] = [lambda: _check_room(config), lambda: _check_guidance(config)]
    if not configs:
        checks = [lambda: check_output(config.output_dir)]
    if config.data_json_path:
        checks.append(lambda: _check_embeddings(config, world_size, configs))
    if config.lora_init and configs:
        shape = (config.lora_rank, config.lora_alpha, config.lora_target_modules)
        checks.append(lambda: read_lora_init(meta_transformer(path), config.lora_init, *shape))
    if config.dry_run:  # a run that goes on looks when it has the folder
        checks.append(lambda: to_resume(config, world_size))
    texts = [name for name in ("prompts_file", "eval_prompts") if getattr(config, name) is not None]
    checks += [lambda name=name: _check_prompts(config, world_size, name) for name in texts]
    found += raised(checks)
    if found:
        raise FlagErrors(found)


def _missing_trackers(config: GRPOConfig) -> Iterator[FlagError]:
    """The trackers whose package isn't there."""
    for name in config.log_with:
        if importlib.util.find_spec(name) is None:
            wanted = "-r requirements.txt" if name in ("wandb", "tensorboard") else "-e '.[trackers]'"
            yield FlagError("log_with", name, f"needs the package {name}; `pip install {wanted}` installs it")


def _describe_guidance(config: GRPOConfig) -> Iterator[str]:
    """What classifier-free guidance costs, for a model that has it."""
    if family_of(config.pretrained_model_name_or_path).guided(config.guidance_scale):
        yield (
            f"classifier-free guidance {config.guidance_scale:g}: each evaluation takes two passes of the model, with "
            "the prompt and with the empty one, in rollout and training; --guidance_scale 1 halves the cost"
        )


def _check_guidance(config: GRPOConfig) -> None:
    """Raises FlagError for guidance of a model that takes none."""
    if family_of(config.pretrained_model_name_or_path).step_distilled and config.guidance_scale > 1:
        problem = "the model is step-distilled and takes no guidance; leave the flag out"
        raise FlagError("guidance_scale", config.guidance_scale, problem)


FEW_STEPS = 10  # below it, a model that was distilled for few steps can't take out the noise that a step adds
HIGH_NOISE = 0.9  # of the state before a rollout's last step: there, on a tiny FLUX.2, training made this step worse


def _warn_of_few_steps(config: GRPOConfig) -> None:
    """Warns of noisy steps of a model that was distilled for few steps, and of one step that has to do nearly all."""
    last = make_plan(config, next(windows(config))).steps[-1]
    if last.sigma >= HIGH_NOISE:
        longer = min(1, 2 * config.dpm_post_compress_ratio)
        flags = [f"--dpm_post_compress_ratio {longer:g}"] if last.kind == "dpmpp" else []
        warn(
            f"the rollout's last step goes from sigma {last.sigma:.2f} to 0 at once: the pictures that rewards judge "
            "are coarse, and training may make this step worse, with classifier-free guidance above all. More steps "
            f"cost time: {' or '.join([*flags, 'more --sampling_steps'])}. Or take a smaller --shift"
        )
    noisy = config.sampling_steps < FEW_STEPS and config.algorithm not in DRAWN
    if noisy and few_steps(config.pretrained_model_name_or_path):
        warn(
            f"this model was distilled for few steps: {config.sampling_steps} noisy ones leave noise in the pictures "
            "that rewards judge, and training tends to blur. Likelihood-free algorithms (--algorithm awm or "
            f"diffusion_nft) sample without noise; else take --sampling_steps {FEW_STEPS} or more, or the model from "
            "which this one was distilled"
        )


def _check_embeddings(config: GRPOConfig, world_size: int, configs: bool) -> None:
    """Raises FlagError for cached embeddings that can't be used. A run that goes on checks their content only later,
    unless it needs the empty prompt's.

    configs: whether the transformer's config.json can be read.
    """
    widths = None
    # Another model's embeddings also lack the empty prompt's, and their widths say why.
    if configs and (config.dry_run or takes_empty_prompt(config)):
        path = config.pretrained_model_name_or_path
        widths = family_of(path).widths(meta_transformer(path))
    data = LatentFluxRLDataset(config.data_json_path, widths=widths)
    if takes_empty_prompt(config):
        data.negative_prompt_embeds  # noqa: B018  (raises)
    prompts = [(entry["caption"], entry.get("metadata", {})) for entry in data.entries]
    _check_use(config, world_size, "data_json_path", prompts, data.weights)


def _check_prompts(config: GRPOConfig, world_size: int, field: str) -> None:
    """Raises FlagError for a prompt file that can't be used. field: prompts_file or eval_prompts."""
    found = read_prompts(getattr(config, field), field, config.prompt_column)
    _check_use(config, world_size, field, list(zip(found.prompts, found.metadata, strict=True)), found.weights)


def _check_use(
    config: GRPOConfig,
    world_size: int,
    field: str,
    prompts: Sequence[tuple[str, dict[str, Any]]],
    weights: Sequence[float],
) -> None:
    """Calls `check_needs` for all rewards that score these prompts, and prints the split and the weights, if any. Warns
    if an iteration takes more prompts than there are.

    Args:
        field: the setting that names their file. prompts: with their metadata.

    Raises FlagError too if --eval_split leaves no prompts on one side, or if all weights are 0.
    """
    training = resolve_reward_spec(config)
    evaluation = training | (resolve_reward_spec(config, "eval_reward") if config.eval_reward is not None else {})
    if field == "eval_prompts":
        check_needs(evaluation, prompts, field, getattr(config, field))
        _print(f"prompts to evaluate: {len(prompts)}")
        return
    if config.eval_split is not None:
        out = held_out([prompt for prompt, _ in prompts], config.eval_split)
        judged = list(compress(prompts, out))
        prompts, weights = (list(compress(all_of_it, map(not_, out))) for all_of_it in (prompts, weights))
        check_needs(evaluation, judged, "eval_split", config.eval_split)
        shown = ", ".join(f"{prompt[:60]!r}" for prompt, _ in judged[:3]) + ", …" * (len(judged) > 3)
        _print(f"prompts: {len(prompts)} to train on, {len(judged)} held out to evaluate: {shown}")
    else:
        _print(f"prompts: {len(prompts)} to train on")
    check_needs(training, prompts, field, getattr(config, field))
    try:
        times = draws_per_epoch(weights)
    except ValueError as error:
        raise FlagError(field, getattr(config, field), str(error)) from error
    together = config.local_prompts(world_size) * config.data_ranks(world_size)
    if is_first() and together > (there := sum(weight > 0 for weight in weights)):
        warn(f"an iteration takes {together} prompts of only {there}: some repeat")
    if min(times) != max(times):
        each = f"{min(times):g} to {max(times):g} draws per prompt and epoch"
        _print(f"weights: {each}, {sum(times):.6g} draws per epoch")


def _print(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _not_downloaded(config: GRPOConfig, field: str) -> Iterator[FlagError]:
    """The models on a hub that the rewards named in `field` need and that can't be downloaded, as no hub is asked."""
    entries = [REWARDS[key] for key in resolve_reward_spec(config, field) if key in REWARDS]
    for entry in entries if not config.reward_server else ():
        mode = entry.chosen_mode(config, field == "eval_reward")
        for name, path in to_download(entry, config, mode):
            yield from _from_hub(name, path)


def _from_hub(field: str, name: str) -> Iterator[FlagError]:
    if is_offline_mode():
        yield bad_file(field, name, "not downloaded yet, and HF_HUB_OFFLINE is set, so no hub is asked")
    else:
        say(f"note: --{field} {name} isn't on this machine yet; the run downloads it first")


def _missing_in_pipeline(config: GRPOConfig) -> Iterator[FlagError]:
    """What the folder of --pretrained_model_name_or_path lacks of the parts that the run loads."""
    path = config.pretrained_model_name_or_path
    folder = local_folder(path)
    if problem := misplaced(path):
        yield FlagError(BASE, path, problem)
        return
    if folder is None:
        if may_be_hub_id(path):
            yield from _from_hub(BASE, path)
        else:
            yield FlagError(BASE, path, no_folder(path))
        return
    if not Path(path).is_dir() and not is_offline_mode():
        return  # from a hub, which completes it
    for part, files in _parts(config).items():
        if not (folder / part).is_dir():
            yield FlagError(BASE, path, f"no folder {part}/ in it")
            continue
        for names in files:
            if not any(any((folder / part).glob(name)) for name in names):
                gguf = f", but GGUF: {GGUF}" if names is WEIGHTS and any((folder / part).glob("*.gguf")) else ""
                yield FlagError(BASE, path, f"{part or 'it'} has no {' or '.join(names)}{gguf}")
        yield from (FlagError(BASE, path, problem) for problem in _lost_shards(folder, part))


def _parts(config: GRPOConfig) -> dict[str, list[tuple[str, ...]]]:
    """{folder of the pipeline that a run loads: file patterns, of which one each must be there}."""
    parts: dict[str, list[tuple[str, ...]]] = {part: [("config.json",), WEIGHTS] for part in ("transformer", "vae")}
    if config.init_random_flux:
        parts["transformer"].remove(WEIGHTS)
    if config.prompts_file or config.eval_prompts:
        parts |= {"": [("model_index.json",)], "scheduler": [("scheduler_config.json",)]}
        family = family_of(config.pretrained_model_name_or_path)
        parts |= {part: [("config.json",), WEIGHTS] for part in family.text_encoders}
        parts |= {part: [VOCABULARIES] for part in family.tokenizers}
    return parts


def _lost_shards(folder: Path, part: str) -> Iterator[str]:
    for index in (folder / part).glob("*.index.json") if part else ():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{part}/{index.name} can't be read: {error!r}"
            continue
        if lost := sorted(name for name in names if not (folder / part / name).is_file()):
            yield f"{part} lacks {len(lost)} of the {len(names)} files in {index.name}, such as {lost[0]}"


def _describe_time(config: GRPOConfig) -> str | None:
    """How long the run takes if its iterations take as long as those before it in --output_dir; None without any."""
    path = Path(config.output_dir) / "metrics.jsonl"
    rows = [row for row in read_metrics(path)[0] if "seconds_total" in row] if path.is_file() else []
    timed = [row["seconds_total"] + row.get("seconds_evaluation", 0) for row in rows[1:] or rows]  # the first warms up
    if not timed:
        return None
    mean = sum(timed) / len(timed)
    return (
        f"predicted time: {counted(config.max_train_steps, 'iteration')} of {mean:.3g} s, the mean in {path}: "
        f"{duration(mean * config.max_train_steps)}"
    )


def _check_room(config: GRPOConfig) -> None:
    """Raises FlagError unless a checkpoint fits on the disk. Warns if not all fit that the run will keep.

    One more has to fit than --checkpoints_total_limit says: an old one is deleted when the new one is complete.
    """
    size, output = checkpoint_size(config), Path(os.path.abspath(config.output_dir))
    check_output(config.output_dir)
    saved = max(1, -(-config.max_train_steps // config.checkpointing_steps) - len(checkpoints(output)))
    kept = min(saved, (config.checkpoints_total_limit or saved) + 1)
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    leftovers = [path for part in output.glob(".checkpoint-*.part") for path in part.rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in leftovers)  # which the run deletes
    fit = free // size
    if not fit:
        problem = f"a checkpoint takes {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free"
        raise FlagError("output_dir", config.output_dir, problem)
    text = (
        f"checkpoints: {saved} of {size / 1e9:.3g} GB, at most {kept} at a time, {kept * size / 1e9:.3g} GB of the "
        f"{free / 1e9:.3g} GB that are free; --output_dir has room for {fit}"
    )
    if fit < kept:
        advice = f"--checkpoints_total_limit {fit - 1}" if fit > 1 else "another --output_dir"
        text = f"warning: {text}; choose {advice}"
    _print(text)

"""Draws pictures of prompts with the base model, a tuned model, or both in turn, through their diffusers pipeline.

    python -m fastvideo.sample.sample_flux --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --model_path outputs/mixgrpo/checkpoint-300-0 --prompts_file data/prompts_test.txt --output_dir outputs/tuned
    torchrun --nproc_per_node 8 -m fastvideo.sample.sample_flux ...      (same flags)

Hybrid inference (MixGRPO, arXiv 2507.21802): the tuned transformer takes the first `--mix_sampling_steps` of
`--total_sampling_steps`, or the share `--mix_fraction` of all steps, and the base model takes the rest. The base model
undoes some of what was learned only to please the reward. Several shares (`--mix_fraction 0.2,0.5,0.8`) load the models
once. Each share has its own folder mix_{steps}_{total}/, and sweep.json lists the manifests.

A picture's noise depends on `--seed`, the prompt's place in the file and the picture's number, not on processes or
batches. A restart keeps the pictures that are there: each file carries its prompt, its seed and a hash of the settings,
and sampling.json in the folder holds the settings. Other settings in the same folder are refused, and other prompts for
pictures of the same names. Prompts may be added: then sampling.1.json, ... name the new pictures. Several runs may work
on one folder at once. The manifest is written when all pictures are there: a JSON list of {"image", "prompt", "seed",
"index"}, with the path `image` relative to the manifest. docs/evaluation.md has more.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, FlagErrors, flag_errors, parse_dataclass, parse_first, raised
from fastvideo.sample.settings import SampleConfig

if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(SampleConfig, doc=__doc__)

from fastvideo.config import GRPOConfig
from fastvideo.eval.benchmark import is_benchmark, read_benchmark
from fastvideo.family_defaults import family_defaults
from fastvideo.io.devices import resolve_dtype, torch_dtype
from fastvideo.io.files import check_writable, write_bytes, write_json, writing
from fastvideo.io.fingerprint import model_fingerprint, sample_file
from fastvideo.io.messages import say
from fastvideo.io.pictures import png
from fastvideo.io.processes import Processes, barrier, processes
from fastvideo.io.prompts import read_prompts
from fastvideo.io.resumable import Claims, Store, digest, finish
from fastvideo.io.words import counted
from fastvideo.models.family import LatentShape
from fastvideo.models.lora import LORA_CONFIG, LORA_FILE, lora_file
from fastvideo.models.pretrained import (
    BASE,
    CutPrompts,
    check_files,
    check_lora,
    check_pipeline,
    check_transformer,
    family_of,
    load_text_encoders,
    load_transformer,
    load_vae,
    load_weights_of,
    load_with_lora,
    meta_transformer,
)
from fastvideo.runtime.checkpoint import (
    base_of,
    check_base_model,
    check_tuned_place,
    checkpoint_of,
    linked,
    read_record,
)

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    path: Path
    prompt: str
    seed: int  # torch.Generator("cpu").manual_seed(seed) gives the same picture in the pipeline
    index: int  # in the manifest
    style: str | None = None  # if the prompt is from the HPSv2 benchmark
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of the prompt; see io/prompts.py


def read_prompt_list(path: str, column: str | None) -> list[tuple[str, str | None, Mapping[str, Any]]]:
    """(prompt, style, metadata) for all prompts of a prompt file or data set, where the style is None, or of a folder
    of benchmark prompts, which have no metadata.

    column: see `read_prompts`. Raises FlagError for a file or folder without prompts.
    """
    if is_benchmark(Path(path)):
        styles = read_benchmark(Path(path), "prompts_file")
        return [(prompt, style, {}) for style, prompts in styles.items() for prompt in prompts]
    found = read_prompts(path, "prompts_file", column, unique=False)
    return [(prompt, None, metadata) for prompt, metadata in zip(found.prompts, found.metadata, strict=True)]


def plan_pictures(config: SampleConfig, prompts: Sequence[tuple[str, str | None, Mapping[str, Any]]]) -> list[Picture]:
    """All pictures of a run, in the manifest's order. Seeds are hashed, so that different --seed share no noise."""
    found, before = [], {}
    for place, (prompt, style, metadata) in enumerate(prompts):
        number_in_style = before[style] = before.get(style, -1) + 1
        for number in range(config.images_per_prompt):
            # The benchmark has one picture per prompt, and no number in its name.
            name = f"{number_in_style:05d}" + (f"_{number}" if style is None or config.images_per_prompt > 1 else "")
            path = Path(config.output_dir) / (style or "") / f"{name}.{config.image_format}"
            seed = int(np.random.SeedSequence([config.seed, place, number]).generate_state(1)[0])
            found.append(Picture(path, prompt, seed, len(found), style, metadata))
    return found


class Pictures(Store[Picture, Image.Image]):
    """The pictures' files. Each file says what it was made of: prompt, seed and the hash of the settings."""

    def __init__(self, settings_hash: str) -> None:
        """settings_hash: see `Claims.claim`."""
        self.settings_hash = settings_hash

    def record(self, picture: Picture) -> dict[str, str]:
        """The text that a picture's file carries."""
        return {"prompt": picture.prompt, "seed": str(picture.seed), "settings": self.settings_hash}

    def has(self, picture: Picture) -> bool:
        try:
            with Image.open(picture.path, formats=("PNG", "JPEG")) as image:
                image.load()
                record = image.text if image.format == "PNG" else json.loads(image.info["comment"])
                return record == self.record(picture)
        # missing, truncated, broken, in another format
        except (OSError, SyntaxError, ValueError, KeyError, AttributeError):
            return False

    def keep(self, picture: Picture, image: Image.Image) -> None:
        record, content = self.record(picture), io.BytesIO()
        if picture.path.suffix == ".jpg":
            image.save(content, "JPEG", quality=95, comment=json.dumps(record))
            write_bytes(picture.path, content.getvalue())
        else:
            write_bytes(picture.path, png(image, record))


def claim_folder(
    config: SampleConfig, settings: dict[str, object], pictures: Sequence[Picture], here: Processes
) -> Pictures:
    """Claims the pictures in sampling.json, see `Claims`; returns their store."""
    folder, unnamed = Path(config.output_dir), Pictures("")
    made_of = {_relative(picture.path, folder): digest(unnamed.record(picture)) for picture in pictures}
    names = ("pretrained_model_name_or_path", "model_path", "prompts_file")
    sources = {name: getattr(config, name) for name in names}
    if not config.tuned_steps:
        sources["model_path"] = None
    outdated = [config.manifest, folder / "manifest.json"] if config.overwrite else None
    return Pictures(Claims(folder).claim(settings, made_of, sources, here, outdated))


def _weight_file(model_path: str) -> Path | None:
    """The weights of a model without config.json, whose architecture is the base model's; None for other models."""
    path = Path(model_path)
    if path.is_file():
        return path
    file = path / SAFETENSORS_WEIGHTS_NAME
    return file if file.is_file() and not (path / "config.json").is_file() else None


def check_tuned(base: str, model_path: str) -> None:
    """Raises FlagError for a tuned model that isn't there, is damaged, or can't take the place of the base model's.

    Reads LoRA adapters, and of whole models only the headers. Checks nothing of a hub id.
    """
    check_tuned_place(Path(model_path), "model_path")
    if lora_file(model_path):
        check_lora(base, model_path)
    elif file := _weight_file(model_path):
        check_files(model_path, file, "model_path", meta_transformer(base))
    elif Path(model_path).exists() or model_path.count("/") != 1:
        tuned, own = check_transformer(model_path, "model_path"), meta_transformer(base)
        if type(tuned) is not type(own):
            problem = f"is a {type(tuned).__name__}, --pretrained_model_name_or_path {base} has a {type(own).__name__}"
            raise FlagError("model_path", model_path, problem)
        found, wanted = tuned.config, own.config
        for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"):
            if found.get(name) != wanted.get(name):
                problem = f"has {name} {found.get(name)}, --pretrained_model_name_or_path {base} has {wanted.get(name)}"
                raise FlagError("model_path", model_path, problem)


def load_tuned(base: str, model_path: str, dtype: torch.dtype) -> ModelMixin:
    """The transformer that `--model_path` names. LoRA adapters are put into the transformer of the pipeline `base`.

    Raises FlagError for a model that isn't there, isn't finite, or doesn't fit the base model.
    """
    check_tuned(base, model_path)
    if lora_file(model_path):
        return load_with_lora(base, model_path, dtype)
    if file := _weight_file(model_path):
        return load_weights_of(meta_transformer(base, dtype), file, model_path, "model_path")
    return load_transformer(model_path, dtype, field="model_path")


class HybridPipeline:
    """The base pipeline. In the first steps of every call the tuned transformer takes the base transformer's place."""

    def __init__(
        self, config: SampleConfig, tuned_steps: Sequence[int], vae: ModelMixin, device: str, dtype: torch.dtype
    ) -> None:
        """Loads what calls with these `tuned_steps` need besides the VAE. With LoRA adapters one transformer is enough.

        Raises FlagError for a model that isn't there.
        """
        base = config.pretrained_model_name_or_path
        self.config, self.family = config, family_of(base)
        self.cut = CutPrompts(self.family)
        self.tuned = load_tuned(base, config.model_path, dtype) if any(tuned_steps) else None
        self.lora = self.tuned is not None and lora_file(config.model_path) is not None
        only_tuned = self.lora or min(tuned_steps) == config.total_sampling_steps
        self.base = self.tuned if only_tuned else load_transformer(base, dtype)
        pipe = load_text_encoders(base, dtype)
        settings = {n: pipe.config[n] for n in pipe._get_signature_keys(type(pipe))[1] if n in pipe.config}
        torch.nn.Module.to(vae, dtype)  # ModelMixin.to would warn
        first = self.base if self.tuned is None else self.tuned
        self.pipe = type(pipe)(**{**pipe.components, **settings, "vae": vae, "transformer": first})
        self.pipe.set_progress_bar_config(disable=True)
        if config.shift is not None:
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self.pipe.scheduler.config, shift=config.shift, use_dynamic_shifting=False
            )
        self.first, self.base_hook = first, None
        second = self.base if self.base is not first else None  # the pipeline doesn't know this one
        if config.cpu_offload == "none":
            self.pipe.to(device)
            if second:
                second.to(device)
        elif config.cpu_offload == "model":
            self.pipe.enable_model_cpu_offload(device=device)
            if second:
                # At share 0 it runs right after the text encoders, and the pipeline leaves the last encoder on the GPU.
                last = getattr(self.pipe, [*self.family.text_encoders][-1])
                encoder = UserCpuOffloadHook(last, CpuOffload(device))
                _, self.base_hook = cpu_offload_with_hook(second, device, prev_module_hook=encoder)
        else:
            for part in (self.pipe, *([second] if second else [])):
                part.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
        if config.compile:
            for transformer in {first, self.base}:
                transformer.compile_repeated_blocks()

    def _use(self, transformer: ModelMixin, tuned: bool) -> None:
        """Chooses the transformer of the next steps. Adapters are switched on or off; then the model stays."""
        self.pipe.transformer = transformer
        if self.lora:
            (transformer.enable_adapters if tuned else transformer.disable_adapters)()

    def __call__(self, pictures: Sequence[Picture], tuned_steps: int) -> list[Image.Image]:
        """Samples a batch. Each picture has its own CPU generator, so its noise doesn't depend on other pictures."""
        config = self.config

        def after_step(pipe: DiffusionPipeline, step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
            if step + 1 == config.total_sampling_steps:
                pipe.transformer = self.first  # the one that offloading knows
                if self.base_hook:
                    self.base_hook.offload()  # the VAE may need the room
            elif step + 1 == tuned_steps:
                if self.base_hook:
                    self.tuned.to("cpu")
                self._use(self.base, tuned=False)
            return tensors

        prompts = [picture.prompt for picture in pictures]
        self.cut.look(self.pipe, prompts, config.max_sequence_length)
        self._use(self.tuned if tuned_steps else self.base, tuned=tuned_steps > 0)
        return self.pipe(
            prompt=prompts,
            height=config.h,
            width=config.w,
            num_inference_steps=config.total_sampling_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures],
            max_sequence_length=self.cut.limit,
            callback_on_step_end=after_step,
        ).images


def _tuned_fingerprint(model_path: str) -> str | None:
    adapters, file = lora_file(model_path), _weight_file(model_path)
    if adapters and adapters.name == LORA_FILE:
        return model_fingerprint(str(adapters.parent))
    if not (adapters or file):
        return model_fingerprint(model_path, (".", "transformer"))
    found = str(sample_file(adapters or file)["sha256"])
    config = (adapters or file).with_name(LORA_CONFIG)
    return digest([found, sample_file(config)["sha256"]], 64) if adapters and config.is_file() else found


def _settings(config: SampleConfig, dtype: str) -> dict[str, object] | None:
    """All that decides what a picture looks like, except its prompt and seed. None while a model isn't on disk."""
    family = family_of(config.pretrained_model_name_or_path)
    folders = ("scheduler", *family.text_encoders, *family.tokenizers, "transformer", "vae")
    base = model_fingerprint(config.pretrained_model_name_or_path, folders)
    tuned = _tuned_fingerprint(config.model_path) if config.tuned_steps else "none"
    if base is None or tuned is None:
        return None
    names = ("seed", "h", "w", "guidance_scale", "total_sampling_steps", "shift", "max_sequence_length")
    chosen = {name: getattr(config, name) for name in names}
    return {
        "base_model": base,
        "tuned_model": tuned,
        "mix_sampling_steps": config.tuned_steps,
        **chosen,
        "dtype": dtype,
    }


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def _sample_run(
    config: SampleConfig,
    pictures: Sequence[Picture],
    store: Pictures,
    load: Callable[[], HybridPipeline],
    here: Processes,
) -> None:
    """Makes the missing pictures of one configuration of `runs`, and its manifest."""
    if here.rank == 0:
        print(f"{config.output_dir}: {config.models}")
        for folder in {picture.path.parent for picture in pictures}:
            folder.mkdir(exist_ok=True)
    barrier()
    made, there = store.complete(
        pictures, config.batch_size, lambda batch: load()(batch, config.tuned_steps), here, "sampling pictures"
    )
    if made:
        load().cut.warn()
    print(f"rank {here.rank}: {made} sampled, {there} were there")

    def write() -> None:
        folder = config.manifest.parent
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for picture in pictures:
            entry = {"image": _relative(picture.path, folder), "prompt": picture.prompt, "seed": picture.seed}
            others = {"style": picture.style, "metadata": picture.metadata}
            entry |= {"index": picture.index} | {name: value for name, value in others.items() if value}
            entries.append(entry)
        write_json(config.manifest, entries)
        prompts = counted(len(entries) // config.images_per_prompt, "prompt")
        print(f"{counted(len(entries), 'picture')} of {prompts}: {config.manifest}")

    finish(here, write)


def _trained_from(model_path: str | None) -> str:
    """The base model of the checkpoint or merged model that `--model_path` names; the usual one for other models."""
    checkpoint = checkpoint_of(Path(model_path)) if model_path else None
    if checkpoint is None:
        return GRPOConfig.pretrained_model_name_or_path
    base = base_of(checkpoint, "model_path")
    say(f"note: --{BASE} is {base}, the base model of {checkpoint}")
    return base


def _compare_base(config: SampleConfig) -> None:
    """Warns if the tuned model is known to have another base model or another guidance, or its record can't be read."""
    checkpoint = checkpoint_of(Path(config.model_path))
    try:
        if checkpoint is not None:
            check_base_model(checkpoint, config.pretrained_model_name_or_path, "model_path")
            trained = read_record(checkpoint, "model_path").get("settings", {}).get("guidance_scale")
            if trained not in (None, config.guidance_scale):
                now = f"here it draws with {config.guidance_scale:g}"
                say(f"note: {checkpoint} was trained with --guidance_scale {trained:g}; {now}")
    except FlagError as error:
        say(f"warning: --{error}")


def resolve(config: SampleConfig) -> SampleConfig:
    """The settings with what a tuned model implies: its base model, and that model's guidance.

    Raises FlagError for a tuned model that isn't there.
    """
    if config.model_path:
        config = replace(config, model_path=str(linked(Path(config.model_path), "model_path")))
        if not config.baseline:
            check_tuned_place(Path(config.model_path), "model_path")
    if config.pretrained_model_name_or_path is None:
        config = replace(config, pretrained_model_name_or_path=_trained_from(config.model_path))
    if config.guidance_scale is None:
        sizes = {"h": config.h, "w": config.w, "sampling_steps": config.total_sampling_steps}
        usual = family_defaults({BASE: config.pretrained_model_name_or_path, **sizes})
        config = replace(config, guidance_scale=usual.get("guidance_scale", GRPOConfig.guidance_scale))
    return config


def check_models(config: SampleConfig) -> None:
    """Raises FlagError for models of the `resolve`d settings that can't be loaded."""
    check_pipeline(config.pretrained_model_name_or_path)
    if any(run.tuned_steps for run in config.runs()):
        check_tuned(config.pretrained_model_name_or_path, config.model_path)


def sample(config: SampleConfig) -> Path:
    """Makes the missing pictures of `config`; returns the path of the manifest, or of sweep.json.

    Under torchrun the batches are dealt out to the processes, and rank 0 writes the manifest.

    Raises FlagError for missing models or prompts, an impossible size, or a folder with other pictures.
    """
    try:
        prompts = read_prompt_list(config.prompts_file, config.prompt_column)
    except FlagError as error:  # and whatever else is missing
        raise FlagErrors([error, *raised([lambda: check_models(resolve(config))])]) from None
    config = resolve(config)
    runs = config.runs()
    check_models(config)
    if any(run.tuned_steps for run in runs):
        _compare_base(config)
    vae = load_vae(config.pretrained_model_name_or_path)
    LatentShape.of(vae, config.h, config.w)  # raises for a size that doesn't fit
    with processes(config.device) as here:
        dtype = resolve_dtype(config.dtype, here.device)

        @cache
        def load() -> HybridPipeline:
            return HybridPipeline(config, [run.tuned_steps for run in runs], vae, here.device, torch_dtype(dtype))

        settings = [_settings(run, dtype) for run in runs]
        if None in settings:  # a hub id that is new here, or a wrong path: loading tells
            load()
            settings = [_settings(run, dtype) for run in runs]
        if None in settings:
            problem = "it or --model_path was not found in the hub's cache after loading"
            raise FlagError("pretrained_model_name_or_path", config.pretrained_model_name_or_path, problem)
        plans = [plan_pictures(run, prompts) for run in runs]
        stores = [claim_folder(*claim, here) for claim in zip(runs, settings, plans, strict=True)]
        for run, pictures, store in zip(runs, plans, stores, strict=True):
            _sample_run(run, pictures, store, load, here)
        if config.is_sweep and here.rank == 0:
            path = config.manifest
            shares = zip(config.mix_fraction, runs, strict=True)
            rows = [
                {
                    "mix_fraction": share,
                    "mix_sampling_steps": run.tuned_steps,
                    "manifest": _relative(run.manifest, path.parent),
                }
                for share, run in shares
            ]
            write_json(path, rows)
            print(f"{len(rows)} shares: {path}")
    return config.manifest


@flag_errors("sample_flux.py")
def main(argv: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the manifest, or of sweep.json."""
    config = parse_dataclass(SampleConfig, argv, __doc__)
    if config.output_json:
        check_writable("output_json", config.output_json, file=True)
    with writing("output_dir", config.output_dir):
        return sample(config)


if __name__ == "__main__":
    main()

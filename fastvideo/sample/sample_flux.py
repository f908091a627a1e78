"""Prompts to pictures with the base model, a tuned one, or both in turn, through diffusers' own FluxPipeline.

    python -m fastvideo.sample.sample_flux --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --model_path outputs/mixgrpo/checkpoint-300-0 --prompts_file data/prompts_test.txt --output_dir outputs/tuned
    torchrun --nproc_per_node 8 -m fastvideo.sample.sample_flux ...      (same flags)

Hybrid inference (MixGRPO, arXiv 2507.21802): the tuned transformer takes the first `--mix_sampling_steps` of
`--total_sampling_steps`, the base model the rest, which undoes some of what was learned only to please the reward.

A picture's noise depends on `--seed`, the prompt's place in the file and the picture's number, not on processes or
batches. A restart keeps the pictures that are there: each carries its prompt, seed and a hash of the settings, and the
folder's sampling.json says what those were. The manifest, a JSON list of {"image", "prompt", "seed", "index"} with
`image` relative to it, is written when all pictures are there.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config import flag, parse_dataclass
from fastvideo.models.flux import (
    LatentShape,
    ModelNotFoundError,
    is_lora,
    load_text_encoders,
    load_transformer,
    load_vae,
    load_with_lora,
)
from fastvideo.utils.files import read_prompts, write_bytes, write_json
from fastvideo.utils.fingerprint import model_fingerprint
from fastvideo.utils.processes import Processes, barrier, processes

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image, PngImagePlugin
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIPELINE_FOLDERS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


@dataclass
class SampleConfig:
    """Settings of a sampling run."""

    pretrained_model_name_or_path: str = flag("data/flux", "base FLUX pipeline: a folder or a hub id")
    model_path: str | None = flag(
        None, "tuned transformer or LoRA adapters: a training checkpoint or a folder; None: only the base model"
    )
    baseline: bool = flag(False, "sample the base model even if model_path is given")
    prompts_file: str = flag("data/prompts_test.txt", "text file with one prompt a line")
    output_dir: str = flag("outputs/samples", "folder for the pictures")
    output_json: str | None = flag(None, "manifest to write (None: manifest.json in output_dir)")
    seed: int = flag(42, "seed of the initial noise")
    images_per_prompt: int = flag(1, "pictures of each prompt, each with its own noise")
    batch_size: int = flag(1, "pictures sampled at a time; speed and memory only")
    h: int = flag(1024, "picture height in pixels")
    w: int = flag(1024, "picture width in pixels")
    guidance_scale: float = flag(3.5, "distilled guidance; only for models with guidance embeds (FLUX.1-dev)")
    total_sampling_steps: int = flag(50, "denoising steps")
    mix_sampling_steps: int | None = flag(None, "steps the tuned model takes before the base model goes on (None: all)")
    shift: float | None = flag(None, "static shift of the sigma schedule (None: the base pipeline's own scheduler)")
    max_sequence_length: int = flag(512, "T5 tokens; cut to what the model's tokenizer declares")
    dtype: str = flag("auto", "number format; auto: bf16 on a GPU, fp32 on the CPU", choices=["auto", *DTYPES])
    device: str = flag("auto", "cpu, cuda, cuda:1, ... or auto")
    overwrite: bool = flag(False, "sample anew into a folder that holds pictures of other settings")

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "batch_size", "h", "w", "total_sampling_steps", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f"--shift {self.shift}: must be above 0")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"--dtype {self.dtype}: choose from auto, {', '.join(DTYPES)}")
        if self.mix_sampling_steps is not None:
            if not 0 <= self.mix_sampling_steps <= self.total_sampling_steps:
                raise ValueError(
                    f"--mix_sampling_steps {self.mix_sampling_steps}: must be between 0 and --total_sampling_steps "
                    f"{self.total_sampling_steps}"
                )
            if self.model_path is None and not self.baseline and self.mix_sampling_steps > 0:
                raise ValueError("--mix_sampling_steps: needs --model_path, the tuned model that takes these steps")

    @property
    def tuned_steps(self) -> int:
        """How many of the first steps the tuned transformer takes."""
        if self.baseline or self.model_path is None:
            return 0
        return self.total_sampling_steps if self.mix_sampling_steps is None else self.mix_sampling_steps

    @property
    def manifest(self) -> Path:
        return Path(self.output_json) if self.output_json else Path(self.output_dir) / "manifest.json"


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    path: Path
    prompt: str
    seed: int  # of its own generator: torch.Generator("cpu").manual_seed(seed) reproduces it in a FluxPipeline
    index: int  # in the manifest


def plan_pictures(config: SampleConfig, prompts: Sequence[str]) -> list[Picture]:
    """All pictures of a run, in the manifest's order. Their seeds are hashed: no two values of --seed share noise."""
    return [
        Picture(
            Path(config.output_dir) / f"{prompt_index:05d}_{number}.png",
            prompt,
            int(np.random.SeedSequence([config.seed, prompt_index, number]).generate_state(1)[0]),
            prompt_index * config.images_per_prompt + number,
        )
        for prompt_index, prompt in enumerate(prompts)
        for number in range(config.images_per_prompt)
    ]


def is_done(picture: Picture, settings_hash: str) -> bool:
    """Whether the file is there, can be read to its end, and was made of this prompt and seed with these settings."""
    try:
        with Image.open(picture.path) as image:
            image.load()
            return image.text == {"prompt": picture.prompt, "seed": str(picture.seed), "settings": settings_hash}
    except (OSError, SyntaxError, AttributeError):  # missing, truncated, broken PNG, no PNG
        return False


def save_picture(picture: Picture, image: Image.Image, settings_hash: str) -> None:
    """Writes the PNG, atomically, with what `is_done` asks for."""
    info = PngImagePlugin.PngInfo()
    for key, text in (("prompt", picture.prompt), ("seed", str(picture.seed)), ("settings", settings_hash)):
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes(picture.path, buffer.getvalue())


class HybridPipeline:
    """The base pipeline, whose transformer is the tuned one for the first steps of every call."""

    def __init__(self, config: SampleConfig, vae: AutoencoderKL, device: str, dtype: torch.dtype) -> None:
        """Loads what the settings need besides the VAE. Raises ValueError, one line, for a model that isn't there."""
        base = config.pretrained_model_name_or_path
        self.config = config
        self.tuned: FluxTransformer2DModel | None = None
        self.lora = config.tuned_steps > 0 and is_lora(config.model_path)
        if self.lora:
            self.tuned = load_with_lora(base, config.model_path, dtype).to(device)
        elif config.tuned_steps > 0:
            try:
                self.tuned = load_transformer(config.model_path, dtype).to(device)
            except ModelNotFoundError as error:
                raise ValueError(str(error).replace("--pretrained_model_name_or_path", "--model_path")) from error
        only_tuned = config.tuned_steps == config.total_sampling_steps or self.lora
        self.base = self.tuned if only_tuned else load_transformer(base, dtype)
        components = load_text_encoders(base, dtype).components
        self.pipe = FluxPipeline(**{**components, "vae": vae.to(dtype), "transformer": self.base}).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if config.shift is not None:
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self.pipe.scheduler.config, shift=config.shift, use_dynamic_shifting=False
            )

    def _use(self, tuned: bool) -> None:
        """The transformer of the next steps; adapters are switched rather than models."""
        self.pipe.transformer = self.tuned if tuned else self.base
        if self.lora:
            (self.tuned.enable_adapters if tuned else self.tuned.disable_adapters)()

    def __call__(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        """Samples a batch; every picture from its own CPU generator, so that its noise doesn't depend on the others."""
        config = self.config

        def after_step(pipe: FluxPipeline, step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
            if step + 1 == config.tuned_steps:
                self._use(tuned=False)
            return tensors

        if self.tuned is not None:
            self._use(tuned=True)
        return self.pipe(
            prompt=[picture.prompt for picture in pictures],
            height=config.h,
            width=config.w,
            num_inference_steps=config.total_sampling_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in pictures],
            max_sequence_length=min(config.max_sequence_length, self.pipe.tokenizer_2.model_max_length),
            callback_on_step_end=after_step,
        ).images


def _settings(config: SampleConfig, dtype: str) -> dict[str, object] | None:
    """All that decides what a picture looks like, besides its prompt and seed. None while a model isn't on disk."""
    base = model_fingerprint(config.pretrained_model_name_or_path, PIPELINE_FOLDERS)
    tuned = model_fingerprint(config.model_path, (".", "transformer")) if config.tuned_steps else "none"
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


def _claim_folder(config: SampleConfig, settings: dict[str, object], here: Processes) -> None:
    """Writes sampling.json; refuses a folder with pictures of other settings, so that they can't be taken for these."""
    path = Path(config.output_dir) / "sampling.json"
    if path.exists() and not config.overwrite:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["settings"]
            changed = [f"{k} ({there.get(k)} there, {v} now)" for k, v in settings.items() if there.get(k) != v]
        except (ValueError, KeyError, AttributeError) as error:
            changed = [f"unreadable sampling.json: {error!r}"]
        if changed:
            raise ValueError(
                f"--output_dir {config.output_dir}: holds pictures of other settings: {', '.join(changed)}; "
                "choose another folder, or --overwrite them"
            )
    barrier()  # nobody writes before everybody has looked
    if here.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = {
            "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
            "model_path": config.model_path,
        }
        write_json(path, {"settings": settings, "sources": {**sources, "prompts_file": config.prompts_file}})
    barrier()


def sample(config: SampleConfig) -> Path:
    """Makes all pictures of `config` that aren't there yet; returns the manifest's path.

    Under torchrun the batches are dealt out to the processes, and rank 0 writes the manifest.

    Raises:
        ValueError: one line, for missing models or prompts, an impossible size, or a folder with other pictures.
    """
    prompt_file = read_prompts(config.prompts_file, "prompts_file", unique=False)
    pictures = plan_pictures(config, prompt_file.prompts)
    vae = load_vae(config.pretrained_model_name_or_path)
    LatentShape.of(vae, config.h, config.w)  # raises for a size that doesn't fit
    with processes(None if config.device == "auto" else config.device) as here:
        dtype = ("fp32" if here.device == "cpu" else "bf16") if config.dtype == "auto" else config.dtype
        pipe = None
        settings = _settings(config, dtype)
        if settings is None:  # a hub id for the first time, or a wrong path, of which loading complains
            pipe = HybridPipeline(config, vae, here.device, DTYPES[dtype])
            settings = _settings(config, dtype)
        if settings is None:
            raise ValueError(
                "--pretrained_model_name_or_path, --model_path: not found in the hub's cache after loading"
            )
        _claim_folder(config, settings, here)
        settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

        # Batches are fixed by the plan: one with a picture missing is sampled as a whole, so that a restart computes in
        # the same shapes as an uninterrupted run.
        batches = [pictures[i : i + config.batch_size] for i in range(0, len(pictures), config.batch_size)]
        made = 0
        mine = batches[here.rank :: here.world_size]
        for batch in tqdm(mine, desc="sampling", unit="batch", disable=here.rank != 0):
            missing = [picture for picture in batch if not is_done(picture, settings_hash)]
            if not missing:
                continue
            pipe = pipe or HybridPipeline(config, vae, here.device, DTYPES[dtype])
            for picture, image in zip(batch, pipe(batch), strict=True):
                if picture in missing:
                    save_picture(picture, image, settings_hash)
                    made += 1
        print(f"rank {here.rank}: {made} pictures sampled, {sum(map(len, mine)) - made} were there")
        barrier()

        if here.rank == 0:
            folder = config.manifest.absolute().parent
            folder.mkdir(parents=True, exist_ok=True)
            entries = [
                {
                    "image": Path(os.path.relpath(picture.path.absolute(), folder)).as_posix(),
                    "prompt": picture.prompt,
                    "seed": picture.seed,
                    "index": picture.index,
                }
                for picture in pictures
            ]
            write_json(config.manifest, entries)
            print(f"{len(entries)} pictures of {len(prompt_file.prompts)} prompts: {config.manifest}")
        barrier()
    return config.manifest


def main(argv: Sequence[str] | None = None) -> Path:
    """The command line; returns the manifest's path."""
    return sample(parse_dataclass(SampleConfig, argv, __doc__))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

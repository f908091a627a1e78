"""Prompts to pictures with the base model, a tuned one, or both in turn, through diffusers' own FluxPipeline.

    python -m fastvideo.sample.sample_flux --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --model_path outputs/mixgrpo/checkpoint-300-0 --prompts_file data/prompts.txt --output_dir outputs/tuned
    torchrun --nproc_per_node 8 -m fastvideo.sample.sample_flux ...      (same flags)

Hybrid inference (MixGRPO, arXiv 2507.21802): the tuned transformer takes the first `--mix_sampling_steps` of
`--total_sampling_steps`, or the share `--mix_fraction` of them, and the base model the rest, which undoes some of what
was learned only to please the reward. Several shares (`--mix_fraction 0.2,0.5,0.8`) load the models once; each has a
folder mix_{steps}_{total}/ of its own, and sweep.json lists their manifests.

A picture's noise depends on `--seed`, the prompt's place in the file and the picture's number, not on processes or
batches. A restart keeps the pictures that are there: each carries its prompt, seed and a hash of the settings. The
folder's sampling.json says what those were; other settings, and other prompts for pictures of the same names, are
refused. Prompts may be added: then sampling.1.json, ... name the further pictures. Several runs may work on one folder
at once. The manifest, a JSON list of {"image", "prompt", "seed", "index"} with `image` relative to it, is written when
all pictures are there.
docs/evaluation.md has more.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fastvideo.cli import flag, parse_dataclass
from fastvideo.eval.benchmark import read_benchmark
from fastvideo.io.devices import DTYPES, resolve_dtype
from fastvideo.io.files import process_name, read_prompts, write_bytes, write_json
from fastvideo.io.fingerprint import model_fingerprint, sample_file
from fastvideo.io.processes import Processes, barrier, processes
from fastvideo.models.flux import (
    LORA_FILE,
    LatentShape,
    ModelNotFoundError,
    is_lora,
    load_text_encoders,
    load_transformer,
    load_vae,
    load_with_lora,
    meta_transformer,
)

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

PIPELINE_FOLDERS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


@dataclass
class SampleConfig:
    """Settings of a sampling run."""

    pretrained_model_name_or_path: str = flag("data/flux", "base FLUX pipeline: a folder or a hub id")
    flux_baseline_model_dir: str | None = flag(None, "another name of --pretrained_model_name_or_path")
    model_path: str | None = flag(
        None,
        "tuned model: a training checkpoint or its ema/, a folder with a transformer, LoRA adapters or a whole "
        "pipeline, a .safetensors file of the base model's architecture, or a hub id; None: only the base model",
    )
    baseline: bool = flag(False, "sample the base model even if model_path is given")
    prompts_file: str = flag(
        "data/prompts.txt",
        "text file with one prompt a line, or a folder of HPSv2 benchmark prompts (anime.json, ...)",
    )
    output_dir: str = flag("outputs/samples", "folder for the pictures")
    output_json: str | None = flag(None, "manifest to write (None: manifest.json in output_dir; sweep.json of a sweep)")
    image_format: str = flag("png", "file format; jpg loses detail", choices=["png", "jpg"])
    seed: int = flag(42, "seed of the initial noise")
    images_per_prompt: int = flag(1, "pictures of each prompt, each with its own noise")
    batch_size: int = flag(1, "pictures sampled at a time; speed and memory only")
    h: int = flag(1024, "picture height in pixels")
    w: int = flag(1024, "picture width in pixels")
    guidance_scale: float = flag(3.5, "distilled guidance; only for models with guidance embeds (FLUX.1-dev)")
    total_sampling_steps: int = flag(50, "denoising steps")
    mix_sampling_steps: int | None = flag(
        None, "steps the tuned model takes before the base model goes on (None or -1: all)"
    )
    mix_fraction: list[float] = flag(
        [], "the same as a share of all steps (the paper recommends 0.8); several are sampled one after the other"
    )
    shift: float | None = flag(None, "static shift of the sigma schedule (None: the base pipeline's own scheduler)")
    max_sequence_length: int = flag(512, "T5 tokens; cut to what the model's tokenizer declares")
    dtype: str = flag("auto", "number format; auto: bf16 on a GPU, fp32 on the CPU", choices=["auto", *DTYPES])
    device: str = flag("auto", "cpu, cuda (the process's own), cuda:1, ... or auto")
    compile: bool = flag(False, "compile the transformers' blocks: a slow start, then faster steps")
    cpu_offload: str = flag(
        "none",
        "keep in GPU memory only the model at work, or (sequential, slow) only the layer",
        choices=["none", "model", "sequential"],
    )
    overwrite: bool = flag(False, "replace the pictures of other settings or prompts in the folder")

    def __post_init__(self) -> None:
        if self.flux_baseline_model_dir is not None:
            self.pretrained_model_name_or_path = self.flux_baseline_model_dir
        if self.mix_sampling_steps == -1:
            self.mix_sampling_steps = None
        for name in ("images_per_prompt", "batch_size", "h", "w", "total_sampling_steps", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f"--shift {self.shift}: must be above 0")
        choices = {
            "dtype": ("auto", *DTYPES),
            "image_format": ("png", "jpg"),
            "cpu_offload": ("none", "model", "sequential"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(allowed)}")
        if self.compile and self.cpu_offload == "sequential":
            raise ValueError("--compile: its graphs can't move layers; choose --cpu_offload none or model")
        self._check_mix()

    def _check_mix(self) -> None:
        if self.mix_fraction:
            shares = ",".join(f"{fraction:g}" for fraction in self.mix_fraction)
            if self.mix_sampling_steps is not None:
                raise ValueError(f"--mix_fraction {shares}, --mix_sampling_steps: give one of them")
            if not all(0 <= fraction <= 1 for fraction in self.mix_fraction):
                raise ValueError(f"--mix_fraction {shares}: must be between 0 and 1")
            if len(set(self._mix_steps())) < len(self.mix_fraction):
                raise ValueError(
                    f"--mix_fraction {shares}: two shares are the same number of --total_sampling_steps "
                    f"{self.total_sampling_steps}"
                )
            if self.baseline and len(self.mix_fraction) > 1:
                raise ValueError(f"--baseline: takes no share of --mix_fraction {shares}")
            if self.model_path is None and not self.baseline and any(self.mix_fraction):
                raise ValueError("--mix_fraction: needs --model_path, the tuned model that takes these steps")
        if self.mix_sampling_steps is not None:
            if not 0 <= self.mix_sampling_steps <= self.total_sampling_steps:
                raise ValueError(
                    f"--mix_sampling_steps {self.mix_sampling_steps}: must be between 0 and --total_sampling_steps "
                    f"{self.total_sampling_steps}"
                )
            if self.model_path is None and not self.baseline and self.mix_sampling_steps > 0:
                raise ValueError("--mix_sampling_steps: needs --model_path, the tuned model that takes these steps")

    def _mix_steps(self) -> list[int]:
        return [int(fraction * self.total_sampling_steps + 0.5) for fraction in self.mix_fraction]

    @property
    def is_sweep(self) -> bool:
        return len(self.mix_fraction) > 1

    def runs(self) -> list["SampleConfig"]:
        """One configuration for every share of `--mix_fraction`, in the folder that a sweep gives it, or only this."""
        found = []
        for steps in self._mix_steps():
            places = {}
            if self.is_sweep:
                name = f"mix_{steps}_{self.total_sampling_steps}"
                places["output_dir"] = str(Path(self.output_dir) / name)
                if self.output_json:
                    path = Path(self.output_json)
                    places["output_json"] = str(path.with_name(f"{path.stem}_{name}.json"))
            found.append(replace(self, mix_fraction=[], mix_sampling_steps=steps, **places))
        return found or [self]

    @property
    def tuned_steps(self) -> int:
        """How many of the first steps the tuned transformer takes, in a configuration of `runs`."""
        if self.baseline or self.model_path is None:
            return 0
        return self.total_sampling_steps if self.mix_sampling_steps is None else self.mix_sampling_steps

    @property
    def manifest(self) -> Path:
        """What the run writes last; of a sweep, the list of its manifests."""
        default = Path(self.output_dir) / ("sweep.json" if self.is_sweep else "manifest.json")
        return Path(self.output_json) if self.output_json else default


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    path: Path
    prompt: str
    seed: int  # of its own generator: torch.Generator("cpu").manual_seed(seed) reproduces it in a FluxPipeline
    index: int  # in the manifest
    style: str | None = None  # of the benchmark


def read_prompt_list(path: str) -> list[tuple[str, str | None]]:
    """(prompt, style) of a text file, style None, or of a folder of benchmark prompts. Raises ValueError, one line."""
    if Path(path).is_dir():
        styles = read_benchmark(Path(path), "prompts_file")
        return [(prompt, style) for style, prompts in styles.items() for prompt in prompts]
    return [(prompt, None) for prompt in read_prompts(path, "prompts_file", unique=False).prompts]


def plan_pictures(config: SampleConfig, prompts: Sequence[tuple[str, str | None]]) -> list[Picture]:
    """All pictures of a run, in the manifest's order. Their seeds are hashed: no two values of --seed share noise."""
    found, before = [], {}
    for place, (prompt, style) in enumerate(prompts):
        number_in_style = before[style] = before.get(style, -1) + 1
        for number in range(config.images_per_prompt):
            # The benchmark has one picture a prompt, and no number in its name.
            name = f"{number_in_style:05d}" + (f"_{number}" if style is None or config.images_per_prompt > 1 else "")
            path = Path(config.output_dir) / (style or "") / f"{name}.{config.image_format}"
            seed = int(np.random.SeedSequence([config.seed, place, number]).generate_state(1)[0])
            found.append(Picture(path, prompt, seed, len(found), style))
    return found


def _record(picture: Picture, settings_hash: str) -> dict[str, str]:
    """What a picture's file says about it."""
    return {"prompt": picture.prompt, "seed": str(picture.seed), "settings": settings_hash}


def is_done(picture: Picture, settings_hash: str) -> bool:
    """Whether the file is there, can be read to its end, and was made of this prompt and seed with these settings."""
    try:
        with Image.open(picture.path) as image:
            image.load()
            record = image.text if image.format == "PNG" else json.loads(image.info["comment"])
            return record == _record(picture, settings_hash)
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError):  # missing, truncated, broken, another format
        return False


def save_picture(picture: Picture, image: Image.Image, settings_hash: str) -> None:
    """Writes the file, atomically, with what `is_done` asks for."""
    record = _record(picture, settings_hash)
    buffer = io.BytesIO()
    if picture.path.suffix == ".jpg":
        image.save(buffer, "JPEG", quality=95, comment=json.dumps(record))
    else:
        info = PngImagePlugin.PngInfo()
        for key, text in record.items():
            info.add_itxt(key, text)
        image.save(buffer, "PNG", pnginfo=info)
    write_bytes(picture.path, buffer.getvalue())


def _weight_file(model_path: str) -> Path | None:
    """The file of a model that comes without a config.json, and so has the base model's architecture."""
    path = Path(model_path)
    if path.is_file():
        return path
    file = path / SAFETENSORS_WEIGHTS_NAME
    return file if file.is_file() and not (path / "config.json").is_file() else None


def _lora_folder(model_path: str) -> str | None:
    """The folder of LoRA adapters that the path means, if it does; it may name their file."""
    path = Path(model_path)
    folder = path.parent if path.name == LORA_FILE else path
    return str(folder) if is_lora(folder) else None


def load_tuned(base: str, model_path: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer that `--model_path` means; adapters are switched on in the transformer of the pipeline `base`.

    Raises ValueError, one line, for a model that isn't there or doesn't fit the base model.
    """
    folder, file = _lora_folder(model_path), _weight_file(model_path)
    try:
        if folder:
            return load_with_lora(base, folder, dtype)
        if file:
            transformer = meta_transformer(base, dtype).eval()
            weights = {name: tensor.to(dtype, copy=True) for name, tensor in load_file(file).items()}
            transformer.load_state_dict(weights, assign=True)
            return transformer
        return load_transformer(model_path, dtype)
    except ModelNotFoundError as error:
        raise ValueError(
            str(error).replace(f"--pretrained_model_name_or_path {model_path}", f"--model_path {model_path}")
        ) from error
    except (RuntimeError, SafetensorError) as error:  # torch's and peft's, of other names or shapes
        problem = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--model_path {model_path}: doesn't fit --pretrained_model_name_or_path {base}: {problem}"
        ) from error


class HybridPipeline:
    """The base pipeline, whose transformer is the tuned one for the first steps of every call."""

    def __init__(
        self, config: SampleConfig, tuned_steps: Sequence[int], vae: AutoencoderKL, device: str, dtype: torch.dtype
    ) -> None:
        """Loads what calls with these `tuned_steps` need besides the VAE: with LoRA adapters always one transformer.

        Raises ValueError, one line, for a model that isn't there.
        """
        base = config.pretrained_model_name_or_path
        self.config = config
        self.tuned = load_tuned(base, config.model_path, dtype) if any(tuned_steps) else None
        self.lora = self.tuned is not None and _lora_folder(config.model_path) is not None
        only_tuned = self.lora or min(tuned_steps) == config.total_sampling_steps
        self.base = self.tuned if only_tuned else load_transformer(base, dtype)
        components = load_text_encoders(base, dtype).components
        torch.nn.Module.to(vae, dtype)  # ModelMixin.to would warn
        first = self.base if self.tuned is None else self.tuned
        self.pipe = FluxPipeline(**{**components, "vae": vae, "transformer": first})
        self.pipe.set_progress_bar_config(disable=True)
        if config.shift is not None:
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self.pipe.scheduler.config, shift=config.shift, use_dynamic_shifting=False
            )
        self.first, self.base_hook = first, None
        second = self.base if self.base is not first else None  # which the pipeline doesn't know
        if config.cpu_offload == "none":
            self.pipe.to(device)
            if second:
                second.to(device)
        elif config.cpu_offload == "model":
            self.pipe.enable_model_cpu_offload(device=device)
            if second:
                # At share 0 it runs right after the text encoders, the last of which the pipeline leaves there.
                encoder = UserCpuOffloadHook(self.pipe.text_encoder_2, CpuOffload(device))
                _, self.base_hook = cpu_offload_with_hook(second, device, prev_module_hook=encoder)
        else:
            for part in (self.pipe, *([second] if second else [])):
                part.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
        if config.compile:
            for transformer in {first, self.base}:
                transformer.compile_repeated_blocks()

    def _use(self, transformer: FluxTransformer2DModel, tuned: bool) -> None:
        """The transformer of the next steps; adapters are switched rather than models."""
        self.pipe.transformer = transformer
        if self.lora:
            (transformer.enable_adapters if tuned else transformer.disable_adapters)()

    def __call__(self, pictures: Sequence[Picture], tuned_steps: int) -> list[Image.Image]:
        """Samples a batch; every picture from its own CPU generator, so that its noise doesn't depend on the others."""
        config = self.config

        def after_step(pipe: FluxPipeline, step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
            if step + 1 == config.total_sampling_steps:
                pipe.transformer = self.first  # the one that offloading knows
                if self.base_hook:
                    self.base_hook.offload()  # the VAE may need the room
            elif step + 1 == tuned_steps:
                if self.base_hook:
                    self.tuned.to("cpu")
                self._use(self.base, tuned=False)
            return tensors

        self._use(self.tuned if tuned_steps else self.base, tuned=tuned_steps > 0)
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


def _tuned_fingerprint(model_path: str) -> str | None:
    folder, file = _lora_folder(model_path), _weight_file(model_path)
    if file and not folder:
        return str(sample_file(file)["sha256"])
    return model_fingerprint(folder or model_path, (".", "transformer"))


def _settings(config: SampleConfig, dtype: str) -> dict[str, object] | None:
    """All that decides what a picture looks like, besides its prompt and seed. None while a model isn't on disk."""
    base = model_fingerprint(config.pretrained_model_name_or_path, PIPELINE_FOLDERS)
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


def _claimed(folder: Path) -> tuple[dict[str, object] | None, dict[str, str], Path]:
    """A folder's claims: settings (None: no claim), a hash of what each picture is made of, and the next claim's file.

    Raises ValueError, one line, for claims that can't be read.
    """
    settings, pictures, number, path = None, {}, 0, folder / "sampling.json"
    while path.exists():
        try:
            claim = json.loads(path.read_text(encoding="utf-8"))
            settings, pictures = claim["settings"], pictures | claim["pictures"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--output_dir {folder}: unreadable {path.name}: {error!r}; choose another folder, or --overwrite it"
            ) from error
        number += 1
        path = folder / f"sampling.{number}.json"
    return settings, pictures, path


def _next_claim(folder: Path, settings: dict[str, object], pictures: dict[str, str]) -> Path | None:
    """Where these pictures are to be claimed; None if they are. Raises ValueError for a folder that holds others."""
    there, taken, path = _claimed(folder)
    if there is None:
        return path
    other = "--output_dir {}: holds pictures of other {}; choose another folder, or --overwrite them"
    if changed := [f"{k} ({there.get(k)} there, {v} now)" for k, v in settings.items() if there.get(k) != v]:
        raise ValueError(other.format(folder, f"settings: {', '.join(changed)}"))
    if changed := [name for name, made_of in pictures.items() if taken.get(name, made_of) != made_of]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(other.format(folder, f"prompts: {', '.join(changed[:3])}{more}"))
    return path if pictures.keys() - taken.keys() else None


def _claim_folder(
    config: SampleConfig, settings: dict[str, object], pictures: Sequence[Picture], here: Processes
) -> str:
    """Claims the pictures in sampling.json, or those that it lacks in a file beside it; returns the settings' hash.

    Raises ValueError for a folder with pictures of other settings, or of other prompts at the same places, so that they
    can't be taken for these.
    """
    folder = Path(config.output_dir)
    made_of = {
        _relative(picture.path, folder): hashlib.sha256(json.dumps(_record(picture, "")).encode()).hexdigest()[:16]
        for picture in pictures
    }
    if here.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        names = ("pretrained_model_name_or_path", "model_path", "prompts_file")
        sources = {name: getattr(config, name) for name in names}
        own = folder / f".sampling.{process_name()}.json"
        write_json(own, {"settings": settings, "pictures": made_of, "sources": sources})
        try:
            if config.overwrite:  # manifests first: they must never name pictures of both runs
                for path in (config.manifest, folder / "manifest.json", *folder.glob("sampling.[0-9]*.json")):
                    path.unlink(missing_ok=True)
                os.replace(own, folder / "sampling.json")
            with suppress(ValueError):  # every process raises it, below
                while path := _next_claim(folder, settings, made_of):
                    try:
                        os.link(own, path)  # unlike a replacement it fails when there is one, also of this very moment
                    except FileExistsError:
                        continue  # of a run that claims other pictures, or the same
                    except OSError:  # a file system without links
                        os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
    barrier()
    _next_claim(folder, settings, made_of)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def _sample_run(
    config: SampleConfig,
    pictures: Sequence[Picture],
    settings_hash: str,
    load: Callable[[], HybridPipeline],
    here: Processes,
) -> None:
    """Makes the pictures of one configuration of `runs` that aren't there yet, and its manifest."""
    if here.rank == 0:
        for folder in {picture.path.parent for picture in pictures}:
            folder.mkdir(exist_ok=True)
    barrier()
    # Batches are fixed by the plan: one with a picture missing is sampled as a whole, so that a restart computes in the
    # same shapes as an uninterrupted run.
    batches = [pictures[i : i + config.batch_size] for i in range(0, len(pictures), config.batch_size)]
    made = 0
    mine = batches[here.rank :: here.world_size]
    for batch in tqdm(mine, desc="sampling", unit="batch", disable=here.rank != 0):
        missing = [picture for picture in batch if not is_done(picture, settings_hash)]
        if not missing:
            continue
        for picture, image in zip(batch, load()(batch, config.tuned_steps), strict=True):
            if picture in missing:
                save_picture(picture, image, settings_hash)
                made += 1
    print(f"rank {here.rank}: {made} pictures sampled, {sum(map(len, mine)) - made} were there")
    barrier()

    if here.rank == 0:
        folder = config.manifest.parent
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for picture in pictures:
            entry = {"image": _relative(picture.path, folder), "prompt": picture.prompt, "seed": picture.seed}
            entry |= {"index": picture.index} | ({"style": picture.style} if picture.style else {})
            entries.append(entry)
        write_json(config.manifest, entries)
        print(f"{len(entries)} pictures of {len(entries) // config.images_per_prompt} prompts: {config.manifest}")
    barrier()


def sample(config: SampleConfig) -> Path:
    """Makes all pictures of `config` that aren't there yet; returns the path of the manifest, or of sweep.json.

    Under torchrun the batches are dealt out to the processes, and rank 0 writes the manifest.

    Raises:
        ValueError: one line, for missing models or prompts, an impossible size, or a folder with other pictures.
    """
    prompts = read_prompt_list(config.prompts_file)
    runs = config.runs()
    vae = load_vae(config.pretrained_model_name_or_path)
    LatentShape.of(vae, config.h, config.w)  # raises for a size that doesn't fit
    with processes(config.device) as here:
        dtype = resolve_dtype(config.dtype, here.device)

        @cache
        def load() -> HybridPipeline:
            return HybridPipeline(config, [run.tuned_steps for run in runs], vae, here.device, DTYPES[dtype])

        settings = [_settings(run, dtype) for run in runs]
        if None in settings:  # a hub id for the first time, or a wrong path, of which loading complains
            load()
            settings = [_settings(run, dtype) for run in runs]
        if None in settings:
            raise ValueError(
                "--pretrained_model_name_or_path, --model_path: not found in the hub's cache after loading"
            )
        plans = [plan_pictures(run, prompts) for run in runs]
        hashes = [_claim_folder(*claim, here) for claim in zip(runs, settings, plans, strict=True)]
        for run, pictures, settings_hash in zip(runs, plans, hashes, strict=True):
            _sample_run(run, pictures, settings_hash, load, here)
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


def main(argv: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of the manifest, or of sweep.json."""
    return sample(parse_dataclass(SampleConfig, argv, __doc__))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

"""Makes the tiny FLUX in data/tiny_flux: a complete diffusers `FluxPipeline` that draws two coloured shapes.

    python scripts/make_tiny_flux.py --output_dir data/tiny_flux   # draw, train, save
    python scripts/make_tiny_flux.py --family flux2 --output_dir outputs/tiny_flux2   # FLUX.2 [klein], tiny_flux2.py
    python scripts/make_tiny_flux.py --evaluate data/tiny_flux     # measure a saved one
    python scripts/make_tiny_flux.py --prompts data                # write the prompt files of the world

Every part is FLUX's own class and has FLUX's interfaces (16 latent channels packed 2×2, CLIP's pooled embedding, T5's
token embeddings, guidance embeds); only the sizes differ: 32×32 pixels, 4× VAE, 16 image tokens, 2 million parameters.
Training has two parts, both from scratch: the VAE, then transformer and text encoders together by flow matching
(x_σ = (1 - σ)·x0 + σ·ε, target ε - x0).

Captions lie, as those of pictures on the web do: 40 % of the training examples have the caption of another scene, with
colours or objects exchanged or a shape changed. Flow matching learns that distribution, lies included, and converges to
a model that draws what a caption says less than half of the time. That leaves reinforcement learning something to do.
"""

import copy
import json
import os
import platform
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass
from fastvideo.io.devices import resolve_device
from fastvideo.io.files import usual_modes, write_bytes, writing
from fastvideo.models import pretrained
from fastvideo.models.reward_model.shapes import IMAGE_SIZE, JITTER, Scene, ShapesRewardModel, all_scenes, draw

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from tiny_flux2 import TinyFlux2, caption_words, make_flux2_pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

CLIP_LENGTH = 24  # tokens, special ones included
T5_LENGTH = (
    14  # tokens: a caption has 12 or 13, and its end. Without an attention mask the padding is part of the prompt
)
GUIDANCE = 3.5  # the only value seen in training, FLUX.1-dev's default
SHIFT = 3.0
SAMPLING_STEPS = 10
LIES = 0.4  # share of the training examples with the caption of another scene
MAX_BYTES = 6_000_000


def _make_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """CLIP (byte-level BPE) and T5 (unigram) tokenizers: one token a caption word, any other word letter by letter."""
    words = caption_words()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words * 2, trainer)
    trained = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    pieces += sorted(piece for piece in trained["vocab"] if piece not in set(pieces))
    vocab = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in trained["merges"]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)

    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    scores += [(f"▁{word}", -4.0) for word in words]
    scores += [(letter, -8.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    t5 = T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=T5_LENGTH)
    return clip, t5


def make_pipeline(guidance_embeds: bool = True, seed: int = 0, single_layers: int = 3) -> FluxPipeline:
    """The pipeline with random float32 weights; without guidance embeds it is like FLUX.1-schnell."""
    clip_tokenizer, t5_tokenizer = _make_tokenizers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=single_layers,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(8, 12, 12),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=1,  # more groups normalise flat colours away
            sample_size=IMAGE_SIZE,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer),
                d_model=64,
                d_kv=32,
                d_ff=128,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=t5_tokenizer.pad_token_id,
                eos_token_id=t5_tokenizer.eos_token_id,
            )
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


class TinyFlux1:
    """What the training of the tiny FLUX.1 has of its own. TinyFlux2 in tiny_flux2.py has the same members.

    guidance: of training and sampling. empty: share of the training examples with the empty caption. text_encoders:
    parts of the pipeline that are trained beside the transformer, in order.
    """

    guidance, empty = GUIDANCE, 0.0
    text_encoders = ("text_encoder", "text_encoder_2")

    def make(self, seed: int) -> FluxPipeline:
        """The pipeline with random weights."""
        return make_pipeline(seed=seed)

    def length(self, pipe: FluxPipeline) -> int:
        """Tokens of a caption."""
        return pipe.tokenizer_2.model_max_length

    def normalise(self, vae: AutoencoderKL, latents: torch.Tensor) -> None:
        """Puts mean and spread of the latents [N, 16, 8, 8] into the VAE."""
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())

    def pack(self, vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, 16, 8, 8] as the transformer takes them, [N, 16, 64]."""
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def tokens(self, pipe: FluxPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text encoders take of each caption, [N, tokens] each."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = pipe.tokenizer(captions, max_length=CLIP_LENGTH, **options).input_ids
        return clip, pipe.tokenizer_2(captions, max_length=T5_LENGTH, **options).input_ids

    def velocity(
        self, pipe: FluxPipeline, latents: torch.Tensor, sigma: torch.Tensor, clip: torch.Tensor, t5: torch.Tensor
    ) -> torch.Tensor:
        """The transformer's answer [N, 16, 64] with gradients, also of the text encoders; clip, t5: `tokens`."""
        return pipe.transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=torch.full_like(sigma, self.guidance),
            pooled_projections=pipe.text_encoder(clip).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(t5)[0],
            txt_ids=torch.zeros(T5_LENGTH, 3, device=latents.device),
            img_ids=pipe._prepare_latent_image_ids(1, 4, 4, latents.device, torch.float32),
            return_dict=False,
        )[0]


FAMILIES = {"flux1": TinyFlux1(), "flux2": TinyFlux2()}


def family_of(pipe: DiffusionPipeline) -> TinyFlux1 | TinyFlux2:
    return FAMILIES["flux2" if isinstance(pipe, Flux2KleinPipeline) else "flux1"]


def with_parts(pipe: DiffusionPipeline, parts: dict[str, torch.nn.Module]) -> DiffusionPipeline:
    """The pipeline with other models."""
    components = {name: part for name, part in pipe.components.items() if part is not None}
    options = {"is_distilled": pipe.config.is_distilled} if isinstance(pipe, Flux2KleinPipeline) else {}
    return type(pipe)(**{**components, **parts}, **options)


def save_pipeline(pipe: DiffusionPipeline, output_dir: str | Path) -> None:
    """Write a float16 copy of the pipeline as safetensors; the one in memory stays float32."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    halves = {name: copy.deepcopy(model).half() for name, model in models.items()}
    with_parts(pipe, halves).save_pretrained(output_dir)
    usual_modes(Path(output_dir))


def build_tiny_flux2(output_dir: str | Path, seed: int = 0, single_layers: int = 3, distilled: bool = False) -> None:
    """Write an untrained FLUX.2 [klein] pipeline with random weights, in a second."""
    save_pipeline(make_flux2_pipeline(seed, single_layers, distilled), output_dir)


def build_tiny_flux(
    output_dir: str | Path, guidance_embeds: bool = True, seed: int = 0, single_layers: int = 3
) -> None:
    """Write an untrained pipeline with random weights, in a second; `guidance_embeds=False` is like FLUX.1-schnell."""
    save_pipeline(make_pipeline(guidance_embeds, seed, single_layers), output_dir)


class PictureBank:
    """Pictures of all training scenes, several of each with different jitter, and batches of them.

    `pixels` is uint8 [N, 3, 32, 32]; picture n shows `scenes[n % len(scenes)]`.
    """

    def __init__(self, copies: int, seed: int, device: torch.device):
        self.scenes: list[Scene] = all_scenes(withheld=False)
        rng = np.random.default_rng(seed)
        pictures = [draw(s, rng.uniform(-JITTER, JITTER, (2, 2))) for _ in range(copies) for s in self.scenes]
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()
        self.pixels = pixels.to(device)

    def float_pixels(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures as the VAE takes them: float32 [B, 3, 32, 32] in -1 to 1."""
        return self.pixels[index].float() / 127.5 - 1

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Endless index batches [B], every picture once an epoch."""
        while True:
            order = torch.randperm(len(self.pixels), generator=generator)
            yield from (b.to(self.pixels.device) for b in order.split(batch_size) if len(b) == batch_size)


def _cosine_lr(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + np.cos(np.pi * step / steps)) / 2)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vae(pipe: DiffusionPipeline, bank: PictureBank, steps: int, batch_size: int = 128, lr: float = 3e-3) -> None:
    """Train the pipeline's VAE with L1 + 1e-4·KL, then put the latents' mean and spread into it.

    Pixels of the shape, the minority, weigh more. The posterior starts narrow (log-variance -5): from the usual start
    the noise drowns the latents and training takes far longer.
    """
    vae = pipe.vae
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = -5.0
        vae.encoder.conv_out.weight[16:] *= 0.1
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = _cosine_lr(optimizer, steps)
    batches = bank.batches(batch_size, generator)
    vae.train()
    progress = tqdm(range(steps), desc="VAE", mininterval=5)
    for step in progress:
        pixels = bank.float_pixels(next(batches))
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        is_shape = ((pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05).float()
        weight = 1 + 3 * is_shape
        reconstruction = (weight * (output - pixels).abs()).sum() / weight.sum() / 3
        loss = reconstruction + 1e-4 * posterior.kl().mean() / 64  # KL per latent pixel
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 99:
            mse = (output.detach().clamp(-1, 1) - pixels).square().mean() / 4
            progress.set_postfix(l1=f"{reconstruction.item():.4f}", psnr=f"{-10 * mse.log10().item():.1f}")
    vae.eval()
    mean, std = encode_bank(vae, bank)
    latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
    family_of(pipe).normalise(vae, latents)


@torch.no_grad()
def encode_bank(vae: AutoencoderKL, bank: PictureBank) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std [N, 16, 8, 8] of the posterior of every picture."""
    posteriors = [
        vae.encode(bank.float_pixels(index)).latent_dist for index in torch.arange(len(bank.pixels)).split(256)
    ]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def lying_captions(scenes: list[Scene]) -> torch.Tensor:
    """Index [N, 4] into the scenes of four false captions of each; one that is withheld gives its place to another."""
    place = {scene: n for n, scene in enumerate(scenes)}
    lies = [[place[lie] for lie in scene.mistakes().values() if lie in place] for scene in scenes]
    return torch.tensor([(found * 4)[:4] for found in lies])


def train_flow(
    pipe: DiffusionPipeline,
    bank: PictureBank,
    steps: int,
    output_dir: Path,
    check_every: int,
    lies: float = LIES,
    batch_size: int = 256,
    lr: float = 1.5e-3,
) -> None:
    """Train transformer and text encoders together by flow matching, and save their averaged (EMA) weights.

    lies: share of the examples whose caption is another scene's. Every `check_every` steps the averaged model is saved
    and measured on captions of the training and on withheld ones.
    """
    device, family = bank.pixels.device, family_of(pipe)
    names = ("transformer", *family.text_encoders)
    parts = torch.nn.ModuleList(getattr(pipe, name) for name in names)
    for parameter in pipe.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    generator = torch.Generator().manual_seed(2)
    mean, std = encode_bank(pipe.vae, bank)
    captions, false = [scene.caption() for scene in bank.scenes], lying_captions(bank.scenes)
    empty = len(captions)
    tokens = [ids.to(device) for ids in family.tokens(pipe, [*captions, ""])]

    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = _cosine_lr(optimizer, steps)
    averaged = copy.deepcopy(parts)
    batches = bank.batches(batch_size, generator)
    parts.train()
    progress = tqdm(range(1, steps + 1), desc="flow matching", mininterval=5)
    average_loss = torch.ones((), device=device)
    for step in progress:
        index = next(batches)
        scene = index.cpu() % len(captions)
        lie = false[scene, torch.randint(false.shape[1], (batch_size,), generator=generator)]
        scene = torch.where(torch.rand(batch_size, generator=generator) < lies, lie, scene)
        if family.empty:
            scene[torch.rand(batch_size, generator=generator) < family.empty] = empty
        scene = scene.to(device)
        latents = mean[index] + std[index] * torch.randn(batch_size, 16, 8, 8, generator=generator).to(device)
        clean = family.pack(pipe.vae, latents)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Stratified over the batch, and shifted by 2 towards noise, where the caption decides what is drawn.
        uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        sigma = (2 * uniform / (1 + uniform)).to(device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = family.velocity(pipe, noisy, sigma, *(ids[scene] for ids in tokens))
        loss = F.mse_loss(velocity, noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        decay = min(0.998, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(parts.parameters()), 1 - decay)
            average_loss.lerp_(loss, 0.01)
        if step % check_every == 0 or step == steps:
            candidate = with_parts(pipe, dict(zip(names, averaged, strict=True)))
            save_pipeline(candidate, output_dir)
            shares = []
            for scenes in (_choose(bank.scenes, 540, seed=step), all_scenes(withheld=True) * 2):
                now = [scene.caption() for scene in scenes]
                shares.append(check(sample(candidate, now, seed=step), now)["right"].mean())
            tqdm.write(
                f"step {step}: loss {average_loss:.4f}, right in everything: training scenes {shares[0]:.1%}, "
                f"withheld scenes {shares[1]:.1%}"
            )


def sample(
    pipe: DiffusionPipeline,
    captions: list[str],
    seed: int,
    steps: int = SAMPLING_STEPS,
    batch_size: int = 270,
    guidance_scale: float | None = None,
) -> list[Image.Image]:
    """Pictures of the captions through the pipeline itself, with fresh noise from `seed`.

    guidance_scale: None is the family's.
    """
    family = family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(captions), batch_size):
        images += pipe(
            prompt=captions[start : start + batch_size],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance_scale or family.guidance,
            max_sequence_length=family.length(pipe),
            generator=generator,
        ).images
    return images


def check(images: list[Image.Image], captions: list[str]) -> dict[str, np.ndarray]:
    """Scores of each part, and whether each picture is right in everything, [N] each."""
    return ShapesRewardModel([1, 1, 1], [1, 1, 1]).score_components(images, captions)


def _choose(scenes: list[Scene], count: int, seed: int) -> list[Scene]:
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[n] for n in order[:count]]


def evaluate(directory: str | Path, device: torch.device, seed: int = 1234, guidance_scale: float | None = None) -> str:
    """Measure a saved pipeline (float32) on 540 training and all 270 withheld captions, two pictures of each of these.

    guidance_scale: None is the family's. Returns a text report.
    """
    pipeline = pretrained.family_of(str(directory), "evaluate").pipelines[0]
    pipe = pipeline.from_pretrained(directory, dtype=torch.float32).to(device)
    guidance, schedule = guidance_scale or family_of(pipe).guidance, pipe.scheduler.config
    shift = "of the picture's size" if schedule.use_dynamic_shifting else schedule.shift
    size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    parameters = sum(
        p.numel() for part in pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()
    )
    lines = [f"parameters {parameters:,}, {size / 1e6:.2f} MB on disk; guidance {guidance}, shift {shift}, seed {seed}"]
    cases = {"training": _choose(all_scenes(False), 540, seed), "withheld": all_scenes(True) * 2}
    bank = PictureBank(1, seed, device)
    with torch.no_grad():
        decoded = [pipe.vae(bank.float_pixels(i)).sample for i in torch.arange(len(bank.pixels)).split(270)]
    redrawn = [Image.fromarray(x) for x in _bytes(torch.cat(decoded))]
    right = check(redrawn, [scene.caption() for scene in bank.scenes])["right"].mean()
    lines.append(f"drawings of the training scenes through the VAE and back: {right:.1%} right in everything")
    for steps in (4, 6, 8, SAMPLING_STEPS, 28):
        for name, scenes in cases.items():
            captions = [scene.caption() for scene in scenes]
            images = sample(pipe, captions, seed, steps, guidance_scale=guidance)
            found = {key: value.mean() for key, value in check(images, captions).items()}
            right, error = found.pop("right"), np.sqrt(1 / len(captions))
            error *= np.sqrt(right * (1 - right))
            parts = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            lines.append(f"{name} scenes, {steps} steps: right in everything {right:.1%} ± {error:.1%}; {parts}")
    return "\n".join(lines)


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [N, 32, 32, 3] of pictures as the VAE gives them."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_prompts(folder: Path) -> None:
    """tiny_prompts.txt: 240 training scenes; tiny_prompts_test.txt: the 270 withheld ones, in mixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scenes in {
        "tiny_prompts.txt": _choose(all_scenes(False), 240, seed=0),
        "tiny_prompts_test.txt": _choose(all_scenes(True), 270, seed=0),
    }.items():
        write_bytes(folder / name, "".join(f"{scene.caption()}\n" for scene in scenes).encode())


def _versions() -> str:
    versions = {"Python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, diffusers, transformers, np)}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


@dataclass
class TinyFluxConfig:
    """Train or measure the tiny FLUX that draws two coloured shapes. Give --output_dir, --evaluate or --prompts."""

    output_dir: str | None = flag(None, "train from scratch and save the pipeline here")
    evaluate: str | None = flag(None, "measure the pipeline in this folder")
    family: str = flag("flux1", "model to train", choices=("flux1", "flux2"))
    guidance_scale: float | None = flag(None, "of --evaluate (None: 3.5 for FLUX.1, 4 for FLUX.2)", above=0)
    prompts: str | None = flag(None, "write tiny_prompts.txt and tiny_prompts_test.txt to this folder")
    vae_steps: int = flag(1500, "optimizer steps of the VAE", at_least=1)
    steps: int = flag(4500, "optimizer steps of the flow matching part", at_least=1)
    lies: float = flag(LIES, "share of training captions that lie", at_least=0, at_most=1)
    check_every: int = flag(200, "steps between measurements", at_least=1)
    seed: int = flag(2, "seed of weights and pictures; some converge later", at_least=0, below=2**32)
    threads: int | None = flag(None, "CPU threads (None: all)", at_least=1)
    device: str = flag("auto", "cpu, cuda, cuda:1, ... or auto")

    def __post_init__(self) -> None:
        check_fields(self)
        tasks = (self.output_dir, self.evaluate, self.prompts)
        if sum(task is not None for task in tasks) != 1:
            raise FlagError("output_dir", self.output_dir, "give one of --output_dir, --evaluate and --prompts")
        if self.evaluate and not (Path(self.evaluate) / "model_index.json").is_file():
            raise FlagError("evaluate", self.evaluate, "no model_index.json there, so no pipeline")


@flag_errors("make_tiny_flux.py")
def main(argv: Sequence[str] | None = None) -> None:
    """The command line: trains (--output_dir), measures (--evaluate) or writes the prompt files (--prompts)."""
    config = parse_dataclass(TinyFluxConfig, argv, __doc__)
    torch.set_num_threads(config.threads or os.cpu_count())
    device = torch.device(resolve_device(config.device))
    transformers.utils.logging.disable_progress_bar()  # they would break up the ones of training
    diffusers.utils.logging.disable_progress_bar()
    if config.prompts:
        with writing("prompts", config.prompts):
            write_prompts(Path(config.prompts))
    elif config.evaluate:
        print(f"python scripts/make_tiny_flux.py --evaluate {config.evaluate}  ({date.today()}, {_versions()})")
        print(evaluate(Path(config.evaluate), device, guidance_scale=config.guidance_scale))
    else:
        with writing("output_dir", config.output_dir):
            make_tiny_flux(config, device)


def make_tiny_flux(config: TinyFluxConfig, device: torch.device) -> None:
    """Trains the pipeline and saves it in `output_dir`."""
    start = time.monotonic()
    torch.manual_seed(config.seed)
    pipe = FAMILIES[config.family].make(config.seed).to(device)
    bank = PictureBank(copies=8, seed=config.seed, device=device)
    train_vae(pipe, bank, config.vae_steps)
    print(f"VAE after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    train_flow(pipe, bank, config.steps, Path(config.output_dir), config.check_every, config.lies)
    print(f"saved {config.output_dir} after {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

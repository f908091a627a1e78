"""Times the real trainer by phase on FLUX blocks of any number and width with random weights; needs no downloads.

    python benchmarks/bench_iteration.py --no_gradient_checkpointing
    python benchmarks/bench_iteration.py --windows 10 --ablation --no_gradient_checkpointing   # each optimisation off
    python benchmarks/bench_iteration.py --windows 0 --sweep --no_gradient_checkpointing       # other G, T, pixels
    python benchmarks/bench_iteration.py --windows 10 --scouting --no_gradient_checkpointing   # what --scouts costs
    python benchmarks/bench_iteration.py --fp8 --no_gradient_checkpointing         # FP8 in untrained steps, its error
    python benchmarks/bench_iteration.py --compare --no_gradient_checkpointing     # optimisations, FP8, scouts
    python benchmarks/bench_iteration.py --double_blocks 19 --single_blocks 38 --use_lora      # LoRA of all of FLUX.1
    python benchmarks/bench_iteration.py --family flux2 --recipes --rollout_batch_size 4 --train_micro_batch_size 2
    python benchmarks/bench_iteration.py --double_blocks 2 --single_blocks 4 --attention_heads 12     # other blocks
    python benchmarks/bench_iteration.py --tiny --ablation                         # on a CPU
    python benchmarks/bench_iteration.py --tiny --save                             # and how long saving takes

From the first flag that isn't the benchmark's own on, flags go to the trainer. The defaults are the MixGRPO recipe
(720×720, G 12, T 25, window 4, k 3, one prompt), a reward that costs nothing, and two iterations a window, of
which the second is reported. `--family flux2` is all of FLUX.2-klein-base-4B, with its guidance. Useful operations are
counted once: what is recomputed, or fills up a batch, adds nothing. Prints tables and the versions; keep the output
under benchmarks/results/.
"""

import gc
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

from fastvideo.cli import FlagError, flag, flag_errors, parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS, NEGATIVE
from fastvideo.io.files import check_writable
from fastvideo.io.messages import is_first
from fastvideo.models.pretrained import family_of, meta_transformer
from fastvideo.train_grpo_flux import Trainer, set_up

import diffusers
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, FluxTransformer2DModel, ModelMixin
from PIL import Image
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from make_tiny_flux import build_tiny_flux, build_tiny_flux2  # noqa: E402


@dataclass
class BenchmarkConfig:
    """What to time."""

    family: str = flag("flux1", "architecture of the blocks", choices=("flux1", "flux2"))
    double_blocks: int | None = flag(None, "double-stream blocks (None: 4 of FLUX.1's 19; FLUX.2's 5)", at_least=1)
    single_blocks: int | None = flag(None, "single-stream blocks (None: 8 of FLUX.1's 38; FLUX.2's 20)", at_least=1)
    attention_heads: int = flag(24, "width of the blocks, in heads of 128 channels (both have 24)", at_least=1)
    tiny: bool = flag(False, "the tiny pipeline at 32x32 instead, for a CPU")
    windows: list[int] = flag([0, 10, 19], "where the window starts")
    ablation: bool = flag(False, "measure again with each optimisation switched off")
    fp8: bool = flag(False, "measure again with FP8 in untrained steps, and how far it moves velocities and latents")
    compare: bool = flag(False, "ablation, fp8 and scouting")
    sweep: bool = flag(False, "measure again with other numbers of pictures, steps, window steps and pixels")
    scouting: bool = flag(False, "measure again with samples from their own noise, and with --scouts 24 and 48")
    recipes: bool = flag(False, "measure again as LoRA, without guidance, and with larger pictures")
    profile: bool = flag(False, "milliseconds of GPU kernels by phase and kind, at the first window")
    save: bool = flag(False, "save a checkpoint, and print how long training waits for it and when it is whole")
    folder: str | None = flag(None, "where the inputs go (None: a temporary folder)")
    json_file: str | None = flag(None, "write all numbers there too")

    def __post_init__(self) -> None:
        double, single = {"flux1": (4, 8), "flux2": (5, 20)}[self.family]
        self.double_blocks, self.single_blocks = self.double_blocks or double, self.single_blocks or single


# Switched off one at a time, from the fastest setting; the last is all of them, one picture at a time.
OFF = {
    "compile": ["--compile", "false"],
    "cuDNN's attention in training": ["--cudnn_attention", "rollout"],
    "cuDNN's attention": ["--cudnn_attention", "never"],
    "FSDP2's parameters kept whole": ["--rollout_keep_gathered", "false"],
    "shared prefix": ["--no_share_prefix"],
    "batches": ["--rollout_batch_size", "1", "--train_micro_batch_size", "1"],
}
OFF["all of these"] = [flag for flags in list(OFF.values()) for flag in flags]

# The rollout's drift is measured in the first iteration of each window, which isn't timed.
PRECISION = "fp8" if torch.cuda.is_available() else "fp8_emulated"
FP8 = {"with fp8": ["--rollout_precision", PRECISION, "--rollout_drift_steps", "2"]}

# One thing larger or smaller than in the recipe.
SWEEP = {
    "G 6": ["--num_generations", "6"],
    "G 24": ["--num_generations", "24"],
    "T 15": ["--sampling_steps", "15"],
    "T 50": ["--sampling_steps", "50"],
    "window of 2": ["--group_size", "2"],
    "window of 8": ["--group_size", "8"],
    "512x512": ["--h", "512", "--w", "512"],
    "1024x1024": ["--h", "1024", "--w", "1024"],
}

# The published configurations of FLUX.1-dev and FLUX.2-klein-base-4B. AutoencoderKLFlux2's defaults are FLUX.2's.
TRANSFORMERS = {
    "flux1": (FluxTransformer2DModel, {"attention_head_dim": 128, "guidance_embeds": True}),
    "flux2": (
        Flux2Transformer2DModel,
        {"attention_head_dim": 128, "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 3 * 2560},
    ),
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Scouting needs samples with their own initial noise, which share no prefix.
OWN_NOISE = ["--no_init_same_noise"]
SCOUTING = {"own initial noise": OWN_NOISE} | {
    f"{scouts} scouts": [*OWN_NOISE, "--scouts", str(scouts)] for scouts in (24, 48)
}


def recipes(tiny: bool) -> dict[str, list[str]]:
    """All weights or adapters, with guidance or without, and pictures of 1024×1024 pixels (48×48 of the tiny model)."""
    side = "48" if tiny else "1024"
    larger = ["--h", side, "--w", side]
    lora = "--use_lora --lora_rank 128 --lora_alpha 128 --learning_rate 3e-4".split()
    return {
        f"{side}x{side}": larger,
        "guidance 1": ["--guidance_scale", "1"],
        "LoRA": lora,
        f"LoRA, {side}x{side}": [*lora, *larger],
        "LoRA, guidance 1": [*lora, "--guidance_scale", "1"],
    }


PHASES = ("scout", "rollout", "decode", "reward", "train", "total")
# What a GPU kernel does, by the first of these that its name contains.
KERNELS = {
    "compiled, elementwise": "triton",
    "attention": "fmha|flash|sdpa",
    "convolutions": "conv|fprop|winograd",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk",
    "optimizer, clipping": "adam|multi_tensor|lpnorm",
    "copies and casts": "copy|memcpy|memset|cat|elementwise|fill",
    "communication": "nccl",
    "others": "",
}


def full_size(config: BenchmarkConfig) -> ModelMixin:
    """The transformer of the family with the wanted blocks, on the meta device."""
    cls, published = TRANSFORMERS[config.family]
    size = {"num_layers": config.double_blocks, "num_single_layers": config.single_blocks}
    with torch.device("meta"):
        return cls(**size, **published, num_attention_heads=config.attention_heads)


def make_inputs(folder: Path, config: BenchmarkConfig) -> None:
    """A transformer's config.json (see --init_random_flux), a random VAE and one prompt's embeddings under `folder`."""
    torch.manual_seed(0)
    flux2 = config.family == "flux2"
    if config.tiny:
        (build_tiny_flux2 if flux2 else build_tiny_flux)(folder)
    else:
        full_size(config).save_config(folder / "transformer")
        vae = AutoencoderKLFlux2() if flux2 else AutoencoderKL(**VAE)
        vae.save_pretrained(folder / "vae")
        pipeline = "Flux2KleinPipeline" if flux2 else "FluxPipeline"
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    transformer = meta_transformer(str(folder))
    text, widths = 32 if config.tiny else 512, family_of(str(folder)).widths(transformer)
    shapes = {"prompt_embed": (text, widths["prompt_embeds"]), "text_ids": (text, widths["text_ids"])}
    if "pooled_prompt_embeds" in widths:
        shapes["pooled_prompt_embeds"] = (widths["pooled_prompt_embeds"],)
    for name, shape in shapes.items():
        (folder / name).mkdir(exist_ok=True)
        torch.save(torch.zeros(shape) if name == "text_ids" else torch.randn(shape), folder / name / "0.pt")
    # As many entries as there may be ranks: an epoch has to hold an iteration.
    entry = {key: "0.pt" for key, name in FOLDERS.items() if name in shapes} | {"caption": "a benchmark"}
    entry |= {NEGATIVE: "0.pt"} if flux2 else {}
    (folder / "prompt.json").write_text(json.dumps([entry] * 64))


def free(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """A reward that costs nothing: one value of a pixel."""
    return [float(image.getpixel((0, 0))[0]) for image in images]


def measure(folder: Path, config: BenchmarkConfig, flags: list[str]) -> list[dict]:
    """Metrics of the second iteration at each window position, and the first one's rollout drift."""
    torch._dynamo.reset()  # its graphs would keep the last variant's weights
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    size = "--h 32 --w 32 --mixed_precision no" if config.tiny else "--init_random_flux"
    training = parse_dataclass(
        GRPOConfig,
        f"--pretrained_model_name_or_path {folder} --data_json_path {folder}/prompt.json "
        f"--output_dir {folder}/out --reward_model bench_iteration:free --dataloader_num_workers 0 {size}".split()
        + flags,
    )
    trainer, sampler, loader = set_up(training)
    end = training.sampling_steps - 2
    starts = [start for start in config.windows if 0 <= start < end]  # a sweep may have fewer steps
    if not starts:
        raise FlagError("windows", config.windows, f"choose from 0 to {end - 1}")
    windows = [list(range(start, min(start + training.group_size, end))) for start in starts for _ in range(2)]
    lines = []
    for window, batch in zip(windows, loader, strict=False):
        gc.collect()  # compilation leaves so much that a collection inside the iteration would take half a second
        lines.append(trainer.iteration(batch, window)[0])
    if training.rollout_precision != "bf16":
        errors = velocity_errors(trainer, batch)
        if trainer.accelerator.is_main_process:
            print(errors)
    if config.profile:
        with torch.profiler.profile() as profiler:
            trainer.iteration(next(iter(loader)), windows[0])
        if trainer.accelerator.is_main_process:
            show_profile(profiler, lines[1])
    if config.save:
        start = time.perf_counter()
        trainer.save(sampler)
        waited = time.perf_counter() - start
        trainer.writer.finish()
        whole = time.perf_counter() - start
        if trainer.accelerator.is_main_process:
            size = sum(path.stat().st_size for path in Path(training.output_dir, "latest").rglob("*")) / 1e9
            print(f"a checkpoint of {size:.3g} GB: training waits {waited:.3g} s, it is whole after {whole:.3g} s")
            shutil.rmtree(training.output_dir)  # for the next variant
    drifts = ({k: v for k, v in line.items() if k.startswith("rollout_drift")} for line in lines[::2])
    return [line | drift for line, drift in zip(lines[1::2], drifts, strict=True)]


@torch.no_grad()
def velocity_errors(trainer: Trainer, batch: dict) -> str:
    """Relative difference of velocities with and without FP8 at 5 noise levels, and the time that the copies take."""
    conditioning, engine = trainer.conditioning(batch), trainer.engine
    device = trainer.accelerator.device
    shape = (trainer.config.num_generations, trainer.shape.tokens, trainer.shape.channels)
    latents = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    levels, first = (0.99, 0.9, 0.7, 0.4, 0.1), torch.zeros(len(latents), dtype=torch.long, device=device)
    found = []
    with engine.sampling_model() as model:
        plain = trainer.velocity_of(model, conditioning, training=False)
        for velocity in (plain, engine.in_float8(plain)):
            found.append([velocity(latents, torch.full_like(latents[:, 0, 0], level), first) for level in levels])
        times = []
        for _ in range(2):
            engine.float8.drop()
            trainer.throughput.begin()
            with trainer.throughput.phase("copies"):
                engine.take_float8()
            times.append(trainer.throughput.seconds["seconds_copies"])
    moved = {level: float((a - b).norm() / b.norm()) for level, b, a in zip(levels, *found, strict=True)}
    if not min(moved.values()) > 0:
        raise SystemExit("bench_iteration.py: FP8 moves no velocity, so it has no effect: nothing is measured")
    errors = [f"{error:.2%} at {level}" for level, error in moved.items()]
    return f"FP8 moves the velocity of {len(latents)} rows by {', '.join(errors)}; copies take {times[-1] * 1e3:.1f} ms"


def show_profile(profiler: torch.profiler.profile, seconds: dict[str, float]) -> None:
    """Milliseconds of GPU kernels by phase and kind, and the longest of them.

    seconds: by phase, of such an iteration without the profiler, which slows the CPU. What the kernels don't take of it
    the GPU waits.
    """
    events = profiler.events()
    phases = {e.name: e.time_range for e in events if e.device_type == DeviceType.CPU and e.name in PHASES}
    table = {phase: dict.fromkeys(KERNELS, 0.0) for phase in phases}
    longest: dict[tuple[str, str], list[float]] = {}
    for kernel in events:
        if kernel.device_type == DeviceType.CUDA and not kernel.is_user_annotation:
            # A phase ends with a wait for its kernels.
            begin, milliseconds = kernel.time_range.start, kernel.time_range.elapsed_us() / 1e3
            phase = next((name for name, span in phases.items() if span.start <= begin < span.end), None)
            kind = next(kind for kind, names in KERNELS.items() if re.search(names, kernel.name.lower()))
            if phase:
                table[phase][kind] += milliseconds
                longest.setdefault((phase, kernel.name), []).append(milliseconds)
    for phase, row in table.items():
        row["waiting"] = 1e3 * seconds[f"seconds_{phase}"] - sum(row.values())
    print("\nms of GPU kernels     " + "".join(f"{phase:>10}" for phase in table))
    for kind in [*KERNELS, "waiting"]:
        print(f"{kind:22}" + "".join(f"{row[kind]:10.1f}" for row in table.values()))
    for (phase, name), times in sorted(longest.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"{sum(times):9.1f} ms {len(times):6d} x  {phase:8} {name[:110]}")


def show(title: str, lines: list[dict]) -> None:
    phases = [phase for phase in PHASES if f"seconds_{phase}" in lines[0]]
    print(f"\n{title}\nwindow  " + "".join(f"{phase:>9}" for phase in phases) + "     NFE  TFLOP/s (share of peak)")
    for line in lines:
        seconds = "".join(f"{line[f'seconds_{phase}']:9.2f}" for phase in phases)
        rates = "  ".join(
            f"{phase} {line[f'tflops_{phase}']:.3g} ({line[f'peak_share_{phase}']:.0%})"
            for phase in ("prefix", "rollout", "train")
            if f"tflops_{phase}" in line
        )
        window = f"{line['window'][0]:2d}-{line['window'][-1]:<5d}" if line["window"] else "none    "
        drift = "".join(f"  {k} {v:.2%}" for k, v in line.items() if k.startswith("rollout_drift"))
        ratio = f"ratio-1 {line['ratio_first_deviation']:.1e}"
        print(f"{window}{seconds}{line['nfe']:8d}  {rates}  {ratio}{drift}")
    means = "".join(f"{sum(line[f'seconds_{phase}'] for line in lines) / len(lines):9.2f}" for phase in phases)
    memory = f"     peak memory {max(line['gib_peak'] for line in lines):.1f} GiB" if "gib_peak" in lines[0] else ""
    print(f"mean    {means}{memory}", flush=True)


def compare(results: dict[str, list[dict]]) -> None:
    """Seconds per iteration of all variants in one table."""
    starts = [f"window at {(line['window'] or ['none'])[0]}" for line in next(iter(results.values()))]
    print(f"\n| seconds per iteration | {' | '.join(starts)} | mean | share of all on | peak memory |")
    print(f"|---{'|---' * len(starts)}|---|---|---|")
    means = {name: sum(line["seconds_total"] for line in lines) / len(lines) for name, lines in results.items()}
    for name, lines in results.items():
        seconds = [f"{line['seconds_total']:.2f}" for line in lines]
        seconds += [""] * (len(starts) - len(seconds))  # a sweep may have fewer steps
        memory = f"{max(line['gib_peak'] for line in lines):.1f} GiB" if "gib_peak" in lines[0] else ""
        share = f"{means[name] / means['all on']:.0%}" if len(lines) == len(starts) else ""
        print(f"| {name} | {' | '.join(seconds)} | {means[name]:.2f} | {share} | {memory} |")


@flag_errors("bench_iteration.py")
def main() -> None:
    argv = sys.argv[1:]
    own = {f"--{f.name}" for f in fields(BenchmarkConfig)} | {"--help"}
    split = next((i for i, word in enumerate(argv) if word.startswith("--") and word not in own), len(argv))
    config, flags = parse_dataclass(BenchmarkConfig, argv[:split], __doc__), argv[split:]
    if config.folder:
        check_writable("folder", config.folder)
    if config.json_file:
        check_writable("json_file", config.json_file, file=True)
    main_process = is_first()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary)
        if main_process:
            folder.mkdir(parents=True, exist_ok=True)
            make_inputs(folder, config)
        while not (folder / "prompt.json").exists():  # several processes share --folder
            time.sleep(0.1)
        variants = {"all on": []}
        if config.ablation or config.compare:  # FSDP2's parameters are whole with FSDP2 alone
            variants |= {f"without {k}": v for k, v in OFF.items() if "fsdp" in flags or not k.startswith("FSDP2")}
        variants |= FP8 if config.fp8 or config.compare else {}
        variants |= SCOUTING if config.scouting or config.compare else {}
        variants |= SWEEP if config.sweep else {}
        variants |= recipes(config.tiny) if config.recipes else {}
        results = {}
        for name, changed in variants.items():
            results[name] = measure(folder, config, flags + changed)
            gc.collect()
            if main_process:
                show(f"{name}: {' '.join(flags + changed)}", results[name])
    if main_process and len(results) > 1:
        compare(results)
    if main_process:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
        size = f"{config.double_blocks}+{config.single_blocks} blocks of {config.attention_heads} heads"
        print(f"\n{gpu}; {versions}; {config.family}, {'tiny' if config.tiny else size}")
        if config.json_file:
            Path(config.json_file).write_text(json.dumps({"gpu": gpu, "versions": versions, "runs": results}))


if __name__ == "__main__":
    main()

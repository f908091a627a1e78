r"""How far samples spread when the window of stochastic steps lies early or late.

    python benchmarks/window_spread.py --pretrained_model_name_or_path data/flux --windows 0 4 8 12 16 20

Draws the picture of Figure 2 in MixGRPO (arXiv 2507.21802). All samples of a prompt start from the same noise and take
the steps of a MixGRPO iteration, with the window at one of several places. One panel per prompt shows the final latents
on the first two principal components of all samples of the prompt. The last panel shows, by the window's first step,
the mean distance of samples with the same window (root mean square over the elements). The numbers go into a JSON file
beside the picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, flag, flag_errors, parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.dataset.latent_flux_rl_datasets import TENSORS
from fastvideo.eval.plots import INK, SERIES, STYLE, save
from fastvideo.io.files import check_writable, write_json, writing
from fastvideo.io.prompts import FORMATS, read_prompts
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.pretrained import family_of, load_text_encoders, load_transformer, meta_vae
from fastvideo.rollout_plan import make_plan
from fastvideo.runtime.evaluation import noise_free_plan
from fastvideo.sample.sample_flux import load_tuned
from fastvideo.train_grpo_flux import rollout
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import Noise

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure


def as_in_training(name: str) -> Any:
    """The field of this name in GRPOConfig, with its default."""
    (found,) = (f for f in fields(GRPOConfig) if f.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass
class SpreadConfig:
    pretrained_model_name_or_path: str = flag("data/flux", "diffusers FLUX pipeline: a folder or a hub id")
    model_path: str | None = flag(None, "tuned transformer or LoRA adapters; None: the pipeline's own")
    prompts_file: str = flag("data/prompts.txt", f"prompts: {FORMATS}; the first ones are used")
    prompt_column: str | None = as_in_training("prompt_column")
    prompts: int = flag(3, "how many prompts")
    windows: list[int] = flag([0, 4, 8, 12, 16, 20], "first steps of the windows", metavar="STEP")
    samples: int = flag(24, "samples per prompt and window")
    group_size: int = as_in_training("group_size")
    sampling_steps: int = as_in_training("sampling_steps")
    eta: float = as_in_training("eta")
    shift: float = as_in_training("shift")
    guidance_scale: float = as_in_training("guidance_scale")
    h: int = as_in_training("h")
    w: int = as_in_training("w")
    seed: int = flag(714, "seed of all noise")
    batch_size: int = flag(12, "rows per forward pass; changes speed and memory only")
    output: str = flag(
        "outputs/window_spread.png", "picture to write, by its suffix PNG, SVG or PDF; a JSON file beside it"
    )

    def __post_init__(self) -> None:
        for name in ("prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise FlagError(name, getattr(self, name), "must be at least 1")
        if self.samples < 2:
            raise FlagError("samples", self.samples, "a distance needs 2")
        last = self.sampling_steps - 1 - self.group_size  # the step to σ = 0 can't be stochastic
        if Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise FlagError("output", self.output, "name a .png, .svg or .pdf file")
        if not self.windows or not all(0 <= start <= last for start in self.windows):
            raise FlagError("windows", self.windows, f"choose from 0 to {last}")

    def training(self) -> GRPOConfig:
        """The settings of a MixGRPO iteration with `samples` pictures per prompt."""
        shared = "sampling_steps group_size eta shift seed h w guidance_scale prompts_file".split()
        own = {"num_generations": self.samples, "gradient_accumulation_steps": 1}
        return GRPOConfig.create(**{name: getattr(self, name) for name in shared}, **own)


def principal_components(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of N vectors [N, D].

    Returns the coordinates on the first two components, [N, 2], and the share of the variance of every component.
    """
    u, s, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    return u[:, :2] * s[:2], s**2 / (s**2).sum()


def sample_windows(config: SpreadConfig) -> tuple[list[str], dict[int, torch.Tensor], torch.Tensor]:
    """Samples P prompts.

    Returns the prompts, the final latents [P, samples, elements] by window start, and the final latents [P, elements]
    of a rollout without stochastic steps.
    """
    training = config.training()
    prompts = read_prompts(config.prompts_file, "prompts_file", config.prompt_column).prompts[: config.prompts]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = config.pretrained_model_name_or_path
    family = family_of(base)
    embeds = family.encode_prompts(load_text_encoders(base, dtype).to(device), [*prompts, ""])
    shape = LatentShape.of(meta_vae(base), config.h, config.w)
    model = load_tuned(base, config.model_path, dtype) if config.model_path else load_transformer(base, dtype)
    model = model.to(device).eval()
    *given, text_ids = (embeds[name].float() if name in embeds else None for name in TENSORS)
    negative, given = given[0][-1], [None if x is None else x[:-1] for x in given]
    ids = (text_ids, family.image_ids(shape, device))
    conditioning = Conditioning(*given, *ids, config.guidance_scale, negative_prompt_embeds=negative)

    def velocity(*rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
            parts = zip(*(x.split(config.batch_size) for x in rows), strict=True)
            return torch.cat([family.velocity(model, *x, conditioning) for x in parts])

    # All windows share the initial noise, and the noise of each step.
    noise = Noise(config.seed, 0, range(len(prompts)), shape, device)

    def sample(plan: Plan) -> torch.Tensor:
        latents = rollout(plan, noise(0, 1), len(prompts), velocity, noise).latents.flatten(1)
        return latents.unflatten(0, (len(prompts), -1)).cpu()

    windows = {
        start: sample(make_plan(training, range(start, start + config.group_size))) for start in sorted(config.windows)
    }
    return prompts, windows, sample(noise_free_plan(training.sampling_steps, training.shift))[:, 0]


@flag_errors("window_spread.py")
def main(argv: Sequence[str] | None = None) -> dict:
    """The command line; returns what the JSON file holds."""
    config = parse_dataclass(SpreadConfig, argv, __doc__)
    check_writable("output", config.output, file=True)
    prompts, windows, plain = sample_windows(config)
    found = {"windows": list(windows), "group_size": config.group_size, "prompts": []}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * (len(prompts) + 1), 3.4), layout="constrained")
        axes = figure.subplots(1, len(prompts) + 1)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(windows)))
        for p, (prompt, ax) in enumerate(zip(prompts, axes[:-1], strict=True)):
            samples = [values[p] for values in windows.values()]
            points, shares = principal_components(torch.cat([*samples, plain[p : p + 1]]))
            distances = [float(torch.pdist(x).mean()) / x.shape[1] ** 0.5 for x in samples]
            for part, start, colour in zip(points[:-1].split(config.samples), windows, colours, strict=True):
                ax.scatter(*part.T.numpy(), s=14, color=colour, label=f"steps {start}–{start + config.group_size - 1}")
            ax.scatter(*points[-1].numpy(), s=90, marker="*", color=INK, label="no noise")
            ax.set(title=prompt if len(prompt) <= 40 else prompt[:39] + "…")
            ax.set_xlabel(f"component 1 ({shares[0]:.0%} of the variance)")
            ax.set_ylabel(f"component 2 ({shares[1]:.0%})")
            axes[-1].plot(list(windows), distances, marker="o", color=SERIES[p % len(SERIES)], label=f"prompt {p + 1}")
            numbers = {"points": points.tolist(), "variance_shares": shares[:2].tolist(), "mean_distance": distances}
            found["prompts"].append({"prompt": prompt, **numbers})
        axes[-1].set(title="mean distance within a window", xlabel="first step of the window")
        axes[-1].set_ylim(bottom=0)
        axes[-1].legend()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(axes))
    with writing("output", config.output, file=True):
        save(figure, config.output)
        write_json(Path(config.output).with_suffix(".json"), found)
    print(json.dumps({"windows": found["windows"], "mean_distance": [p["mean_distance"] for p in found["prompts"]]}))
    print(config.output)
    return found


if __name__ == "__main__":
    main()

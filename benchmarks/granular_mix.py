"""Which component leads a granular reward's advantage, with --granular_mix raw and with advantage, on the tiny FLUX.

    python benchmarks/granular_mix.py

Samples groups from data/tiny_flux and scores them with the components of the `shapes` reward, stretched to the scales
of the real scorers: two cosines (0.2 + 0.1 x) and an aesthetic score (4 + 3 x). Prints, for both mixes and for the
weights at the start and at the end of training, the correlation of the advantage with each component's own advantage.
"""

import json
import tempfile
from pathlib import Path

from fastvideo.models.reward_model.shapes import ShapesRewardModel
from fastvideo.sample.sample_flux import SampleConfig, sample
from fastvideo.utils.advantages import group_advantages, mix_advantages

import numpy as np
from PIL import Image

PROMPTS, GROUP = 20, 12
STRETCH = {"color": (0.2, 0.1), "clean": (0.2, 0.1), "form": (4.0, 3.0)}  # as BLIP, CLIP and Aesthetic
WEIGHTS = {"start": (0.5, 0.3, 0.2), "end": (0.2, 0.5, 0.3)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(Path("data/prompts.txt").read_text().splitlines()[:PROMPTS]))
        manifest = sample(
            SampleConfig(
                pretrained_model_name_or_path="data/tiny_flux",
                prompts_file=str(prompts),
                output_dir=folder,
                images_per_prompt=GROUP,
                batch_size=GROUP,
                h=32,
                w=32,
                total_sampling_steps=10,
                shift=3.0,
            )
        )
        entries = json.loads(manifest.read_text())
        images = [Image.open(Path(folder) / entry["image"]) for entry in entries]
        found = ShapesRewardModel((1, 1, 1), (1, 1, 1)).score_components(images, [entry["prompt"] for entry in entries])
    scores = {name: base + scale * found[name].reshape(-1, GROUP) for name, (base, scale) in STRETCH.items()}
    own = {name: group_advantages(values)[0] for name, values in scores.items()}
    spread = ", ".join(f"{name} {values.std(axis=1, ddof=1).mean():.4f}" for name, values in scores.items())
    print(f"{len(entries)} pictures of {len(entries) // GROUP} prompts; mean standard deviation in a group: {spread}")
    print(f"{'--granular_mix':<16}{'weights':<9}" + "".join(f"{name:>9}" for name in STRETCH))
    for mix in ("raw", "advantage"):
        for moment, weights in WEIGHTS.items():
            parts = dict(zip(STRETCH, weights, strict=True))
            if mix == "raw":
                total, _ = mix_advantages(scores, parts, "reward_aggr", True, 0.0)
            else:
                total, _ = mix_advantages(scores, parts, "advantage_aggr", True, 0.0)
            correlations = (np.corrcoef(total.ravel(), own[name].ravel())[0, 1] for name in STRETCH)
            print(f"{mix:<16}{moment:<9}" + "".join(f"{value:9.2f}" for value in correlations))


if __name__ == "__main__":
    main()

"""Reward hacking on the tiny FLUX, shown and caught: what training on a part of the reward alone does to pictures.

    python benchmarks/reward_hacking.py --output_dir outputs/hacking --jobs 16       (on one GPU)

Trains on the whole reward (the healthy run), on one of its parts alone and on the size of JPEG files, each with the
losses of compare_algorithms.py that `--losses` names. Prints the parts and the share right in everything on the
withheld scenes, and the signs of reward hacking that fastvideo.eval.eval_reward finds in them; draws pictures.png, the
first withheld scenes in the same noise. Finished runs in the folder are kept; keep the output under
benchmarks/results/.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from tiny_world import TEST_PROMPTS, Run, base, lines, machine, run_all  # isort: skip  (first: it finds other scripts)
from compare_algorithms import LOSSES  # isort: skip

from fastvideo.cli import flag, flag_errors, parse_dataclass
from fastvideo.eval import eval_reward

import numpy as np
from PIL import Image

PART = "--granular_start_weights {0} --granular_end_weights {0}"
REWARDS = {  # what is trained on -> (flags, what eval_reward is told was trained on)
    "healthy": ("", "shapes"),
    "clean": (PART.format("0 0 1"), "shapes"),
    "jpeg": ("--reward_model jpeg_compressibility", "jpeg_compressibility"),
}
PARTS = ("right", "binding", "form", "clean")


@dataclass
class HackingConfig:
    """What to run."""

    output_dir: str = flag("outputs/hacking", "folder for the results")
    losses: list[str] = flag(["mix_grpo", "kl_0.1", "kl_1"], "losses to train with", choices=list(LOSSES))
    rates: list[float] = flag([2e-4], "learning rate of each loss, or one for all")
    seeds: list[int] = flag([714, 1, 2], "training seeds")
    iterations: int = flag(40, "training iterations, 288 pictures each", at_least=1)
    jobs: int = flag(1, "runs at a time", at_least=1)


def plan_runs(config: HackingConfig) -> dict[str, tuple[str, Run]]:
    """{name: (what is trained on, run)}."""
    rates = config.rates * len(config.losses) if len(config.rates) == 1 else config.rates
    every, runs = max(1, config.iterations // 4), {}
    for reward, (flags, _) in REWARDS.items():
        for loss, rate in zip(config.losses, rates, strict=True):
            for seed in config.seeds:
                name = f"hack {reward}, {loss}-s{seed}"
                given = f"{LOSSES[loss]} {flags} --learning_rate {rate} --seed {seed}".split()
                runs[name] = (reward, Run(name, tuple(given), config.iterations, every, keep_pictures=True))
    return runs


def write_manifest(pictures: np.ndarray, folder: Path) -> Path:
    """Pictures of the withheld scenes as sample_flux.py leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = lines(TEST_PROMPTS)
    entries = []
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:05d}.png")
        entries.append({"index": index, "image": f"{index:05d}.png", "prompt": prompts[index % len(prompts)]})
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder / "manifest.json"


def find_signs(name: str, trained: str, output: Path) -> list[str]:
    """What eval_reward finds in a run's pictures, paired with the base model's."""
    manifests = [write_manifest(np.load(output / f"{run}.npy"), output / "pictures" / run) for run in (name, "base")]
    command = ["--manifest", manifests[0], "--baseline_manifest", manifests[1], "--trained_rewards", trained]
    command += [
        "--reward_model_type",
        "shapes,jpeg_compressibility",
        "--output_json",
        output / "pictures" / f"{name}.json",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        eval_reward.main([*map(str, command), "--device", "cpu"])
    return json.loads((output / "pictures" / f"{name}_summary.json").read_text())["signs"]


def draw(rows: dict[str, np.ndarray], path: Path, count: int = 10) -> None:
    """A row of pictures of the first withheld scenes for each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), count, figsize=(count * 1.1, len(rows) * 1.2), layout="constrained")
    for panels, (label, pictures) in zip(axes, rows.items(), strict=True):
        for panel, picture in zip(panels, pictures, strict=False):
            panel.imshow(picture, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        panels[0].set_ylabel(label, fontsize=9)
    figure.savefig(path, dpi=110)


@flag_errors("reward_hacking.py")
def main() -> None:
    config = parse_dataclass(HackingConfig, None, __doc__)
    output = Path(config.output_dir)
    runs = plan_runs(config)
    before = base(output)
    found = run_all([run for _, run in runs.values()], output, config.jobs)
    print(f"# {machine()}, {config.jobs} runs at a time; withheld scenes, {config.iterations} iterations")
    print(f"| trained on, loss, seed | right in everything | binding | form | clean | signs |\n{'|---' * 6}|")
    print(f"| base model | {' | '.join(f'{before[part]:.3f}' for part in PARTS)} | |")
    for name, (reward, _) in runs.items():
        last = found[name]["points"][-1]
        signs = find_signs(name, REWARDS[reward][1], output)
        texts = "; ".join(sign.split(" (95 %")[0] for sign in signs) or "none"
        print(f"| {name.removeprefix('hack ')} | {' | '.join(f'{last[part]:.3f}' for part in PARTS)} | {texts} |")
    seed = config.seeds[0]
    shown = {"base model": "base"}
    shown |= {f"{r}, {loss}": f"hack {r}, {loss}-s{seed}" for r in REWARDS for loss in config.losses}
    draw({label: np.load(output / f"{name}.npy") for label, name in shown.items()}, output / "pictures.png")


if __name__ == "__main__":
    main()

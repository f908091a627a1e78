"""Held-out reward over training on the tiny FLUX: does it learn, on several seeds, and not from shuffled rewards?

    python benchmarks/learning_curves.py --output_dir outputs/learning --jobs 2

Trains scripts/finetune/finetune_tiny_flux.sh for each run and seed, samples a checkpoint every 15 iterations on
data/prompts_test.txt with the base model's seeds, and prints the paired changes with standard errors clustered by
prompt. Writes curves.json and curves.png to the folder; finished runs found there are kept. Keep the output under
benchmarks/results/.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fastvideo.config import flag, parse_dataclass

import diffusers
import torch

ROOT = Path(__file__).parents[1]
MODEL, TEST_PROMPTS = ROOT / "data/tiny_flux", ROOT / "data/prompts_test.txt"
JPEG_FLAGS = "--lr_scheduler constant --train_batch_size 6 --train_micro_batch_size 18 --learning_rate 5e-5".split()
# Run -> (held-out score that it should raise, more flags for the recipe). Shuffled rewards live with the tests.
RUNS = {
    "granular": ("ShapesRewardModel", []),
    "granular, shuffled": ("ShapesRewardModel", ["--reward_model", "custom_rewards:shuffled_shapes"]),
    "jpeg": ("JpegCompressibilityRewardModel", ["--reward_model", "jpeg_compressibility", *JPEG_FLAGS]),
    "jpeg, shuffled": (
        "JpegCompressibilityRewardModel",
        ["--reward_model", "custom_rewards:shuffled_jpeg", *JPEG_FLAGS],
    ),
}


@dataclass
class CurvesConfig:
    """What to run."""

    output_dir: str = flag("outputs/learning", "folder for runs, pictures and the curves")
    runs: list[str] = flag([*RUNS], f"which of {', '.join(map(repr, RUNS))}", nargs="+")
    seeds: list[int] = flag([714, 1, 2], "training seeds", nargs="+")
    iterations: int = flag(75, "training iterations")
    every: int = flag(15, "iterations between measurements")
    images_per_prompt: int = flag(2, "held-out pictures a prompt")
    jobs: int = flag(1, "runs at a time, which share the cores")


def call(config: CurvesConfig, log: Path, *command: object) -> None:
    """A child process with its share of the cores; what it prints goes to `log`."""
    threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    ours = {"PYTHON_BIN": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run([*map(str, command)], check=True, stdout=file, stderr=file, env=os.environ | ours)


def sample(config: CurvesConfig, folder: Path, log: Path, *weights: object) -> Path:
    """Pictures of the held-out prompts; returns their manifest."""
    settings = "--seed 42 --batch_size 64 --h 32 --w 32 --total_sampling_steps 10".split()
    where = ["--pretrained_model_name_or_path", MODEL, "--prompts_file", TEST_PROMPTS, "--output_dir", folder]
    count = ["--images_per_prompt", config.images_per_prompt]
    call(config, log, sys.executable, "-m", "fastvideo.sample.sample_flux", *where, *settings, *count, *weights)
    return folder / "manifest.json"


def run(config: CurvesConfig, name: str, seed: int) -> dict[str, dict]:
    """{iteration: {score: paired change and its standard error}} of one training run."""
    folder = Path(config.output_dir) / f"{name.replace(', ', '_')}-{seed}"
    result, log = folder / "changes.json", Path(config.output_dir) / f"{folder.name}.log"
    if result.exists():
        return json.loads(result.read_text())
    steps = ["--max_train_steps", config.iterations, "--checkpointing_steps", config.every, "--seed", seed]
    embeddings = Path(config.output_dir) / "embeddings/prompt.json"
    where = ["--data_json_path", embeddings, "--output_dir", folder / "run"]
    call(config, log, "bash", ROOT / "scripts/finetune/finetune_tiny_flux.sh", *where, *steps, *RUNS[name][1])
    changes = {}
    for done in range(config.every, config.iterations + 1, config.every):
        checkpoint = next((folder / "run").glob(f"checkpoint-{done}-*"))
        manifest = sample(config, folder / f"pictures-{done}", log, "--model_path", checkpoint)
        scores = folder / f"scores-{done}.json"
        compare = ["--manifest", manifest, "--baseline_manifest", Path(config.output_dir) / "base/manifest.json"]
        rewards = ["--reward_model_type", "shapes,jpeg_compressibility", "--output_json", scores, "--device", "cpu"]
        call(config, log, sys.executable, "-m", "fastvideo.eval.eval_reward", *compare, *rewards)
        models = json.loads(scores.with_name(f"{scores.stem}_summary.json").read_text())["models"]
        changes[str(done)] = {k: [m["difference_mean"], m["difference_standard_error"]] for k, m in models.items()}
    result.write_text(json.dumps(changes))
    return changes


def draw(curves: dict[str, dict], path: Path) -> None:
    """Two panels, granular and jpeg: a line a seed with its standard error, shuffled rewards dashed."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for key, changes in curves.items():
        name, seed = key.rsplit("-", 1)
        score, shuffled = RUNS[name][0], "shuffled" in name
        panel = panels[int("jpeg" in name)]
        points = [(0, 0.0, 0.0), *((int(done), *values[score]) for done, values in changes.items())]
        steps, means, errors = zip(*points, strict=True)
        label = f"{'rewards shuffled, ' if shuffled else ''}seed {seed}"
        panel.errorbar(steps, means, errors, label=label, ls="--" if shuffled else "-", lw=1.4, capsize=2)
        panel.set(title=f"{score}: held-out change", xlabel="iteration")
        panel.axhline(0, color="0.6", lw=0.8)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    config = parse_dataclass(CurvesConfig, None, __doc__)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    embed = ["--model_path", MODEL, "--prompt_dir", ROOT / "data/prompts.txt", "--output_dir", output / "embeddings"]
    call(
        config, output / "base.log", sys.executable, "-m", "fastvideo.data_preprocess.preprocess_flux_embedding", *embed
    )
    sample(config, output / "base", output / "base.log", "--baseline")
    pairs = list(product(config.runs, config.seeds))
    with ThreadPoolExecutor(config.jobs) as pool:
        results = list(pool.map(lambda pair: run(config, *pair), pairs))
    curves = {f"{name}-{seed}": changes for (name, seed), changes in zip(pairs, results, strict=True)}
    (output / "curves.json").write_text(json.dumps(curves))

    print(f"# {platform.machine()} CPU, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"# change of each score after {config.iterations} iterations, ± standard error, and their quotient")
    for key, changes in curves.items():
        last = changes[str(config.iterations)]
        cells = [f"{name} {mean:+.4f} ± {error:.4f} ({mean / error:+.1f})" for name, (mean, error) in last.items()]
        print("\n  ".join([key, *cells]))
    draw(curves, output / "curves.png")


if __name__ == "__main__":
    main()

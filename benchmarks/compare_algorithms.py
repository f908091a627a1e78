"""All algorithms on the tiny FLUX with the same number of training pictures: what does each learn, at which cost?

    python benchmarks/compare_algorithms.py --output_dir outputs/compare --jobs 2

Trains every algorithm on each seed until `--images` pictures are sampled and scored, samples some checkpoints on
data/prompts_test.txt with the base model's seeds, and prints the held-out change of the reward with its spread over
seeds beside pictures, evaluations, optimizer steps and seconds of training. Writes comparison.json and comparison.png,
the change against pictures, evaluations and seconds. Finished runs in the folder are kept. Seconds are those of the
fastest seed, since other work on the machine only adds to them. Keep the output under benchmarks/results/.
"""

import json
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fastvideo.config import GRPOConfig, flag, parse_dataclass
from fastvideo.rollout_plan import leaf_columns, make_plan, start_rows
from fastvideo.utils.grpo_states import windows

import diffusers
import numpy as np
import torch
from learning_curves import MODEL, ROOT, call, sample

# The same schedule for all; prompts an iteration such that each makes some 290 pictures in it, except in the trees: one
# optimizer step an iteration gets the 64 pictures that a step of the others has.
ALGORITHMS = {
    "mix_grpo": "--train_batch_size 24 --iters_per_group 10",
    "mix_grpo+cps": "--algorithm mix_grpo --sde_type cps --train_batch_size 24 --iters_per_group 10",
    "mix_grpo_flash": "--train_batch_size 24 --iters_per_group 10",
    "mix_grpo_flash_star": "--train_batch_size 24",
    "flow_grpo": "--train_batch_size 24",
    "flow_grpo_fast": "--algorithm flow_grpo --flow_grpo_fast_steps 2 --train_batch_size 24",
    "dance_grpo": "--train_batch_size 24 --gradient_accumulation_steps 3",
    "dance_grpo_lora": "--train_batch_size 24 --gradient_accumulation_steps 3 --learning_rate 3e-4",
    "grpo_merge": "--train_batch_size 5",
    # The merges that entropy gives grpo_merge; by entropy cps merges nothing.
    "grpo_merge+cps": "--algorithm grpo_merge --sde_type cps --train_batch_size 5 "
    "--eta_step_list 0,1,2,3,4 --eta_step_merge_list 1,1,2,2,2",
    "granular_grpo": "--train_batch_size 2",
    "branch_grpo": "--train_batch_size 4 --tree_split_points 0,2,4,6",
    "branch_grpo_mix": "--train_batch_size 4 --tree_split_points 0,2,4,6 --iters_per_group 40",
}
COMMON = (
    "--h 32 --w 32 --sampling_steps 10 --mixed_precision no --no_gradient_checkpointing --no_use_wandb "
    "--dataloader_num_workers 0 --train_micro_batch_size 72 --image_log_steps 0"
).split()
COSTS = {"images": "pictures", "nfe": "velocity evaluations", "seconds_total": "seconds of training"}


@dataclass
class ComparisonConfig:
    """What to run."""

    output_dir: str = flag("outputs/compare", "folder for runs, pictures and the comparison")
    algorithms: list[str] = flag(list(ALGORITHMS), "which to run")
    seeds: list[int] = flag([714, 1, 2], "training seeds")
    images: int = flag(8000, "pictures to sample and score in training")
    learning_rate: float = flag(1e-4, "of all algorithms but dance_grpo_lora, which has its own")
    reward: str = flag("shapes", "reward to train on")
    score: str = flag("ShapesRewardModel", "held-out score to report")
    points: int = flag(4, "measurements along a run")
    images_per_prompt: int = flag(2, "held-out pictures a prompt")
    jobs: int = flag(1, "runs at a time, one thread each")

    def __post_init__(self) -> None:
        unknown = set(self.algorithms) - set(ALGORITHMS)
        if unknown:
            raise ValueError(f"--algorithms {' '.join(sorted(unknown))}: choose from {', '.join(ALGORITHMS)}")


def training_flags(config: ComparisonConfig, name: str) -> list[str]:
    algorithm = [] if "--algorithm" in ALGORITHMS[name] else ["--algorithm", name]
    rate = ["--learning_rate", str(config.learning_rate), "--reward_model", config.reward]
    return [*COMMON, *rate, *algorithm, *ALGORITHMS[name].split()]


def run(config: ComparisonConfig, name: str, seed: int) -> list[dict[str, float]]:
    """Held-out change and cumulated costs at the measured checkpoints of one run."""
    output = Path(config.output_dir)
    folder, embeddings = output / f"{name}-{seed}", output / "embeddings/prompt.json"
    result, log = folder / "points.json", output / f"{folder.name}.log"
    if result.exists():
        return json.loads(result.read_text())
    flags = training_flags(config, name)
    settings = parse_dataclass(GRPOConfig, [*flags, "--data_json_path", str(embeddings)])
    plan = make_plan(settings, next(windows(settings)))
    pictures = settings.train_batch_size * max(c.stop for c in leaf_columns(plan, start_rows(settings)).values())
    every = max(1, round(config.images / pictures / config.points))
    steps = ["--max_train_steps", every * config.points, "--checkpointing_steps", every, "--seed", seed]
    where = ["--pretrained_model_name_or_path", MODEL, "--data_json_path", embeddings, "--output_dir", folder / "run"]
    call(config, log, sys.executable, "-m", "fastvideo.train_grpo_flux", *flags, *where, *steps)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    points = []
    for done in range(every, every * config.points + 1, every):
        checkpoint = next((folder / "run").glob(f"checkpoint-{done}-*"))
        manifest = sample(config, folder / f"pictures-{done}", log, "--model_path", checkpoint)
        scores = folder / f"scores-{done}.json"
        compare = ["--manifest", manifest, "--baseline_manifest", output / "base/manifest.json"]
        rewards = ["--reward_model_type", config.reward, "--output_json", scores, "--device", "cpu"]
        call(config, log, sys.executable, "-m", "fastvideo.eval.eval_reward", *compare, *rewards)
        change = json.loads(scores.with_name(f"{scores.stem}_summary.json").read_text())["models"][config.score]
        spent = {cost: sum(line[cost] for line in lines[:done]) for cost in (*COSTS, "optimizer_steps")}
        points.append({"change": change["difference_mean"], "error": change["difference_standard_error"], **spent})
    result.write_text(json.dumps(points))
    return points


def cost_of(seeds: list[list[dict]], cost: str) -> np.ndarray:
    """Of each measurement: the mean over seeds, of seconds the least."""
    values = np.array([[point[cost] for point in points] for points in seeds])
    return values.min(0) if cost == "seconds_total" else values.mean(0)


def draw(results: dict[str, list[list[dict]]], path: Path) -> None:
    """Change of the score against each cost: mean over seeds and, shaded, their standard deviation."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(COSTS), figsize=(14, 4.2), layout="constrained", sharey=True)
    for panel, (cost, label) in zip(panels, COSTS.items(), strict=True):
        for i, (name, seeds) in enumerate(results.items()):
            y = np.array([[point["change"] for point in points] for points in seeds])
            x, mean, spread = cost_of(seeds, cost), y.mean(0), y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]
            style = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}  # ten colours in the cycle
            panel.plot(np.r_[0, x], np.r_[0, mean], lw=1.4, label=name, **style)
            band = np.r_[0, mean - spread], np.r_[0, mean + spread]
            panel.fill_between(np.r_[0, x], *band, color=style["color"], lw=0, alpha=0.1)
        panel.axhline(0, color="0.6", lw=0.8)
        panel.set(xlabel=label)
        panel.locator_params(axis="x", nbins=5)
    panels[0].set(ylabel="held-out change of the reward")
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def main() -> None:
    config = parse_dataclass(ComparisonConfig, None, __doc__)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    embed = ["--model_path", MODEL, "--prompt_dir", ROOT / "data/prompts.txt", "--output_dir", output / "embeddings"]
    base_log = output / "base.log"
    call(config, base_log, sys.executable, "-m", "fastvideo.data_preprocess.preprocess_flux_embedding", *embed)
    sample(config, output / "base", base_log, "--baseline")
    pairs = [(name, seed) for seed, name in product(config.seeds, config.algorithms)]  # a seed's runs beside each other
    with ThreadPoolExecutor(config.jobs) as pool:
        points = dict(zip(pairs, pool.map(lambda pair: run(config, *pair), pairs), strict=True))
    results = {name: [points[name, seed] for seed in config.seeds] for name in config.algorithms}
    (output / "comparison.json").write_text(json.dumps(results))

    print(f"# {platform.machine()} CPU, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"# {config.score}, held-out change after {config.images} pictures: mean ± standard deviation over seeds")
    print(f"| algorithm | {config.score} | {' | '.join(COSTS.values())} | optimizer steps |\n|---|---|---|---|---|---|")
    for name, seeds in results.items():
        last = np.array([points[-1]["change"] for points in seeds])
        spread = last.std(ddof=1) if len(seeds) > 1 else math.nan
        costs = " | ".join(f"{cost_of(seeds, cost)[-1]:.0f}" for cost in (*COSTS, "optimizer_steps"))
        print(f"| {name} | {last.mean():+.4f} ± {spread:.4f} | {costs} |")
    draw(results, output / "comparison.png")


if __name__ == "__main__":
    main()

"""Does the quickstart's training learn, on several seeds, and does it not from shuffled rewards?

    python benchmarks/learning_curves.py --output_dir outputs/learning --jobs 2

Trains the recipe scripts/finetune/finetune_tiny_flux.sh for each seed, and the negative control: the same with each
group's rewards given to its pictures at random. `--kinds win_rates` trains on the share of the group's other pictures
that a picture beats, as the reward pairwise does with a judge. Every `--every` iterations a checkpoint draws the
withheld scenes. Finished runs in the folder are kept. Prints the share right in everything and the reward's parts, and
writes curves.png; keep the output under benchmarks/results/.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tiny_world import ROOT, Run, base, machine, run_all  # isort: skip  (first: it finds the other scripts)

from fastvideo.cli import flag, flag_errors, parse_dataclass
from fastvideo.config import GRPOConfig

KINDS = {
    "quickstart": (),
    "shuffled rewards": ("--reward_model", "custom_rewards:shuffled_shapes"),
    "win_rates": ("--reward_model", "custom_rewards:shapes_win_rates"),
}


@dataclass
class CurvesConfig:
    """What to run."""

    output_dir: str = flag("outputs/learning", "folder for the results")
    seeds: list[int] = flag([714, 1, 2], "training seeds")
    kinds: list[str] = flag(list(KINDS)[:2], "which of the runs", choices=list(KINDS))
    every: int = flag(10, "iterations between measurements", at_least=1)
    jobs: int = flag(1, "runs at a time, which share the cores", at_least=1)


def recipe() -> list[str]:
    """The flags that scripts/finetune/finetune_tiny_flux.sh gives the trainer."""
    script = ROOT / "scripts/finetune/finetune_tiny_flux.sh"
    environment = os.environ | {"PYTHON_BIN": "echo", "NPROC_PER_NODE": "1"}
    return subprocess.run(["bash", script], env=environment, check=True, capture_output=True, text=True).stdout.split()[
        1:
    ]


def plan_runs(config: CurvesConfig) -> dict[str, list[Run]]:
    """{kind: a run for each seed}."""
    flags = recipe()
    iterations = parse_dataclass(GRPOConfig, flags).max_train_steps
    return {
        kind: [
            Run(f"{kind}-s{seed}", (*flags, *KINDS[kind], "--seed", str(seed)), iterations, config.every)
            for seed in config.seeds
        ]
        for kind in config.kinds
    }


def draw(curves: dict[str, list[dict]], before: dict[str, float], path: Path) -> None:
    """Share right over the iterations, a line a seed; shuffled rewards dashed."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for i, (kind, runs) in enumerate(curves.items()):
        for number, run in enumerate(runs):
            x = [0, *(point["iteration"] for point in run["points"])]
            y, error = ([before[name], *(point[name] for point in run["points"])] for name in ("right", "right_error"))
            label = kind if number == 0 else None
            panel.errorbar(
                x, y, error, color=f"C{i}", ls="-" if i == 0 else "--", lw=1.6, capsize=2, alpha=0.8, label=label
            )
    panel.set(xlabel="iteration", ylabel="withheld scenes right in everything", ylim=(0, 1))
    panel.legend(frameon=False)
    panel.grid(axis="y", color="0.9")
    figure.savefig(path, dpi=130)


@flag_errors("learning_curves.py")
def main() -> None:
    config = parse_dataclass(CurvesConfig, None, __doc__)
    output, runs = Path(config.output_dir), plan_runs(config)
    before = base(output)
    found = run_all([run for seeds in runs.values() for run in seeds], output, config.jobs)
    curves = {kind: [found[run.name] for run in seeds] for kind, seeds in runs.items()}
    print(f"# {machine()}, {config.jobs} runs at a time; withheld scenes")
    print("| run | iteration | right in everything | binding | form | clean |\n|---|---|---|---|---|---|")
    for name, points in [("base", [{"iteration": 0, **before}]), *((n, r["points"]) for n, r in found.items())]:
        for point in points:
            parts = " | ".join(f"{point[part]:.3f}" for part in ("binding", "form", "clean"))
            print(f"| {name} | {point['iteration']} | {point['right']:.3f} ± {point['right_error']:.3f} | {parts} |")
    draw(curves, before, output / "curves.png")


if __name__ == "__main__":
    main()

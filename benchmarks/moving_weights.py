"""Do reward weights that move with training help? Schedules of the granular reward on the tiny FLUX, with controls.

    python benchmarks/moving_weights.py --output_dir outputs/weights --jobs 16       (on one GPU)

Every run is MixGRPO with the same learning rate and number of pictures; only the weights of binding, form and clean
over training differ. Two designs of weights: `paper` moves from .5 .3 .2 to .2 .5 .3, the defaults of the granular
reward; `competing` moves from .45 .45 .1 to .05 .05 .9, where clean can rise at the cost of the others (a picture
without objects is clean). The controls are constant weights: those of the start, of the end, their mean, and equal
ones. Runs of a seed share prompts and noise, so differences are paired by seed. Finished runs in the folder are kept.
Writes weights.png; keep the printed tables under benchmarks/results/.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tiny_world import Run, base, machine, run_all  # isort: skip  (first: it finds the other scripts)

from fastvideo.cli import flag, flag_errors, parse_dataclass

import numpy as np

DESIGNS = {"paper": ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3)), "competing": ((0.45, 0.45, 0.1), (0.05, 0.05, 0.9))}
SCHEDULES = {
    "linear": "--granular_schedule linear",
    "exponential, γ 2": "--granular_schedule exponential --granular_gamma 2",
    "exponential, γ 4": "--granular_schedule exponential --granular_gamma 4",
    "logarithmic, γ 0.5": "--granular_schedule logarithmic --granular_gamma 0.5",
    "logarithmic, γ 2": "--granular_schedule logarithmic --granular_gamma 2",
    "cosine": "--granular_schedule cosine",
}
CONTROL = "constant, mean of start and end"
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
MIX = "--algorithm mix_grpo --train_batch_size 24 --iters_per_group 3"


@dataclass
class WeightsConfig:
    """What to run."""

    output_dir: str = flag("outputs/weights", "folder for the results")
    seeds: list[int] = flag([714, 1, 2, 3, 4], "training seeds")
    iterations: int = flag(24, "training iterations, 288 pictures each", at_least=1)
    learning_rate: float = flag(2e-4, "of all runs; tuned once, with equal constant weights", above=0, at_most=1)
    jobs: int = flag(1, "runs at a time", at_least=1)


def moving(start: tuple[float, ...], end: tuple[float, ...]) -> str:
    weights = (" ".join(map(str, side)) for side in (start, end))
    return "--granular_start_weights {} --granular_end_weights {}".format(*weights)


def variants() -> dict[str, dict[str, str]]:
    """{group: {variant: flags}}; within a group the same weights are given, and the first variant is the control."""
    groups: dict[str, dict[str, str]] = {}
    for design, (start, end) in DESIGNS.items():
        middle = tuple((s + e) / 2 for s, e in zip(start, end, strict=True))
        constant = {
            CONTROL: moving(middle, middle),
            "constant, start weights": moving(start, start),
            "constant, end weights": moving(end, end),
            "constant, equal weights": moving((1, 1, 1), (1, 1, 1)),
        }
        forth = {name: f"{moving(start, end)} {schedule}" for name, schedule in SCHEDULES.items()}
        back = {f"{name}, reversed": f"{moving(end, start)} {schedule}" for name, schedule in SCHEDULES.items()}
        groups[f"{design}, raw"] = constant | forth | back
    groups["paper, advantage"] = {
        name: f"{flags} --granular_mix advantage" for name, flags in groups["paper, raw"].items()
    }
    start, end = DESIGNS["paper"]
    for mix in ("raw", "advantage"):
        middle = groups[f"paper, {mix}"][CONTROL]
        groups[f"paper, {mix}, progress over the group"] = {CONTROL: middle} | {
            name: f"{flags} --granular_mix {mix} --granular_progress batch_index"
            for name, flags in {
                "linear": f"{moving(start, end)} {SCHEDULES['linear']}",
                "exponential, γ 2": f"{moving(start, end)} {SCHEDULES['exponential, γ 2']}",
                "logarithmic, γ 2": f"{moving(start, end)} {SCHEDULES['logarithmic, γ 2']}",
                "linear, reversed": f"{moving(end, start)} {SCHEDULES['linear']}",
            }.items()
        }
    return groups


def make_run(config: WeightsConfig, flags: str, rate: float, seed: int) -> Run:
    """A run named after its flags, so that groups share those that they have in common."""
    given = (*MIX.split(), *flags.split(), "--learning_rate", str(rate), "--seed", str(seed))
    name = "_".join(given[7:]).replace("--granular_", "").replace("--", "")
    return Run(f"weights-{name}", given, config.iterations, max(1, config.iterations // 2))


def plan_runs(config: WeightsConfig) -> tuple[dict[float, Run], dict[tuple[str, str], list[Run]]]:
    """{learning rate: run with equal constant weights}, and {(group, variant): a run for each seed}."""
    groups = variants()
    equal = groups["paper, raw"]["constant, equal weights"]
    tuning = {rate: make_run(config, equal, rate, config.seeds[0]) for rate in RATES}
    runs = {
        (group, name): [make_run(config, flags, config.learning_rate, seed) for seed in config.seeds]
        for group, found in groups.items()
        for name, flags in found.items()
    }
    return tuning, runs


def with_error(values: np.ndarray, signed: bool = False) -> str:
    """Mean and standard error over seeds."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():{'+' if signed else ''}.3f} ± {error:.3f}"


def draw(results: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Difference from the control of every variant, with standard errors, a panel a group."""
    import matplotlib.pyplot as plt

    groups = {name: variants for name, variants in results.items() if "progress" not in name}
    figure, panels = plt.subplots(1, len(groups), figsize=(15, 5), layout="constrained", sharex=True)
    for panel, (group, found) in zip(panels, groups.items(), strict=True):
        for y, (name, values) in enumerate(found.items()):
            change = values - found[CONTROL]
            error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else 0
            colour = "0.4" if name.startswith("constant") else "C1" if name.endswith("reversed") else "C0"
            panel.errorbar(change.mean(), -y, xerr=error, fmt="o", color=colour, capsize=2)
        panel.axvline(0, color="0.7", lw=0.8)
        panel.set_yticks([-y for y in range(len(found))], list(found), fontsize=7)
        panel.set_title(group, fontsize=9)
        panel.locator_params(axis="x", nbins=5)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlabel("share right, less the control's", fontsize=8)
    figure.savefig(path, dpi=130)


@flag_errors("moving_weights.py")
def main() -> None:
    config = parse_dataclass(WeightsConfig, None, __doc__)
    output = Path(config.output_dir)
    tuning, runs = plan_runs(config)
    every_run = {run.name: run for run in [*tuning.values(), *(run for seeds in runs.values() for run in seeds)]}
    before = base(output)
    found = run_all(list(every_run.values()), output, config.jobs)

    print(f"# {machine()}, {config.jobs} runs at a time; {config.iterations} iterations, lr {config.learning_rate:g}")
    print(f"# base model: right in everything {before['right']:.3f} ± {before['right_error']:.3f}")
    shares = {rate: found[run.name]["training"]["right"] for rate, run in tuning.items()}
    print("# learning rate, equal constant weights, right on training prompts:", end=" ")
    print(", ".join(f"{rate:g} {share:.3f}" for rate, share in shares.items()))
    results: dict[str, dict[str, np.ndarray]] = {}
    for (group, name), seeds in runs.items():
        last = [found[run.name]["points"][-1] for run in seeds]
        if group not in results:
            print(f"\n## {group}: withheld scenes, mean ± standard error over {len(seeds)} seeds; paired by seed")
            print(f"| weights | right in everything | less the control | binding | form | clean |\n{'|---' * 6}|")
        results.setdefault(group, {})[name] = np.array([point["right"] for point in last])
        change = results[group][name] - results[group][CONTROL]
        parts = " | ".join(f"{np.mean([point[part] for point in last]):.3f}" for part in ("binding", "form", "clean"))
        print(f"| {name} | {with_error(results[group][name])} | {with_error(change, signed=True)} | {parts} |")
    draw(results, output / "weights.png")


if __name__ == "__main__":
    main()

"""Does scouting pay (--scouts, Sol-RL)? Share right on the tiny FLUX at equal cost, with random picks as the control.

    python benchmarks/scouting.py --output_dir outputs/scouting --jobs 14       (on one GPU)

Every run of an algorithm costs the same number of passes through the transformer, so with more candidates it has fewer
iterations. A pass is one velocity evaluation of one row. A trained row counts three (forward and backward pass), one
more each for the velocities of an old policy (likelihood-free algorithms) and of a reference (--ref_kl_coeff), and a
picture that is decoded and scored counts one: with FLUX's blocks that is nearly time (benchmarks/results/scouting.txt).
Samples have their own initial noise, except in the variant with one start for all, MixGRPO's default. MixGRPO's window
stays at steps 2 to 5, so that its runs differ in length alone.

Runs of a seed share prompts and noise, so differences are paired by seed. The learning rate of each variant is the one
with the greatest share right on *training* prompts. Finished runs in the folder are kept. Writes scouting.png; keep the
printed tables under benchmarks/results/.
"""

from dataclasses import dataclass
from pathlib import Path

from tiny_world import COMMON, Run, base, machine, run_all  # isort: skip  (first: it finds the other scripts)

from fastvideo.cli import flag, flag_errors, parse_dataclass
from fastvideo.config import DRAWN, GRPOConfig
from fastvideo.rollout_plan import make_plan, scout_plan

import numpy as np
from compare_algorithms import choose, spread
from moving_weights import with_error

FROZEN_AT = 2
PASSES = {"trained row": 3, "picture": 1}
# name -> (flags, iterations without scouts)
ALGORITHMS = {
    "mix_grpo": ("--algorithm mix_grpo --train_batch_size 24", 30),
    "v_grpo": ("--algorithm v_grpo --train_batch_size 24", 40),
    "diffusion_nft": ("--algorithm diffusion_nft --train_batch_size 24", 40),
}
OWN, OFF, SHARED = "--no_init_same_noise", "off", "off, one start for all"
VARIANTS = {SHARED: "", OFF: OWN} | {
    f"{count} candidates, {pick}": f"{OWN} --scouts {count} --scout_pick {pick}"
    for count in (24, 48)
    for pick in ("extremes", "random")
}


@dataclass
class ScoutingConfig:
    """What to run."""

    output_dir: str = flag("outputs/scouting", "folder for the results")
    algorithms: list[str] = flag(list(ALGORITHMS), "which of them", choices=list(ALGORITHMS))
    seeds: list[int] = flag([714, 1, 2], "training seeds")
    learning_rates: list[float] = flag([1e-4, 2e-4, 4e-4], "tried for each variant")
    scout_steps: int = flag(4, "DPM-Solver++ steps of a candidate; samples have 10", at_least=1, at_most=10)
    points: int = flag(2, "measurements along a run", at_least=1)
    jobs: int = flag(1, "runs at a time", at_least=1)


def variants(config: ScoutingConfig, algorithm: str) -> dict[str, list[str]]:
    """{variant: flags}. The samples of likelihood-free algorithms always have their own initial noise."""
    found = {}
    for name, flags in VARIANTS.items():
        if name != SHARED or algorithm not in DRAWN:
            steps = f"--scout_steps {config.scout_steps}" if "--scouts" in flags else ""
            found[name] = f"{ALGORITHMS[algorithm][0]} {flags} {steps}".split()
    return found


def passes(flags: list[str]) -> int:
    """What an iteration costs a prompt, in passes of one row."""
    settings = parse_dataclass(GRPOConfig, [*COMMON, *flags, "--data_json_path", "unused"])
    plan = make_plan(settings, range(FROZEN_AT, FROZEN_AT + settings.group_size))
    plans = [plan, *filter(None, [scout_plan(settings)])]
    rows = sum(rows // branch for rows, branch in plan.training.values())
    a_row = PASSES["trained row"] + bool(plan.draws) + bool(settings.ref_kl_coeff)
    return sum(p.evaluations + PASSES["picture"] * p.pictures for p in plans) + a_row * rows


def plan_runs(config: ScoutingConfig) -> dict[str, dict[str, dict[float, list[Run]]]]:
    """{algorithm: {variant: {learning rate: a run for each seed}}}."""
    found: dict[str, dict[str, dict[float, list[Run]]]] = {}
    for algorithm in config.algorithms:
        given, iterations = variants(config, algorithm), ALGORITHMS[algorithm][1]
        budget = iterations * passes(given[OFF])
        for name, flags in given.items():
            count = max(1, round(budget / passes(flags)))

            def run(rate: float, seed: int, name=name, flags=flags, count=count, algorithm=algorithm) -> Run:
                whole = (*flags, "--learning_rate", str(rate), "--seed", str(seed))
                label = f"{algorithm}, {name}-lr{rate:g}-s{seed}"
                return Run(label, whole, count, -(-count // config.points), FROZEN_AT)

            rates = {rate: [run(rate, seed) for seed in config.seeds] for rate in config.learning_rates}
            found.setdefault(algorithm, {})[name] = rates
    return found


def of_curves(runs: list[dict], key: str) -> float:
    """The mean of a metric over iterations and runs; NaN where no run has it."""
    values = [row[key] for run in runs for row in run["curve"] if row.get(key) is not None]
    return float(np.mean(values)) if values else np.nan


def report(results: dict[str, dict[float, list[dict]]], costs: dict[str, int]) -> None:
    """A table: each variant at its best learning rate, and its paired differences from the controls."""
    columns = "variant | right in everything | less off | less random picks | learning rate | iterations | passes | "
    columns += "seconds | rank correlation"
    print(f"| {columns} | right with each learning rate |\n{'|---' * 10}|")
    last = {n: {r: [run["points"][-1] for run in runs] for r, runs in rates.items()} for n, rates in results.items()}
    best = {name: choose(rates) for name, rates in results.items()}
    right = {name: np.array([point["right"] for point in last[name][best[name]]]) for name in results}
    for name, rates in results.items():
        points, control = last[name][best[name]], name.replace("extremes", "random")
        less = [
            with_error(right[name] - right[other], signed=True) if other != name else "–" for other in (OFF, control)
        ]
        count = points[0]["iteration"]
        cells = [spread(right[name].tolist()), *less, f"{best[name]:g}", f"{count}", f"{count * costs[name]:,}"]
        cells += [f"{np.mean([point['seconds_total'] for point in points]):.1f}"]
        cells += [f"{of_curves(rates[best[name]], 'scout_rank_correlation'):.3f}"]
        cells += [", ".join(f"{rate:g}: {spread([p['right'] for p in found])}" for rate, found in last[name].items())]
        print(f"| {name} | {' | '.join(cells)} |")


def draw(found: dict[str, dict[str, dict[float, list[dict]]]], before: float, path: Path) -> None:
    """Share right against seconds of training, at the chosen learning rate: mean and standard deviation over seeds."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(found), figsize=(5 * len(found) + 3, 4), layout="constrained", sharey=True, squeeze=False
    )
    for panel, (algorithm, results) in zip(panels[0], found.items(), strict=True):
        for name, rates in results.items():
            i = list(VARIANTS).index(name)
            runs = [run["points"] for run in rates[choose(rates)]]
            y = np.array([[point["right"] for point in points] for points in runs])
            x = np.mean([[point["seconds_total"] for point in points] for points in runs], axis=0)
            error = np.r_[0, y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]]
            style = {"ls": "--" if "random" in name else "-", "color": f"C{i}", "capsize": 2, "lw": 1.6}
            panel.errorbar(np.r_[0, x], np.r_[before, y.mean(0)], error, label=name, **style)
        panel.set(xlabel="seconds of training", title=algorithm)
    panels[0, 0].set(ylabel="withheld scenes right in everything", ylim=(0, 1))
    panels[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


@flag_errors("scouting.py")
def main() -> None:
    config = parse_dataclass(ScoutingConfig, None, __doc__)
    output, planned = Path(config.output_dir), plan_runs(config)
    before = base(output)
    every_run = [
        run for given in planned.values() for rates in given.values() for runs in rates.values() for run in runs
    ]
    found = run_all(every_run, output, config.jobs)
    print(f"# {machine()}, {config.jobs} runs at a time; {config.scout_steps} steps a candidate")
    print(f"# base model: right in everything {before['right']:.3f} ± {before['right_error']:.3f}")
    results = {
        algorithm: {
            n: {r: [found[run.name] for run in runs] for r, runs in rates.items()} for n, rates in given.items()
        }
        for algorithm, given in planned.items()
    }
    for algorithm, given in results.items():
        print(
            f"\n## {algorithm}: withheld scenes, mean ± standard deviation over {len(config.seeds)} seeds; differences"
        )
        print(
            "## paired by seed, mean ± standard error; rank correlation of the picks' rewards as candidates and samples"
        )
        report(given, {name: passes(flags) for name, flags in variants(config, algorithm).items()})
    draw(results, before["right"], output / "scouting.png")


if __name__ == "__main__":
    main()

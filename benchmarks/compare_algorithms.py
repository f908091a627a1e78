"""What each algorithm learns on the tiny FLUX from the same number of training pictures, and at which cost.

    python benchmarks/compare_algorithms.py --output_dir outputs/compare --jobs 16    (on one GPU; on 2 cores: --jobs 2)

`--studies algorithms` trains every algorithm with four learning rates and three seeds until `--images` pictures are
sampled and scored. The learning rate of each is the one with the greatest share right in everything on *training*
prompts; what is reported is that share on the withheld scenes, with its spread over seeds, beside pictures,
evaluations, optimizer steps and seconds of training. `losses` compares MixGRPO's loss with others, `windows` its
windows; `why` changes single settings of the algorithms that fall behind; `precision` has FP8 in untrained steps,
emulated on a CPU; `guidance` trains with two scales of guidance, for a model that takes classifier-free guidance:

    python benchmarks/compare_algorithms.py --studies guidance --model outputs/tiny_flux2 --output_dir outputs/compare2

Finished runs in the folder are kept. Writes algorithms.png; keep the printed tables under
benchmarks/results/.
"""

from dataclasses import dataclass
from pathlib import Path

from tiny_world import COMMON, MODEL, Run, base, machine, run_all  # isort: skip  (first: it finds the other scripts)

from fastvideo.cli import flag, flag_errors, parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.rollout_plan import make_plan
from fastvideo.utils.grpo_states import windows

import numpy as np
import torch

# Prompts per iteration such that each algorithm makes some 290 pictures in it. The trees make 64: with all edges in one
# optimizer step (`one update` in WHY), that step has as many pictures as a step of the others.
MIX = "--train_batch_size 24 --iters_per_group 5"
ALGORITHMS = {
    "mix_grpo": MIX,
    "mix_grpo+cps": f"--algorithm mix_grpo --sde_type cps {MIX}",
    "mix_grpo_flash": MIX,
    "mix_grpo_flash_star": "--train_batch_size 24",
    "flow_grpo": "--train_batch_size 24",
    "flow_grpo_fast": "--algorithm flow_grpo --flow_grpo_fast_steps 2 --train_batch_size 24",
    "dance_grpo": "--train_batch_size 24 --gradient_accumulation_steps 3",
    "dance_grpo_lora": "--train_batch_size 24 --gradient_accumulation_steps 3",
    "grpo_merge": "--train_batch_size 5",
    # The merges that entropy gives grpo_merge; by entropy cps merges nothing.
    "grpo_merge+cps": "--algorithm grpo_merge --sde_type cps --train_batch_size 5 "
    "--eta_step_list 0,1,2,3,4 --eta_step_merge_list 1,1,2,2,2",
    "granular_grpo": "--train_batch_size 2",
    "v_grpo": "--train_batch_size 24",
    "branch_grpo": "--train_batch_size 4 --tree_split_points 0,2,4,6",
    "branch_grpo_mix": "--train_batch_size 4 --tree_split_points 0,2,4,6 --iters_per_group 22",
}
RATES, LORA_RATES = (5e-5, 1e-4, 2e-4, 4e-4), (3e-4, 6e-4, 1.2e-3, 2.4e-3)
# One setting changed in those that fall behind MixGRPO.
DANCE, BRANCH = (
    f"--algorithm dance_grpo {ALGORITHMS['dance_grpo']}",
    f"--algorithm branch_grpo {ALGORITHMS['branch_grpo']}",
)
WHY = {
    "dance_grpo, eta 0.7": f"{DANCE} --eta 0.7",
    "dance_grpo, eta 0.1": f"{DANCE} --eta 0.1",
    "dance_grpo, noisy last step scored": f"{DANCE} --no_drop_last_sample",
    "dance_grpo, all steps trained": f"{DANCE} --timestep_fraction 1",
    "dance_grpo, first 4 steps trained": f"{DANCE} --frozen_init_timesteps 4 --timestep_fraction 1",
    "dance_grpo, k 12": "--algorithm dance_grpo --train_batch_size 24",
    "dance_grpo, flow steps": f"{DANCE} --sde_type flow --eta 0.7",
    "flow_grpo, first 4 steps trained": "--algorithm flow_grpo --train_batch_size 24 --frozen_init_timesteps 4",
    "branch_grpo, noise scale 1": f"{BRANCH} --tree_split_noise_scale 1",
    "branch_grpo, noise scale 2": f"{BRANCH} --tree_split_noise_scale 2",
    "branch_grpo, clip range 1e-4": f"{BRANCH} --clip_range 1e-4",
    "branch_grpo, one update": f"{BRANCH} --gradient_accumulation_steps 1000",
    "branch_grpo, 18 prompts a step": f"{BRANCH} --train_batch_size 18 --gradient_accumulation_steps 1000",
    "branch_grpo, flow steps, noise scale 1": f"{BRANCH} --sde_type flow --eta 0.7 --tree_split_noise_scale 1",
    "granular_grpo, 8 prompts": "--algorithm granular_grpo --train_batch_size 8",
    "granular_grpo, stride 1": "--algorithm granular_grpo --train_batch_size 5 --granular_list 1",
}
# Other losses than MixGRPO's, and the likelihood-free algorithms, with as many pictures. reward_hacking.py trains with
# them on rewards that can be hacked.
SOLVER = "--train_batch_size 24 --dpm_algorithm_type dpmsolver++ --sampling_steps 6"
LOSSES = {
    "mix_grpo": f"--algorithm mix_grpo {MIX}",
    "guard": f"--algorithm mix_grpo {MIX} --ratio_norm --step_weights velocity --clip_range 2e-6",
    "dppo": f"--algorithm mix_grpo {MIX} --trust_region divergence",
    "tempflow": f"--algorithm mix_grpo {MIX} --step_weights noise",
    "lp": f"--algorithm mix_grpo {MIX} --advantage_norm lp",
    "precise": f"--algorithm mix_grpo {MIX} --sde_type precise --eta 1.5",
    "kl_0.1": f"--algorithm mix_grpo {MIX} --ref_kl_coeff 0.1",
    "kl_1": f"--algorithm mix_grpo {MIX} --ref_kl_coeff 1",
    "kl_1_reset_10": f"--algorithm mix_grpo {MIX} --ref_kl_coeff 1 --ref_reset_steps 10",
    "v_grpo": "--algorithm v_grpo --train_batch_size 24",
    "v_grpo_dpm_6": f"--algorithm v_grpo {SOLVER}",
    "diffusion_nft": "--algorithm diffusion_nft --train_batch_size 24",
    "diffusion_nft_dpm_6": f"--algorithm diffusion_nft {SOLVER}",
    "awm": "--algorithm awm --train_batch_size 24",
    "awm_clip_1e-4": "--algorithm awm --train_batch_size 24 --clip_range 1e-4",
}
# name -> (flags, where the window is frozen)
WINDOWS = {
    "size 1": (f"{MIX} --group_size 1", None),
    "size 2": (f"{MIX} --group_size 2", None),
    "size 4, progressive": (MIX, None),
    "size 6": (f"{MIX} --group_size 6", None),
    "frozen at 0": (MIX, 0),
    "frozen at 2": (MIX, 2),
    "frozen at 4": (MIX, 4),
    "random": (f"{MIX} --sample_strategy random", None),
    "decay": (f"{MIX} --sample_strategy decay", None),
}
# FP8 products need bf16 around them. A CPU is slow in bf16, and emulates FP8 in float32.
COMPUTE, REDUCED = ("bf16", "fp8") if torch.cuda.is_available() else ("no", "fp8_emulated")
PRECISION = {
    f"{algorithm}, {name}": f"--algorithm {algorithm} {MIX} --mixed_precision {COMPUTE} {flags}"
    for algorithm in ("mix_grpo", "mix_grpo_flash")
    for name, flags in {
        "no FP8": "",
        "FP8 after the window": f"--rollout_precision {REDUCED}",
        "FP8 before it too": f"--rollout_precision {REDUCED} --fp8_steps all",
    }.items()
}
# FLUX.2 with one pass of the transformer per step, and with the two of its own guidance.
# (MixGRPO: FLUX.2's schedule stays at high noise, so Flash would end 10 steps with a single one from sigma 0.91.)
GUIDANCE = {f"guidance {scale}": f"--algorithm mix_grpo {MIX} --guidance_scale {scale}" for scale in (1, 4)}
COSTS = {"images": "pictures", "nfe": "velocity evaluations", "seconds_total": "seconds of training"}
STUDIES = ("algorithms", "losses", "windows", "why", "precision", "guidance")


@dataclass
class ComparisonConfig:
    """What to run."""

    output_dir: str = flag("outputs/compare", "folder for the results")
    model: str = flag(str(MODEL), "folder of the base model that draws the tiny world")
    studies: list[str] = flag(list(STUDIES[:-1]), "which comparisons", choices=list(STUDIES))
    algorithms: list[str] = flag(list(ALGORITHMS), "which of them to compare", choices=list(ALGORITHMS))
    learning_rates: list[float] = flag([], "for all variants (none: each study's own)")
    seeds: list[int] = flag([714, 1, 2], "training seeds")
    images: int = flag(11520, "pictures to sample and score in training", at_least=1)
    points: int = flag(4, "measurements along a run", at_least=1)
    jobs: int = flag(1, "runs at a time", at_least=1)


def training_flags(name: str) -> list[str]:
    """Those of an algorithm or of a variant in WHY, PRECISION or GUIDANCE, without the learning rate."""
    given = (ALGORITHMS | WHY | PRECISION | GUIDANCE)[name]
    return given.split() if "--algorithm" in given else ["--algorithm", name, *given.split()]


def make_run(
    config: ComparisonConfig, name: str, flags: list[str], rate: float, seed: int, frozen_at: int | None = None
) -> Run:
    """A run that ends after the iteration in which `--images` pictures are reached."""
    settings = parse_dataclass(GRPOConfig, [*COMMON, *flags, "--data_json_path", "unused"])
    plan = make_plan(settings, next(windows(settings)))
    pictures = settings.train_batch_size * plan.pictures
    every = max(1, round(config.images / pictures / config.points))
    flags = (*flags, "--learning_rate", str(rate), "--seed", str(seed))
    name = f"{name}-lr{rate:g}-s{seed}"
    return Run(name, flags, every * config.points, every, frozen_at, model=Path(config.model))


def plan_runs(config: ComparisonConfig) -> dict[str, dict[str, dict[float, list[Run]]]]:
    """{study: {variant: {learning rate: a run for each seed}}}."""
    studies = {study: {} for study in config.studies}
    if "algorithms" in studies:
        for name in config.algorithms:
            rates = config.learning_rates or (LORA_RATES if "lora" in name else RATES)
            flags = training_flags(name)
            studies["algorithms"][name] = {
                r: [make_run(config, name, flags, r, s) for s in config.seeds] for r in rates
            }
    if "losses" in studies:
        for name, flags in LOSSES.items():
            studies["losses"][name] = {
                r: [make_run(config, f"loss {name}", flags.split(), r, s) for s in config.seeds]
                for r in config.learning_rates or RATES[1:]
            }
    if "windows" in studies:
        for name, (flags, frozen) in WINDOWS.items():
            flags = ["--algorithm", "mix_grpo", *flags.split()]
            runs = {
                r: [make_run(config, f"window {name}", flags, r, s, frozen) for s in config.seeds]
                for r in config.learning_rates or RATES[1:3]
            }
            studies["windows"][name] = runs
    if "why" in studies:
        for name in WHY:
            flags = training_flags(name)
            rates = config.learning_rates or RATES
            studies["why"][name] = {r: [make_run(config, name, flags, r, config.seeds[0])] for r in rates}
    for study, variants, own in (("precision", PRECISION, RATES[2:3]), ("guidance", GUIDANCE, RATES[:2])):
        for name in variants if study in studies else ():
            flags = training_flags(name)
            studies[study][name] = {
                r: [make_run(config, name, flags, r, s) for s in config.seeds] for r in config.learning_rates or own
            }
    return studies


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def choose(rates: dict[float, list[dict]]) -> float:
    """The learning rate with the greatest mean share right on training prompts."""
    return max(rates, key=lambda rate: np.mean([found["training"]["right"] for found in rates[rate]]))


def report(results: dict[str, dict[float, list[dict]]]) -> None:
    """A table: each variant at its best learning rate, and its share right with all of them."""
    columns = "variant | right in everything | learning rate | pictures | evaluations | optimizer steps | seconds"
    print(f"| {columns} | right with each learning rate |\n{'|---' * 8}|")
    for name, rates in results.items():
        best = choose(rates)
        last = {rate: [found["points"][-1] for found in runs] for rate, runs in rates.items()}
        costs = [
            f"{np.mean([p[cost] for p in last[best]]):,.0f}"
            for cost in ("images", "nfe", "optimizer_steps", "seconds_total")
        ]
        others = ", ".join(f"{rate:g}: {spread([p['right'] for p in last[rate]])}" for rate in rates)
        print(f"| {name} | {spread([p['right'] for p in last[best]])} | {best:g} | {' | '.join(costs)} | {others} |")


def draw(results: dict[str, dict[float, list[dict]]], before: float, path: Path) -> None:
    """Share right against each cost, at the chosen learning rate: mean over seeds and, shaded, standard deviation."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(COSTS), figsize=(14, 4.4), layout="constrained", sharey=True)
    for panel, (cost, label) in zip(panels, COSTS.items(), strict=True):
        for i, (name, rates) in enumerate(results.items()):
            runs = [found["points"] for found in rates[choose(rates)]]
            y = np.array([[point["right"] for point in points] for points in runs])
            x = np.r_[0, np.mean([[point[cost] for point in points] for points in runs], axis=0)]
            mean, band = np.r_[before, y.mean(0)], np.r_[0, y.std(0, ddof=1) if len(y) > 1 else 0 * y[0]]
            style = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}  # ten colours in the cycle
            panel.plot(x, mean, lw=1.6, label=name, **style)
            panel.fill_between(x, mean - band, mean + band, color=style["color"], lw=0, alpha=0.1)
        panel.set(xlabel=label)
        panel.locator_params(axis="x", nbins=5)
    panels[0].set(ylabel="withheld scenes right in everything", ylim=(0, 1))
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


@flag_errors("compare_algorithms.py")
def main() -> None:
    config = parse_dataclass(ComparisonConfig, None, __doc__)
    output = Path(config.output_dir)
    studies = plan_runs(config)
    every_run = [
        run for variants in studies.values() for rates in variants.values() for runs in rates.values() for run in runs
    ]
    scales = sorted({run.guidance_scale for run in every_run}, key=lambda scale: scale or 0)
    before = {scale: base(output, Path(config.model), scale) for scale in scales}
    found = run_all(every_run, output, config.jobs)
    print(f"# {machine()}, {config.jobs} runs at a time")
    for scale, measured in before.items():
        where = "" if scale is None else f" with guidance {scale:g}"
        print(f"# base model{where}: right in everything {measured['right']:.3f} ± {measured['right_error']:.3f}")
    for study, variants in studies.items():
        print(f"\n## {study}: withheld scenes, mean ± standard deviation over {len(config.seeds)} seeds")
        results = {
            n: {r: [found[run.name] for run in runs] for r, runs in rates.items()} for n, rates in variants.items()
        }
        report(results)
        if study == "algorithms":
            draw(results, before[None]["right"], output / "algorithms.png")


if __name__ == "__main__":
    main()

"""The trainer's settings: one documented field per flag. Everything is checked here, before any weight is loaded.

A field holds its default, range, choices and help. What several settings must fulfil together stands in the check below
the section's fields. ALGORITHMS says what an algorithm is; a field's `algorithms` are the only ones that read it.
"""

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastvideo.cli import FlagError, check_fields, default_of, flag, written
from fastvideo.family_defaults import family_defaults
from fastvideo.io.prompts import COLUMN_HELP, FORMATS
from fastvideo.io.secrets import redact
from fastvideo.io.words import counted
from fastvideo.models.reward_model.spec import NO_GROUP, REWARDS, RewardSpecConfig, resolve_reward_spec
from fastvideo.utils.steps import SDE_KINDS, STEP_WEIGHTS

# An algorithm is what its `requires` fields say; `defaults` are its values where the user gives none. "Published
# recipes" in docs/algorithms.md says where papers and scripts have other values.
# The order matters: without --algorithm the first one whose requirements hold is taken.
ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "mix_grpo_flash_star": {
        "requires": {"training_strategy": "part", "dpm_algorithm_type": "dpmsolver++", "prog_overlap_step": 0},
        "defaults": {"dpm_apply_strategy": "post", "dpm_post_compress_ratio": 0.2},
    },
    "mix_grpo_flash": {
        "requires": {"training_strategy": "part", "dpm_algorithm_type": "dpmsolver++"},
        "defaults": {"dpm_apply_strategy": "post", "iters_per_group": 20},
    },
    "mix_grpo": {"requires": {"training_strategy": "part", "dpm_algorithm_type": None}, "defaults": {}},
    "flow_grpo": {
        "requires": {"training_strategy": "all", "dpm_algorithm_type": None, "flow_grpo_sampling": True},
        "defaults": {"timestep_fraction": 1.0},
    },
    "dance_grpo": {
        "requires": {"training_strategy": "all", "dpm_algorithm_type": None, "flow_grpo_sampling": False},
        "defaults": {
            "sde_type": "dance",
            "sampling_steps": 16,
            "eta": 0.3,
            "gradient_accumulation_steps": 12,
            "timestep_fraction": 0.6,
            "drop_last_sample": True,
        },
    },
}
DERIVED = tuple(ALGORITHMS)
# These run only if --algorithm names them. Most of them need all samples of a prompt to start from the same noise.
_SHARED_START = {
    "training_strategy": "all",
    "dpm_algorithm_type": None,
    "flow_grpo_sampling": False,
    "init_same_noise": True,
}
_MERGE_DEFAULTS = {"sampling_steps": 16, "learning_rate": 2e-6}
_TREE_DEFAULTS = {
    "sde_type": "dance",
    "sampling_steps": 20,
    "eta": 0.3,
    "clip_range": 1e-3,
    "gradient_accumulation_steps": 12,
    "drop_last_sample": True,
}
_DANCE = ALGORITHMS["dance_grpo"]
ALGORITHMS |= {
    "dance_grpo_lora": {
        "requires": {**_DANCE["requires"], "use_lora": True},
        "defaults": {**_DANCE["defaults"], "sampling_steps": 12, "learning_rate": 3e-4},
    },
    "grpo_merge": {"requires": _SHARED_START, "defaults": _MERGE_DEFAULTS},
    "granular_grpo": {"requires": _SHARED_START, "defaults": {**_MERGE_DEFAULTS, "granular_list": [1, 2, 3]}},
    "branch_grpo": {"requires": _SHARED_START, "defaults": _TREE_DEFAULTS},
    "branch_grpo_mix": {"requires": _SHARED_START, "defaults": _TREE_DEFAULTS},
}
_DRAWS = {"training_strategy": "all", "flow_grpo_sampling": False, "init_same_noise": False}
ALGORITHMS |= {
    "v_grpo": {"requires": _DRAWS, "defaults": {"clip_range": 3e-2}},
    "diffusion_nft": {"requires": _DRAWS, "defaults": {"old_policy_decay": 0.5, "ref_kl_coeff": 1e-4}},
    "awm": {"requires": _DRAWS, "defaults": {"clip_range": 1e-2}},
}
MERGES, TREES = ("grpo_merge", "granular_grpo"), ("branch_grpo", "branch_grpo_mix")
DRAWN = ("v_grpo", "diffusion_nft", "awm")  # likelihood-free: train draws of time and noise on finished pictures
AVERAGED = ("diffusion_nft", "awm")  # need an average of the policies of all iterations
# Policies, see runtime/policies.py: the trained parameters, and copies of them.
CURRENT, EMA, OLD_POLICY, REFERENCE = "current", "ema", "old_policy", "reference"
PICKS = ("extremes", "random")
TRACKERS = ("wandb", "tensorboard", "swanlab", "trackio")
# Settings that say where things are or what is shown, not what is trained.
PLACES = (
    "output_dir resume_from_checkpoint dry_run use_wandb log_with experiment_name image_log_steps eval_steps "
    "eval_prompts eval_reward eval_h eval_w eval_sampling_steps eval_guidance_scale serve_report"
).split()

NOT_AGAIN = ("resume_from_checkpoint", "dry_run", "hps_clip_path")  # what to do with a run, and what isn't read


@dataclass
class GRPOConfig(RewardSpecConfig):
    """All settings of a training run. Defaults are the MixGRPO recipe's."""

    SECTIONS = ("model", "data", "reward")  # the first in --help; the others follow in the order below

    # --- what to train on -------------------------------------------------------------------------------------------
    pretrained_model_name_or_path: str = flag(
        "data/flux", "diffusers pipeline of FLUX.1 or FLUX.2 klein: a folder or a hub id", section="model"
    )
    init_random_flux: bool = flag(
        False,
        "for measurements: random weights for the transformer whose config.json is in that pipeline",
    )
    data_json_path: str | None = flag(None, "prompt.json written by the preprocessing script", section="data")
    prompts_file: str | None = flag(None, f"prompts: {FORMATS}; embedded and cached under output_dir")
    prompt_column: str | None = flag(None, COLUMN_HELP)
    seed: int = flag(714, "seed of all noise and of the samples' order", at_least=0, below=2**63)
    sampler_seed: int = flag(7144, "seed of the prompts' order", at_least=0, below=2**63)
    cfg: float = flag(
        0.0,
        "share of prompts whose embeddings are replaced by zeros (classifier-free dropout)",
        at_least=0,
        below=1,
    )
    dataloader_num_workers: int = flag(4, "threads that read embeddings ahead; 0: none", at_least=0, at_most=256)

    def _check_data(self) -> None:
        given = (self.data_json_path is not None) + (self.prompts_file is not None)
        both = "give either --data_json_path (cached embeddings) or --prompts_file (texts)"
        self._need(given == 1, "data_json_path", both)
        texts = self.prompts_file is not None or self.eval_prompts is not None
        self._need(texts or self.prompt_column is None, "prompt_column", "goes with --prompts_file or --eval_prompts")

    # --- how much of it ---------------------------------------------------------------------------------------------
    max_train_steps: int = flag(
        300,
        "iterations; the run stops after exactly this many",
        at_least=1,
        at_most=10**9,
        section="amount of training",
    )
    train_batch_size: int = flag(1, "prompts per rank and iteration", at_least=1, at_most=10**5)
    prompts_per_iteration: int | None = flag(
        None, "prompts per iteration over all ranks; overrides train_batch_size", at_least=1, at_most=10**6
    )
    num_generations: int = flag(12, "images per prompt (G), the group of the advantages", at_least=2, at_most=10**4)
    gradient_accumulation_steps: int = flag(
        3,
        "samples of each group per optimizer step (k): G/k steps per iteration; E-GRPO: all samples; trees: edges of "
        "each prompt per optimizer step, at random",
        at_least=1,
    )
    rollout_batch_size: int | None = flag(
        None,
        "rows per forward pass of the rollout (None: all); with several prompts per rank, as many prompts as fit are "
        "sampled together, and scored while the next ones are sampled; speed and memory only",
        at_least=1,
    )
    train_micro_batch_size: int | None = flag(
        None,
        "rows per training forward pass (None or auto: as many as are predicted to take half of the GPU memory that "
        "weights, gradients and moments leave; 8 on a CPU); speed and memory only",
        at_least=1,
        none="auto",
    )

    def _check_amounts(self) -> None:
        even = self.algorithm in TREES or self.num_generations % self.gradient_accumulation_steps == 0
        self._need(even, "gradient_accumulation_steps", f"must divide --num_generations {self.num_generations}")

    # --- sampling ---------------------------------------------------------------------------------------------------
    algorithm: str | None = flag(
        None,
        "sets defaults of its own (docs/algorithms.md); derived from the flags below if not given",
        choices=list(ALGORITHMS),
        section="algorithm and sampling",
    )
    h: int = flag(720, "picture height in pixels", at_least=16, at_most=2**14)
    w: int = flag(720, "picture width in pixels", at_least=16, at_most=2**14)
    sampling_steps: int = flag(25, "denoising steps T", at_least=3, at_most=1000)
    shift: float = flag(
        3.0,
        "shift of the sigma schedule towards noise (FLUX.2: by default its own for this size and number of steps)",
        at_least=1e-3,
        at_most=1e3,
    )
    eta: float = flag(
        0.7, "noise level of the stochastic steps; deterministic steps can't be trained", at_least=1e-3, at_most=10
    )
    guidance_scale: float = flag(
        3.5,
        "guidance: distilled in FLUX.1-dev; classifier-free in FLUX.2 klein base, with two passes per evaluation, off "
        "at 1 (4 by default there); other models take none",
        above=0,
        at_most=1000,
    )
    sde_type: str = flag("flow", "kind of stochastic step", choices=list(SDE_KINDS))
    init_same_noise: bool = flag(True, "all samples of a prompt start from the same noise")
    share_prefix: bool = flag(True, "compute once what the samples of a prompt have in common; changes speed only")
    training_strategy: str = flag("part", "train a window of steps, or all steps", choices=["part", "all"])
    timestep_fraction: float = flag(
        1.0, "share of the steps that is trained, drawn per sample (training_strategy all)", above=0, at_most=1
    )
    frozen_init_timesteps: int = flag(
        0, "train just the first n steps (training_strategy all); 0: timestep_fraction decides", at_least=0
    )
    flow_grpo_sampling: bool = flag(False, "training_strategy all with Flow-GRPO's steps instead of DanceGRPO's")
    drop_last_sample: bool = flag(False, "score the last x0 prediction, not a noisy last step (training_strategy all)")
    flow_grpo_fast_steps: int = flag(
        0,
        "Flow-GRPO-Fast: number of consecutive steps, drawn at random, that are stochastic; 0: all steps are",
        at_least=0,
        algorithms=("flow_grpo",),
    )

    def _check_sampling(self) -> None:
        for name in ("h", "w"):
            self._need(getattr(self, name) % 16 == 0, name, "must be a multiple of 16")
        self._need(self.sde_type != "cps" or self.eta < 1, "eta", "coefficients-preserving steps need an eta below 1")
        trainable, fast = self.sampling_steps - 1, self.flow_grpo_fast_steps
        if self.training_strategy == "part":
            for name in ("drop_last_sample", "flow_grpo_sampling"):
                self._need(not getattr(self, name), name, "goes with --training_strategy all")
            return
        fits = self.frozen_init_timesteps <= trainable
        self._need(fits, "frozen_init_timesteps", f"there are {trainable} trainable steps")
        most = f"at most {self.sampling_steps - 2} with --sampling_steps {self.sampling_steps}"
        self._need(fast <= self.sampling_steps - 2, "flow_grpo_fast_steps", f"{most}, or --sampling_steps {fast + 2}")
        if fast:
            self._need(self.frozen_init_timesteps == 0, "frozen_init_timesteps", "not with --flow_grpo_fast_steps")
        trained = int((fast or trainable) * self.timestep_fraction)
        self._need(trained >= 1, "timestep_fraction", f"leaves no step of {fast or trainable} to train")

    # --- scouting ---------------------------------------------------------------------------------------------------
    scouts: int = flag(
        0,
        "Sol-RL: candidates per prompt that are sampled cheaply and scored first; --num_generations of them are "
        "sampled again from their own noise with the full plan, and trained; 0: none",
        at_least=0,
        at_most=10**4,
        section="scouting",
    )
    scout_steps: int = flag(6, "DPM-Solver++ steps of a candidate (scouts)", at_least=1, at_most=1000)
    scout_pick: str = flag(
        "extremes",
        "which candidates are trained: half the best and half the worst, or random ones as the control (scouts)",
        choices=list(PICKS),
    )

    def _check_scouts(self) -> None:
        if not self.scouts:
            for name in ("scout_steps", "scout_pick"):
                self._need(getattr(self, name) == getattr(GRPOConfig, name), name, "goes with --scouts")
            return
        fitting = [name for name in ALGORITHMS if not ALGORITHMS[name]["requires"].get("init_same_noise")]
        start = f"--algorithm {self.algorithm} starts all samples of a prompt from one noise, so no candidate differs"
        self._need(self.algorithm in fitting, "scouts", f"{start}; choose from {', '.join(fitting)}")
        differ = "candidates of a prompt differ in their initial noise alone; give --no_init_same_noise too"
        self._need(not self.init_same_noise, "scouts", differ)
        more = self.scouts > self.num_generations
        self._need(more, "scouts", f"must be more than --num_generations {self.num_generations}, or 0")
        most = f"at most --sampling_steps {self.sampling_steps}: candidates are to be cheaper than samples"
        self._need(self.scout_steps <= self.sampling_steps, "scout_steps", most)
        place = "batch_index weights a score by the picture's place in its group, which a candidate doesn't have yet"
        self._need(self.granular_progress == "train_step", "granular_progress", f"not with --scouts: {place}")

    # --- likelihood-free algorithms ---------------------------------------------------------------------------------
    draws: int = flag(
        4,
        "times and noises at which each finished picture is trained; the pictures of a prompt share them",
        at_least=1,
        at_most=1000,
        algorithms=DRAWN,
        section="likelihood-free algorithms",
    )

    old_policy_decay: float = flag(
        0.9,
        "decay, per iteration, of the average of policies that DiffusionNFT samples with and AWM stays close to",
        at_least=0,
        below=1,
        algorithms=AVERAGED,
    )
    old_kl_coeff: float = flag(
        0.1, "AWM: weight of mean((v − v_old)²), the distance from this average", at_least=0, algorithms=("awm",)
    )
    nft_beta: float = flag(
        1.0,
        "DiffusionNFT: how far the velocities of the good and the bad policy lie from the old policy's, as a share of "
        "the trained policy's distance",
        above=0,
        at_most=1,
        algorithms=("diffusion_nft",),
    )

    def _check_draws(self) -> None:
        self._need_all_steps_trained()
        steps = {"ratio_norm": False, "step_weights": "equal", "trust_region": "clip", "recompute_old_log_prob": False}
        steps |= {"drop_last_sample": False} | {
            n: default_of(self.__dataclass_fields__[n]) for n in ("eta", "sde_type")
        }
        for name, plain in steps.items():
            problem = f"--algorithm {self.algorithm} trains no denoising step; leave it out"
            self._need(getattr(self, name) == plain, name, problem)
        if self.algorithm == "diffusion_nft":
            for name in ("clip_range", "kl_coeff"):
                unset = getattr(self, name) == default_of(self.__dataclass_fields__[name])
                self._need(unset, name, "DiffusionNFT has no probability ratio; leave it out")

    # --- E-GRPO and Granular-GRPO -----------------------------------------------------------------------------------
    entropy_threshold: float = flag(
        2.2,
        "a stochastic step is merged with the next ones until its e^h exceeds this",
        above=0,
        algorithms=("grpo_merge",),
        section="E-GRPO and Granular-GRPO",
    )
    eta_step_list: list[int] = flag(
        [], "active steps, from 0, instead of the first half", metavar="E", algorithms=MERGES
    )
    eta_step_merge_list: list[int] = flag(
        [], "steps that each active step is merged into, instead of by entropy", algorithms=("grpo_merge",)
    )
    granular_list: list[int] = flag(
        [1],
        "strides of the ODE tails; each tail is scored, and the advantages of the tails are summed",
        algorithms=MERGES,
    )

    def _check_merges(self) -> None:
        steps, active, merges, strides = (
            self.sampling_steps, self.eta_step_list, self.eta_step_merge_list, self.granular_list
        )  # fmt: skip
        self._need_all_steps_trained()
        self._need(active == sorted(set(active)), "eta_step_list", "steps must ascend, each once")
        inside = all(0 <= e < steps - 1 for e in active)
        self._need(inside, "eta_step_list", f"choose from 0 to {steps - 2} with --sampling_steps {steps}")
        as_many = not merges or len(merges) == len(active)
        self._need(as_many, "eta_step_merge_list", f"--eta_step_list has {len(active)}")
        for step, merge in zip(active, merges, strict=False):
            fits = merge >= 1 and step + merge < steps
            self._need(fits, "eta_step_merge_list", f"step {step} can be merged into 1 to {steps - 1 - step} steps")
        self._need(bool(strides) and min(strides) >= 1, "granular_list", "give strides of at least 1")
        self._need(len(set(strides)) == len(strides), "granular_list", "give each stride once")

    # --- BranchGRPO -------------------------------------------------------------------------------------------------
    tree_split_points: list[int] = flag(
        [0, 3, 6, 9], "steps at which every row splits", metavar="STEP", algorithms=TREES, section="BranchGRPO"
    )
    tree_split_children: int = flag(
        2,
        "successors of a row at a split; G is this to the power of the number of splits",
        at_least=2,
        algorithms=TREES,
    )
    tree_split_noise_scale: float = flag(4.0, "factor of the standard deviation at splits", above=0, algorithms=TREES)
    tree_fusion: str = flag(
        "mean",
        "reward of an inner node: mean of its leaves, or weighted by edge probability",
        choices=["mean", "probability"],
        algorithms=TREES,
    )
    tree_fusion_temperature: float = flag(
        1.0, "divides log-probabilities, means over elements, before the softmax", above=0, algorithms=TREES
    )
    tree_width_prune: int = flag(
        0,
        "after the last split train 0: all edges, 1: the best of each branch, 2: best and worst",
        choices=[0, 1, 2],
        algorithms=TREES,
    )
    tree_width_prune_share: float = flag(
        0.5, "share of the edges that width pruning keeps", above=0, at_most=1, algorithms=TREES
    )
    depth_pruning: list[int] = flag(
        [], "depths, in steps from the root, whose edges are not trained", metavar="DEPTH", algorithms=TREES
    )
    depth_pruning_slide_interval: int = flag(
        0, "iterations until these depths move one shallower; 0: never", at_least=0, algorithms=TREES
    )
    depth_pruning_stop_depth: int = flag(1, "where the shallowest of these depths stops", at_least=1, algorithms=TREES)

    def _check_tree(self) -> None:
        steps, splits, children = self.sampling_steps, self.tree_split_points, self.tree_split_children
        self._need_all_steps_trained()
        always = f"--algorithm {self.algorithm} always computes once what its rows have in common"
        self._need(self.share_prefix, "share_prefix", always)
        ascend = bool(splits) and splits == sorted(set(splits))
        self._need(ascend, "tree_split_points", "steps must ascend, each once")
        inside = splits[0] >= 0 and splits[-1] < steps - 1
        self._need(inside, "tree_split_points", f"choose from 0 to {steps - 2} with --sampling_steps {steps}")
        leaves = f"the tree has {children}^{len(splits)} = {children ** len(splits)}"
        self._need(self.num_generations == children ** len(splits), "num_generations", leaves)
        if self.sde_type in ("cps", "precise"):  # a precise step from σ = 1 draws all noise anew
            most, of = (
                (1 / math.sin(self.eta * math.pi / 2), f" --eta {self.eta}") if self.sde_type == "cps" else (1, "")
            )
            fits = self.tree_split_noise_scale <= most
            self._need(fits, "tree_split_noise_scale", f"at most {most:.3g} with --sde_type {self.sde_type}{of}")
        inside = all(1 <= depth < steps for depth in self.depth_pruning)
        self._need(inside, "depth_pruning", f"depths lie between 1 and {steps - 1}")

    # --- MixGRPO's window -------------------------------------------------------------------------------------------
    group_size: int = flag(
        4, "window size: stochastic, trained steps per iteration", at_least=1, at_most=1000, section="MixGRPO's window"
    )
    sample_strategy: str = flag(
        "progressive", "how the window moves", choices=["progressive", "random", "decay", "exp_decay"]
    )
    iters_per_group: int = flag(25, "iterations before the window moves", at_least=1, at_most=10**9)
    prog_overlap: bool = flag(True, "move the window by prog_overlap_step instead of by its size")
    prog_overlap_step: int = flag(1, "window stride; 0 freezes the window", at_least=0, at_most=1000)
    max_iters_per_group: int = flag(10, "decay: iterations of the first window position", at_least=1, at_most=10**9)
    min_iters_per_group: int = flag(1, "decay: iterations of the last window position", at_least=1, at_most=10**9)
    roll_back: bool = flag(True, "past the end restart at step 0 instead of staying on the last window")

    def _check_window(self) -> None:
        steps, window = self.sampling_steps, self.group_size
        usable = steps - 2  # the window's indices are 0 … T−3
        fits = window <= usable or (self.training_strategy == "all" and self.algorithm != "branch_grpo_mix")
        choices = f"at most {usable} with --sampling_steps {steps}, or --sampling_steps {window + 2}"
        self._need(fits, "group_size", f"the window's steps; two more must follow them: {choices}")
        ordered = self.max_iters_per_group >= self.min_iters_per_group
        self._need(ordered, "max_iters_per_group", "must not be below min_iters_per_group")

    # --- MixGRPO-Flash ----------------------------------------------------------------------------------------------
    dpm_algorithm_type: str | None = flag(
        None, "solver of the compressed tail, None or dpmsolver++", section="MixGRPO-Flash"
    )
    dpm_apply_strategy: str | None = flag(None, "where the solver runs: post, after the window")
    dpm_post_compress_ratio: float = flag(
        0.4, "points of the tail, as a share of the steps it replaces", above=0, at_most=1
    )
    dpm_solver_order: int = flag(2, "order of DPM-Solver++", choices=[1, 2, 3])
    dpm_solver_type: str = flag("midpoint", "second-order variant", choices=["midpoint", "heun"])

    def _check_flash(self) -> None:
        known = self.dpm_algorithm_type in (None, "dpmsolver++")
        why = "choose from None, dpmsolver++ (the reference's dpmsolver was wrong for flow models)"
        self._need(known, "dpm_algorithm_type", why)
        known = self.dpm_apply_strategy in (None, "post")
        why = "choose from None, post (a solver on `all` steps leaves no stochastic step to train)"
        self._need(known, "dpm_apply_strategy", why)
        fits = self.dpm_algorithm_type is None or self.training_strategy == "part" or self.algorithm in DRAWN
        self._need(fits, "dpm_algorithm_type", "the compressed tail goes with --training_strategy part")

    # --- rewards ----------------------------------------------------------------------------------------------------
    multi_reward_mix: str = flag(
        "advantage_aggr",
        "combine advantages per model, or rewards first",
        choices=["advantage_aggr", "reward_aggr"],
        section="mixes of rewards, and failures",
    )
    granular_mix: str = flag(
        "raw", "weight raw component scores, or each component's advantage", choices=["raw", "advantage"]
    )
    granular_progress: str = flag(
        "train_step", "progress over training, or over the group", choices=["train_step", "batch_index"]
    )
    reward_timeout: float = flag(
        3600.0,
        "seconds in which the rewards must score the pictures sampled together; else the run is saved and ends",
        above=0,
        at_most=10**7,
    )
    max_reward_failures: int | None = flag(
        None,
        "failed scores per iteration, over all ranks, before the run stops (None: any number)",
        at_least=0,
    )

    # --- GRPO -------------------------------------------------------------------------------------------------------
    use_group: bool = flag(
        True, "normalise rewards per prompt; else over all samples (reward_aggr only)", section="advantages and loss"
    )
    trimmed_ratio: float = flag(
        0.0, "lowest share of rewards, left out of mean and standard deviation", at_least=0, below=1
    )
    advantage_rerange_strategy: str | None = flag(
        None, "order of the samples over optimizer steps", choices=["random", "balance"]
    )
    advantage_norm: str = flag(
        "std",
        "what divides a group's rewards less their mean: the standard deviation, or lp, (Σ|A|^p)^(1/p)",
        choices=["std", "lp"],
    )
    advantage_p: float = flag(0.8, "p of --advantage_norm lp", at_least=0.1, at_most=100)
    flat_group_std: float = flag(
        1e-5,
        "a group whose rewards have a standard deviation of at most this times max(1, |mean|) differs by the scorer's "
        "rounding alone: its advantages are 0",
        at_least=0,
    )
    adv_clip_max: float = flag(5.0, "advantages are clamped to ± this", above=0)
    clip_range: float = flag(1e-4, "clip range of the probability ratio", above=0)
    ratio_norm: bool = flag(
        False,
        "GRPO-Guard: log-ratios with a mean of 0 and the same spread in all steps; goes with --clip_range 2e-6",
    )
    step_weights: str = flag(
        "equal",
        "weight of each trained step's loss: equal; velocity: GRPO-Guard, the inverse of how far the velocity moves "
        "the step's mean; noise: TempFlow-GRPO, the step's noise",
        choices=list(STEP_WEIGHTS),
    )
    trust_region: str = flag(
        "clip",
        "what stops an update that went far: clip, the clipped ratio; divergence, Flow-DPPO's mask of transitions that "
        "are farther than --divergence_limit from the old policy's",
        choices=["clip", "divergence"],
    )
    divergence_limit: float = flag(1e-5, "mean(Δμ²)/(2·std²) from which --trust_region divergence stops", above=0)
    kl_coeff: float = flag(0.0, "weight of the squared log-probability change against the old policy", at_least=0)
    ref_kl_coeff: float = flag(
        0.0,
        "weight of the KL divergence from the base model's transitions, or of mean((v − v_ref)²) with likelihood-free "
        "algorithms; 0: not computed",
        at_least=0,
    )
    ref_reset_steps: int = flag(
        0,
        "iterations after which --ref_kl_coeff measures from the policy that training has reached by then, not from "
        "the base model; 0: never",
        at_least=0,
    )
    recompute_old_log_prob: bool = flag(False, "compute the old log-probabilities again in the batches of training")

    def _check_advantages(self) -> None:
        resolve_reward_spec(self)
        fits = self.use_group or self.multi_reward_mix == "reward_aggr"
        self._need(fits, "multi_reward_mix", "without --use_group choose reward_aggr")
        fits = self.granular_mix == "raw" or self.multi_reward_mix == "advantage_aggr"
        self._need(fits, "granular_mix", "advantage needs --multi_reward_mix advantage_aggr")
        fits = self.ref_reset_steps == 0 or self.ref_kl_coeff > 0
        self._need(fits, "ref_reset_steps", "goes with --ref_kl_coeff")

    # --- optimizer --------------------------------------------------------------------------------------------------
    learning_rate: float = flag(1e-5, "AdamW learning rate", above=0, at_most=1, section="optimizer")
    lr_scheduler: str = flag(
        "constant_with_warmup",
        "learning rate over optimizer steps, a schedule of diffusers",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    )
    lr_warmup_steps: int = flag(0, "optimizer steps of warm-up", at_least=0)
    lr_num_cycles: int = flag(1, "cycles of cosine_with_restarts", at_least=1)
    lr_power: float = flag(1.0, "power of polynomial", at_least=0)
    weight_decay: float = flag(1e-4, "AdamW weight decay", at_least=0)
    max_grad_norm: float = flag(1.0, "gradient norm is clipped to this", above=0)
    max_skipped_steps: int = flag(
        5, "optimizer steps skipped in a row for non-finite numbers before the run stops", at_least=1
    )
    ema_decay: float = flag(
        0.0, "decay of an average of the weights, saved beside each checkpoint; 0: none", at_least=0, below=1
    )
    ema_start_step: int = flag(0, "iteration at which averaging starts", at_least=0)
    mixed_precision: str = flag("bf16", "compute format", choices=["no", "bf16"], section="number formats and speed")
    master_weight_type: str = flag("fp32", "format of the trained weights", choices=["fp32", "bf16"])
    allow_tf32: bool = flag(True, "TF32 matrix products on NVIDIA GPUs")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass: less memory, more time")
    selective_checkpointing: float = flag(
        1.0, "share of the blocks that gradient_checkpointing covers", above=0, at_most=1
    )
    compile: str = flag(
        "auto",
        "compile the transformer's blocks (auto: on a GPU, not with deepspeed)",
        choices=["auto", "true", "false"],
    )
    rollout_precision: str = flag(
        "bf16",
        "bf16: all steps of a rollout compute as training does; fp8: untrained steps have FP8 products in the blocks "
        "(NVIDIA GPUs of compute capability 8.9 or more); fp8_emulated: the same numbers on any device, slower, for "
        "studies",
        choices=["bf16", "fp8", "fp8_emulated"],
    )
    fp8_steps: str = flag(
        "after",
        "the steps in FP8: after the trained steps, or all untrained steps; always all for candidates (--scouts) and "
        "with algorithms that train no step",
        choices=["after", "all"],
    )
    rollout_drift_steps: int = flag(
        25,
        "fp8: iterations between comparisons of a prompt's pictures with those of a rollout without FP8; 0: none",
        at_least=0,
    )
    cudnn_attention: str = flag(
        "always",
        "on a GPU, use cuDNN's attention, the fastest: never, only in steps that aren't trained, or in training too",
        choices=["never", "rollout", "always"],
    )

    def _check_precision(self) -> None:
        if self.rollout_precision == "bf16":
            for name, plain in {"fp8_steps": "after", "rollout_drift_steps": 25}.items():
                self._need(getattr(self, name) == plain, name, "goes with --rollout_precision fp8 or fp8_emulated")
            return
        fits = self.rollout_precision != "fp8" or self.mixed_precision == "bf16"
        problem = f"needs --mixed_precision bf16, not {self.mixed_precision}; fp8_emulated takes both"
        self._need(fits, "rollout_precision", problem)
        fits = self.parallel != "deepspeed"
        self._need(fits, "rollout_precision", "goes with --parallel none, ddp or fsdp, not deepspeed")

    # --- LoRA -------------------------------------------------------------------------------------------------------
    use_lora: bool = flag(False, "train low-rank adapters; the model itself stays frozen", section="LoRA")
    lora_rank: int = flag(128, "rank of the adapters", at_least=1, at_most=2**14)
    lora_alpha: int = flag(256, "scale of the adapters, times their rank", at_least=1, at_most=10**6)
    lora_target_modules: list[str] = flag(
        ["to_q", "to_k", "to_v", "to_out.0"], "linear layers that get an adapter", metavar="MODULE"
    )
    lora_init: str | None = flag(
        None,
        "LoRA file, or folder with one, that the adapters start from; it must have the layers of lora_target_modules "
        "and the rank lora_rank (None: adapters that change nothing yet)",
    )
    quantize_base: bool = flag(False, "LoRA, without fsdp or deepspeed: the frozen model's blocks are held in 8 bit")

    # --- processes --------------------------------------------------------------------------------------------------
    parallel: str | None = flag(
        None,
        "how the model lies on the processes (None: ddp for several processes, none for one)",
        choices=["none", "ddp", "fsdp", "deepspeed"],
        section="engine and processes",
    )
    zero_stage: int = flag(2, "deepspeed: splits gradients and moments (2), or parameters too (3)", choices=[2, 3])
    fsdp_sharding_startegy: str | None = flag(
        None,
        "fsdp: full splits over all processes, hybrid_full over the processes of each node, hybrid_zero2 too, without "
        "splitting again after the forward pass; given without --parallel, chooses fsdp (none: ddp)",
        choices=["full", "hybrid_full", "hybrid_zero2", "none"],
        alias="fsdp_sharding_strategy",
    )
    sp_size: int = flag(
        1,
        "ddp, fsdp: number of processes that compute a picture together, its tokens split over them (diffusers' "
        "Ulysses attention), for pictures too large for one GPU; must divide processes, attention heads, image and "
        "text tokens",
        at_least=1,
    )
    use_cpu_offload: bool = flag(False, "fsdp, deepspeed: parameters and moments wait in the CPU's memory")
    rollout_keep_gathered: str = flag(
        "auto",
        "fsdp: gather parameters once per rollout and optimizer step, not in each forward and backward pass (auto: "
        "where memory allows; true: in the rollout in any case)",
        choices=["auto", "true", "false"],
    )

    def _check_processes(self) -> None:
        if not self.use_lora:
            for name in ("lora_rank", "lora_alpha"):
                self._need(getattr(self, name) == getattr(GRPOConfig, name), name, "goes with --use_lora")
        layers = self.lora_target_modules or not self.use_lora
        self._need(bool(layers), "lora_target_modules", "give at least one linear layer, such as to_q")
        self._need(self.use_lora or self.lora_init is None, "lora_init", "goes with --use_lora")
        strategy, sp_size = self.fsdp_sharding_startegy, self.sp_size
        engine = self.parallel or ("ddp" if strategy == "none" else None)
        fits = strategy in (None, "none") or engine in (None, "fsdp")
        self._need(fits, "fsdp_sharding_startegy", f"goes with --parallel fsdp, not {engine}")
        instead = "splits nothing; choose --parallel ddp, or full, hybrid_full or hybrid_zero2"
        self._need(strategy != "none" or engine != "fsdp", "fsdp_sharding_startegy", instead)
        fits = self.lr_scheduler != "polynomial" or self.learning_rate > 1e-7
        self._need(fits, "learning_rate", "--lr_scheduler polynomial ends at 1e-7; choose more")
        fits = self.master_weight_type == "fp32" or self.mixed_precision == "bf16" or self.use_lora
        self._need(fits, "master_weight_type", "goes with --mixed_precision bf16: the VAE and the inputs are fp32")
        if engine == "deepspeed":
            own = "DeepSpeed splits the weights its own way; choose --parallel fsdp"
            self._need(self.ema_decay == 0, "ema_decay", own)
            self._need(self.algorithm not in AVERAGED, "algorithm", own)
            self._need(self.ref_reset_steps == 0, "ref_reset_steps", own)
            self._need(self.ref_kl_coeff == 0 or self.zero_stage == 2, "ref_kl_coeff", f"{own}, or --zero_stage 2")
            self._need(self.compile != "true", "compile", "DeepSpeed's hooks break the graph; choose auto or false")
        if self.quantize_base:
            self._need(self.use_lora, "quantize_base", "goes with --use_lora: weights in 8 bit can't be trained")
            split = engine in ("fsdp", "deepspeed") or strategy not in (None, "none")
            whole = "each process holds the model whole; choose --parallel none or ddp"
            self._need(not split, "quantize_base", whole)
        if sp_size > 1:
            fits = engine in (None, "ddp", "fsdp")
            self._need(fits, "sp_size", f"goes with --parallel ddp or fsdp, not {engine}")
            self._need(self.compile != "true", "compile", f"not with --sp_size {sp_size}; choose auto or false")

    # --- evaluation during training ---------------------------------------------------------------------------------
    eval_steps: int = flag(
        0,
        "iterations between evaluations; 0: none. An evaluation samples --eval_prompts with fixed seeds and scores "
        "them, also before training and after the last iteration; the link `best` points to the best checkpoint",
        at_least=0,
        section="evaluation during training",
    )
    eval_prompts: str | None = flag(None, "the prompts of these evaluations, in a format of prompts_file")
    eval_split: float | None = flag(
        None,
        "instead of --eval_prompts: a share (below 1) or number of the prompts, held out from training and evaluated; "
        "a hash of the caption chooses them",
        above=0,
    )
    eval_reward: str | None = flag(
        None,
        "what decides which checkpoint is best, named as in --reward_model: rewards that training doesn't see "
        "(None: the reward in training)",
    )

    eval_h: int | None = flag(None, "height of the evaluated pictures (None: --h)", at_least=16, at_most=2**14)
    eval_w: int | None = flag(None, "width of the evaluated pictures (None: --w)", at_least=16, at_most=2**14)
    eval_sampling_steps: int | None = flag(
        None, "denoising steps of the evaluated pictures (None: --sampling_steps)", at_least=1, at_most=1000
    )
    eval_guidance_scale: float | None = flag(
        None, "guidance of the evaluated pictures (None: --guidance_scale)", above=0, at_most=1000
    )

    def _check_evaluation(self) -> None:
        if (self.eval_split or 0) >= 1:
            self._need(self.eval_split % 1 == 0, "eval_split", "give a share below 1, or a whole number of prompts")
            self.eval_split = int(self.eval_split)  # messages and config.yaml have 10, not 10.0
        for name in "eval_prompts eval_split eval_reward eval_h eval_w eval_sampling_steps eval_guidance_scale".split():
            self._need(self.eval_steps > 0 or getattr(self, name) is None, name, "goes with --eval_steps")
        for name in ("eval_h", "eval_w"):
            self._need((getattr(self, name) or 0) % 16 == 0, name, "must be a multiple of 16")
        given = (self.eval_prompts is not None) + (self.eval_split is not None)
        self._need(self.eval_steps == 0 or given > 0, "eval_steps", "give --eval_prompts or --eval_split too")
        self._need(
            given < 2, "eval_split", f"not with --eval_prompts {self.eval_prompts}: one of them says what is judged"
        )
        evaluated = "reward_model" if self.eval_reward is None else "eval_reward"
        if self.eval_steps and any(
            name in REWARDS and REWARDS[name].groupwise for name in resolve_reward_spec(self, evaluated)
        ):
            raise FlagError("eval_reward", self.eval_reward, NO_GROUP)

    # --- output -------------------------------------------------------------------------------------------------------
    output_dir: str = flag(
        "outputs/mixgrpo", "folder for args.json, config.yaml, metrics.jsonl, images and checkpoints", section="output"
    )
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint folder to go on from; `latest`: the newest in output_dir; `auto`: this or a new run"
    )
    dry_run: bool = flag(False, "print the derived arithmetic and the rollout plan, then exit")
    checkpointing_steps: int = flag(50, "iterations between checkpoints; the last one is always saved", at_least=1)
    checkpoints_total_limit: int | None = flag(
        None, "checkpoints kept; older ones are deleted (None: all are kept)", at_least=1
    )
    log_with: list[str] = flag(
        ["wandb"],
        f"trackers, of {', '.join(TRACKERS)}, that get metrics and pictures too; none: no tracker. Without a key wandb "
        "and swanlab write to output_dir, as tensorboard does",
        choices=TRACKERS,
        metavar="TRACKER",
        alias="report_to",
    )
    use_wandb: bool = flag(True, "older flag: adds wandb to log_with, or removes it")
    experiment_name: str = flag("mixgrpo", "name of the run in its trackers")
    wandb_project: str = flag("mixgrpo-flux", "project of the run in its trackers")
    wandb_key: str | None = flag(None, "refused: set WANDB_API_KEY in the environment instead")
    image_log_steps: int = flag(10, "iterations between saved image grids; 0: none", at_least=0)
    serve_report: int | None = flag(
        None,
        "port of this machine at which a browser finds the report of the running training (0: any free one)",
        at_least=0,
        below=65536,
    )

    @staticmethod
    def outdone(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
        """{flag of a recipe or the environment: flag given after it that excludes it}, see fastvideo/cli.py."""
        given, found = before | after, {}
        pairs = [("data_json_path", "prompts_file"), ("eval_prompts", "eval_split")]
        if (given.get("fsdp_sharding_startegy") == "none") == (given.get("parallel") == "fsdp"):
            pairs.append(("parallel", "fsdp_sharding_startegy"))
        for a, b in (*pairs, *(pair[::-1] for pair in pairs)):
            if before.get(a) is not None and after.get(b) is not None:
                found[a] = b
        if "use_wandb" in before and "log_with" in after:
            found["use_wandb"] = "log_with"
        if (algorithm := after.get("algorithm")) in ALGORITHMS:
            owners = {f.name: f.metadata["algorithms"] for f in fields(GRPOConfig) if "algorithms" in f.metadata}
            for name, value in before.items():
                needed = ALGORITHMS[algorithm]["requires"].get(name, value)
                if needed != value or algorithm not in owners.get(name, ALGORITHMS):
                    found[name] = "algorithm"
        elif before.get("algorithm") in DERIVED:
            requires = ALGORITHMS[before["algorithm"]]["requires"]
            for name, value in after.items():
                if requires.get(name, value) != value:  # the flags choose another algorithm
                    found["algorithm"] = name
        return {name: by for name, by in found.items() if name not in after}

    @staticmethod
    def other_defaults() -> dict[str, list[str]]:
        """{field: `VALUE with ALGORITHM, ...`}, the defaults of algorithms that differ from the fields'."""
        found: dict[str, dict[str, list[str]]] = {}
        for name, algorithm in ALGORITHMS.items():
            for key, value in (algorithm["requires"] | algorithm["defaults"]).items():
                if value != default_of(GRPOConfig.__dataclass_fields__[key]):
                    found.setdefault(key, {}).setdefault(str(value), []).append(name)
        return {
            key: [f"{value} with {', '.join(names)}" for value, names in values.items()]
            for key, values in found.items()
        }

    @classmethod
    def create(cls, **explicit: Any) -> "GRPOConfig":
        """The config of the given flags, with the defaults of their algorithm where a flag isn't given.

        Raises:
            FlagError: a flag contradicts the algorithm, or a value can't be used.
        """
        base = {f.name: default_of(f) for f in fields(cls)}
        if "log_with" in explicit or "use_wandb" in explicit:
            names = explicit.get("log_with", base["log_with"])
            if "use_wandb" in explicit:
                names = ["wandb"] * explicit["use_wandb"] + [name for name in names if name != "wandb"]
            explicit["log_with"] = list(dict.fromkeys(names))
        given = {**base, **explicit}
        fitting = (
            name
            for name, algorithm in ALGORITHMS.items()
            if all(given[key] == value for key, value in algorithm["requires"].items())
        )
        name = explicit.get("algorithm") or next(fitting, None)
        if name in ALGORITHMS:  # else __post_init__ says what is wrong
            algorithm = ALGORITHMS[name]
            for key, value in algorithm["requires"].items():
                if explicit.get(key, value) != value:
                    problem = f"contradicts --{written(key, explicit[key])}: it needs --{written(key, value)}"
                    raise FlagError("algorithm", name, problem)
            usual = algorithm["defaults"] | algorithm["requires"]
            usual |= family_defaults({**base, **usual, **explicit})
            explicit = {**usual, **explicit, "algorithm": name}
            if name in TREES:
                tree = {**base, **explicit}
                leaves = tree["tree_split_children"] ** len(tree["tree_split_points"])
                if leaves >= 2:  # else _check_tree says what is wrong
                    explicit.setdefault("num_generations", leaves)
                if explicit["sde_type"] in ("cps", "precise"):
                    explicit.setdefault("tree_split_noise_scale", 1.0)  # they keep the noise level
            if name in MERGES:
                explicit["gradient_accumulation_steps"] = explicit.get("num_generations", base["num_generations"])
        return cls(**explicit)

    def __post_init__(self) -> None:
        if self.wandb_key:  # before any message could repeat its value
            problem = "keys don't belong on a command line; set WANDB_API_KEY in the environment"
            raise FlagError("wandb_key", None, problem)
        check_fields(self)
        for f in fields(self):
            owners = f.metadata.get("algorithms")
            owned = owners is None or self.algorithm in owners or getattr(self, f.name) == default_of(f)
            self._need(owned, f.name, f"goes with --algorithm {' or '.join(owners or ())}")
        self._check_amounts()
        self._check_sampling()
        self._check_window()
        if self.algorithm in MERGES:
            self._check_merges()
        if self.algorithm in TREES:
            self._check_tree()
        if self.algorithm in DRAWN:
            self._check_draws()
        self._check_flash()
        self._check_scouts()
        self._check_advantages()
        self._check_precision()
        self._check_processes()
        self._check_data()
        self._check_evaluation()

    def _need(self, holds: bool, name: str, problem: str) -> None:
        if not holds:
            raise FlagError(name, getattr(self, name), problem)

    def _need_all_steps_trained(self) -> None:
        for name, plain in {"timestep_fraction": 1, "frozen_init_timesteps": 0}.items():
            self._need(getattr(self, name) == plain, name, f"--algorithm {self.algorithm} needs {plain}")

    def held_out(self) -> "GRPOConfig":
        """These settings for scoring --eval_reward: in this process, not at a reward server."""
        return replace(self, reward_server=None)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the copies of the trained parameters that the run holds."""
        needed = {EMA: self.ema_decay > 0, OLD_POLICY: self.algorithm in AVERAGED, REFERENCE: self.ref_kl_coeff > 0}
        return tuple(name for name, need in needed.items() if need)

    @property
    def sampling_policy(self) -> str:
        """The policy that draws the pictures of training, see runtime/policies.py."""
        return OLD_POLICY if self.algorithm == "diffusion_nft" else CURRENT

    def data_ranks(self, world_size: int) -> int:
        """Groups of processes with their own prompts: one group per process, or one per `sp_size` processes.

        Raises FlagError if the processes can't be divided so.
        """
        fits = world_size % self.sp_size == 0
        self._need(fits, "sp_size", f"must divide the number of processes, which is {world_size}")
        return world_size // self.sp_size

    def local_prompts(self, world_size: int) -> int:
        """Prompts per data rank, P / data ranks. Raises FlagError if P can't be divided so."""
        ranks = self.data_ranks(world_size)
        if self.prompts_per_iteration is None:
            return self.train_batch_size
        fits = self.prompts_per_iteration % ranks == 0
        self._need(fits, "prompts_per_iteration", f"must be a multiple of {ranks} ranks")
        return self.prompts_per_iteration // ranks

    def to_public_dict(self) -> dict[str, Any]:
        """All fields for args.json, checkpoints and trackers, without secrets that a URL may hold."""
        values = asdict(self)
        del values["wandb_key"], values["use_wandb"]  # log_with says the latter
        return {k: redact(v) if isinstance(v, str) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        """A file that starts the run again with --config: all fields that it reads, those of its own first.

        Without secrets, so a login in a URL must be given again.
        """
        import yaml

        algorithm = ALGORITHMS[self.algorithm]
        usual = {f.name: default_of(f) for f in fields(self)} | algorithm["defaults"] | algorithm["requires"]
        readers = {f.name: f.metadata.get("algorithms") or ALGORITHMS for f in fields(self)}
        values = self.to_public_dict()
        values = {k: v for k, v in values.items() if k not in NOT_AGAIN and self.algorithm in readers[k]}
        follows = family_defaults(vars(self))  # of the model and the pictures' size, so another size may have others
        values = {k: v for k, v in values.items() if k not in follows or v != follows[k]}
        own = {k: v for k, v in values.items() if v != usual[k]}
        parts = {
            "--config FILE --output_dir FOLDER starts this run again, on "
            f"{counted(world_size_of_environment(), 'process')} as here. Its own settings:": {
                "algorithm": self.algorithm
            }
            | own,
            "and the defaults:": {k: v for k, v in values.items() if k not in {"algorithm", *own}},
        }
        texts = (yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=10**6) for part in parts.values())
        return "\n".join(f"# {title}\n{text}" for title, text in zip(parts, texts, strict=True))


def world_size_of_environment() -> int:
    """Number of processes as torchrun announces it. Raises FlagError if the environment has another value there."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise FlagError("parallel", None, f"WORLD_SIZE is {value!r} in the environment; start processes with torchrun")
    return int(value)

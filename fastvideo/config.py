"""One documented dataclass field per flag. Everything is validated here, before any weight is loaded.

`--flag_name` and `--flag-name` are the same; every switch has a `--no_` form; the string None means "not set".
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, get_origin

from fastvideo.cli import default_of, flag
from fastvideo.models.reward_model.spec import RewardSpecConfig, resolve_reward_spec

# Flags of the reference recipe that did nothing there.
IGNORED_FLAGS = (
    "vae_model_path cache_dir num_latent_t t ignore_last dit_model_name_or_path precondition_outputs "
    "logging_dir loss_coef train_sp_batch_size"
).split()

# An algorithm is what its `requires` fields say; `defaults` are its paper's values where the user gives none.
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
# The others are never derived from other flags. All samples of a prompt have to start from the same noise in most.
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
# Settings that say where things are or what is shown, not what is trained.
PLACES = (
    "output_dir resume_from_checkpoint dry_run use_wandb experiment_name image_log_steps eval_steps eval_prompts "
    "eval_reward serve_report"
).split()
MERGES, TREES = ("grpo_merge", "granular_grpo"), ("branch_grpo", "branch_grpo_mix")
# Flags, or the first word of flags, that only these algorithms read.
OWN_FLAGS = {
    "tree": TREES,
    "depth": TREES,
    "eta_step_list": MERGES,
    "granular_list": MERGES,
    "eta_step_merge_list": ("grpo_merge",),
    "entropy_threshold": ("grpo_merge",),
    "flow_grpo_fast_steps": ("flow_grpo",),
}


@dataclass
class GRPOConfig(RewardSpecConfig):
    """All settings of a training run. Defaults are the MixGRPO recipe's."""

    # --- what to train on -------------------------------------------------------------------------------------------
    pretrained_model_name_or_path: str = flag("data/flux", "diffusers FLUX pipeline: a folder or a hub id")
    init_random_flux: bool = flag(
        False,
        "for measurements: random weights for the transformer whose config.json is in that pipeline",
    )
    data_json_path: str | None = flag(None, "prompt.json written by the preprocessing script")
    prompts_file: str | None = flag(None, "text file of prompts, one a line; embedded and cached under output_dir")
    output_dir: str = flag("outputs/mixgrpo", "folder for args.json, metrics.jsonl, images and checkpoints")
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder to go on from, or `latest`")
    seed: int = flag(714, "seed of all noise and rearranging")
    sampler_seed: int = flag(7144, "seed of the prompts' order")
    cfg: float = flag(0.0, "share of prompts whose embeddings are replaced by zeros (classifier-free dropout)")
    dataloader_num_workers: int = flag(4, "processes that read embeddings ahead")
    dry_run: bool = flag(False, "print the derived arithmetic and the rollout plan, then exit")

    # --- how much of it ---------------------------------------------------------------------------------------------
    max_train_steps: int = flag(300, "iterations; the run stops after exactly this many")
    train_batch_size: int = flag(1, "prompts a rank and iteration")
    prompts_per_iteration: int | None = flag(None, "prompts an iteration over all ranks; overrides train_batch_size")
    num_generations: int = flag(12, "images a prompt (G), the group of the advantages")
    gradient_accumulation_steps: int = flag(
        3, "samples of each group an optimizer step uses (k): G/k steps an iteration; E-GRPO and trees: all"
    )
    rollout_batch_size: int | None = flag(
        None,
        "rows a forward pass of the rollout (None: all); with several prompts a rank, those that fit are sampled "
        "together, and scored while the next ones are; speed and memory only",
    )
    train_micro_batch_size: int | None = flag(
        None,
        "rows a training forward pass (None or auto: as many as are predicted to take half of the GPU memory that "
        "weights, gradients and moments leave; 8 on a CPU); speed and memory only",
        none="auto",
    )
    checkpointing_steps: int = flag(50, "iterations between checkpoints; the last one is always saved")
    checkpoints_total_limit: int | None = flag(None, "checkpoints kept; older ones are deleted (None: all are kept)")

    # --- sampling ---------------------------------------------------------------------------------------------------
    algorithm: str | None = flag(None, "derived from the flags below when not given", choices=list(ALGORITHMS))
    h: int = flag(720, "picture height in pixels")
    w: int = flag(720, "picture width in pixels")
    sampling_steps: int = flag(25, "denoising steps T")
    shift: float = flag(3.0, "shift of the sigma schedule towards noise")
    eta: float = flag(0.7, "noise level of the stochastic steps")
    guidance_scale: float = flag(3.5, "distilled guidance; only for models with guidance embeds (FLUX.1-dev)")
    sde_type: str = flag("flow", "kind of stochastic step", choices=["flow", "dance", "cps"])
    init_same_noise: bool = flag(True, "all samples of a prompt start from the same noise")
    share_prefix: bool = flag(True, "evaluate what the samples of a prompt have in common once; changes speed only")
    training_strategy: str = flag("part", "train a window of steps, or all steps", choices=["part", "all"])
    timestep_fraction: float = flag(1.0, "share of the steps trained, drawn per sample (training_strategy all)")
    frozen_init_timesteps: int = flag(0, "train just the first n steps (strategy all); 0: see timestep_fraction")
    flow_grpo_sampling: bool = flag(False, "training_strategy all with Flow-GRPO's steps instead of DanceGRPO's")
    drop_last_sample: bool = flag(False, "score the last x0 prediction, not a noisy last step (strategy all)")
    flow_grpo_fast_steps: int = flag(
        0, "Flow-GRPO-Fast: noise only in so many consecutive steps, drawn at random; 0: all"
    )

    # --- E-GRPO and Granular-GRPO -----------------------------------------------------------------------------------
    entropy_threshold: float = flag(2.2, "a stochastic step is merged with following ones until its e^h exceeds this")
    eta_step_list: list[int] = flag([], "active steps, from 0, instead of the first half", metavar="E")
    eta_step_merge_list: list[int] = flag([], "steps that each active step is merged into, instead of by entropy")
    granular_list: list[int] = flag([1], "strides of the ODE tails; each tail is scored, its advantages are summed")

    # --- BranchGRPO -------------------------------------------------------------------------------------------------
    tree_split_points: list[int] = flag([0, 3, 6, 9], "steps at which every row splits", metavar="STEP")
    tree_split_children: int = flag(2, "successors of a row at a split; G is this to the power of the number of splits")
    tree_split_noise_scale: float = flag(4.0, "factor of the standard deviation at splits")
    tree_fusion: str = flag(
        "mean",
        "reward of an inner node: mean of its leaves, or weighted by edge probability",
        choices=["mean", "probability"],
    )
    tree_fusion_temperature: float = flag(1.0, "divides log-probabilities, means over elements, before the softmax")
    tree_width_prune: int = flag(
        0, "after the last split train 0: all edges, 1: the best of each branch, 2: best and worst", choices=[0, 1, 2]
    )
    tree_width_prune_share: float = flag(0.5, "share of the edges that width pruning keeps")
    depth_pruning: list[int] = flag([], "depths, in steps from the root, whose edges are not trained", metavar="DEPTH")
    depth_pruning_slide_interval: int = flag(0, "iterations until these depths move one shallower; 0: never")
    depth_pruning_stop_depth: int = flag(1, "where the shallowest of these depths stops")

    # --- MixGRPO's window -------------------------------------------------------------------------------------------
    group_size: int = flag(4, "window size: stochastic, trained steps an iteration")
    sample_strategy: str = flag(
        "progressive", "how the window moves", choices=["progressive", "random", "decay", "exp_decay"]
    )
    iters_per_group: int = flag(25, "iterations before the window moves")
    prog_overlap: bool = flag(True, "move the window by prog_overlap_step instead of by its size")
    prog_overlap_step: int = flag(1, "window stride; 0 freezes the window")
    max_iters_per_group: int = flag(10, "decay: iterations of the first window position")
    min_iters_per_group: int = flag(1, "decay: iterations of the last window position")
    roll_back: bool = flag(True, "restart at step 0 past the end instead of staying on the last window")

    # --- MixGRPO-Flash ----------------------------------------------------------------------------------------------
    dpm_algorithm_type: str | None = flag(None, "solver of the compressed tail, None or dpmsolver++")
    dpm_apply_strategy: str | None = flag(None, "where the solver runs: post, after the window")
    dpm_post_compress_ratio: float = flag(0.4, "points of the tail, as a share of the steps it replaces")
    dpm_solver_order: int = flag(2, "order of DPM-Solver++", choices=[1, 2, 3])
    dpm_solver_type: str = flag("midpoint", "second-order variant", choices=["midpoint", "heun"])

    # --- rewards ----------------------------------------------------------------------------------------------------
    multi_reward_mix: str = flag(
        "advantage_aggr", "combine advantages per model, or rewards first", choices=["advantage_aggr", "reward_aggr"]
    )
    granular_mix: str = flag(
        "raw", "weight raw component scores, or each one's advantage", choices=["raw", "advantage"]
    )
    granular_progress: str = flag(
        "train_step", "progress over training, or over the group", choices=["train_step", "batch_index"]
    )
    max_reward_failures: int | None = flag(
        None,
        "failed scores that an iteration may have, over all ranks, before the run stops (None: any number)",
    )

    # --- GRPO -------------------------------------------------------------------------------------------------------
    use_group: bool = flag(True, "normalise rewards per prompt; else over all samples (reward_aggr only)")
    trimmed_ratio: float = flag(0.0, "lowest share of rewards left out of mean and standard deviation")
    advantage_rerange_strategy: str | None = flag(
        None, "order of the samples over optimizer steps", choices=["random", "balance"]
    )
    adv_clip_max: float = flag(5.0, "advantages are clamped to ± this")
    clip_range: float = flag(1e-4, "clip range of the probability ratio")
    kl_coeff: float = flag(0.0, "weight of the squared log-probability change against the old policy")
    ref_kl_coeff: float = flag(0.0, "weight of the KL divergence from the base model's transitions; 0: not computed")
    recompute_old_log_prob: bool = flag(False, "compute the old log-probabilities again in the batches of training")

    # --- optimizer --------------------------------------------------------------------------------------------------
    learning_rate: float = flag(1e-5, "AdamW learning rate")
    lr_scheduler: str = flag(
        "constant_with_warmup",
        "learning rate over optimizer steps, a schedule of diffusers",
        choices=[
            "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
            "piecewise_constant",
        ],
    )  # fmt: skip
    lr_warmup_steps: int = flag(0, "optimizer steps of warm-up")
    lr_num_cycles: int = flag(1, "cycles of cosine_with_restarts")
    lr_power: float = flag(1.0, "power of polynomial")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "gradient norm is clipped to this")
    max_skipped_steps: int = flag(5, "optimizer steps skipped in a row for non-finite numbers before the run stops")
    ema_decay: float = flag(0.0, "decay of an average of the weights, saved beside each checkpoint; 0: none")
    ema_start_step: int = flag(0, "iteration at which averaging starts")
    mixed_precision: str = flag("bf16", "compute format", choices=["no", "bf16"])
    master_weight_type: str = flag("fp32", "format of the trained weights", choices=["fp32", "bf16"])
    allow_tf32: bool = flag(True, "TF32 matrix products on NVIDIA GPUs")
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass: less memory, more time")
    selective_checkpointing: float = flag(1.0, "share of the blocks that gradient_checkpointing covers")
    compile: str = flag(
        "auto",
        "compile the transformer's blocks (auto: on a GPU, not with deepspeed)",
        choices=["auto", "true", "false"],
    )
    cudnn_attention: str = flag(
        "always",
        "on a GPU, use cuDNN's attention, the fastest: never, only in steps that aren't trained, or in training too",
        choices=["never", "rollout", "always"],
    )

    # --- LoRA -------------------------------------------------------------------------------------------------------
    use_lora: bool = flag(False, "train low-rank adapters; the model itself stays frozen")
    lora_rank: int = flag(128, "rank of the adapters")
    lora_alpha: int = flag(256, "scale of the adapters, times their rank")
    lora_target_modules: list[str] = flag(
        ["to_q", "to_k", "to_v", "to_out.0"], "linear layers that get an adapter", metavar="MODULE"
    )
    quantize_base: bool = flag(False, "LoRA, without fsdp or deepspeed: the frozen model's blocks are held in 8 bit")

    # --- processes --------------------------------------------------------------------------------------------------
    parallel: str | None = flag(
        None,
        "how the model lies on the processes (None: ddp for several, else none)",
        choices=["none", "ddp", "fsdp", "deepspeed"],
    )
    zero_stage: int = flag(2, "deepspeed: splits gradients and moments (2), or parameters too (3)", choices=[2, 3])
    fsdp_sharding_startegy: str | None = flag(
        None,
        "fsdp: split over all processes, over those of a node, or that without splitting again after the forward pass; "
        "given without --parallel, chooses fsdp (none: ddp)",
        choices=["full", "hybrid_full", "hybrid_zero2", "none"],
    )
    sp_size: int = flag(
        1,
        "ddp, fsdp: so many processes compute a picture together, its tokens split over them (diffusers' Ulysses "
        "attention), for pictures too large for one GPU; must divide processes, attention heads, image and text tokens",
    )
    use_cpu_offload: bool = flag(False, "fsdp, deepspeed: parameters and moments wait in the CPU's memory")
    rollout_keep_gathered: str = flag(
        "auto",
        "fsdp: gather parameters once a rollout and an optimizer step, not in each forward and backward pass (auto: "
        "where memory allows; true: in the rollout in any case)",
        choices=["auto", "true", "false"],
    )

    # --- evaluation during training ---------------------------------------------------------------------------------
    eval_steps: int = flag(
        0,
        "iterations between evaluations: samples --eval_prompts with fixed seeds and scores them, before training and "
        "after the last iteration too, and lets the link `best` point to the best checkpoint; 0: none",
    )
    eval_prompts: str | None = flag(None, "text file of the prompts of these evaluations, one a line")
    eval_reward: str | None = flag(
        None,
        "what decides which checkpoint is best, named as in --reward_model: rewards that training doesn't see "
        "(None: the reward in training)",
    )

    # --- logging ----------------------------------------------------------------------------------------------------
    experiment_name: str = flag("mixgrpo", "name of the run in wandb")
    wandb_key: str | None = flag(None, "refused: set WANDB_API_KEY in the environment instead")
    wandb_project: str = flag("mixgrpo-flux", "project of the run in wandb")
    use_wandb: bool = flag(True, "log to wandb too; offline without a key")
    image_log_steps: int = flag(10, "iterations between saved image grids; 0: none")
    serve_report: int | None = flag(
        None, "port of this machine at which a browser finds the report of the running training (0: any free one)"
    )

    @classmethod
    def create(cls, **explicit: Any) -> "GRPOConfig":
        """The config of the given flags, with the defaults of their algorithm where a flag isn't given.

        Raises:
            ValueError: a flag contradicts the algorithm, or a value is out of range.
        """
        base = {f.name: default_of(f) for f in fields(cls)}
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
                    raise ValueError(f"--algorithm {name} contradicts --{key} {explicit[key]}: it needs {value}")
            explicit = {**algorithm["defaults"], **algorithm["requires"], **explicit, "algorithm": name}
            if name in TREES:
                tree = {**base, **explicit}
                leaves = tree["tree_split_children"] ** len(tree["tree_split_points"])
                if leaves >= 2:  # else _check_algorithm says what is wrong
                    explicit.setdefault("num_generations", leaves)
                if explicit["sde_type"] == "cps":
                    explicit.setdefault("tree_split_noise_scale", 1.0)  # cps keeps the noise level
            if name in (*MERGES, *TREES):
                explicit["gradient_accumulation_steps"] = explicit.get("num_generations", base["num_generations"])
        return cls(**explicit)

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"--{name} {getattr(self, name)}: {what}")

        if self.wandb_key:
            raise ValueError("--wandb_key: keys don't belong on a command line; set WANDB_API_KEY in the environment")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float):
                need(math.isfinite(value), f.name, "must be a finite number")
        for name in (
            "max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps "
            "h w group_size iters_per_group max_iters_per_group min_iters_per_group unified_reward_num_workers "
            "reward_batch_size max_skipped_steps lora_rank lora_alpha sp_size"
        ).split():
            need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("prompts_per_iteration rollout_batch_size train_micro_batch_size checkpoints_total_limit").split():
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1, or None")
        need(0 <= (self.serve_report or 0) < 65536, "serve_report", "a port is between 0 and 65535")
        need((self.max_reward_failures or 0) >= 0, "max_reward_failures", "must not be negative, or None")
        for name in (
            "seed sampler_seed dataloader_num_workers frozen_init_timesteps prog_overlap_step eta kl_coeff "
            "lr_warmup_steps weight_decay ema_start_step image_log_steps flow_grpo_fast_steps "
            "depth_pruning_slide_interval ref_kl_coeff eval_steps"
        ).split():
            need(getattr(self, name) >= 0, name, "must not be negative")
        for name in (
            "shift adv_clip_max clip_range learning_rate max_grad_norm guidance_scale entropy_threshold "
            "tree_split_noise_scale tree_fusion_temperature"
        ).split():
            need(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("cfg trimmed_ratio ema_decay").split():
            need(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        for name in (
            "timestep_fraction dpm_post_compress_ratio selective_checkpointing tree_width_prune_share"
        ).split():
            need(0 < getattr(self, name) <= 1, name, "must be above 0 and at most 1")
        for f in fields(self):  # argparse has checked the command line; this is for other callers
            if f.metadata.get("choices"):
                value = getattr(self, f.name)
                optional = get_origin(f.type) is UnionType and value is None
                need(optional or value in f.metadata["choices"], f.name, f"choose from {f.metadata['choices']}")

        need(self.h % 16 == 0, "h", "must be a multiple of 16")
        need(self.w % 16 == 0, "w", "must be a multiple of 16")
        need(self.num_generations >= 2, "num_generations", "a group needs at least 2 images to compare")
        need(
            self.num_generations % self.gradient_accumulation_steps == 0,
            "gradient_accumulation_steps",
            f"must divide --num_generations {self.num_generations}",
        )
        need(self.sampling_steps >= 3, "sampling_steps", "must be at least 3")
        usable = self.sampling_steps - 2  # the window's indices are 0 … T−3
        if self.training_strategy == "part":
            need(
                self.group_size <= usable,
                "group_size",
                f"the window doesn't fit into the {usable} usable steps (sampling_steps {self.sampling_steps} less 2)",
            )
            need(
                not self.drop_last_sample and not self.flow_grpo_sampling,
                "training_strategy",
                "drop_last_sample and flow_grpo_sampling go with --training_strategy all",
            )
        else:
            trainable = self.sampling_steps - 1
            need(
                self.frozen_init_timesteps <= trainable,
                "frozen_init_timesteps",
                f"there are {trainable} trainable steps",
            )
            need(
                int(trainable * self.timestep_fraction) >= 1,
                "timestep_fraction",
                f"leaves no step of {trainable} to train",
            )
        need(self.eta > 0, "eta", "must be greater than 0: deterministic steps can't be trained")
        need(
            self.sde_type != "cps" or self.eta < 1,
            "eta",
            "coefficients-preserving steps need an eta below 1",
        )
        self._check_algorithm(need)
        need(
            self.dpm_algorithm_type in (None, "dpmsolver++"),
            "dpm_algorithm_type",
            "choose from [None, 'dpmsolver++'] (the reference's dpmsolver was wrong for flow models)",
        )
        need(
            self.dpm_apply_strategy in (None, "post"),
            "dpm_apply_strategy",
            "choose from [None, 'post'] (a solver on `all` steps leaves no stochastic step to train)",
        )
        need(
            self.dpm_algorithm_type is None or self.training_strategy == "part",
            "dpm_algorithm_type",
            "the compressed tail goes with --training_strategy part",
        )
        need(
            self.use_group or self.multi_reward_mix == "reward_aggr",
            "multi_reward_mix",
            "without --use_group choose reward_aggr",
        )
        need(
            self.granular_mix == "raw" or self.multi_reward_mix == "advantage_aggr",
            "granular_mix",
            "advantage needs --multi_reward_mix advantage_aggr",
        )
        need(
            self.max_iters_per_group >= self.min_iters_per_group,
            "max_iters_per_group",
            "must not be below min_iters_per_group",
        )
        engine = self.parallel or ("ddp" if self.fsdp_sharding_startegy == "none" else None)
        need(
            self.fsdp_sharding_startegy in (None, "none") or engine in (None, "fsdp"),
            "fsdp_sharding_startegy",
            f"goes with --parallel fsdp, not {engine}",
        )
        need(
            self.fsdp_sharding_startegy != "none" or engine != "fsdp",
            "fsdp_sharding_startegy",
            "splits nothing; choose --parallel ddp, or full, hybrid_full or hybrid_zero2",
        )
        if engine == "deepspeed":
            need(self.ema_decay == 0, "ema_decay", "DeepSpeed splits the weights its own way; choose --parallel fsdp")
            need(self.compile != "true", "compile", "DeepSpeed's hooks break the graph; choose auto or false")
        if self.quantize_base:
            need(self.use_lora, "quantize_base", "goes with --use_lora: weights in 8 bit can't be trained")
            split = engine in ("fsdp", "deepspeed") or self.fsdp_sharding_startegy not in (None, "none")
            need(not split, "quantize_base", "each process holds the model whole; choose --parallel none or ddp")
        if self.sp_size > 1:
            need(engine in (None, "ddp", "fsdp"), "sp_size", f"goes with --parallel ddp or fsdp, not {engine}")
            need(self.compile != "true", "compile", f"not with --sp_size {self.sp_size}; choose auto or false")
        need(
            (self.data_json_path is None) != (self.prompts_file is None),
            "data_json_path",
            "give either --data_json_path (cached embeddings) or --prompts_file (texts)",
        )
        resolve_reward_spec(self)
        for name in ("eval_prompts", "eval_reward"):
            need(self.eval_steps > 0 or getattr(self, name) is None, name, "goes with --eval_steps")
        need(self.eval_steps == 0 or self.eval_prompts is not None, "eval_steps", "give --eval_prompts too")
        if self.eval_reward is not None:
            resolve_reward_spec(self, "eval_reward")

    def held_out(self) -> "GRPOConfig":
        """These settings with --eval_reward, scored in this process, in place of the reward in training."""
        own = {"eval_steps": 0, "eval_prompts": None, "eval_reward": None, "reward_server": None}
        return replace(self, reward_model=self.eval_reward, **own)

    def _check_algorithm(self, need: Callable[[bool, str, str], None]) -> None:
        """The flags of Flow-GRPO-Fast, E-GRPO, Granular-GRPO and BranchGRPO."""
        steps, name = self.sampling_steps, self.algorithm
        window = {"flow_grpo": self.flow_grpo_fast_steps, "branch_grpo_mix": self.group_size}.get(name, 0)
        need(window <= steps - 2, "group_size" if name in TREES else "flow_grpo_fast_steps", f"at most {steps - 2}")
        for f in fields(self):
            owners = OWN_FLAGS.get(f.name) or OWN_FLAGS.get(f.name.split("_")[0], ())
            if owners and name not in owners:
                need(getattr(self, f.name) == default_of(f), f.name, f"goes with --algorithm {' or '.join(owners)}")
        if self.flow_grpo_fast_steps:
            need(self.frozen_init_timesteps == 0, "frozen_init_timesteps", "not with --flow_grpo_fast_steps")
            share = int(self.flow_grpo_fast_steps * self.timestep_fraction)
            need(share >= 1, "timestep_fraction", f"leaves no step of {self.flow_grpo_fast_steps} to train")
        if name in (*MERGES, *TREES):
            for value, plain in {"timestep_fraction": 1, "frozen_init_timesteps": 0}.items():
                need(getattr(self, value) == plain, value, f"--algorithm {name} needs {plain}")
        if name in MERGES:
            active, merges = self.eta_step_list, self.eta_step_merge_list
            need(active == sorted(set(active)), "eta_step_list", "steps must ascend, each once")
            need(all(0 <= e < steps - 1 for e in active), "eta_step_list", f"choose from 0 to {steps - 2}")
            need(not merges or len(merges) == len(active), "eta_step_merge_list", f"--eta_step_list has {len(active)}")
            for step, merge in zip(active, merges, strict=False):
                fits = merge >= 1 and step + merge < steps
                need(fits, "eta_step_merge_list", f"step {step} can be merged into 1 to {steps - 1 - step} steps")
            strides = self.granular_list
            need(bool(strides) and min(strides) >= 1, "granular_list", "give strides of at least 1")
            need(len(set(strides)) == len(strides), "granular_list", "give each stride once")
        if name in TREES:
            splits, children = self.tree_split_points, self.tree_split_children
            need(self.share_prefix, "share_prefix", f"--algorithm {name} always shares what its rows have in common")
            need(children >= 2, "tree_split_children", "must be at least 2")
            need(bool(splits) and splits == sorted(set(splits)), "tree_split_points", "steps must ascend, each once")
            need(splits[0] >= 0 and splits[-1] < steps - 1, "tree_split_points", f"choose from 0 to {steps - 2}")
            leaves = children ** len(splits)
            need(self.num_generations == leaves, "num_generations", f"the tree has {children}^{len(splits)} = {leaves}")
            if self.sde_type == "cps":
                most = 1 / math.sin(self.eta * math.pi / 2)
                fits = self.tree_split_noise_scale <= most
                need(fits, "tree_split_noise_scale", f"at most {most:.3g} with --sde_type cps --eta {self.eta}")
            inside = all(1 <= depth < steps for depth in self.depth_pruning)
            need(inside, "depth_pruning", f"depths lie between 1 and {steps - 1}")
            need(self.depth_pruning_stop_depth >= 1, "depth_pruning_stop_depth", "must be at least 1")

    def data_ranks(self, world_size: int) -> int:
        """Groups of processes with prompts of their own: all processes, or with --sp_size so many times fewer.

        Raises ValueError if the processes don't divide.
        """
        if world_size % self.sp_size:
            raise ValueError(f"--sp_size {self.sp_size}: must divide the number of processes, which is {world_size}")
        return world_size // self.sp_size

    def local_prompts(self, world_size: int) -> int:
        """Prompts of each data rank, P / data ranks. Raises ValueError if P doesn't divide."""
        ranks = self.data_ranks(world_size)
        if self.prompts_per_iteration is None:
            return self.train_batch_size
        if self.prompts_per_iteration % ranks:
            raise ValueError(
                f"--prompts_per_iteration {self.prompts_per_iteration}: must be a multiple of {ranks} ranks"
            )
        return self.prompts_per_iteration // ranks

    def to_public_dict(self) -> dict[str, Any]:
        """All fields for args.json and wandb, without credentials that a URL may hold."""
        without_login = re.compile(r"(?:(?<=://)|(?<![^,\s]))[^/@\s,]+@")
        values = asdict(self)
        values.pop("wandb_key")
        return {k: without_login.sub("", v) if isinstance(v, str) else v for k, v in values.items()}


def world_size_of_environment() -> int:
    """Number of processes as torchrun announces it."""
    return int(os.environ.get("WORLD_SIZE", "1"))

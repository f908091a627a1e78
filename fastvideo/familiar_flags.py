"""What to answer to a flag that a program doesn't have: the flag that users of other programs mean, or a typing error.

FAMILIAR holds names from diffusers' training examples, TRL, the Trainer of transformers, accelerate, torchrun, wandb,
Flow-GRPO and kohya's scripts. Without an entry only a typing error is answered: a name that merely looks alike often
means something else.
"""

import difflib
import re
from collections.abc import Collection

# "names of other programs" -> answers. A program gives the first answer whose flags it has all. An answer that starts
# with -- is a flag to use instead; any other says what to do, as no flag does the same.
_PROCESSES = "no flag: NPROC_PER_NODE=8 before a recipe, or torchrun, sets the processes per machine"
_MACHINES = "no flag: HOSTFILE=FILE before a recipe starts several machines, see docs/distributed.md"
_ADAMW = "no flag: the optimizer is AdamW with betas 0.9 and 0.999, epsilon 1e-8 and --weight_decay"
_ONE_LOSS = "no flag: GRPO has no such loss term, leave it out"
_NO_PICTURES = "no flag: training takes no pictures; give texts with --prompts_file or --data_json_path"
_TUNED = "--model_path, beside --pretrained_model_name_or_path, the base model"
_START = "no flag: training starts with the base model; --resume_from_checkpoint goes on with a run"
_HUB = "no flag: upload the finished checkpoint folder with the hub's own command"
_FAMILIAR: dict[str, tuple[str, ...]] = {
    # models
    "model base_model model_name model_id model_name_or_path pretrained_model pretrained_model_path pretrained_path "
    "pretrained_model_name_or_path pretrained base_model_path flux_path flux pipeline model_dir name_or_path": (
        "--pretrained_model_name_or_path (base model) or --model_path (tuned model)",
        "--pretrained_model_name_or_path",
        "--model_path",
    ),
    "model_path": ("--pretrained_model_name_or_path",),
    "tuned_model transformer transformer_path lora_path lora_weights lora_dir lora_model_path network_weights "
    "adapter adapter_path": (_TUNED, _START),
    "ckpt ckpt_path checkpoint checkpoint_path checkpoint_dir": (_TUNED, "--resume_from_checkpoint"),
    "revision variant non_ema_revision": ("no flag: download that version and give its folder",),
    "vae vae_path ae text_encoder text_encoder_path t5xxl clip_l tokenizer tokenizer_name": (
        "no flag: all parts come from the folder of --pretrained_model_name_or_path",
        "no flag: all parts come from the folder of --model_path",
    ),
    "hub_token token hf_token": ("no flag: set HF_TOKEN in the environment",),
    "cache_dir": ("no flag: set HF_HOME in the environment",),
    "push_to_hub hub_model_id push_checkpoints_to_hub": (_HUB,),
    "torch_dtype precision weight_dtype dtype": ("--mixed_precision", "--dtype", "--reward_dtype"),
    "fp16 full_fp16 half": ("--mixed_precision bf16", "--dtype fp16", "--reward_dtype fp16", "--dtype bf16"),
    "bf16 full_bf16 bfloat16": ("--mixed_precision bf16", "--dtype bf16", "--reward_dtype bf16"),
    "fp32 float32 full_precision": ("--mixed_precision no", "--dtype fp32", "--reward_dtype fp32"),
    "tf32": ("--allow_tf32",),
    "fp8 use_fp8 enable_fp8 rollout_fp8 fp8_rollout": (
        "--rollout_precision fp8 (steps that aren't trained); --quantize_base holds LoRA's frozen model in 8 bit",
    ),
    "load_in_8bit fp8_base do_fp8_training quantize quantization bnb_quantization_config_path": ("--quantize_base",),
    "load_in_4bit": ("--quantize_base, which holds the frozen model in 8 bit",),
    # prompts and data
    "prompts prompt_list caption_file captions": (
        "--prompts_file",
        "--prompt_dir",
        "--manifest, which has the prompts",
    ),
    "prompt_file prompts_path prompt_path prompt_dir prompt_fn": (
        "--prompts_file",
        "--manifest, which has the prompts",
    ),
    "prompts_file": ("--prompt_dir", "--manifest, which has the prompts"),
    "validation_prompt": (
        "--eval_prompts, a text file with one prompt per line",
        "--prompts_file, a text file with one prompt per line",
    ),
    "prompt text caption instance_prompt": (
        "--prompts_file, a text file with one prompt per line",
        "--prompt_dir, a text file with one prompt per line",
    ),
    "validation_prompts sample_prompts test_prompts": ("--eval_prompts",),
    "negative_prompt": ("no flag: FLUX is sampled without negative prompts",),
    "data data_path data_json json_path train_data embeddings embedding_path embed_path": ("--data_json_path",),
    "dataset dataset_name dataset_path train_file": ("--prompts_file, a file of prompts or a hub's data set",),
    "dataset_config dataset_config_name dataset_split": ("--prompts_file user/name:subset:split",),
    "caption_column text_column prompt_key caption_key": ("--prompt_column",),
    "validation_split test_size val_split held_out": ("--eval_split",),
    "train_data_dir instance_data_dir class_data_dir class_prompt num_class_images image_column "
    "caption_extension repeats center_crop random_flip flip_aug color_aug enable_bucket cache_latents": (
        _NO_PICTURES,
    ),
    "images image_dir image_folder img_dir pictures": ("--manifest",),
    "img image_path": ("--image",),
    "num_workers workers max_data_loader_n_workers": ("--dataloader_num_workers",),
    "max_prompt_length max_token_length max_length tokenizer_max_length": ("--max_sequence_length",),
    "max_sequence_length": ("no flag here: preprocessing, which embeds the prompts, has --max_sequence_length",),
    # amounts
    "max_steps total_steps num_train_steps train_steps training_steps iterations num_iters max_iters "
    "max_iterations": ("--max_train_steps",),
    "steps num_steps": (
        "--max_train_steps (iterations) or --sampling_steps (denoising steps)",
        "--total_sampling_steps",
    ),
    "epochs num_epochs num_train_epochs max_train_epochs": ("--max_train_steps, which counts iterations",),
    "batch_size bs batch per_device_train_batch_size per_gpu_train_batch_size micro_batch_size": (
        "--train_batch_size (prompts per process) or --train_micro_batch_size (pictures per forward pass)",
        "--reward_batch_size",
        "--batch_size",
    ),
    "global_batch_size total_batch_size": ("--prompts_per_iteration",),
    "sample_batch_size sampling_batch_size": ("--rollout_batch_size", "--batch_size"),
    "per_device_eval_batch_size eval_batch_size test_batch_size": (
        "no flag: the evaluations of --eval_steps draw one picture at a time",
        "--reward_batch_size",
    ),
    "num_generation n_generations num_samples samples_per_prompt n_samples num_images num_images_per_prompt "
    "num_image_per_prompt images_per_prompt rollout_n rollouts": ("--num_generations", "--images_per_prompt"),
    "grad_accum grad_accumulation_steps accumulation_steps gradient_accumulation accumulate_grad_batches": (
        "--gradient_accumulation_steps",
    ),
    "group": ("--num_generations (pictures per prompt) or --group_size (steps of the window)",),
    "caption_dropout caption_dropout_rate prompt_dropout": ("--cfg, the share of prompts",),
    "num_iterations num_inner_epochs ppo_epochs": (
        "no flag: each sample trains once; --gradient_accumulation_steps sets the optimizer steps per iteration",
    ),
    # sampling
    "height image_height": ("--h",),
    "width image_width": ("--w",),
    "resolution image_size img_size size validation_resolution": ("--h and --w",),
    "num_inference_steps inference_steps sample_steps denoising_steps diffusion_steps sample_num_steps "
    "num_sampling_steps validation_num_inference_steps": ("--sampling_steps", "--total_sampling_steps"),
    "sampling_steps": ("--total_sampling_steps",),
    "total_sampling_steps": ("--sampling_steps",),
    "eval_num_steps": ("--sampling_steps, which evaluations take too",),
    "guidance cfg_scale sample_guidance_scale embedded_guidance validation_guidance "
    "flux_guidance_value": ("--guidance_scale",),
    "cfg": ("--guidance_scale",),
    "discrete_flow_shift timestep_shift flow_shift time_shift flux_schedule_shift flow_schedule_shift": ("--shift",),
    "noise_level sample_eta sde_eta": ("--eta",),
    "sde_window_size window_size window": ("--group_size, the size of the window in steps",),
    "sde sde_mode sde_algorithm": ("--sde_type",),
    "solver dpm_solver": ("--dpm_algorithm_type",),
    "solver_order dpm_order": ("--dpm_solver_order",),
    "compress_ratio": ("--dpm_post_compress_ratio",),
    "same_latent same_noise same_init_noise": ("--init_same_noise",),
    "sampler": ("no flag: the pipeline's own scheduler is used; --shift sets its shift",),
    "scheduler": ("--lr_scheduler", "no flag: the pipeline's own scheduler is used; --shift sets its shift"),
    "random_seed manual_seed": ("--seed",),
    "lora_scale lora_weight": (
        "no flag: adapters have the strength --lora_alpha / --lora_rank",
        "no flag: adapters of --model_path have the strength that they were trained with",
    ),
    # rewards
    "reward rewards reward_fn reward_func reward_funcs reward_function reward_name reward_type scorer metric metrics": (
        "--reward_model_type",
        "--reward_model",
    ),
    "multi_reward": ("--reward_model_type multi_reward", "--reward_model multi_reward"),
    "use_hpsv2 use_hpsv3 use_pickscore use_clip use_imagereward use_unified_reward": ("--reward_model",),
    "reward_model_path reward_ckpt reward_path": ("--reward_model, whose files have flags such as --hps_path",),
    "reward_weights reward_weight": ("--reward_model with weights, as hpsv2:0.7,image_reward:0.3",),
    "reward_url reward_server_url reward_api": ("--reward_server",),
    "per_prompt_stat_tracking": ("--use_group",),
    "global_std": ("--no_use_group",),
    # GRPO
    "algo algorithm_name": ("--algorithm",),
    "beta kl kl_beta kl_weight init_kl_coef kl_ratio": ("--ref_kl_coeff",),
    "clip epsilon clip_eps eps_clip clip_ratio cliprange clip_param train_clip_range": ("--clip_range",),
    "epsilon_high": ("--clip_range, the same on both sides",),
    "adv_clip advantage_clip train_adv_clip_max": ("--adv_clip_max",),
    "adv_norm norm_adv advantage_normalization scale_rewards": ("--advantage_norm",),
    "p_norm advantage_p_norm": ("--advantage_p",),
    "guard grpo_guard ratio_normalization": ("--ratio_norm",),
    "kl_threshold divergence_threshold kl_target": ("--divergence_limit",),
    "best_of_n bestofn": ("no flag: all samples of a group are trained",),
    "train_timestep_fraction": ("--timestep_fraction",),
    "temperature top_k top_p max_completion_length use_vllm": (
        "no flag: pictures have no such sampling; --eta sets the noise",
    ),
    "with_prior_preservation prior_loss_weight snr_gamma noise_offset weighting_scheme logit_mean logit_std "
    "mode_scale timestep_sampling sigmoid_scale model_prediction_type": (_ONE_LOSS,),
    # optimizer
    "lr transformer_lr unet_lr base_lr train_learning_rate train_lr": ("--learning_rate",),
    "text_encoder_lr train_text_encoder": ("no flag: only the transformer is trained",),
    "scale_lr": ("no flag: give the scaled --learning_rate",),
    "scheduler_type lr_scheduler_type lr_schedule schedule": ("--lr_scheduler",),
    "warmup warmup_steps num_warmup_steps lr_warmup": ("--lr_warmup_steps",),
    "warmup_ratio": ("--lr_warmup_steps, a number of optimizer steps",),
    "lr_scheduler_num_cycles num_cycles": ("--lr_num_cycles",),
    "lr_scheduler_power": ("--lr_power",),
    "wd adam_weight_decay": ("--weight_decay",),
    "grad_clip clip_grad gradient_clipping clip_grad_norm max_gradient_norm gradient_clip_val train_max_grad_norm "
    "grad_norm": ("--max_grad_norm",),
    "optimizer optim optimizer_type adam_beta1 adam_beta2 adam_epsilon prodigy_beta3 betas": (_ADAMW,),
    "use_8bit_adam train_use_8bit_adam adam8bit": (
        "no flag: the optimizer is AdamW; --master_weight_type bf16 halves its memory",
    ),
    "ema use_ema ema_rate": ("--ema_decay",),
    "checkpointing grad_checkpointing activation_checkpointing": ("--gradient_checkpointing",),
    "xformers enable_xformers_memory_efficient_attention attn_implementation flash_attention sdpa mem_eff_attn "
    "enable_npu_flash_attention": ("--cudnn_attention",),
    "torch_compile use_compile dynamo_backend": ("--compile",),
    # LoRA
    "lora": ("--use_lora", _TUNED),
    "use_peft peft network_module": ("--use_lora",),
    "rank r lora_r lora_dim network_dim linear": ("--lora_rank",),
    "alpha network_alpha linear_alpha": ("--lora_alpha",),
    "lora_layers target_modules lora_targets lora_modules": ("--lora_target_modules",),
    "lora_dropout network_dropout": ("no flag: adapters are trained without dropout",),
    # output
    "output out outdir out_dir output_path output_folder save_dir save_path project_dir": (
        "--output_dir",
        "--output_json",
    ),
    "output_file out_file output_name": ("--output_json", "--output_dir"),
    "output_dir": ("--output_json",),
    "manifest_path": ("--manifest",),
    "overwrite_output_dir": ("no flag: choose a new --output_dir, or go on with --resume_from_checkpoint",),
    "save_steps save_interval save_freq save_every save_every_n_steps checkpoint_steps checkpoint_interval "
    "checkpoint_every": ("--checkpointing_steps",),
    "save_strategy save_every_n_epochs": ("--checkpointing_steps, a number of iterations",),
    "save_total_limit num_checkpoint_limit save_last_n_steps max_checkpoints keep_checkpoints max_step_saves_to_keep": (
        "--checkpoints_total_limit",
    ),
    "resume resume_from resume_path resume_checkpoint load_from_checkpoint": ("--resume_from_checkpoint",),
    "logging_dir log_dir logdir": ("--run_dir", "no flag: everything goes to --output_dir"),
    "run runs run_folder": ("--run_dir",),
    # evaluation
    "eval_interval eval_freq eval_every evaluation_steps validation_steps sample_every_n_steps "
    "sample_every": ("--eval_steps",),
    "eval_strategy evaluation_strategy validation_epochs sample_every_n_epochs do_eval": (
        "--eval_steps, a number of iterations",
    ),
    "num_validation_images": ("no flag: evaluations draw one picture per line of --eval_prompts",),
    "logging_steps log_interval log_every log_steps": (
        "no flag: every iteration is logged; --image_log_steps sets the iterations between pictures",
    ),
    "baseline baseline_dir": ("--baseline_manifest", "--baseline_scores", "--baseline"),
    "tuned": ("--tuned_scores", "--manifest"),
    "port http_port": ("--serve_report",),
    "address bind ip": ("--host",),
    # trackers
    "wandb tracker trackers logger loggers use_tracker enable_wandb tensorboard swanlab trackio use_tensorboard "
    "use_swanlab": ("--log_with",),
    "no_wandb disable_wandb without_wandb": ("--log_with none",),
    "project project_name wandb_project_name tracker_project_name log_tracker_name": ("--wandb_project",),
    "name run_name exp_name wandb_name wandb_run_name wandb_run experiment tracker_run_name": ("--experiment_name",),
    "wandb_mode wandb_offline": ("no flag: set WANDB_MODE=offline in the environment",),
    "wandb_entity entity wandb_team": ("no flag: set WANDB_ENTITY in the environment",),
    "wandb_dir": ("no flag: set WANDB_DIR in the environment",),
    "wandb_group wandb_tags tags": ("no flag: set WANDB_RUN_GROUP or WANDB_TAGS in the environment",),
    "swanlab_api_key": ("no flag: set SWANLAB_API_KEY in the environment",),
    "swanlab_mode": ("no flag: set SWANLAB_MODE=offline in the environment",),
    "wandb_api_key wandb_token api_key": ("no flag: set WANDB_API_KEY in the environment",),
    # processes
    "rdzv_endpoint rdzv_backend rdzv_id max_restarts": ("no flag: torchrun takes it, before the script",),
    "config_path yaml yaml_path settings": ("--config",),
    "num_processes nproc nproc_per_node num_gpus gpus n_gpus n_gpu world_size multi_gpu gpu_ids "
    "gpus_per_node": (_PROCESSES,),
    "num_machines nnodes num_nodes node_rank machine_rank master_addr master_port main_process_ip main_process_port "
    "hostfile": (_MACHINES,),
    "local_rank config_file": ("no flag: leave it out; torchrun sets what is needed",),
    "fsdp use_fsdp fsdp_config": ("--parallel fsdp",),
    "ddp use_ddp": ("--parallel ddp",),
    "deepspeed use_deepspeed deepspeed_config deepspeed_config_file": ("--parallel deepspeed",),
    "zero zero3 zero2": ("--zero_stage",),
    "sharding_strategy": ("--fsdp_sharding_strategy",),
    "sequence_parallel_size sequence_parallel ulysses_degree ulysses": ("--sp_size",),
    "offload cpu_offload fsdp_offload_params offload_optimizer_device enable_model_cpu_offload "
    "enable_sequential_cpu_offload": ("--cpu_offload model or sequential", "--use_cpu_offload"),
    "blocks_to_swap lowvram highvram low_vram": (
        "no flag: --quantize_base, --train_micro_batch_size and --rollout_batch_size save memory",
        "no flag: --cpu_offload saves memory",
    ),
    "device gpu cuda cpu": (
        "--device",
        "no flag: CUDA_VISIBLE_DEVICES chooses the GPUs, --reward_device those of the reward models",
    ),
    "dryrun dry test_run": ("--dry_run",),
}  # fmt: skip
FAMILIAR = {name: answers for names, answers in _FAMILIAR.items() for name in names.split()}

# Words that people leave out at a flag's end: --max_grad for --max_grad_norm.
_LEFT_OUT = "size steps path file dir scale norm range name rate stage limit".split()


def flags_in(text: str) -> list[str]:
    """The flags that an answer names, without dashes, and without the `no_` of a switch."""
    return [name.removeprefix("no_") for name in re.findall(r"--(\w+)", text)]


def answer(unknown: str, known: Collection[str]) -> str:
    """What follows "unknown flag ...": empty, or "; " and a question or an advice.

    unknown: the name without dashes, with underscores. known: all names that the program has, without dashes.
    """
    parts = unknown.lower().split(".")  # Flow-GRPO: --config.sample.num_steps
    last = parts[-1]
    names = ("_".join(parts[-2:]), last, last.removeprefix("no_"))
    name = next((name for name in names if name in FAMILIAR), "")
    for text in FAMILIAR.get(name, ()):
        flags = flags_in(text)
        if not set(flags) <= set(known):
            continue
        if flags and last == f"no_{name}":  # a switch turned off
            text = f"--no_{flags[0]}" if f"no_{flags[0]}" in known else f"--{flags[0]}"
        return f"; did you mean {text}?" if text.startswith("--") else f"; {text}"
    found = _mistyped(last, known)
    return f"; did you mean --{found}?" if found else ""


def _mistyped(name: str, known: Collection[str]) -> str | None:
    """The one name that is `name` with a typing error, or with its last word left out; None if none or several are."""
    longer = [other for other in known if other in {f"{name}_{word}" for word in _LEFT_OUT}]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(name, [other for other in known if _alike(name, other)], 1, 0.8)
    return close[0] if close else None


def _alike(name: str, other: str) -> bool:
    """Whether two names differ in letters within words, or in underscores. eval_batch_size isn't train_batch_size."""
    words, others = name.split("_"), other.split("_")
    if name.replace("_", "") == other.replace("_", ""):
        return True
    similar = (difflib.SequenceMatcher(None, *pair).ratio() >= 0.75 for pair in zip(words, others, strict=False))
    return len(words) == len(others) and all(similar)

"""Predicts the GPU memory of a run from its flags and the models' config.json, before any weights are loaded."""

import math
import os

from fastvideo.config import REFERENCE, GRPOConfig
from fastvideo.io.fingerprint import local_folder
from fastvideo.io.model_index import model_index
from fastvideo.io.words import counted
from fastvideo.models.family import LatentShape
from fastvideo.models.float8 import float8_layers
from fastvideo.models.int8 import quantize_linear
from fastvideo.models.pretrained import add_lora, family_of, meta_transformer, meta_vae
from fastvideo.rollout_plan import make_plan, scout_plan
from fastvideo.runtime.engines import choose_engine, kept_whole, still_to_come
from fastvideo.runtime.evaluation import Sampling
from fastvideo.utils.grpo_states import windows

import torch
from diffusers import ModelMixin

TEXT_TOKENS, ROWS_ON_A_CPU = 512, 8
# Bytes per token and unit of width, measured in bf16 on an H100 (benchmarks/results/h100_iteration.txt).
KEPT_BY_A_BLOCK = 40  # from forward to backward pass
KEPT_WITH_LORA = 26  # the same in a block whose own weights need no gradient
RECOMPUTED_WITH_LORA = 64  # by such a block that is computed again, until its backward pass ends
KEPT_AT_A_CHECKPOINT = 2  # a block's input
IN_FLIGHT = 30  # during a forward pass without gradient
LATENTS_OF_A_SCOUT = 5  # float32: x, v and three x0 predictions
DECODED_PIXEL = 1350  # bytes per pixel in the VAE's last level
USABLE = 0.95  # share of a GPU; in a run that failed with 94 % in use, the rest lay in gaps between allocations


def predict_memory(config: GRPOConfig, world_size: int) -> dict[str, float]:
    """GiB per GPU: weights, gradients, moments, activations, and their peak. Reward models on the GPU are not included.

    `rows` isn't GiB: it is --train_micro_batch_size, or its default value. `evaluation` is there if evaluations
    take more than all activations of training.

    Within 3 % of the measurements in tests/test_memory.py. What FSDP2 keeps whole depends on this machine's GPUs
    (`kept_whole`); without any, it is nothing.

    Raises:
        FlagError: a model's config.json can't be read.
    """
    path, engine = config.pretrained_model_name_or_path, choose_engine(config, world_size)
    family = family_of(path)
    transformer, compute = trained_model(config), 2 if config.mixed_precision == "bf16" else 4
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    held = [p for p in transformer.parameters() if not p.requires_grad]  # with LoRA, the base model
    frozen = sum(p.numel() * (1 if p.dtype == torch.int8 else compute) for p in held)
    everything = sum(p.numel() for p in held) or trained
    master = 2 if config.master_weight_type == "bf16" else 4
    split = world_size if engine in ("fsdp", "deepspeed") else 1
    if engine == "fsdp" and (config.fsdp_sharding_startegy or "").startswith("hybrid"):
        split = min(split, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    split_weights = 1 if engine == "deepspeed" and config.zero_stage == 2 else split

    weights = (master * trained + frozen) / split_weights
    gradients, moments = master * trained / split, 2 * master * trained / split
    if config.use_cpu_offload:  # the CPU's memory holds them
        weights, gradients, moments = 0 if engine == "fsdp" or split_weights > 1 else weights, 0, 0
    gpu = min(gpu_sizes(), default=None)
    casts = engine == "fsdp" or split_weights > 1 or (master != compute and not config.use_lora)
    in_rollout = in_training = compute * everything if casts else 0  # the whole model in the compute format
    summed, passing = gradients, 0  # gradients from micro-batch to micro-batch; parameters that aren't kept whole
    if engine == "fsdp":
        room = 0 if gpu is None else (gpu - weights - still_to_come(config) * trained / split) / 2
        whole = kept_whole(config, 4 * trained, compute * everything, lambda size: size <= room)
        block = max(sum(p.numel() for p in block.parameters()) for block in family.blocks(transformer))
        passing = 2 * compute * block  # the one that is computed, and the next
        until_backward = whole.in_training or config.fsdp_sharding_startegy == "hybrid_zero2"
        in_rollout, in_training = in_rollout * whole.in_rollout, in_training * until_backward
        summed = 4 * trained if whole.gradients else gradients
    if not config.use_cpu_offload:
        weights += len(config.copies) * master * trained / split_weights

    shape = LatentShape.of(meta_vae(path), config.h, config.w)
    sizes = transformer.config
    width, blocks = sizes.num_attention_heads * sizes.attention_head_dim, family.blocks(transformer)

    def row_of(picture: LatentShape, guidance_scale: float) -> float:
        """Bytes of one unit of width, for all tokens of a row."""
        passes = 1 + family.guided(guidance_scale)
        return passes * (picture.tokens + TEXT_TOKENS) / config.sp_size * width * compute / 2

    row = row_of(shape, config.guidance_scale)
    share = config.selective_checkpointing if config.gradient_checkpointing else 0
    whole_block, again = KEPT_BY_A_BLOCK, KEPT_BY_A_BLOCK
    if config.use_lora:
        whole_block, again = KEPT_WITH_LORA, RECOMPUTED_WITH_LORA
    kept = whole_block * (1 - share) + KEPT_AT_A_CHECKPOINT * share
    training_row = row * (len(blocks) * kept + (again if share else 0))
    left = math.inf if gpu is None else gpu - weights - in_training - summed - moments
    plan = make_plan(config, next(windows(config)))
    updates = plan.updates(config.num_generations, config.gradient_accumulation_steps)
    group = config.num_generations

    def rows_of(samples: slice, position: int) -> int:
        """Rows of a prompt from which these samples take a trained step: early in a plan, samples share rows."""
        after, branch = plan.training[position]
        return max(1, math.ceil((samples.stop - samples.start) * (after // branch) / group))

    largest = max(sum(rows_of(samples, position) for position in positions) for samples, positions in updates)
    most = config.local_prompts(world_size) * math.ceil(largest / (plan.parts or 1))
    fitting = int(min(most, left / 2 / training_row)) if left < math.inf else ROWS_ON_A_CPU
    rows = config.train_micro_batch_size or max(1, fitting)
    training = rows * training_row
    with_gradients = gradients + training
    copied = engine == "none" and master != compute  # ComputeCopy: the first gradient is in the compute format
    if copied or engine == "fsdp":
        batches = math.ceil(most / rows)
        gradients = summed if batches > 1 else compute * trained if copied else gradients
        ends = [math.ceil(i * most / batches) for i in range(batches + 1)]
        # While the first, the second, a later micro-batch is computed.
        held = [0, compute * trained if copied else gradients, gradients]
        with_gradients = max(held[min(i, 2)] + (ends[i + 1] - ends[i]) * training_row for i in range(batches))
        if copied and batches > 2:  # the sum so far and the newest, when the first block's activations are left
            last_block = math.ceil(most / batches) * row * whole_block
            with_gradients = max(with_gradients, gradients + compute * trained + last_block)
        with_gradients = max(with_gradients, gradients)
    pictures = config.local_prompts(world_size) * config.num_generations
    together = config.rollout_batch_size or pictures
    sampling = together * row * IN_FLIGHT
    # Trained steps are sampled with gradient, in even parts of at most `rows` rows.
    trained_steps = math.ceil(together / math.ceil(together / rows)) * row * len(blocks) * kept if plan.trained else 0
    if scouts := scout_plan(config):  # sampled in passes of as many rows; the latents of all are held meanwhile
        held = max(scouts.pictures, config.rollout_batch_size or config.local_prompts(world_size) * scouts.pictures)
        sampling += held * shape.tokens * shape.channels * 4 * LATENTS_OF_A_SCOUT
    copies = 0  # in FP8, one byte per weight, during the rollout
    if config.rollout_precision != "bf16":
        copies = sum(layer.weight.numel() for block in blocks for layer in float8_layers(block))
    pixel = DECODED_PIXEL * compute / 2
    decoding = (config.rollout_batch_size or config.num_generations) * config.h * config.w * pixel
    evaluation = 0.0  # samples and decodes one picture at a time, without FP8
    if config.eval_steps:
        size = Sampling.of(config)
        large = LatentShape.of(meta_vae(path), size.h, size.w, "eval_")
        evaluation = max(row_of(large, size.guidance_scale) * IN_FLIGHT, size.h * size.w * pixel)
    without_evaluation = max(training, trained_steps, sampling, decoding)
    sampled = max(sampling + copies, trained_steps + (copies if config.fp8_steps == "all" else 0))
    in_use = (
        max(in_training, passing) + with_gradients,
        max(in_rollout, passing) + max(sampled, evaluation),
        decoding,
    )
    peak, weights = weights + moments + max(in_use), weights + max(in_rollout, in_training)
    activations = max(without_evaluation, evaluation)
    parts = dict(weights=weights, gradients=gradients, moments=moments, activations=activations, peak=peak)
    parts |= {"fp8_copies": copies} if copies else {}
    parts |= {"evaluation": evaluation} if evaluation > without_evaluation else {}
    return {"rows": rows} | {name: size / 2**30 for name, size in parts.items()}


def trained_model(config: GRPOConfig) -> ModelMixin:
    """The model of the run on the meta device, with its adapters if it has any: what is trained has requires_grad.

    Raises:
        FlagError: a model's config.json can't be read, or has no layers of --lora_target_modules.
    """
    transformer = meta_transformer(config.pretrained_model_name_or_path)
    if config.quantize_base:
        quantize_linear(family_of(config.pretrained_model_name_or_path).blocks(transformer), "meta")
    if config.use_lora:
        with torch.device("meta"):
            add_lora(transformer, config.lora_rank, config.lora_alpha, config.lora_target_modules, config.seed)
    return transformer


def checkpoint_size(config: GRPOConfig) -> int:
    """Bytes of a checkpoint: trained weights, AdamW's two moments and copies of the trained weights."""
    trained = sum(p.numel() for p in trained_model(config).parameters() if p.requires_grad)
    copies = len(set(config.copies) - ({REFERENCE} if not config.ref_reset_steps else set()))
    return trained * (2 if config.master_weight_type == "bf16" else 4) * (3 + copies)


def gpu_sizes() -> list[int]:
    """Bytes of memory of each GPU on this machine."""
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def describe_memory(config: GRPOConfig, world_size: int) -> str:
    """The prediction as one line, and a second line with a warning if this machine's GPUs are too small."""
    if local_folder(path := config.pretrained_model_name_or_path) is None:
        other = ". The plan above has FLUX.1's schedule; another family has its own schedule and guidance"
        return "predicted peak memory: unknown until the model is here" + ("" if model_index(path) else other)
    found = predict_memory(config, world_size)
    parts = ", ".join(f"{name} {size:.3g}" for name, size in found.items() if name not in ("peak", "rows"))
    line = (
        f"predicted peak memory of each process: {found['peak']:.3g} GiB (of parts that aren't all held at once: "
        f"{parts}), without reward models, with training micro-batches of at most {counted(found['rows'], 'row')}"
    )
    sizes = [size / 2**30 for size in gpu_sizes()]
    if not sizes and choose_engine(config, world_size) == "fsdp":
        line += "; this is the least: on GPUs with more room FSDP2 keeps more (this machine has no GPU to look at)"
    if sizes and found["peak"] > USABLE * min(sizes):
        lower = "--eval_h and --eval_w" if "evaluation" in found else "--train_micro_batch_size or --rollout_batch_size"
        line += (
            f"\nwarning: a GPU here has {min(sizes):.3g} GiB, some of which gaps between allocations take; lower "
            f"{lower}, use --gradient_checkpointing, --use_lora, or more GPUs with "
            "--parallel fsdp --rollout_keep_gathered false"
        )
    return line

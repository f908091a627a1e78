"""Distributes the transformer over processes: one process, DDP, FSDP2 or DeepSpeed, all through Accelerate.

The trainer uses one interface: `prepare`, `model`, `sampling_model`, `backward` per micro-batch, `step` per optimizer
step, and methods that save and load state. docs/distributed.md explains the flags.
"""

import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from fastvideo.cli import FlagError
from fastvideo.config import GRPOConfig
from fastvideo.io.messages import say
from fastvideo.io.waiting import PATIENCE, waiting
from fastvideo.models.float8 import Float8Copies
from fastvideo.models.pretrained import family_of, load_transformer, meta_transformer, random_transformer
from fastvideo.models.speed import compile_transformer, cudnn_attention, split_sequence
from fastvideo.rollout_plan import float8_states
from fastvideo.runtime.optimizer_files import TensorReader, tensors_only
from fastvideo.utils.plan import Plan

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from diffusers import ModelMixin
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.integrations import unset_hf_deepspeed_config

# Variables in which `accelerate launch` and a shell hand settings to Accelerate, or to NVIDIA's libraries.
LAUNCHER_SETTINGS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "NVIDIA_TF32_OVERRIDE")
# The types that Accelerate may report for each engine.
EXPECTED = {
    # Under torchrun Accelerate reports a type for several processes, even for the one process of --parallel none.
    "none": {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU},
    "ddp": {DistributedType.MULTI_GPU, DistributedType.MULTI_CPU},
    "fsdp": {DistributedType.FSDP},
    "deepspeed": {DistributedType.DEEPSPEED},
}


def still_to_come(config: GRPOConfig) -> int:
    """Bytes per trained parameter that a new engine doesn't hold yet: float32 gradients, two moments, copies."""
    return 4 * (3 + len(config.copies))


def choose_engine(config: GRPOConfig, world_size: int) -> str:
    """The engine's name. Without --parallel: ddp for several processes, else none.

    Raises:
        FlagError: the number of processes or a setting doesn't fit the engine.
    """
    sharded = config.fsdp_sharding_startegy not in (None, "none") and world_size > 1
    name = config.parallel or ("fsdp" if sharded else "ddp" if world_size > 1 else "none")
    if name == "none" and world_size > 1:
        raise FlagError("parallel", name, f"{world_size} processes were started; choose ddp, fsdp or deepspeed")
    if name in ("fsdp", "deepspeed") and config.master_weight_type != "fp32":
        raise FlagError("master_weight_type", config.master_weight_type, f"--parallel {name} supports only fp32")
    if name in ("none", "ddp") and config.use_cpu_offload:
        raise FlagError("use_cpu_offload", None, f"needs --parallel fsdp or deepspeed; this run is {name}")
    if name == "fsdp" and (config.fsdp_sharding_startegy or "").startswith("hybrid"):
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", world_size // per_node))
        if nodes > 1 and (per_node < 2 or per_node * nodes != world_size):
            raise FlagError(
                "fsdp_sharding_startegy",
                config.fsdp_sharding_startegy,
                f"needs the same number of processes on every node, at least 2; here are {world_size} on {nodes} "
                f"nodes, {per_node} of them on this one",
            )
    if config.dry_run:  # describes the run of an engine without its processes
        return name
    if name == "ddp" and world_size == 1:
        raise FlagError("parallel", name, "only one process was started; use torchrun, or --parallel none")
    if name in ("fsdp", "deepspeed") and "LOCAL_RANK" not in os.environ:
        raise FlagError("parallel", name, "start it with torchrun (--nproc_per_node 1 for a single process)")
    return name


class Whole(NamedTuple):
    """What FSDP2 keeps whole on every GPU. gradients: from micro-batch to micro-batch. in_rollout, in_training: the
    parameters in the compute format, for a part of the rollout and until the optimizer step."""

    gradients: bool
    in_rollout: bool
    in_training: bool


def kept_whole(config: GRPOConfig, gradients: int, parameters: int, fits: Callable[[int], bool]) -> Whole:
    """What FSDP2 keeps whole. gradients, parameters: bytes of the whole. fits: bytes -> whether they fit every GPU."""
    choice = config.rollout_keep_gathered
    return Whole(
        gradients=fits(gradients),
        in_rollout=fits(parameters) if choice == "auto" else choice == "true",
        in_training=choice != "false" and fits(gradients + parameters),
    )


def ignore_launcher_settings() -> None:
    """Removes the environment's settings of numbers and engines: nothing but this program's flags decides them.

    Some of them would count even more than arguments: ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides all gradients.
    """
    found = sorted(name for name in os.environ if name.startswith(LAUNCHER_SETTINGS))
    if found:
        say(f"ignored, because this program's flags decide: {', '.join(found)}")
    for name in found:
        del os.environ[name]


def build_accelerator(config: GRPOConfig, name: str) -> Accelerator:
    """The Accelerator of engine `name`.

    Raises:
        FlagError: Accelerate set up another type, or the environment doesn't say how to connect the processes.
    """
    ignore_launcher_settings()
    cpu = not torch.cuda.is_available()
    if config.use_cpu_offload and cpu:
        raise FlagError("use_cpu_offload", None, "this machine has no GPU")
    together = InitProcessGroupKwargs(timeout=PATIENCE + timedelta(seconds=config.reward_timeout))
    settings = {"mixed_precision": config.mixed_precision, "cpu": cpu, "kwargs_handlers": [together]}
    if name == "fsdp":
        compute = torch.bfloat16 if config.mixed_precision == "bf16" else None
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=family_of(config.pretrained_model_name_or_path).transformer._repeated_blocks,
            reshard_after_forward=config.fsdp_sharding_startegy != "hybrid_zero2",
            cpu_offload=config.use_cpu_offload,
            cpu_ram_efficient_loading=True,  # the first process alone reads the weights
            # Inputs stay float32, because the timestep would lose digits in bf16. Autocast casts as without FSDP.
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        )
        if config.use_cpu_offload:
            os.environ["FSDP_OFFLOAD_PARAMS"] = "true"  # Accelerate then adds a CPU backend, to clip gradients there
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(os.environ.get("WORLD_SIZE", "1")) // per_node
        if nodes > 1 and (config.fsdp_sharding_startegy or "").startswith("hybrid"):
            settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=nodes, dp_shard_size=per_node)
        # Uncompiled single blocks of FLUX return views. The warning is harmless: nothing changes the views in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        if cpu:  # on a CPU Accelerate silently skips FSDP
            PartialState(cpu=True, timeout=together.timeout)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif name == "ddp":  # gradients are views of DDP's buckets, not copies
        settings["kwargs_handlers"].append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    elif name == "deepspeed":
        offload = "cpu" if config.use_cpu_offload else "none"
        settings["deepspeed_plugin"] = DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "offload_optimizer": {"device": offload},
                    **({"offload_param": {"device": offload}} if config.zero_stage == 3 else {}),
                },
                "communication_data_type": "fp32",
            }
        )
        settings["cpu"] = False  # True would silently drop the plugin
        if cpu:
            from deepspeed import ops

            together.backend = "gloo"
            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its own collectives compile for a minute, once
    try:
        accelerator = Accelerator(**settings)
    except ValueError as error:  # another launcher's variables, such as MPI's
        problem = f"the processes can't be connected: {error}; start them with torchrun"
        raise FlagError("parallel", name, problem) from error
    unset_hf_deepspeed_config()  # with it transformers would split text encoders and reward models as ZeRO-3 does
    if accelerator.distributed_type not in EXPECTED[name]:
        raise FlagError("parallel", name, f"Accelerate set up {accelerator.distributed_type.value} instead")
    return accelerator


def add_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b in float32. Overwrites `a` if it is float32."""
    return a.float().add_(b)


class ComputeCopy:
    """bf16 copies that replace the float32 parameters of a single process in forward and backward passes.

    Does what FSDP2 does for several processes: casts parameters once per part of the rollout and once per optimizer
    step, not in every call, and sums the gradients of micro-batches in float32.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], compiled: bool) -> None:
        self.parameters = parameters
        self.masters: list[torch.Tensor] = []  # float32 parameters, while copies replace them
        self.gradients: list[torch.Tensor | None] = [None] * len(parameters)  # flat
        # The compiled kernel reads two bf16 gradients and writes only their sum. One graph per size: a kernel for
        # variable sizes reads number by number and takes three times as long.
        self.add = torch.compile(add_in_float32, dynamic=False) if compiled else add_in_float32

    def take(self) -> None:
        """Replaces the parameters by bf16 copies, unless copies are in place already."""
        if not self.masters:
            self.masters = [parameter.data for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.data = parameter.data.bfloat16()

    def add_gradients(self) -> None:
        """Call after each backward pass. (In autograd's hooks, another thread, torch's own limit of graphs holds.)"""
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                new, so_far = parameter.grad.flatten(), self.gradients[i]
                # The first gradient stays in bf16 until the second, because activations take the most memory then.
                self.gradients[i] = new if so_far is None else self.add(so_far, new)
                parameter.grad = None

    def drop(self) -> None:
        """Restores the float32 parameters, with the gradients summed since `take`, unless they are restored already."""
        if self.masters:
            for i, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
                gradient, self.gradients[i] = self.gradients[i], None
                parameter.data = master
                parameter.grad = None if gradient is None else gradient.float().view_as(master)
            self.masters = []


class Engine:
    """One process, DDP or FSDP2.

    Attributes:
        family: of the model. transformer: the model, sharded in place under FSDP2. model: the wrapped model to call.
        data_rank, data_ranks: index of this process's sequence group, and number of groups. A group is --sp_size
            consecutive processes that share prompts, noise and scores. place_in_group: index of this process in it.
    """

    def __init__(self, config: GRPOConfig, name: str) -> None:
        self.config, self.name = config, name
        self.family = family_of(config.pretrained_model_name_or_path)
        self.accelerator = build_accelerator(config, name)
        # For the threads that write checkpoints, so that their collectives don't mix with the training's.
        self.disk_group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        # torch.distributed.checkpoint warns when there is only one process.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self.float8: Float8Copies | None = None
        self.data_ranks = config.data_ranks(self.accelerator.num_processes)
        self.data_rank, self.place_in_group = divmod(self.accelerator.process_index, config.sp_size)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of all data ranks, sorted by data rank."""
        processes = self.accelerator.gather(tensor).unflatten(0, (-1, len(tensor)))
        return processes[:: self.config.sp_size].flatten(0, 1)

    def _split_sequence(self, transformer: ModelMixin) -> None:
        """With --sp_size, makes the processes of a sequence group compute each row together."""
        if self.config.sp_size > 1:
            shape = (self.data_ranks, 1, self.config.sp_size)
            mesh = init_device_mesh(self.accelerator.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
            split_sequence(transformer, mesh)

    def load(self, source: str, dtype: torch.dtype) -> ModelMixin:
        """The model at `source`. --init_random_flux replaces the base model by random weights of the same shapes."""
        if not self.loads_weights:
            return meta_transformer(source, dtype).to_empty(device="cpu")
        if self.config.init_random_flux and source == self.config.pretrained_model_name_or_path:
            wait = self.name == "fsdp" or self.config.quantize_base  # less will go to the GPU later
            device = "cpu" if wait else self.accelerator.device
            return random_transformer(source, dtype, self.config.seed, device)
        return load_transformer(source, dtype)

    @property
    def compiled(self) -> bool:
        """Whether models are compiled."""
        if self.config.compile == "auto":
            eager = self.name == "deepspeed" or self.config.sp_size > 1
            return self.accelerator.device.type == "cuda" and not eager
        return self.config.compile == "true"

    def uses_cudnn(self, training: bool) -> bool:
        """Whether cuDNN's attention is used. training: in trained steps; else in the other steps."""
        fits = self.accelerator.device.type == "cuda" and self.config.mixed_precision == "bf16"
        fits = fits and self.config.sp_size == 1  # its backward pass crashes there (torch 2.11, H200)
        return fits and self.config.cudnn_attention in (("always",) if training else ("always", "rollout"))

    def attention(self, training: bool) -> AbstractContextManager:
        """Context for model calls, and for backward passes, where gradient checkpointing calls the model again."""
        return cudnn_attention() if self.uses_cudnn(training) else nullcontext()

    @property
    def loads_weights(self) -> bool:
        """Whether this process reads the weights. Under FSDP2 only the first reads, and sends to the others."""
        return self.name != "fsdp" or self.accelerator.is_main_process

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Number format of weights that aren't trained."""
        on_gpu = self.accelerator.device.type == "cuda"
        return torch.bfloat16 if on_gpu and self.config.mixed_precision == "bf16" else torch.float32

    def prepare(self, transformer: ModelMixin, optimizer_settings: dict) -> None:
        """Prepares the transformer and makes AdamW for its trained parameters, the ones with requires_grad."""
        self.transformer = transformer
        if self.name != "fsdp":
            transformer.to(self.accelerator.device)
        self.family.prepare_blocks(transformer)
        self._split_sequence(transformer)
        if self.compiled:
            compile_transformer(transformer)
        if self.config.rollout_precision != "bf16":
            self.float8 = Float8Copies(self.blocks(), self.config.rollout_precision == "fp8_emulated")
        self.raw_optimizer = torch.optim.AdamW(self.trained_parameters(), fused=True, **optimizer_settings)
        self.model, self.optimizer = self._wrap()
        formats = (self.config.mixed_precision, self.config.master_weight_type)
        casts = self.name == "none" and formats == ("bf16", "fp32")
        self.compute_copy = ComputeCopy(self.trained_parameters() if casts else [], self.compiled)
        self._choose_memory()

    def _wrap(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        return self.accelerator.prepare(self.transformer, self.raw_optimizer)

    def _choose_memory(self) -> None:
        """Decides what FSDP2 keeps unsharded: parameters in the rollout, parameters and gradients in training.

        Unsharded tensors are exchanged only once per rollout or optimizer step, not per step or micro-batch.
        """
        self.keep_gathered, self.defer_sync = False, True
        if self.name != "fsdp":
            return
        if any(not isinstance(block, FSDPModule) for block in self.blocks()):
            raise FlagError("parallel", self.name, "Accelerate left transformer blocks unsharded")
        everything = sum(p.numel() for p in self.transformer.parameters())
        trained = sum(p.numel() for p in self.trained_parameters())
        compute = 2 if self.config.mixed_precision == "bf16" else 4
        whole = kept_whole(self.config, 4 * trained, compute * everything, self._fits)
        self.defer_sync, self.keep_gathered = whole.gradients, whole.in_rollout
        self.reshard = self.config.fsdp_sharding_startegy != "hybrid_zero2"
        if whole.in_training:
            self.reshard = False
            self.transformer.set_reshard_after_backward(False)  # `step` reshards
        self.transformer.set_reshard_after_forward(self.reshard)

    def _fits(self, size: int) -> bool:
        """Whether `size` more bytes take at most half of the free memory of every GPU. Activations need the rest."""
        if self.accelerator.device.type != "cuda":
            return True
        trained = sum(p.to_local().numel() for p in self.trained_parameters())
        left = torch.cuda.mem_get_info()[0] - still_to_come(self.config) * trained
        return not self.any_process(size > left / 2)

    def any_process(self, value: bool) -> bool:
        """Whether `value` is true on any process. All processes must call it."""
        flag = torch.tensor(float(value), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def blocks(self) -> list[torch.nn.Module]:
        return self.family.blocks(self.transformer)

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.transformer.parameters() if p.requires_grad]

    @contextmanager
    def sampling_model(self) -> Iterator[torch.nn.Module]:
        """The model to sample with. FSDP2 gathers each block once per rollout, not once per step, if memory allows."""
        if self.name == "fsdp":
            self.transformer.set_reshard_after_forward(not self.keep_gathered)
        self.compute_copy.take()
        # DDP's wrapper would synchronise buffers in every call. DeepSpeed's wrapper gathers ZeRO-3's shards.
        yield self.model if self.name == "deepspeed" else self.transformer
        if self.name == "fsdp":
            self.transformer.set_reshard_after_forward(self.reshard)
        self.drop_gathered()

    def float8_states(self, plan: Plan) -> set[int]:
        """States of the plan whose velocities are computed in FP8 now."""
        return float8_states(self.config, plan) if self.float8 else set()

    def in_float8(self, velocity: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`velocity`, a function that calls the `sampling_model`, with FP8 products in the blocks."""

        def in_float8(*args: torch.Tensor) -> torch.Tensor:
            self.take_float8()
            with self.float8.in_use():
                return velocity(*args)

        return in_float8

    def take_float8(self) -> None:
        """Copies the weights of the `sampling_model` in FP8, unless the copies are there already."""
        compute = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32
        self.float8.take(compute, self._gathered)

    @contextmanager
    def without_float8(self) -> Iterator[None]:
        """Context in which rollouts use no FP8."""
        copies, self.float8 = self.float8, None
        try:
            yield
        finally:
            self.float8 = copies

    @contextmanager
    def _gathered(self, block: torch.nn.Module) -> Iterator[None]:
        """Context in which a block's parameters are whole. They stay so if they do in the rollout."""
        if self.name == "fsdp":
            block.unshard()
        yield
        if self.name == "fsdp" and not self.keep_gathered:
            block.reshard()

    def drop_gathered(self) -> None:
        """Drops FSDP2's unsharded parameters, and the copies in bf16 and FP8. The optimizer and the average use the
        sharded float32 parameters, and a step would leave copies out of date."""
        self.compute_copy.drop()
        if self.float8:
            self.float8.drop()
        for module in self.transformer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch.

        Multiplies by sp_size: engines average gradients over all processes, but a sequence group needs the sum.
        """
        with self.attention(training=True):
            self.accelerator.backward(loss * self.config.sp_size)
        self.compute_copy.add_gradients()

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Context of a micro-batch's forward and backward pass. Only the last micro-batch exchanges gradients."""
        self.compute_copy.take()
        return nullcontext() if last or not self.defer_sync else self.accelerator.no_sync(self.model)

    def step(self, loss: torch.Tensor) -> None:
        """Clips gradients and steps, unless a loss or gradient of any process isn't finite. See `gradient_norm`."""
        accelerator = self.accelerator
        self.drop_gathered()  # moves the gradients to the sharded parameters
        parameters = self.trained_parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = norm.detach().to(loss.device)  # from the CPU with --use_cpu_offload
        both = torch.stack([norm, accelerator.reduce(loss + norm, "sum")])
        # The fused AdamW divides gradients by grad_scale as it reads them, and changes nothing if found_inf is 1. This
        # saves a pass over all gradients and a wait of the CPU. torch's GradScaler sets both attributes too.
        place = parameters[0].device
        self.raw_optimizer.grad_scale = (norm / self.config.max_grad_norm).clamp(min=1).float().to(place)
        self.raw_optimizer.found_inf = (~torch.isfinite(both[1])).float().to(place)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._outcome = both.to("cpu", non_blocking=True)
        self._known = torch.cuda.Event() if loss.device.type == "cuda" else None
        if self._known:
            self._known.record()

    def gradient_norm(self) -> float | None:
        """Gradient norm of the last step, equal on all processes; None: skipped. Waits only for this step, not for work
        queued after it."""
        if self._known:
            self._known.synchronize()
        norm, both = self._outcome.tolist()
        return norm if math.isfinite(both) else None

    # --- saving and loading -----------------------------------------------------------------------------------------

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Copies of the full trained parameters on the CPU, by name, on the first process; empty on the others.

        All processes must call it.
        """
        self.drop_gathered()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = get_model_state_dict(self.model, options=options)
        if next(self.transformer.parameters()).device.type != "cpu":
            return weights
        # On a CPU these may be the parameters themselves. Clones one by one, so as not to hold gathered ones twice.
        return {name: weights.pop(name).clone() for name in list(weights)}

    def set_trained_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Loads the result of `trained_weights` on all processes. Only the first process's `weights` count."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), strict=False)
        set_model_state_dict(self.transformer, weights, options=options)

    def save_optimizer(self, folder: Path) -> Future | None:
        """Copies the optimizer's state. On every process, a thread writes the process's share.

        Returns a future that ends when all processes have written, or with the error of any. None: nothing to wait for.
        """
        if not self.raw_optimizer.state:  # before the first step there is no state, and reading it would create one
            return None
        state = {"optimizer": get_optimizer_state_dict(self.model, self.raw_optimizer)["state"]}
        return dcp.async_save(
            state, checkpoint_id=folder, process_group=self.disk_group, no_dist=not dist.is_initialized()
        )

    def load_optimizer(self, folder: Path) -> None:
        """Loads the optimizer's state, also for another number of processes. Keeps learning rate etc. of the flags."""
        if not self.any_process(self.accelerator.is_main_process and folder.is_dir()):
            return
        template = get_optimizer_state_dict(self.model, self.raw_optimizer)
        reader = TensorReader(folder)
        dcp.load({"optimizer": template["state"]}, storage_reader=reader, no_dist=not dist.is_initialized())
        set_optimizer_state_dict(self.model, self.raw_optimizer, template)


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO-2 or -3, which clips, steps and skips bad steps itself."""

    def _wrap(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        # DeepSpeed turns autocast off around the model; without it float32 latents would meet bf16 weights.
        device, mixed = self.accelerator.device.type, self.config.mixed_precision == "bf16"
        self.transformer.forward = torch.autocast(device, torch.bfloat16, enabled=mixed)(self.transformer.forward)
        model, optimizer = super()._wrap()
        self.raw_optimizer = model.optimizer.optimizer  # with CPU offload, DeepSpeed replaces the optimizer
        return model, optimizer

    def backward(self, loss: torch.Tensor) -> None:
        with self.attention(training=True):
            self.model.backward(loss)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()  # ZeRO exchanges gradients in every micro-batch

    def step(self, loss: torch.Tensor) -> None:
        self.model.step()

    def gradient_norm(self) -> float | None:
        return None if self.model.optimizer.overflow else float(self.model.get_global_grad_norm())

    def trained_weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                if self.accelerator.is_main_process:
                    weights[name] = whole.detach().cpu().clone()
        return weights

    def save_optimizer(self, folder: Path) -> None:
        """Writes the optimizer's state before training continues; DeepSpeed can't write it in a thread."""
        try:
            self.model.save_checkpoint(folder, tag="state", save_latest=False, exclude_frozen_parameters=True)
        except RuntimeError as error:  # torch.save raises it for a full disk, for example
            raise OSError(f"DeepSpeed's part: {error}") from error

    def load_optimizer(self, folder: Path) -> None:
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in self.raw_optimizer.param_groups]
        try:
            with tensors_only():
                loaded, _ = self.model.load_checkpoint(folder, tag="state", load_lr_scheduler_states=False)
        except pickle.UnpicklingError as error:
            raise FlagError("resume_from_checkpoint", folder.parent, f"DeepSpeed's state: {error}") from error
        if loaded is None:
            raise FlagError("resume_from_checkpoint", folder.parent, "DeepSpeed can't read its state")
        for group, values in zip(self.raw_optimizer.param_groups, wanted, strict=True):
            group.update(values)


def build_engine(config: GRPOConfig, world_size: int) -> Engine:
    """The engine that the flags choose. Its `config` has the smallest --train_micro_batch_size of all processes.

    Raises:
        FlagError: the processes or the machine don't allow the engine.
    """
    name = choose_engine(config, world_size)
    engine = (DeepSpeedEngine if name == "deepspeed" else Engine)(config, name)
    accelerator = engine.accelerator
    if accelerator.num_processes != world_size:
        problem = f"{world_size} processes were started, but Accelerate connects {accelerator.num_processes}"
        raise FlagError("parallel", name, problem)
    # The GPUs may differ, but all processes must run the model equally often.
    rows = accelerator.gather(torch.tensor([config.train_micro_batch_size], device=accelerator.device)).min()
    engine.config = replace(config, train_micro_batch_size=int(rows))
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention backward crashes on Hopper (torch 2.11)
    return engine


def main_process_first(accelerator: Accelerator, work: Callable[[], object]) -> object:
    """Runs `work` on the main process only, and returns its result or raises its FlagError on all processes."""
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except FlagError as error:
            answer[1] = (error.field, error.value, error.problem)
    with waiting("the first process"):
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise FlagError(*answer[1])
    return answer[0]

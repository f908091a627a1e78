"""Speed and memory of FLUX: compiled blocks, attention, sequence parallelism, gradient checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.models import ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxSingleTransformerBlock
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel


def rotary_embedding(x: torch.Tensor, frequencies: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """diffusers' apply_rotary_emb for FLUX, in a form that compiles to a faster kernel. Results are bit for bit equal.

    It swaps a pair by index, because stacking the two halves compiles to masked loads. Uncompiled, it would be slower.

    Args:
        x: [N, S, heads, D]. frequencies: cosine and sine, each [S, D], equal for both members of a pair.
    """
    if not torch.compiler.is_compiling():
        return apply_rotary_emb(x, frequencies, sequence_dim=1)
    cosine, sine = (f.unsqueeze(1) for f in frequencies)
    sign = torch.arange(-1, 2, 2, device=x.device)  # (a, b) -> (−b, a)
    swapped = (x.float().unflatten(-1, (-1, 2)).flip(-1) * sign).flatten(-2)
    return (x.float() * cosine + swapped * sine).to(x.dtype)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is stored without gaps."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()


class StreamwiseAttnProcessor(FluxAttnProcessor):
    """diffusers' attention for FLUX with the same results, but fewer passes over memory when compiled.

    Text and picture get their rotary embeddings before they are joined, so that the norm and the embedding of each
    compile to one kernel. cuDNN's attention reads heads without the transposed copies that diffusers makes.

    Attributes:
        cudnn: whether to use cuDNN's attention, twice as fast as FlashAttention-2 on Hopper. Its backward pass reads
            past the end of a gradient with gaps (illegal memory access; torch 2.11, cuDNN 9.19). In a single block the
            attention's gradient is a slice of the gradient of [attention, MLP], so it is made contiguous.
    """

    cudnn = False

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        streams = [(hidden_states, attn.to_q, attn.norm_q, attn.to_k, attn.norm_k, attn.to_v)]
        if encoder_hidden_states is not None:
            text = (attn.add_q_proj, attn.norm_added_q, attn.add_k_proj, attn.norm_added_k, attn.add_v_proj)
            streams.insert(0, (encoder_hidden_states, *text))
        lengths = [stream[0].shape[1] for stream in streams]
        parts = []
        for stream, cosine, sine in zip(streams, *(f.split(lengths) for f in image_rotary_emb), strict=True):
            x, to_q, norm_q, to_k, norm_k, to_v = stream
            query, key, value = (to(x).unflatten(-1, (-1, attn.head_dim)) for to in (to_q, to_k, to_v))
            query, key = (rotary_embedding(h, (cosine, sine)) for h in (norm_q(query), norm_k(key)))
            parts.append((query, key, value))
        query, key, value = parts[0] if len(parts) == 1 else (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.cudnn else nullcontext():
            together = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        together = _ContiguousGradient.apply(together.flatten(2, 3).to(query.dtype))
        if encoder_hidden_states is None:
            return together
        text, picture = together.split(lengths, dim=1)
        picture = attn.to_out[1](attn.to_out[0](picture.contiguous()))
        return picture, attn.to_add_out(text.contiguous())


@contextmanager
def cudnn_attention() -> Iterator[None]:
    """Context in which StreamwiseAttnProcessor uses cuDNN's attention, also where a backward pass recomputes it."""
    before, StreamwiseAttnProcessor.cudnn = StreamwiseAttnProcessor.cudnn, True
    try:
        yield
    finally:
        StreamwiseAttnProcessor.cudnn = before


_single_block_forward = FluxSingleTransformerBlock.forward  # Dynamo can't trace it as an attribute of its class


def _forward_without_views(block: FluxSingleTransformerBlock, *args, **kwargs) -> tuple[torch.Tensor, ...]:
    """The block's outputs as separate tensors.

    If they were views of one tensor, their gradients would be assembled outside the compiled block, from zeros, copies
    and a sum. (A forward hook would be compiled separately, and would copy.)
    """
    return tuple(part.clone() for part in _single_block_forward(block, *args, **kwargs))


# With these options a row rounds alike in graphs of any number of rows from 2 on: sampled in a part of 4 and trained in
# a part of 3, its first ratio is 1. `deterministic`: otherwise Inductor times, for each number of rows, how norms sum
# and whether products are padded. `emulate_precision_casts`: otherwise the layout of a kernel's loops can decide which
# casts between operations are left out and which products and sums are fused.
ROUNDING_OF_ROWS = {"deterministic": True, "emulate_precision_casts": True}


def compile_transformer(transformer: FluxTransformer2DModel) -> None:
    """Compiles one graph for all blocks of a kind, and the parts around the blocks that are slow uncompiled."""
    # One graph per shape, with and without gradients, with and without adapters: more than Dynamo's default limit,
    # above which it leaves blocks uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # Autocast makes norms return float32. Without the hook, each linear layer after a norm would write a bf16 copy.
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for norm in [*norms, *(block.norm for block in transformer.single_transformer_blocks)]:
        norm.register_forward_hook(lambda module, inputs, output: (output[0].to(output[1].dtype), *output[1:]))
    for block in transformer.single_transformer_blocks:
        block.forward = MethodType(_forward_without_views, block)
    transformer.compile_repeated_blocks(dynamic=False, options=ROUNDING_OF_ROWS)
    transformer.pos_embed.compile(dynamic=False, options=ROUNDING_OF_ROWS)
    transformer.norm_out.compile(dynamic=False, options=ROUNDING_OF_ROWS)


def split_sequence(transformer: FluxTransformer2DModel, mesh: DeviceMesh) -> None:
    """Makes every process of the mesh's dimension `ulysses` compute its share of the tokens and return all tokens.

    The processes must pass the same rows. The gradient of a parameter is the sum over these processes.
    """
    split = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)

    def resolve(config: ParallelConfig) -> ParallelConfig:
        """Replaces a method of diffusers that divides by the number of accelerators, which is 0 on a CPU machine."""
        device = torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else 0)
        config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
        transformer._parallel_config = config
        return config

    transformer._resolve_parallel_config = resolve
    transformer.enable_parallelism(config=ParallelConfig(context_parallel_config=split))
    # CUDA's autocast makes norms return float32. Such queries and keys would meet bf16 values in the backward pass of
    # attention, where nothing casts them, and would double the size of the exchange.
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            module.register_forward_hook(lambda module, inputs, output: output.to(inputs[0].dtype))


def enable_gradient_checkpointing(transformer: FluxTransformer2DModel, share: float = 1.0) -> None:
    """Recomputes activations in the backward pass, for a `share` (0 to 1] of the blocks, spread evenly."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    kept = {id(block) for i, block in enumerate(blocks) if int((i + 1) * share) > int(i * share)}

    def run(block: torch.nn.Module, *args):
        if id(block) in kept:
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)

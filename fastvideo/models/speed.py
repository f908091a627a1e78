"""Speed and memory of a transformer: compiled blocks, attention, sequence parallelism, gradient checkpointing; and the
speed of a compiled VAE."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.models.float8 import (
    Modulated,
    Rounded,
    activated_product,
    norm_and_rotate,
    products,
    shared,
    swiglu,
    takes_rounded,
)

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.models import ParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel


def rotary_embedding(x: torch.Tensor, frequencies: Sequence[torch.Tensor]) -> torch.Tensor:
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


def rotated(
    x: torch.Tensor, norm: torch.nn.Module, frequencies: Sequence[torch.Tensor], in_float8: bool
) -> torch.Tensor:
    """The rotary embedding of norm(x) [N, S, heads, D]. in_float8: in an FP8 step, where one kernel computes it."""
    if in_float8 and x.is_cuda and norm_and_rotate:
        return norm_and_rotate(x, norm.weight, norm.eps, *frequencies)
    return rotary_embedding(norm(x), frequencies)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is stored without gaps."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()


class _AttnProcessor(FluxAttnProcessor):
    """Attention of all tokens, by diffusers' kernels or cuDNN's.

    Attributes:
        cudnn: whether to use cuDNN's attention, twice as fast as FlashAttention-2 on Hopper, which reads heads without
            the transposed copies that diffusers makes. Its backward pass reads past the end of a gradient with gaps
            (illegal memory access; torch 2.11, cuDNN 9.19). In a single block the attention's gradient is a slice of
            the gradient of [attention, MLP], so it is made contiguous. An attribute of each class: compiled code looks
            for it there.
    """

    cudnn: bool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """query, key, value: [N, S, heads, D]. Returns [N, S, heads · D]."""
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.cudnn else nullcontext():
            together = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return _ContiguousGradient.apply(together.flatten(2, 3).to(query.dtype))


class StreamwiseAttnProcessor(_AttnProcessor):
    """diffusers' attention of FLUX.1, and of FLUX.2's double blocks, with the same results, but fewer passes over
    memory when compiled.

    Text and picture get their rotary embeddings before they are joined, so that the norm and the embedding of each
    compile to one kernel.
    """

    cudnn = False

    def __call__(
        self,
        attn: FluxAttention | Flux2Attention,
        hidden_states: torch.Tensor | Modulated | Rounded,
        encoder_hidden_states: torch.Tensor | Modulated | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        streams = [(hidden_states, attn.to_q, attn.norm_q, attn.to_k, attn.norm_k, attn.to_v)]
        if encoder_hidden_states is not None:
            text = (attn.add_q_proj, attn.norm_added_q, attn.add_k_proj, attn.norm_added_k, attn.add_v_proj)
            streams.insert(0, (encoder_hidden_states, *text))
        parts, lengths = [], []
        for x, to_q, norm_q, to_k, norm_k, to_v in streams:
            x = shared(x, to_q, to_k, to_v)
            query, key, value = (h.unflatten(-1, (-1, attn.head_dim)) for h in products(x, to_q, to_k, to_v))
            places = slice(sum(lengths), sum(lengths) + value.shape[1])
            frequencies, in_float8 = [f[places] for f in image_rotary_emb], isinstance(x, Rounded)
            query, key = (rotated(h, norm, frequencies, in_float8) for h, norm in ((query, norm_q), (key, norm_k)))
            parts.append((query, key, value))
            lengths.append(value.shape[1])
        query, key, value = parts[0] if len(parts) == 1 else (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        together = self.attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return together
        text, picture = together.split(lengths, dim=1)
        picture = attn.to_out[1](attn.to_out[0](picture.contiguous()))
        return picture, attn.to_add_out(text.contiguous())


class ParallelAttnProcessor(_AttnProcessor):
    """diffusers' attention of FLUX.2's single blocks, with the same results. One product makes queries, keys, values
    and the MLP's inputs, and one takes attention and MLP."""

    cudnn = False

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        *heads, mlp = attn.to_qkv_mlp_proj(hidden_states).split(
            [*[attn.inner_dim] * 3, attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
        )
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in heads)
        in_float8 = takes_rounded(attn.to_qkv_mlp_proj)
        query, key = (
            rotated(h, norm, image_rotary_emb, in_float8) for h, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        together = self.attend(query, key, value, attention_mask)
        return activated_product(attn.to_out, together, mlp, swiglu)


@contextmanager
def cudnn_attention() -> Iterator[None]:
    """Context in which attention is cuDNN's, also where a backward pass recomputes it."""
    before = StreamwiseAttnProcessor.cudnn
    StreamwiseAttnProcessor.cudnn = ParallelAttnProcessor.cudnn = True
    try:
        yield
    finally:
        StreamwiseAttnProcessor.cudnn = ParallelAttnProcessor.cudnn = before


# With these options a row rounds alike in graphs of any number of rows from 2 on: sampled in a part of 4 and trained in
# a part of 3, its first ratio is 1. `deterministic`: otherwise Inductor times, for each number of rows, how norms sum
# and whether products are padded. `emulate_precision_casts`: otherwise the layout of a kernel's loops can decide which
# casts between operations are left out and which products and sums are fused.
ROUNDING_OF_ROWS = {"deterministic": True, "emulate_precision_casts": True}


def compile_transformer(transformer: ModelMixin) -> None:
    """Compiles one graph for all blocks of a kind, and the parts around the blocks that are slow uncompiled."""
    # One graph per shape, with and without gradients, with and without adapters: more than Dynamo's default limit,
    # above which it leaves blocks uncompiled.
    torch._dynamo.config.recompile_limit = 64
    transformer.compile_repeated_blocks(dynamic=False, options=ROUNDING_OF_ROWS)
    transformer.pos_embed.compile(dynamic=False, options=ROUNDING_OF_ROWS)
    transformer.norm_out.compile(dynamic=False, options=ROUNDING_OF_ROWS)


def group_norm(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """norm(x), x [N, C, ...], with statistics of each channel first, and of the groups from them.

    Channels-last memory holds a group's few channels far from those of the next pixel. Inductor's kernels then take
    4 times as long for the statistics of groups as for those of channels (FLUX.1's VAE, H100).
    """
    pixels = x.float()
    variance, mean = torch.var_mean(pixels, dim=tuple(range(2, x.ndim)), correction=0)
    variance, mean = (part.unflatten(1, (norm.num_groups, -1)) for part in (variance, mean))
    between, centre = torch.var_mean(mean, dim=-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance.mean(-1, keepdim=True) + between + norm.eps) * norm.weight.float().view_as(mean[0])
    whole = (centre.expand_as(mean), scale, norm.bias.float().view_as(mean[0]).expand_as(mean))
    centre, scale, shift = (part.flatten(1).unflatten(1, (-1, *[1] * (x.ndim - 2))) for part in whole)
    return ((pixels - centre) * scale + shift).to(x.dtype)


def compile_decoder(decoder: torch.nn.Module) -> None:
    """Compiles a VAE's decoder."""
    for module in decoder.modules():
        if isinstance(module, torch.nn.GroupNorm) and module.affine:
            module.forward = MethodType(group_norm, module)
    decoder.compile(dynamic=False)


def split_sequence(transformer: ModelMixin, mesh: DeviceMesh) -> None:
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


def enable_gradient_checkpointing(
    transformer: ModelMixin, blocks: Sequence[torch.nn.Module], share: float = 1.0
) -> None:
    """Recomputes activations in the backward pass, for a `share` (0 to 1] of the blocks, spread evenly."""
    kept = {id(block) for i, block in enumerate(blocks) if int((i + 1) * share) > int(i * share)}

    def run(block: torch.nn.Module, *args):
        if id(block) in kept:
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)

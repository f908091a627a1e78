"""FLUX.1's weights and adapters in the names of the original code, which ComfyUI and kohya's scripts use.

Where diffusers has several layers side by side (query, key, value, and the MLP's first layer in single blocks), the
original code has one, whose weight has their rows one below the other. Its last modulation gives shift, then scale, but
diffusers' gives scale, then shift.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvideo.io.weights import Shapes, open_weights, stored_shapes
from fastvideo.models.lora import Adapters

import torch
from diffusers import FluxTransformer2DModel

_SWAPPED = "final_layer.adaLN_modulation.1"
# Layer of the original code -> the layers of diffusers whose rows it has. {}: the number of the block.
_LAYERS = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    _SWAPPED: ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
_IN_BLOCKS = {
    "double_blocks": {
        "img_mod.lin": ["norm1.linear"],
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "img_attn.norm.query_norm": ["attn.norm_q"],
        "img_attn.norm.key_norm": ["attn.norm_k"],
        "img_attn.proj": ["attn.to_out.0"],
        "img_mlp.0": ["ff.net.0.proj"],
        "img_mlp.2": ["ff.net.2"],
        "txt_mod.lin": ["norm1_context.linear"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "txt_attn.norm.query_norm": ["attn.norm_added_q"],
        "txt_attn.norm.key_norm": ["attn.norm_added_k"],
        "txt_attn.proj": ["attn.to_add_out"],
        "txt_mlp.0": ["ff_context.net.0.proj"],
        "txt_mlp.2": ["ff_context.net.2"],
    },
    "single_blocks": {
        "modulation.lin": ["norm.linear"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
        "norm.query_norm": ["attn.norm_q"],
        "norm.key_norm": ["attn.norm_k"],
    },
}


def _original_layers(transformer: FluxTransformer2DModel) -> dict[str, list[str]]:
    """Layer of the original code -> the layers of the transformer whose rows it has, in order."""
    present = {name for name, _ in transformer.named_modules()}
    found = {layer: parts for layer, parts in _LAYERS.items() if present.issuperset(parts)}  # schnell has no guidance
    for (original, layers), blocks in zip(
        _IN_BLOCKS.items(), ("transformer_blocks", "single_transformer_blocks"), strict=True
    ):
        for number in range(len(transformer.get_submodule(blocks))):
            for layer, parts in layers.items():
                found[f"{original}.{number}.{layer}"] = [f"{blocks}.{number}.{part}" for part in parts]
    return found


def original_names(transformer: FluxTransformer2DModel) -> dict[str, list[str]]:
    """Name of a tensor in the original code -> the names of the transformer's tensors that `join` makes it of."""
    stored, found = transformer.state_dict(), {}
    for layer, parts in _original_layers(transformer).items():
        for kind in ("weight", "bias"):
            names = [f"{part}.{kind}" for part in parts]
            if stored.keys() >= set(names):
                found[f"{layer}.{'scale' if layer.endswith('_norm') else kind}"] = names
    return found


def join(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor of the original code from those of diffusers, [rows, ...] each."""
    whole = torch.cat(list(parts))
    return torch.cat(whole.chunk(2)[::-1]) if name.startswith(_SWAPPED) else whole


def original_shapes(transformer: FluxTransformer2DModel) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights in the original names."""
    own = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    return {
        name: (sum(own[part][0] for part in parts), *own[parts[0]][1:])
        for name, parts in original_names(transformer).items()
    }


def original_prefix(stored: Shapes) -> str | None:
    """What stands before the original names among the names of a file; None if they aren't there."""
    return next((p for p in ("", "model.diffusion_model.") if f"{p}img_in.weight" in stored), None)


@contextmanager
def open_transformer(place: Path, transformer: FluxTransformer2DModel) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads a weight of the transformer by its name in diffusers, from files with either names.

    place: as in `open_weights`; its headers fit.
    """
    with open_weights(place) as read:
        prefix, rows = original_prefix(stored_shapes(place) or {}), {}
        if prefix is None:
            yield read
            return
        own = transformer.state_dict()
        for name, parts in original_names(transformer).items():
            end = 0
            for part in parts:
                begin, end = end, end + len(own[part])
                rows[part] = (name, slice(begin, end))

        def read_part(part: str) -> torch.Tensor:
            name, where = rows[part]
            return join(name, [read(f"{prefix}{name}")])[where]  # what `join` swaps, it swaps back

        yield read_part


def kohya_adapters(adapters: Adapters, transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    """Adapters of the transformer's layers in kohya's names: `lora_unet_{layer}`, lora_down, lora_up and alpha.

    The adapter of a joined layer has a share of its rank for each of its parts: the rows of lora_down are those of all
    parts, lora_up is block diagonal. Parts without an adapter have zeros. As alpha / rank is one number for all parts,
    lora_up takes what differs. transformer: may be on the meta device.
    """
    found = {}
    for layer, parts in _original_layers(transformer).items():
        own = [part for part in parts if part in adapters.alphas]
        if not own:
            continue
        rank, scale, downs, ups = max(adapters.ranks[part] for part in own), adapters.scale(own[0]), [], []
        for part in parts:
            linear, dtype = transformer.get_submodule(part), adapters.weights[f"{own[0]}.lora_A.weight"].dtype
            down = torch.zeros(rank, linear.in_features, dtype=dtype)
            up = torch.zeros(linear.out_features, rank, dtype=dtype)
            if part in own:
                down[: adapters.ranks[part]] = adapters.weights[f"{part}.lora_A.weight"]
                factor = adapters.scale(part) / scale
                up[:, : adapters.ranks[part]] = adapters.weights[f"{part}.lora_B.weight"] * factor
            downs.append(down)
            ups.append(up)
        name = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{name}.lora_down.weight"] = torch.cat(downs)
        found[f"{name}.lora_up.weight"] = join(layer, [torch.block_diag(*ups)])
        found[f"{name}.alpha"] = torch.tensor(scale * rank * len(parts))
    return found

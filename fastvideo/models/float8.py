"""FP8 products in the blocks of a transformer, for steps that aren't trained.

Numbers are e4m3 (arXiv 2209.05433), with one scale per output row of a weight and one per token of the activations, so
a row of a batch doesn't depend on the other rows. The weights themselves stay; the FP8 copies lie beside them for the
length of a rollout. Modulation, 1 token per row, decides everything after it and costs nearly nothing, so it stays in
the compute format. So do adapters of LoRA, and layers whose sizes FP8 products don't take.

With fast products, a third of a step is rounding and what comes before it. So blocks round once what several layers
take (`shared`), multiply queries, keys and values at once (`products`), and compute a norm or an activation function
where they round its result (`Modulated`, `activated_product`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import NamedTuple

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.models.int8 import Int8Linear

import torch
from torch.nn import functional as F

try:
    from fastvideo.models.float8_kernel import norm_and_rotate, round_rows
except ImportError:  # no triton: torch's own operations take a few passes over memory
    norm_and_rotate = round_rows = None

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = 1e-30  # of a row of zeros
MULTIPLE = 16  # of which torch._scaled_mm needs both sizes of a weight
CAPABILITY = (8, 9)  # of the first GPUs with FP8 products (Ada)
# Layers of diffusers' attention whose FP8 products are one: they share their input, and each row has its own scale.
JOINT = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


class Rounded(NamedTuple):
    """x ≈ scale · numbers, with x [..., K].

    numbers: e4m3, [..., K]. scale: float32, [..., 1]. dtype: the format of x.
    """

    numbers: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class Modulated(NamedTuple):
    """LayerNorm(x) · (1 + scale) + shift, computed where its use is known. See `shared`.

    x: [N, S, K]. scale, shift: [N, K], in the format of the result. epsilon: of the norm.
    """

    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    epsilon: float


def modulated(given: Modulated) -> torch.Tensor:
    """The result [N, S, K]."""
    x, scale, shift, epsilon = given
    return (F.layer_norm(x, x.shape[-1:], eps=epsilon) * (1 + scale[:, None]) + shift[:, None]).to(scale.dtype)


def gelu(raw: torch.Tensor) -> torch.Tensor:
    """FLUX.1's activation function."""
    return F.gelu(raw, approximate="tanh")


def swiglu(raw: torch.Tensor) -> torch.Tensor:
    """FLUX.2's, [..., K] from [..., 2 K]."""
    gate, value = raw.chunk(2, dim=-1)
    return F.silu(gate) * value


def to_e4m3(
    x: torch.Tensor | Modulated | None,
    raw: torch.Tensor | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = gelu,
) -> Rounded:
    """[x, activation(raw)] in e4m3, in one pass over memory on a GPU. Either part may be None.

    x: [..., K]. raw: [..., M], or [..., 2 M] with `swiglu`.
    """
    norm = x[1:] if isinstance(x, Modulated) else None
    given = raw if x is None else x if norm is None else x.x
    if given.is_cuda and round_rows:
        numbers, scale = round_rows(given if x is not None else None, raw, activation is swiglu, norm)
        return Rounded(numbers, scale, given.dtype if norm is None else norm[0].dtype)
    x = x if norm is None else modulated(x)
    parts = [part for part in (x, None if raw is None else activation(raw)) if part is not None]
    whole = torch.cat(parts, dim=-1)
    scale = (whole.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return Rounded((whole.float() * (1 / scale)).to(torch.float8_e4m3fn), scale, whole.dtype)


def float8_product(
    x: Rounded, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, emulated: bool = False
) -> torch.Tensor:
    """x Wᵀ + bias with both factors in e4m3: [..., N] in the format of x, which must be bf16 unless `emulated`.

    Args:
        weight: e4m3, [N, K]. scale: float32, [N, 1], W ≈ scale · weight. bias: [N].
        emulated: multiply the same e4m3 numbers in the format of x, on any device.
    """
    numbers, rows, dtype = x
    bias = None if bias is None else bias.to(dtype)
    if emulated:
        product = F.linear(numbers.to(dtype), weight.to(dtype)).float() * rows * scale.t()
        return product.to(dtype) if bias is None else product.to(dtype) + bias
    flat, rows = numbers.flatten(0, -2), rows.flatten(0, -2)
    product = torch._scaled_mm(flat, weight.t(), rows, scale.t(), bias, out_dtype=dtype, use_fast_accum=True)
    return product.unflatten(0, numbers.shape[:-1])


def float8_layers(block: torch.nn.Module) -> list[torch.nn.Linear]:
    """The linear layers of a block whose products can be in FP8."""
    return [
        layer
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not name.startswith("norm")
        and "lora_" not in name
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
    ]


def _groups(block: torch.nn.Module) -> list[list[torch.nn.Linear]]:
    """The `float8_layers` of a block: those of which `products` makes one product, then each other one alone."""
    alone = dict.fromkeys(float8_layers(block))
    found = [[getattr(module, name, None) for name in names] for module in block.modules() for names in JOINT]
    joint = [layers for layers in found if all(layer in alone for layer in layers)]
    for layer in itertools.chain(*joint):
        del alone[layer]
    return joint + [[layer] for layer in alone]


class Float8Copies:
    """FP8 copies of the weights of a transformer's blocks. See `take`, `in_use` and `drop`.

    Attributes:
        taken: whether there are copies now.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], emulated: bool) -> None:
        self.groups = {block: _groups(block) for block in blocks}
        self.taken = False
        for layer in self._all():
            layer.forward, layer.emulated, layer.in_float8 = MethodType(_forward, layer), emulated, False

    def _all(self) -> list[torch.nn.Linear]:
        return [layer for groups in self.groups.values() for layers in groups for layer in layers]

    @torch.no_grad()
    def take(self, dtype: torch.dtype, whole: Callable[[torch.nn.Module], AbstractContextManager]) -> None:
        """Copies the weights, as they are in the compute format `dtype`, unless there are copies already.

        whole: context in which a block's parameters are whole, see FSDP2.
        """
        for block, groups in self.groups.items() if not self.taken else ():
            with whole(block):
                for layers in groups:
                    _take(layers, dtype)
        self.taken = True

    def drop(self) -> None:
        """Frees the memory of the copies."""
        for layer in self._all() if self.taken else ():
            del layer.weight_e4m3, layer.scale_e4m3
            vars(layer).pop("joint", None)
        self.taken = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which the blocks use the copies. Compiled blocks have one more graph per shape then.

        A switch for all layers wouldn't do: torch 2.11 doesn't look for another graph unless a module's own attributes
        have changed.
        """
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self._all():  # in `vars`, because Module's own way takes 1 ms of the CPU per model call
            vars(layer)["in_float8"] = on


def _take(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> None:
    """Gives each of the layers its part of one FP8 copy, and the first the whole of it, if there are several."""
    weights = [layer.whole(dtype) if isinstance(layer, Int8Linear) else layer.weight.to(dtype) for layer in layers]
    numbers, scale, _ = to_e4m3(torch.cat(weights) if len(weights) > 1 else weights[0])
    sizes = [layer.out_features for layer in layers]
    for layer, *parts in zip(layers, numbers.split(sizes), scale.split(sizes), strict=True):
        layer.weight_e4m3, layer.scale_e4m3 = parts
    if len(layers) > 1:
        biases = [layer.bias for layer in layers]
        layers[0].joint = numbers, scale, None if biases[0] is None else torch.cat(biases).to(dtype)


def _forward(layer: torch.nn.Linear, x: torch.Tensor | Rounded) -> torch.Tensor:
    if not layer.in_float8:
        return type(layer).forward(layer, x)
    rounded = x if isinstance(x, Rounded) else to_e4m3(_in_compute_format(x))
    return float8_product(rounded, layer.weight_e4m3, layer.scale_e4m3, layer.bias, layer.emulated)


def _in_compute_format(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def takes_rounded(layer: torch.nn.Module) -> bool:
    """Whether the layer is in FP8 now, and has no adapter, which would need its input as it is."""
    return isinstance(layer, torch.nn.Linear) and getattr(layer, "in_float8", False)


def shared(x: torch.Tensor | Modulated | Rounded, *layers: torch.nn.Module) -> torch.Tensor | Rounded:
    """What to give to each of the layers instead of x [..., K]: its numbers, or x rounded once if all are in FP8."""
    if isinstance(x, Rounded):
        return x
    rounds = all(takes_rounded(layer) for layer in layers)
    if isinstance(x, Modulated):
        return to_e4m3(x) if rounds else modulated(x)
    return to_e4m3(_in_compute_format(x)) if rounds else x


def products(x: torch.Tensor | Rounded, *layers: torch.nn.Module) -> Sequence[torch.Tensor]:
    """layer(x) of each of the layers, which are `JOINT`. x: as `shared` by them."""
    if not isinstance(x, Rounded):
        return [layer(x) for layer in layers]
    whole = float8_product(x, *layers[0].joint, layers[0].emulated)
    return whole.split([layer.out_features for layer in layers], dim=-1)


def activated_product(
    layer: torch.nn.Module,
    x: torch.Tensor | None,
    raw: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """layer([x, activation(raw)]), see `to_e4m3`."""
    if takes_rounded(layer):
        return layer(to_e4m3(x, raw, activation))
    activated = activation(raw)
    return layer(activated if x is None else torch.cat([x, activated], dim=-1))


def lacks_float8() -> str | None:
    """Why FP8 products can't run on the GPUs of this machine. None: they can."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not found:
        return "this machine has no GPU"
    old = [gpu.name for gpu in found if (gpu.major, gpu.minor) < CAPABILITY]
    return f"{old[0]} has none" if old else None

"""Linear layers whose frozen weights are held in 8 bit: a byte a weight and one scale an output row.

docs/deviations.md says why this isn't torchao's or bitsandbytes'.
"""

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)

import torch
from diffusers import FluxTransformer2DModel


class _Product(torch.autograd.Function):
    """x Wᵀ with W = scale · weight. From forward to backward pass the bytes are kept, not W.

    Scaling W, not the product, is on purpose: from the other form torch's compiler makes a kernel for single tokens.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return torch.nn.functional.linear(x, _whole(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ _whole(*ctx.saved_tensors, gradient.dtype), None, None


def _whole(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) * scale.to(dtype)[:, None]


class Int8Linear(torch.nn.Linear):
    """A linear layer with `weight` int8 [out, in] and `scale` [out], rounded from those of `linear`; not trained.

    A weight moves by at most half a step, 1/254 of the largest in its row.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        weight = linear.weight.detach()
        # In the weights' own format before it divides them: what multiplies in the end is exactly that.
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        levels = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight, self.scale = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in (levels, scale))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_blocks(transformer: FluxTransformer2DModel, device: torch.device | str) -> None:
    """Puts `Int8Linear` on `device` in the place of all linear layers in the blocks, one after the other."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                block.set_submodule(name, Int8Linear(module.to(device)))

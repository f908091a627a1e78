"""Linear layers with frozen 8-bit weights: one byte per weight and one scale per output row.

docs/deviations.md says why torchao and bitsandbytes don't fit.
"""

from collections.abc import Iterable

import torch


class _Product(torch.autograd.Function):
    """x Wᵀ with W = scale · weight. Keeps the int8 weight, not W, for the backward pass.

    W is scaled on purpose: if the product were scaled, torch's compiler would make a kernel for single tokens.
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
    """A frozen linear layer with `weight` int8 [out, in] and `scale` [out], rounded from the weight of `linear`.

    Rounding moves a weight by at most half a step, 1/254 of the largest weight in its row.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        weight = linear.weight.detach()
        # Rounded to the weights' own format before the division, so that the forward pass uses the same number.
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        levels = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight, self.scale = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in (levels, scale))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in the format `dtype`, [out, in]."""
        return _whole(self.weight, self.scale, dtype)


def quantize_linear(blocks: Iterable[torch.nn.Module], device: torch.device | str) -> None:
    """Replaces all linear layers in the blocks by `Int8Linear` on `device`, one after the other."""
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                block.set_submodule(name, Int8Linear(module.to(device)))

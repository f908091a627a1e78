"""The GPU kernel that rounds rows to e4m3, and computes an activation function on the way. Needs triton."""

import torch
import triton
import triton.language as tl


def round_rows(x: torch.Tensor | None, raw: torch.Tensor | None, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What `to_e4m3` of fastvideo/models/float8.py returns of [x, activation(raw)], read and written once.

    gated: the activation function is SwiGLU, else GELU in its form with tanh.
    """
    parts = [None if part is None else part.contiguous() for part in (x, raw)]
    given = next(part for part in parts if part is not None)
    plain = 0 if x is None else x.shape[-1]
    active = 0 if raw is None else raw.shape[-1] // (2 if gated else 1)
    numbers = torch.empty(*given.shape[:-1], plain + active, dtype=torch.float8_e4m3fn, device=given.device)
    scale = torch.empty(*given.shape[:-1], 1, dtype=torch.float32, device=given.device)
    _round_row[(scale.numel(),)](
        *(given if part is None else part for part in parts),
        numbers,
        scale,
        PLAIN=plain,
        ACTIVE=active,
        PLAIN_BLOCK=triton.next_power_of_2(max(plain, 1)),
        ACTIVE_BLOCK=triton.next_power_of_2(max(active, 1)),
        GATED=gated,
        num_warps=16 if active else 4,
    )
    return numbers, scale


@triton.jit
def _round_row(
    x,
    raw,
    numbers,
    scales,
    PLAIN: tl.constexpr,
    ACTIVE: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr,
    ACTIVE_BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    numbers += row * (PLAIN + ACTIVE)
    i, j = tl.arange(0, PLAIN_BLOCK), tl.arange(0, ACTIVE_BLOCK)
    largest = tl.full((), 0.0, tl.float32)
    if PLAIN > 0:
        plain = tl.load(x + row * PLAIN + i, mask=i < PLAIN, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(plain))
    if ACTIVE > 0:
        raw += row * ACTIVE * (2 if GATED else 1)
        a = tl.load(raw + j, mask=j < ACTIVE, other=0.0).to(tl.float32)
        if GATED:  # SiLU(a) is rounded, as outside of this kernel
            b = tl.load(raw + ACTIVE + j, mask=j < ACTIVE, other=0.0).to(tl.float32)
            active = (a * tl.sigmoid(a)).to(raw.dtype.element_ty).to(tl.float32) * b
        else:  # (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 z = 2 (2/π)^½ (a + 0.044715 a³)
            active = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        active = active.to(raw.dtype.element_ty).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(active)))
    scale = tl.maximum(largest / 448.0, 1e-30)
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    if PLAIN > 0:
        tl.store(numbers + i, (plain * inverse).to(tl.float8e4nv), mask=i < PLAIN)
    if ACTIVE > 0:
        tl.store(numbers + PLAIN + j, (active * inverse).to(tl.float8e4nv), mask=j < ACTIVE)

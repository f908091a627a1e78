"""GPU kernels of FP8 steps, each of which reads its input once. Needs triton.

One rounds rows to e4m3, and computes a norm or an activation function on the way; one prepares queries and keys.
"""

import torch
import triton
import triton.language as tl


def round_rows(
    x: torch.Tensor | None,
    raw: torch.Tensor | None,
    gated: bool,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `to_e4m3` of fastvideo/models/float8.py returns of [x, activation(raw)], read and written once.

    gated: the activation function is SwiGLU, else GELU in its form with tanh.
    norm: scale [N, K], shift [N, K] and epsilon of `Modulated`, if x [N, S, K] is to be normalised first.
    """
    parts = [None if part is None else part.contiguous() for part in (x, raw)]
    given = next(part for part in parts if part is not None)
    plain = 0 if x is None else x.shape[-1]
    active = 0 if raw is None else raw.shape[-1] // (2 if gated else 1)
    numbers = torch.empty(*given.shape[:-1], plain + active, dtype=torch.float8_e4m3fn, device=given.device)
    scale = torch.empty(*given.shape[:-1], 1, dtype=torch.float32, device=given.device)
    modulation = (given, given) if norm is None else [part.contiguous() for part in norm[:2]]
    _round_row[(scale.numel(),)](
        *(given if part is None else part for part in parts),
        *modulation,
        numbers,
        scale,
        given.shape[-2] if norm else 1,
        EPSILON=norm[2] if norm else None,
        PLAIN=plain,
        ACTIVE=active,
        PLAIN_BLOCK=triton.next_power_of_2(max(plain, 1)),
        ACTIVE_BLOCK=triton.next_power_of_2(max(active, 1)),
        GATED=gated,
        num_warps=16 if active else 4,
    )
    return numbers, scale


def norm_and_rotate(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """The rotary embedding of RMSNorm(x), computed in float32 and returned in the format of x.

    Args:
        x: [N, S, heads, D], whose heads lie one after the other; D is a power of 2. weight: [D].
        cosine, sine: float32, [S, D].
    """
    rows, tokens, heads, size = x.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_and_rotate_token[(rows * tokens,)](
        x,
        weight,
        cosine.contiguous(),
        sine.contiguous(),
        result,
        tokens,
        x.stride(1),
        EPSILON=epsilon,
        HEADS=heads,
        SIZE=size,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        num_warps=8,
    )
    return result


@triton.jit
def _round_row(
    x,
    raw,
    modulation_scale,
    modulation_shift,
    numbers,
    scales,
    tokens,
    EPSILON: tl.constexpr,
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
        if EPSILON is not None:
            plain = tl.where(i < PLAIN, plain - tl.sum(plain) / PLAIN, 0.0)
            plain *= tl.rsqrt(tl.sum(plain * plain) / PLAIN + EPSILON)
            place = row // tokens * PLAIN + i
            factor = 1.0 + tl.load(modulation_scale + place, mask=i < PLAIN, other=0.0).to(tl.float32)
            plain = plain * factor + tl.load(modulation_shift + place, mask=i < PLAIN, other=0.0).to(tl.float32)
            plain = plain.to(modulation_scale.dtype.element_ty).to(tl.float32)
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


@triton.jit
def _norm_and_rotate_token(
    x,
    weight,
    cosine,
    sine,
    result,
    tokens,
    stride,
    EPSILON: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    place = tl.arange(0, HEADS_BLOCK)[:, None] * SIZE + i[None, :]
    values = tl.load(x + row * stride + place, mask=place < HEADS * SIZE, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=1) / SIZE + EPSILON)[:, None]
    values *= tl.load(weight + i).to(tl.float32)[None, :]
    angle = row % tokens * SIZE + i
    even, odd = tl.split(tl.reshape(values, (HEADS_BLOCK, SIZE // 2, 2)))
    swapped = tl.reshape(tl.join(-odd, even), (HEADS_BLOCK, SIZE))
    values = values * tl.load(cosine + angle)[None, :] + swapped * tl.load(sine + angle)[None, :]
    tl.store(result + row * HEADS * SIZE + place, values.to(result.dtype.element_ty), mask=place < HEADS * SIZE)

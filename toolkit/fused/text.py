"""Between the matrices of the text encoder; see `reference.add_norm` and `reference.norm_turn`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

HEADS = 8  # that one program handles


@triton.jit
def _add_norm(x, y, out, weight, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    value = tl.load(x + at, inside, 0.0)
    if ADD:
        value += tl.load(y + at, inside, 0.0).to(tl.float32)
        tl.store(x + at, value, inside)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value *= tl.load(weight + columns, inside, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _norm_turn(
    x, step, out, weight, cos, sin, length, num_heads, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = tl.arange(0, HALF)[None, :]
    inside = (heads < num_heads) & (half < HALF)
    within = heads * 2 * HALF + half
    given, at = x + row * step + within, row * num_heads * 2 * HALF + within
    first = tl.load(given, inside, 0.0).to(tl.float32)
    second = tl.load(given + HALF, inside, 0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, 1, keep_dims=True)
    factor = tl.rsqrt(squares / (2 * HALF) + eps)
    first *= factor * tl.load(weight + half)
    second *= factor * tl.load(weight + HALF + half)
    angle = (row % length) * HALF + half
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    dtype = out.dtype.element_ty
    tl.store(out + at, (first * c - second * s).to(dtype), inside)
    tl.store(out + at + HALF, (second * c + first * s).to(dtype), inside)


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `reference.add_norm`; everything contiguous."""
    count, width = x.shape
    out = x.new_empty(count, width, dtype=dtype)
    launch(_add_norm, (count,))(
        x, x if y is None else y, out, weight, width, eps,
        ADD=y is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def norm_turn(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """As `reference.norm_turn`; each token's heads side by side, the rest contiguous."""
    count, head_dim = len(x), weight.shape[0]
    num_heads = x.shape[1] // head_dim
    out = x.new_empty(count, num_heads, head_dim)
    launch(_norm_turn, (count, triton.cdiv(num_heads, HEADS)))(
        x, x.stride(0), out, weight, cos, sin, len(cos), num_heads, eps,
        HEADS=HEADS, HALF=head_dim // 2, num_warps=4,
    )  # fmt: skip
    return out

"""q, k and v to fp8 and back, one scale each, for kernels that take no finer ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .matrix import FP8, SMALLEST, Scaled

ROWS, HEADS = 16, 4  # tokens and heads that one program handles
BLOCK = 4096  # numbers that one program widens


@triton.jit
def _tile(
    x, count, length, num_heads, picture_step, head_step, token_step,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A program's numbers [ROWS, HEADS * D], where they lie in a dense result, and which of them there are."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * HEADS * D + tl.arange(0, HEADS * D)[None, :]
    inside = (row < count) & (column < num_heads * D)
    picture = row // length
    at = picture.to(tl.int64) * picture_step + (row - picture * length).to(tl.int64) * token_step
    at += (column // D).to(tl.int64) * head_step + column % D
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    return value, row.to(tl.int64) * num_heads * D + column, inside


@triton.jit
def _largest(
    x, partial, count, length, num_heads, picture_step, head_step, token_step,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    value, _, _ = _tile(x, count, length, num_heads, picture_step, head_step, token_step, ROWS, HEADS, D)  # fmt: skip
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + program, tl.max(tl.max(tl.abs(value), 1), 0))


@triton.jit
def _convert(
    x, out, partial, scale, parts, count, length, num_heads, picture_step, head_step, token_step, smallest,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # every program finds the tensor's largest number in what `_largest` left: no atomics, the same each time
    part = tl.arange(0, PARTS)
    most = tl.max(tl.load(partial + part, part < parts, 0.0), 0)
    step = tl.maximum(most, smallest) / 448.0
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, step)
        tl.store(scale + 1, 1.0 / step)
    value, to, inside = _tile(x, count, length, num_heads, picture_step, head_step, token_step, ROWS, HEADS, D)  # fmt: skip
    tl.store(out + to, (value * (1.0 / step)).to(out.dtype.element_ty), inside)


def to_fp8(x: torch.Tensor) -> Scaled:
    """As `matrix.to_fp8`.

    Args:
        x: [B, num_heads, seq_len, head_dim], the last dimension contiguous; head_dim a power of two.

    Returns:
        Of the same shape, laid out as [B, seq_len, num_heads, head_dim].
    """
    batch, num_heads, length, head_dim = x.shape
    count = batch * length
    grid = triton.cdiv(count, ROWS), triton.cdiv(num_heads, HEADS)
    parts = grid[0] * grid[1]
    partial = x.new_empty(parts, dtype=torch.float32)
    scale = x.new_empty(2, dtype=torch.float32)
    out = x.new_empty(batch, length, num_heads, head_dim, dtype=FP8)
    sizes = count, length, num_heads, *x.stride()[:3]
    tile = {"ROWS": ROWS, "HEADS": HEADS, "D": head_dim, "num_warps": 8}
    launch(_largest, grid)(x, partial, *sizes, **tile)
    most = triton.next_power_of_2(parts)
    launch(_convert, grid)(x, out, partial, scale, parts, *sizes, SMALLEST, PARTS=most, **tile)
    return Scaled(out.transpose(1, 2), scale)


@triton.jit
def _widen(x, out, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count, 0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + at, value.to(out.dtype.element_ty), at < count)


def widen(x: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """As `reference.widen`; x is dense in whatever order, and so is the result."""
    count, out = x.data.numel(), torch.empty_like(x.data, dtype=dtype)
    launch(_widen, (triton.cdiv(count, BLOCK),))(x.data, out, x.scale, count, BLOCK=BLOCK)
    return out

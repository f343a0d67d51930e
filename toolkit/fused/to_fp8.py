"""q, k and v to fp8 and back, one scale each, for kernels that take no finer ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .matrix import FP8, SMALLEST

ROWS = 16  # tokens that one program handles
BLOCK = 4096  # numbers that one program widens


@triton.jit
def _head(x, rows, inside, head, length, picture_step, head_step, token_step, D: tl.constexpr):
    """[ROWS, D] numbers of one head."""
    picture = rows // length
    at = picture.to(tl.int64) * picture_step + (rows - picture * length).to(tl.int64) * token_step
    at += head * head_step
    columns = tl.arange(0, D)[None, :]
    return tl.load(x + at[:, None] + columns, inside[:, None], 0.0).to(tl.float32)


@triton.jit
def _largest(
    x, partial, count, length, picture_step, head_step, token_step,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros([ROWS, D], tl.float32)
    for head in range(HEADS):
        value = _head(x, rows, rows < count, head, length, picture_step, head_step, token_step, D)
        most = tl.maximum(most, tl.abs(value))
    tl.store(partial + tl.program_id(0), tl.max(tl.max(most, 1), 0))


@triton.jit
def _convert(
    x, out, partial, scale, count, length, picture_step, head_step, token_step, smallest,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # every program finds the tensor's largest number in what `_largest` left: no atomics, the same each time
    part = tl.arange(0, PARTS)
    most = tl.max(tl.load(partial + part, part < tl.num_programs(0), 0.0), 0)
    step = tl.maximum(most, smallest) / 448.0
    if tl.program_id(0) == 0:
        tl.store(scale, step)
        tl.store(scale + 1, 1.0 / step)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    to = rows.to(tl.int64)[:, None] * HEADS * D + tl.arange(0, D)[None, :]
    for head in range(HEADS):
        value = _head(x, rows, rows < count, head, length, picture_step, head_step, token_step, D)
        value = (value / step).to(out.dtype.element_ty)
        tl.store(out + to + head * D, value, (rows < count)[:, None])


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in fp8 by its largest number; `data * scale` is what it means.

    Args:
        x: [B, num_heads, seq_len, head_dim], the last dimension contiguous; head_dim a power of two.

    Returns:
        float8_e4m3fn of the same shape, laid out as [B, seq_len, num_heads, head_dim], and [2] fp32: the scale, and one
        over it.
    """
    batch, num_heads, length, head_dim = x.shape
    count = batch * length
    programs = triton.cdiv(count, ROWS)
    partial = x.new_empty(programs, dtype=torch.float32)
    scale = x.new_empty(2, dtype=torch.float32)
    out = x.new_empty(batch, length, num_heads, head_dim, dtype=FP8)
    sizes = count, length, *x.stride()[:3]
    _largest[(programs,)](x, partial, *sizes, HEADS=num_heads, ROWS=ROWS, D=head_dim)
    _convert[(programs,)](
        x, out, partial, scale, *sizes, SMALLEST,
        HEADS=num_heads, ROWS=ROWS, D=head_dim, PARTS=triton.next_power_of_2(programs),
    )  # fmt: skip
    return out.transpose(1, 2), scale


@triton.jit
def _widen(x, out, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count, 0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + at, value.to(out.dtype.element_ty), at < count)


def widen(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x * scale` in another dtype.

    Args:
        x: float8_e4m3fn, dense in whatever order.
        scale: its first number is taken, fp32.
        dtype: of the result.

    Returns:
        Laid out as x.
    """
    out = torch.empty_like(x, dtype=dtype)
    _widen[(triton.cdiv(x.numel(), BLOCK),)](x, out, scale, x.numel(), BLOCK=BLOCK)
    return out

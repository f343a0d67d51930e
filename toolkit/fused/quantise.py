"""Rows to fp8; see `matrix.quantise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .matrix import FP8, SMALLEST, Quantised
from .modulate import store_fp8


@triton.jit
def _quantise(x, out, out_scale, row_step, width, smallest, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row.to(tl.int64) * row_step + columns, inside, 0.0).to(tl.float32)
    to = row.to(tl.int64) * width + columns
    store_fp8(out, out_scale, row, to, value, inside, smallest)


def quantise(x: torch.Tensor) -> Quantised:
    """As `matrix.quantise`; the last dimension contiguous."""
    count, width = x.shape
    out, scale = x.new_empty(count, width, dtype=FP8), x.new_empty(count, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    launch(_quantise, (count,))(
        x, out, scale, x.stride(0), width, SMALLEST, BLOCK=block, num_warps=8
    )
    return Quantised(out, scale)

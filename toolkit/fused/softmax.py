"""Softmax of long rows; see `reference_pixels.softmax`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

WHOLE = 16384  # columns that a program keeps while it needs them
BLOCK = 4096  # of longer rows, which it reads three times
LOG2E = 1.4426950408889634


@triton.jit
def _softmax(scores, out, columns, row_step, scale, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source, target = scores + row * row_step, out + row * columns
    if WHOLE:
        at = tl.arange(0, BLOCK)
        value = tl.load(source + at, at < columns, float("-inf")).to(tl.float32)
        value = tl.exp2((value - tl.max(value, 0)) * scale)
        value = value / tl.sum(value, 0)
        tl.store(target + at, value.to(out.dtype.element_ty), at < columns)
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(source + at, at < columns, float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, value)
        top = tl.max(highest, 0)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(source + at, at < columns, float("-inf")).to(tl.float32)
            sums += tl.exp2((value - top) * scale)
        total = tl.sum(sums, 0)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(source + at, at < columns, float("-inf")).to(tl.float32)
            value = tl.exp2((value - top) * scale) / total
            tl.store(target + at, value.to(out.dtype.element_ty), at < columns)


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """As `reference_pixels.softmax`; the scale is positive, rows may lie apart."""
    if scores.dim() != 2 or scores.stride(1) != 1:
        raise ValueError(f"rows of scores must be contiguous, not {scores.stride()}")
    rows, columns = scores.shape
    out = torch.empty(rows, columns, dtype=dtype, device=scores.device)
    launch(_softmax, (rows,))(
        scores, out, columns, scores.stride(0), scale * LOG2E,
        WHOLE=columns <= WHOLE, BLOCK=triton.next_power_of_2(columns) if columns <= WHOLE else BLOCK,
        num_warps=16 if BLOCK < columns <= WHOLE else 8,
    )  # fmt: skip
    return out

"""Residual, norm and modulation in one pass over the rows; see `reference.modulate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .matrix import FP8, SMALLEST, Activations, Quantised
from .reference import EPS
from .rows import Rows


@triton.jit
def line_of(row, txt_rows, txt_len, img_len):
    """A row's stream (0 text, 1 image), picture and token."""
    img = row >= txt_rows
    number = tl.where(img, row - txt_rows, row)
    length = tl.where(img, img_len, txt_len)
    picture = number // tl.maximum(length, 1)
    token = number - picture * length + tl.where(img, txt_len, 0)
    return img.to(tl.int32), picture, token


@triton.jit
def store_fp8(out, out_scale, row, at, value, inside, smallest):
    """A whole row in fp8, with its scale."""
    step = tl.maximum(tl.max(tl.abs(value), 0), smallest) / 448.0
    tl.store(out_scale + row, step)
    tl.store(out + at, (value * (1.0 / step)).to(out.dtype.element_ty), inside)


@triton.jit
def _modulate(
    x, y, out, out_scale, shift, scale, gate,
    stream_step, picture_step, gate_stream_step, gate_picture_step,
    txt_rows, txt_len, img_len, width, eps, smallest,
    ADD: tl.constexpr, TO_FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    img, picture, _ = line_of(row, txt_rows, txt_len, img_len)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row.to(tl.int64) * width + columns
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        line = img * gate_stream_step + picture * gate_picture_step
        factor = tl.load(gate + line + columns, inside, 0.0).to(tl.float32)
        value += tl.load(y + at, inside, 0.0).to(tl.float32) * factor
        tl.store(x + at, value.to(x.dtype.element_ty), inside)
    mean = tl.sum(value, 0) / width
    value = tl.where(inside, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    line = img * stream_step + picture * picture_step
    factor = 1.0 + tl.load(scale + line + columns, inside, 0.0).to(tl.float32)
    value = value * factor + tl.load(shift + line + columns, inside, 0.0).to(tl.float32)
    if TO_FP8:
        store_fp8(out, out_scale, row, at, value, inside, smallest)
    else:
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    y: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    fp8: bool = False,
) -> Activations:
    """As `reference.modulate`; `x` and `y` contiguous, the tables' last dimension, too."""
    out, width = torch.empty_like(x, dtype=FP8 if fp8 else None), x.shape[1]
    out_scale = x.new_empty(rows.count if fp8 else 1, 1, dtype=torch.float32)
    gate = shift if gate is None else gate
    launch(_modulate, (rows.count,))(
        x, x if y is None else y, out, out_scale, shift, scale, gate,
        *shift.stride()[:2], *gate.stride()[:2],
        rows.txt, rows.txt_len, rows.img_len, width, EPS, SMALLEST,
        ADD=y is not None, TO_FP8=fp8, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return Quantised(out, out_scale) if fp8 else out

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
def _residual(x, y, gate, at, line, inside, ADD: tl.constexpr):
    """Some columns of a row of the residual, to which a gated result was added."""
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + at, inside, 0.0).to(tl.float32) * tl.load(gate + line, inside, 0.0).to(tl.float32)  # fmt: skip
        tl.store(x + at, value.to(x.dtype.element_ty), inside)
    return value


@triton.jit
def _shifted(value, factor, shift, scale, line, inside):
    """What is normed, modulated."""
    return value * factor * (1.0 + tl.load(scale + line, inside, 0.0).to(tl.float32)) + tl.load(shift + line, inside, 0.0).to(tl.float32)  # fmt: skip


@triton.jit
def _modulate(
    x, y, out, out_scale, shift, scale, gate,
    stream_step, picture_step, gate_stream_step, gate_picture_step,
    txt_rows, txt_len, img_len, width, eps, smallest,
    ADD: tl.constexpr, TO_FP8: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # A row stays in registers, in blocks that hold hardly more than it has.
    row = tl.program_id(0)
    img, picture, _ = line_of(row, txt_rows, txt_len, img_len)
    at = row.to(tl.int64) * width
    gate_line = img * gate_stream_step + picture * gate_picture_step
    line = img * stream_step + picture * picture_step
    most, rest = tl.arange(0, MOST), tl.arange(0, 1)
    value = _residual(x, y, gate, at + most, gate_line + most, most < width, ADD)
    total = tl.sum(value, 0)
    if REST:
        rest = MOST + tl.arange(0, REST)
        others = _residual(x, y, gate, at + rest, gate_line + rest, rest < width, ADD)
        total += tl.sum(others, 0)
    mean = total / width
    value = tl.where(most < width, value - mean, 0.0)
    squares = tl.sum(value * value, 0)
    if REST:
        others = tl.where(rest < width, others - mean, 0.0)
        squares += tl.sum(others * others, 0)
    factor = tl.rsqrt(squares / width + eps)
    value = _shifted(value, factor, shift, scale, line + most, most < width)
    if REST:
        others = _shifted(others, factor, shift, scale, line + rest, rest < width)
    inverse = 1.0
    if TO_FP8:
        largest = tl.maximum(tl.max(tl.abs(value), 0), smallest)
        if REST:
            largest = tl.maximum(largest, tl.max(tl.abs(others), 0))
        tl.store(out_scale + row, largest / 448.0)
        inverse = 1.0 / (largest / 448.0)
    tl.store(out + at + most, (value * inverse).to(out.dtype.element_ty), most < width)
    if REST:
        tl.store(out + at + rest, (others * inverse).to(out.dtype.element_ty), rest < width)


def blocks(width: int) -> dict[str, int]:
    """Two powers of two that hold a row: the largest one in it, and what holds the rest, 0 if there is none."""
    most = 1 << (width.bit_length() - 1)
    return {"MOST": most, "REST": triton.next_power_of_2(width - most) if width > most else 0}


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
        ADD=y is not None, TO_FP8=fp8, **blocks(width), num_warps=4,
    )  # fmt: skip
    return Quantised(out, out_scale) if fp8 else out

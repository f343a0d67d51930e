"""SwiGLU, written behind what attention gave; see `reference.swiglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .matrix import FP8, SMALLEST, Activations, Quantised, Scaled
from .modulate import line_of
from .rows import Rows

BLOCK = 1024  # columns that one program writes


@triton.jit
def _swiglu(
    gate_up, attention, out, row_step, picture_step, token_step, attention_width, width,
    txt_rows, txt_len, img_len, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    all_columns = attention_width + width
    to = row.to(tl.int64) * all_columns + columns
    if tl.program_id(1) * BLOCK < attention_width:
        _, picture, token = line_of(row, txt_rows, txt_len, img_len)
        inside = columns < attention_width
        at = picture.to(tl.int64) * picture_step + token.to(tl.int64) * token_step + columns
        tl.store(out + to, tl.load(attention + at, inside, 0.0), inside)
    if (tl.program_id(1) + 1) * BLOCK > attention_width:
        inside = (columns >= attention_width) & (columns < all_columns)
        at = row.to(tl.int64) * row_step + columns - attention_width
        gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
        up = tl.load(gate_up + width + at, inside, 0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + to, value.to(out.dtype.element_ty), inside)


@triton.jit
def _gated(gate_up, at, width, inside):
    """SwiGLU of some columns, in fp32: to round to bf16 on the way takes as long as an exponential."""
    gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + width + at, inside, 0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _largest(value):
    return tl.max(tl.abs(value), 0)


@triton.jit
def _swiglu_fp8(
    gate_up, attention, attention_scale, out, out_scale, row_step, picture_step, token_step, attention_width, width,
    txt_rows, txt_len, img_len, smallest,
    SCALED: tl.constexpr, BEFORE: tl.constexpr, MOST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # A row stays in registers until its largest number is known: in blocks that hold hardly more than it has.
    row = tl.program_id(0)
    source, to = row.to(tl.int64) * row_step, row.to(tl.int64) * (attention_width + width)
    most = tl.arange(0, MOST)
    gated = _gated(gate_up, source + most, width, most < width)
    top = tl.maximum(_largest(gated), smallest)
    if REST:
        rest = MOST + tl.arange(0, REST)
        gated_rest = _gated(gate_up, source + rest, width, rest < width)
        top = tl.maximum(top, _largest(gated_rest))
    if BEFORE:
        _, picture, token = line_of(row, txt_rows, txt_len, img_len)
        columns = tl.arange(0, BEFORE)
        at = picture.to(tl.int64) * picture_step + token.to(tl.int64) * token_step + columns
        before = tl.load(attention + at, columns < attention_width, 0.0).to(tl.float32)
        if SCALED:
            before *= tl.load(attention_scale)
        top = tl.maximum(top, _largest(before))
    step = top / 448.0
    tl.store(out_scale + row, step)
    inverse = 1.0 / step
    if BEFORE:
        tl.store(
            out + to + columns,
            (before * inverse).to(out.dtype.element_ty),
            columns < attention_width,
        )
    to += attention_width
    tl.store(out + to + most, (gated * inverse).to(out.dtype.element_ty), most < width)
    if REST:
        tl.store(
            out + to + rest,
            (gated_rest * inverse).to(out.dtype.element_ty),
            rest < width,
        )


def swiglu(
    gate_up: torch.Tensor,
    rows: Rows,
    attention: torch.Tensor | Scaled | None = None,
    fp8: bool = False,
) -> Activations:
    """As `reference.swiglu`; the last dimension of both contiguous."""
    scaled = attention if isinstance(attention, Scaled) else None
    values = attention.data if isinstance(attention, Scaled) else attention
    width, attention_width = gate_up.shape[1] // 2, 0 if values is None else values.shape[2]
    out = gate_up.new_empty(rows.count, attention_width + width, dtype=FP8 if fp8 else None)
    steps = (0, 0) if values is None else values.stride()[:2]
    attention = gate_up if values is None else values
    sizes = gate_up.stride(0), *steps, attention_width, width, rows.txt, rows.txt_len, rows.img_len
    if not fp8:
        grid = (rows.count, triton.cdiv(out.shape[1], BLOCK))
        launch(_swiglu, grid)(gate_up, attention, out, *sizes, BLOCK=BLOCK, num_warps=4)
        return out
    scale = gate_up.new_empty(rows.count, 1, dtype=torch.float32)
    most = 1 << (width.bit_length() - 1)  # the largest power of two in it
    rest = triton.next_power_of_2(width - most) if width > most else 0
    before = triton.next_power_of_2(attention_width) if attention_width else 0
    launch(_swiglu_fp8, (rows.count,))(
        gate_up, attention, scaled.scale if scaled else scale, out, scale, *sizes, SMALLEST,
        SCALED=scaled is not None, BEFORE=before, MOST=most, REST=rest, num_warps=8
    )  # fmt: skip
    return Quantised(out, scale)

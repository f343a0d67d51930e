"""SwiGLU, written behind what attention gave; see `reference.swiglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .matrix import FP8, SMALLEST, Activations, Quantised
from .modulate import line_of, store_fp8
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
        value = gate * tl.sigmoid(gate) * up
        tl.store(out + to, value.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_fp8(
    gate_up, attention, out, out_scale, row_step, picture_step, token_step, attention_width, width,
    txt_rows, txt_len, img_len, smallest, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    all_columns = attention_width + width
    inside = columns < attention_width
    _, picture, token = line_of(row, txt_rows, txt_len, img_len)
    at = picture.to(tl.int64) * picture_step + token.to(tl.int64) * token_step + columns
    before = tl.load(attention + at, inside, 0.0).to(tl.float32)
    inside = (columns >= attention_width) & (columns < all_columns)
    at = row.to(tl.int64) * row_step + columns - attention_width
    gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + width + at, inside, 0.0).to(tl.float32)
    value = before + gate * tl.sigmoid(gate) * up
    to = row.to(tl.int64) * all_columns + columns
    store_fp8(out, out_scale, row, to, value, columns < all_columns, smallest)


def swiglu(
    gate_up: torch.Tensor, rows: Rows, attention: torch.Tensor | None = None, fp8: bool = False
) -> Activations:
    """As `reference.swiglu`; the last dimension of both contiguous."""
    width, attention_width = gate_up.shape[1] // 2, 0 if attention is None else attention.shape[2]
    out = gate_up.new_empty(rows.count, attention_width + width, dtype=FP8 if fp8 else None)
    steps = (0, 0) if attention is None else attention.stride()[:2]
    attention = gate_up if attention is None else attention
    sizes = gate_up.stride(0), *steps, attention_width, width, rows.txt, rows.txt_len, rows.img_len
    if not fp8:
        grid = (rows.count, triton.cdiv(out.shape[1], BLOCK))
        _swiglu[grid](gate_up, attention, out, *sizes, BLOCK=BLOCK, num_warps=4)
        return out
    scale = gate_up.new_empty(rows.count, 1, dtype=torch.float32)
    whole = triton.next_power_of_2(out.shape[1])
    _swiglu_fp8[(rows.count,)](gate_up, attention, out, scale, *sizes, SMALLEST, BLOCK=whole, num_warps=16)  # fmt: skip
    return Quantised(out, scale)

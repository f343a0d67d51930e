"""Norms and rotary embedding of q and k, written as attention wants them; see `reference.norm_rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .matrix import FP8, SMALLEST, Scaled
from .modulate import line_of
from .rows import Rows
from .to_fp8 import to_fp8

HEADS = 8  # that one program handles, in one warp: sums over a head then need no shared memory


@triton.jit
def _fp8_step(weight, stream_step, smallest, HALF: tl.constexpr):
    """The scale of what a norm gives: of a head's numbers none is larger than all of them, which the norm makes known."""
    columns = tl.arange(0, 2 * HALF)
    txt = tl.abs(tl.load(weight + columns).to(tl.float32))
    img = tl.abs(tl.load(weight + stream_step + columns).to(tl.float32))
    most = tl.max(tl.maximum(txt, img), 0) * tl.sqrt(2.0 * HALF)
    return tl.maximum(most, smallest) / 448.0


@triton.jit
def _turn(source, target, weight, cos, sin, at, to, inside, step, HALF: tl.constexpr, eps):
    """Norm and rotate [HEADS, 2 * HALF] numbers, and divide them by a step."""
    factor = tl.load(weight + tl.arange(0, 2 * HALF)).to(tl.float32) * (1.0 / step)
    value = tl.load(source + at, inside, 0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / (2 * HALF) + eps)
    value *= factor[None, :]
    even, odd = tl.split(tl.reshape(value, (value.shape[0], HALF, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (value.shape[0], 2 * HALF))
    tl.store(target + to, turned.to(target.dtype.element_ty), inside)


@triton.jit
def _norm_rotate(
    qkv, q, k, v, scales, q_norm, k_norm, cos, sin,
    row_step, q_norm_step, k_norm_step, txt_rows, txt_len, img_len, num_heads, eps, smallest,
    TO_FP8: tl.constexpr, COPY_V: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    img, picture, token = line_of(row, txt_rows, txt_len, img_len)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (heads < num_heads)[:, None]
    within = heads[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    width = num_heads * 2 * HALF
    at = row.to(tl.int64) * row_step + within
    to = (picture.to(tl.int64) * (txt_len + img_len) + token) * width + within
    half = tl.arange(0, HALF)
    c = tl.load(cos + token * HALF + half)[None, :]
    s = tl.load(sin + token * HALF + half)[None, :]
    q_step, k_step = 1.0, 1.0
    if TO_FP8:
        q_step = _fp8_step(q_norm, q_norm_step, smallest, HALF)
        k_step = _fp8_step(k_norm, k_norm_step, smallest, HALF)
        if (row == 0) & (tl.program_id(1) == 0):
            tl.store(scales, q_step)
            tl.store(scales + 1, 1.0 / q_step)
            tl.store(scales + 2, k_step)
            tl.store(scales + 3, 1.0 / k_step)
    _turn(qkv, q, q_norm + img * q_norm_step, c, s, at, to, inside, q_step, HALF, eps)
    _turn(qkv + width, k, k_norm + img * k_norm_step, c, s, at, to, inside, k_step, HALF, eps)
    if COPY_V:
        tl.store(v + to, tl.load(qkv + 2 * width + at, inside, 0.0), inside)


def norm_rotate(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: Rows,
    eps: float,
    fp8: bool = False,
) -> tuple:
    """As `reference.norm_rotate`; of one picture, v stays where it is."""
    head_dim = q_norm.shape[-1]
    num_heads = qkv.shape[1] // (3 * head_dim)
    shape = (rows.batch, rows.seq_len, num_heads, head_dim)
    q, k = (qkv.new_empty(shape, dtype=FP8 if fp8 else None) for _ in "qk")
    scales = qkv.new_empty(2, 2, dtype=torch.float32)
    copy = rows.batch > 1
    v = qkv.new_empty(shape) if copy else qkv[None, :, 2 * num_heads * head_dim :].unflatten(2, shape[2:])  # fmt: skip
    launch(_norm_rotate, (rows.count, triton.cdiv(num_heads, HEADS)))(
        qkv, q, k, v, scales, q_norm, k_norm, cos, sin,
        qkv.stride(0), q_norm.stride(0), k_norm.stride(0), rows.txt, rows.txt_len, rows.img_len, num_heads, eps, SMALLEST,
        TO_FP8=fp8, COPY_V=copy, HEADS=HEADS, HALF=head_dim // 2, num_warps=1,
    )  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (Scaled(q, scales[0]), Scaled(k, scales[1]), to_fp8(v)) if fp8 else (q, k, v)

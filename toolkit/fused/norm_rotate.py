"""Norms and rotary embedding of q and k, written as attention wants them; see `reference.norm_rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .modulate import line_of
from .rows import Rows

HEADS = 8  # that one program handles


@triton.jit
def _turn(source, target, weight, cos, sin, at, to, inside, HALF: tl.constexpr, eps):
    """Norm and rotate [HEADS, 2 * HALF] numbers."""
    value = tl.load(source + at, inside, 0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / (2 * HALF) + eps)
    value *= tl.load(weight + tl.arange(0, 2 * HALF)).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(value, (value.shape[0], HALF, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (value.shape[0], 2 * HALF))
    tl.store(target + to, turned.to(target.dtype.element_ty), inside)


@triton.jit
def _norm_rotate(
    qkv, q, k, v, q_norm, k_norm, cos, sin,
    row_step, q_norm_step, k_norm_step, txt_rows, txt_len, img_len, num_heads, eps,
    COPY_V: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
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
    _turn(qkv, q, q_norm + img * q_norm_step, c, s, at, to, inside, HALF, eps)
    _turn(qkv + width, k, k_norm + img * k_norm_step, c, s, at, to, inside, HALF, eps)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.norm_rotate`; of one picture, v stays where it is."""
    head_dim = q_norm.shape[-1]
    num_heads = qkv.shape[1] // (3 * head_dim)
    shape = (rows.batch, rows.seq_len, num_heads, head_dim)
    q, k = qkv.new_empty(shape), qkv.new_empty(shape)
    copy = rows.batch > 1
    v = qkv.new_empty(shape) if copy else qkv[None, :, 2 * num_heads * head_dim :].unflatten(2, shape[2:])  # fmt: skip
    _norm_rotate[(rows.count, triton.cdiv(num_heads, HEADS))](
        qkv, q, k, v, q_norm, k_norm, cos, sin,
        qkv.stride(0), q_norm.stride(0), k_norm.stride(0), rows.txt, rows.txt_len, rows.img_len, num_heads, eps,
        COPY_V=copy, HEADS=HEADS, HALF=head_dim // 2, num_warps=4,
    )  # fmt: skip
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

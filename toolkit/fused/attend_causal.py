"""Attention of a prompt to itself; see `reference.attend_causal`.

A prompt is padded to hundreds of tokens, of which most of them look at nothing but the few that are text: keys behind the
last of those are not read, and heads that share a key read it where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

QUERIES, KEYS = 64, 64  # that one program handles, and reads at once
NOTHING = tl.constexpr(-1e30)  # a score; finite, so that who sees nothing gets no NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_causal(
    q, k, v, present, out, q_step, k_step, v_step, length, scale,
    REPEAT: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, picture = tl.program_id(1), tl.program_id(2)
    columns, everywhere = tl.arange(0, D), tl.arange(0, LENGTH)
    seen = tl.load(present + picture * length + everywhere, everywhere < length, 0) != 0
    last = tl.max(tl.where(seen, everywhere + 1, 0), 0)
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    at = (picture * length + row)[:, None].to(tl.int64)
    inside = (row < length)[:, None]
    mine = tl.load(q + at * q_step + head * D + columns[None, :], inside, 0.0)
    keys = k + (head // REPEAT) * D + columns[:, None]
    values = v + (head // REPEAT) * D + columns[None, :]
    most = tl.full([QUERIES], NOTHING, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, D], tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * QUERIES, last)
    for first in range(0, LENGTH, KEYS):
        if first < end:
            token = first + tl.arange(0, KEYS)
            there = token < length
            place = (picture * length + token).to(tl.int64)
            key = tl.load(keys + place[None, :] * k_step, there[None, :], 0.0)
            score = tl.dot(mine, key, input_precision="ieee") * (scale * LOG2_E)
            visible = (tl.load(present + picture * length + token, there, 0) != 0)[None, :] & (token[None, :] <= row[:, None])  # fmt: skip
            score = tl.where(visible, score, NOTHING)
            larger = tl.maximum(most, tl.max(score, 1))
            share = tl.where(visible, tl.exp2(score - larger[:, None]), 0.0)
            faded = tl.exp2(most - larger)
            value = tl.load(values + place[:, None] * v_step, there[:, None], 0.0)
            total = total * faded + tl.sum(share, 1)
            found = found * faded[:, None]
            found += tl.dot(share.to(value.dtype), value, input_precision="ieee")
            most = larger
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    to = at * (tl.num_programs(1) * D) + head * D + columns[None, :]
    tl.store(out + to, found.to(out.dtype.element_ty), inside)


def attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """As `reference.attend_causal`; the heads of a token side by side, head_dim a power of two."""
    batch, length, num_heads, head_dim = q.shape
    out = q.new_empty(batch, length, num_heads * head_dim)
    launch(_attend_causal, (triton.cdiv(length, QUERIES), num_heads, batch))(
        q, k, v, present.contiguous(), out, q.stride(1), k.stride(1), v.stride(1), length, head_dim**-0.5,
        REPEAT=num_heads // k.shape[2], D=head_dim, LENGTH=triton.next_power_of_2(length),
        QUERIES=QUERIES, KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    return out

"""Qwen3 as far as Klein reads it, over a plain record of weights; knows no host.

The residual stays in fp32, what the matrices read is in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .architecture import HEAD_DIM

THETA = 1e6  # of the rotary embedding
EPS = 1e-6  # of all norms


@dataclass(frozen=True)
class Layer:
    """One layer's weights, C the model's width.

    Attributes:
        attn_norm: [C] fp32, as all norms.
        q: [heads * HEAD_DIM, C].
        k: [kv_heads * HEAD_DIM, C].
        v: as k.
        o: [C, heads * HEAD_DIM].
        q_norm: [HEAD_DIM].
        k_norm: [HEAD_DIM].
        mlp_norm: [C].
        gate: [intermediate, C].
        up: as gate.
        down: [C, intermediate].
    """

    attn_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def hidden_states(
    layers: Sequence[Layer], embeds: torch.Tensor, present: torch.Tensor, taps: Sequence[int]
) -> torch.Tensor:
    """What some layers give.

    Args:
        layers: the first ones of the model, at least as many as the last tap.
        embeds: [B, seq_len, C] of the tokens.
        present: [B, seq_len] bool, False where nothing may look: padding, at the end.
        taps: after how many layers to read.

    Returns:
        [B, len(taps), seq_len, C] fp32.
    """
    x = embeds.float()
    cos, sin = _rotary_table(x.shape[1], x.device)
    earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    visible = earlier & present[:, None, None, :]
    states = []
    for number, layer in enumerate(layers[: max(taps)], 1):
        h = F.rms_norm(x, x.shape[-1:], layer.attn_norm, EPS).to(layer.q.dtype)
        q = _rotate(
            F.rms_norm(_heads(h, layer.q).float(), (HEAD_DIM,), layer.q_norm, EPS), cos, sin
        )
        k = _rotate(
            F.rms_norm(_heads(h, layer.k).float(), (HEAD_DIM,), layer.k_norm, EPS), cos, sin
        )
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, _heads(h, layer.v)))
        q, k = q.to(v.dtype), k.to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.o)
        h = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, EPS).to(layer.gate.dtype)
        x = x + F.linear(F.silu(F.linear(h, layer.gate)) * F.linear(h, layer.up), layer.down)
        if number in taps:
            states.append(x)
    return torch.stack(states, 1)


def _heads(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, seq_len, C] to [B, heads, seq_len, HEAD_DIM]."""
    return F.linear(h, weight).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def _rotary_table(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of each position's angles, [length, HEAD_DIM / 2] fp32."""
    exponents = torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM
    angles = torch.arange(length, device=device).float()[:, None] / THETA**exponents
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + HEAD_DIM / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

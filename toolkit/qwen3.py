"""Qwen3 as far as Klein reads it, over a plain record of weights; knows no host.

The residual stays in fp32, what the matrices read is in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .architecture import HEAD_DIM
from .fused import reference
from .fused.matrix import Joined, Plain
from .fused.rows import Rows

THETA = 1e6  # of the rotary embedding
EPS = 1e-6  # of all norms


@dataclass(frozen=True)
class Layer:
    """One layer's weights, C the model's width.

    Attributes:
        attn_norm: [C] fp32, as all norms.
        qv: [(heads + kv_heads) * HEAD_DIM, C], of queries and values, see `join`.
        k: [kv_heads * HEAD_DIM, C].
        o: [C, heads * HEAD_DIM].
        q_norm: [HEAD_DIM].
        k_norm: [HEAD_DIM].
        mlp_norm: [C].
        gate_up: [2 * intermediate, C], see `join`.
        down: [C, intermediate].
    """

    attn_norm: torch.Tensor
    qv: Plain | Joined
    k: torch.Tensor
    o: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: Plain | Joined
    down: torch.Tensor


def join(first: torch.Tensor, second: torch.Tensor) -> Plain | Joined:
    """Two matrices [out, in] of the same input as one, by reference.

    They usually lie one after the other, as in their file: then they are one matrix, which a large card multiplies faster
    than two.
    """
    behind = first.data_ptr() + first.nbytes == second.data_ptr()
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not (behind and same and first.is_contiguous() and second.is_contiguous()):
        return Joined((first, second))
    height = first.shape[0] + second.shape[0]
    return Plain(first.detach().as_strided((height, first.shape[1]), first.stride()))


def hidden_states(
    layers: Sequence[Layer],
    embeds: torch.Tensor,
    present: torch.Tensor,
    taps: Sequence[int],
    operations: Any = reference,
) -> torch.Tensor:
    """What some layers give.

    Args:
        layers: the first ones of the model, at least as many as the last tap.
        embeds: [B, seq_len, C] of the tokens.
        present: [B, seq_len] bool, False where nothing may look: padding, at the end.
        taps: after how many layers to read, ascending.
        operations: between the matrices, see `reference.py`.

    Returns:
        [B, seq_len, len(taps), C] fp32.
    """
    batch, length, width = embeds.shape
    x = embeds.flatten(0, 1).to(torch.float32, copy=True)  # the residual, written in place
    states = x.new_empty(batch, length, len(taps), width)
    table = rotary_table(length, x.device)
    result: Any = None  # of what was computed last, still to be added
    for number, layer in enumerate(layers[: max(taps)]):
        h = operations.add_norm(x, result, layer.attn_norm, EPS, layer.k.dtype)
        if number in taps:
            states[:, :, taps.index(number)] = x.view(batch, length, width)
        attended = _attend(layer, h, present, table, operations)
        result = F.linear(attended, layer.o)
        h = operations.add_norm(x, result, layer.mlp_norm, EPS, layer.down.dtype)
        gated = operations.swiglu(layer.gate_up(h), Rows(1, len(h), 0))
        result = F.linear(gated, layer.down)
    states[:, :, -1] = (x + result).view(batch, length, width)
    return states


def _attend(
    layer: Layer,
    h: torch.Tensor,
    present: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    operations: Any,
) -> torch.Tensor:
    """[B * seq_len, C] to [B * seq_len, heads * HEAD_DIM]."""
    q, v = layer.qv(h).tensor_split((layer.o.shape[1],), 1)
    q = operations.norm_turn(q, layer.q_norm, *table, EPS)
    k = operations.norm_turn(F.linear(h, layer.k), layer.k_norm, *table, EPS)
    v = v.unflatten(1, (-1, HEAD_DIM))
    q, k, v = (heads.unflatten(0, present.shape) for heads in (q, k, v))
    return operations.attend_causal(q, k, v, present).flatten(0, 1)


def rotary_table(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of each position's angles, [length, HEAD_DIM / 2] fp32."""
    exponents = torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM
    angles = torch.arange(length, device=device).float()[:, None] / THETA**exponents
    return angles.cos(), angles.sin()

"""What is computed between the matrices, in plain torch: the meaning of the Triton kernels, and what runs without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .matrix import Activations, Matrix, Scaled, quantise, stack, to_fp8
from .reference_pixels import (
    add,
    factors,
    from_colours,
    interleave,
    moments,
    normed,
    softmax,
    to_colours,
)
from .reference_randn import compile_randn, jump, normal
from .rows import Rows

__all__ = ["add", "add_norm", "attend_causal", "compile_randn", "factors", "from_colours", "gated", "interleave", "jump", "modulate", "moments", "norm_rotate", "norm_turn", "normal", "normed", "quantise", "softmax", "swiglu", "to_colours", "to_fp8", "widen", "within"]  # fmt: skip

EPS = 1e-6  # of the norms without weights
HIDDEN = -1e30  # added to the score of what is not to be seen; finite in bf16, too


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    y: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    fp8: bool = False,
) -> Activations:
    """Add a gated result to the residual, then norm and modulate it for what comes next.

    Args:
        x: the residual [count, C]; `gate * y` is added in place.
        shift: [2, B, C], for text and for image.
        scale: as `shift`.
        rows: what is where.
        y: [count, C], or None for nothing to add.
        gate: as `shift`.
        fp8: whether the result is wanted in fp8.

    Returns:
        `norm(x) * (1 + scale) + shift`, [count, C].
    """
    wide = x.float()
    if y is not None and gate is not None:
        wide = wide + y.float() * rows.spread(gate).float()
        x.copy_(wide)
    normed = F.layer_norm(wide, wide.shape[-1:], eps=EPS)
    result = normed * (1 + rows.spread(scale).float()) + rows.spread(shift).float()
    return quantise(result) if fp8 else result.to(x.dtype)


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
    """Norm and rotate q and k, and lay everything out for attention.

    Args:
        qkv: [count, 3 * num_heads * head_dim], rows may lie apart.
        q_norm: [2, head_dim], for text and for image.
        k_norm: as `q_norm`.
        cos: [seq_len, head_dim / 2] fp32; neighbouring numbers are a pair.
        sin: as `cos`.
        rows: what is where.
        eps: of the norms.
        fp8: whether the results are wanted in fp8; q and k are then scaled by what their norms allow.

    Returns:
        q, k, v, each [B, num_heads, seq_len, head_dim], in memory [B, seq_len, num_heads, head_dim].
    """
    head_dim = q_norm.shape[-1]
    q, k, v = rows.to_sequences(qkv.unflatten(1, (3, -1, head_dim))).unbind(2)

    def turn(
        x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:  # x: [B, seq_len, num_heads, head_dim]
        wide = F.rms_norm(x.float(), (head_dim,), eps=eps)
        lines = (rows.txt_len, rows.img_len)
        weight = weight.float().repeat_interleave(torch.tensor(lines, device=x.device), 0)
        even, odd = (wide * weight[:, None]).unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)

    q, k, v = (x.transpose(1, 2) for x in (turn(q, q_norm), turn(k, k_norm), v))
    if not fp8:
        return q.to(qkv.dtype), k.to(qkv.dtype), v
    most = (head_dim**0.5 * weight.float().abs().amax() for weight in (q_norm, k_norm))
    return to_fp8(q, next(most)), to_fp8(k, next(most)), to_fp8(v)


def widen(x: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Out of fp8."""
    return x.wide().to(dtype)


def swiglu(
    gate_up: torch.Tensor,
    rows: Rows,
    attention: torch.Tensor | Scaled | None = None,
    fp8: bool = False,
) -> Activations:
    """SiLU of one half times the other, behind what attention gave.

    Args:
        gate_up: [count, 2 * M], rows may lie apart.
        rows: what is where.
        attention: [B, seq_len, C], or None; in fp8 only where the result is.
        fp8: whether the result is wanted in fp8.

    Returns:
        [count, C + M], or [count, M].
    """
    gate, up = gate_up.float().chunk(2, -1)
    out = F.silu(gate) * up
    if attention is not None:
        wide = attention.wide() if isinstance(attention, Scaled) else attention.float()
        out = torch.cat((rows.to_rows(wide), out), 1)
    return quantise(out) if fp8 else out.to(gate_up.dtype)


def gated(
    parts: Sequence[tuple[Activations, Matrix]],
    rows: Rows,
    attention: torch.Tensor | Scaled | None = None,
    fp8: bool = False,
) -> Activations:
    """`swiglu` of products, which need not be written for that.

    Args:
        parts: inputs [count, C] and matrices of 2 * M outputs each, gates first; the products stand one below the other.
        rows: what is where.
        attention: as `swiglu`.
        fp8: as `swiglu`.

    Returns:
        As `swiglu`.
    """
    return swiglu(stack(parts), rows, attention, fp8)


def within(matrix: Matrix) -> bool:
    """Whether SwiGLU is computed within the product by a matrix, so that it is worth a product of its own."""
    return False


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add a result to the residual of the text encoder, then norm it for what comes next.

    Args:
        x: the residual [count, C] fp32; `y` is added in place.
        y: [count, C], or None for nothing to add.
        weight: [C] fp32.
        eps: of the norm.
        dtype: of the result.

    Returns:
        [count, C].
    """
    if y is not None:
        x += y
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype)


def norm_turn(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Norm each head of the text encoder and turn its pairs (i, i + head_dim / 2).

    Args:
        x: [count, heads * head_dim], the tokens of one prompt after those of another.
        weight: [head_dim] fp32.
        cos: [length, head_dim / 2] fp32, of each position in a prompt; `count` is a multiple of it.
        sin: as `cos`.
        eps: of the norm.

    Returns:
        [count, heads, head_dim].
    """
    length, head_dim = len(cos), len(weight)
    heads = x.float().unflatten(1, (-1, head_dim)).unflatten(0, (-1, length))
    heads = F.rms_norm(heads, (head_dim,), weight, eps)
    first, second = heads.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x.dtype).flatten(0, 1)


def attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Attention of prompts, each token to those before it and to itself, but to no padding.

    Args:
        q: [B, seq_len, heads, head_dim].
        k: [B, seq_len, kv_heads, head_dim], each read by heads / kv_heads heads.
        v: as `k`.
        present: [B, seq_len] bool, False where nothing may look.

    Returns:
        [B, seq_len, heads * head_dim]; finite, if without meaning, where a token sees nothing at all.
    """
    length, repeat = q.shape[1], q.shape[2] // k.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    bias = (later | ~present[:, None, None, :]).to(q.dtype) * HIDDEN
    k, v = (x.repeat_interleave(repeat, 2).transpose(1, 2) for x in (k, v))
    found = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias)
    return found.transpose(1, 2).flatten(2)

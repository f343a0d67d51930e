"""One denoising step of FLUX.2-Klein over a plain record of weights; knows no host.

The same mathematics as the model of black-forest-labs/flux2, in an order that suits the card: text and image lie in one
buffer, and all that stands between two matrices is one operation (`fused/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .fused import reference
from .fused.rows import Rows

THETA = 2000.0  # of the rotary embedding
AXES = (32, 32, 32, 32)  # numbers of a head that each of the four coordinates turns
TIME_WIDTH = 256
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stream:
    """One stream's half of a double block; the norms are [head_dim]."""

    qkv: torch.Tensor
    proj: torch.Tensor
    mlp_in: torch.Tensor
    mlp_out: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor


@dataclass(frozen=True)
class SingleBlock:
    """Attention and MLP side by side: `linear_in` gives q, k, v and the MLP's halves, `linear_out` takes both results."""

    linear_in: torch.Tensor
    linear_out: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """All weights of a Klein, by reference; matrices are [out, in], as torch's Linear has them.

    Attributes:
        img_in: of the latent tokens.
        txt_in: of the text's.
        time_in: of the timestep, two layers.
        txt_mod: shift, scale and gate of both halves of the double blocks' text streams, [6 * C, C].
        img_mod: of their image streams.
        single_mod: of the single blocks, [3 * C, C].
        double: blocks as (text stream, image stream).
        single: blocks.
        final_mod: shift and scale before the last layer, [2 * C, C].
        final: the last layer.
        qk_eps: of the norms of q and k.
    """

    img_in: torch.Tensor
    txt_in: torch.Tensor
    time_in: tuple[torch.Tensor, torch.Tensor]
    txt_mod: torch.Tensor
    img_mod: torch.Tensor
    single_mod: torch.Tensor
    double: Sequence[tuple[Stream, Stream]]
    single: Sequence[SingleBlock]
    final_mod: torch.Tensor
    final: torch.Tensor
    qk_eps: float


@dataclass(frozen=True)
class Modulation:
    """What a norm is followed by, and a result multiplied with; each [2, B, C], for text and for image."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


def denoise(
    weights: Weights,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timestep: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attend: Attend,
    ops=reference,
) -> torch.Tensor:
    """Predict the velocity.

    Args:
        weights: the model's.
        latents: [B, img_len, 128] tokens, those of references behind the picture's own.
        prompt_embeds: [B, txt_len, context_dim].
        timestep: [B], 0 to 1.
        rotary: cos and sin, see `rotary_table`.
        attend: q, k, v [B, num_heads, seq_len, head_dim] to the same shape.
        ops: the operations between the matrices, see `fused/reference.py`.

    Returns:
        [B, img_len, 128].
    """
    rows = Rows(len(latents), prompt_embeds.shape[1], latents.shape[1])
    x = latents.new_empty(rows.count, weights.img_in.shape[0])
    _both(x, rows, (weights.txt_in, weights.img_in), (prompt_embeds.flatten(0, 1), latents.flatten(0, 1)))  # fmt: skip
    vec = F.silu(_embed_time(weights, timestep, x.dtype))  # [B, C]
    first, second = _modulations(vec, weights)
    third = _modulation(*F.linear(vec, weights.single_mod).chunk(3, -1))
    shift, scale = F.linear(vec, weights.final_mod).chunk(2, -1)

    h = ops.modulate(x, first.shift, first.scale, rows)
    for number, streams in enumerate(weights.double):
        after = first if number + 1 < len(weights.double) else third
        h = _double(x, h, streams, first, second, after, rows, rotary, attend, weights.qk_eps, ops)
    for number, block in enumerate(weights.single):
        y = _single(h, block, rows, rotary, attend, weights.qk_eps, ops)
        if number + 1 < len(weights.single):
            h = ops.modulate(x, third.shift, third.scale, rows, y, third.gate)
    picture, last = slice(rows.txt, None), Rows(rows.batch, 0, rows.img_len)
    h = ops.modulate(x[picture], _pair(shift), _pair(scale), last, y[picture], third.gate)
    return F.linear(h, weights.final).unflatten(0, (rows.batch, rows.img_len))


def _double(x, h, streams, first, second, after, rows, rotary, attend, eps, ops) -> torch.Tensor:
    """A double block: `h` is the residual `x` [count, C] modulated for it; returns it modulated for the next one."""
    txt, img = streams
    qkv = h.new_empty(rows.count, img.qkv.shape[0])
    _both(qkv, rows, (txt.qkv, img.qkv), _parts(h, rows))
    q_norm, k_norm = torch.stack((txt.q_norm, img.q_norm)), torch.stack((txt.k_norm, img.k_norm))
    q, k, v = ops.norm_rotate(qkv, q_norm, k_norm, *rotary, rows, eps)
    attention = rows.to_rows(attend(q, k, v).transpose(1, 2).flatten(2))
    y = torch.empty_like(x)
    _both(y, rows, (txt.proj, img.proj), _parts(attention, rows))
    h = ops.modulate(x, second.shift, second.scale, rows, y, first.gate)
    gate_up = h.new_empty(rows.count, img.mlp_in.shape[0])
    _both(gate_up, rows, (txt.mlp_in, img.mlp_in), _parts(h, rows))
    _both(y, rows, (txt.mlp_out, img.mlp_out), _parts(ops.swiglu(gate_up, rows), rows))
    return ops.modulate(x, after.shift, after.scale, rows, y, second.gate)


def _single(h, block, rows, rotary, attend, eps, ops) -> torch.Tensor:
    """A single block: `h` is the residual modulated for it; returns what is to be added, [count, C]."""
    width = 3 * h.shape[1]
    z = F.linear(h, block.linear_in)
    both = (weight.expand(2, -1) for weight in (block.q_norm, block.k_norm))
    q, k, v = ops.norm_rotate(z[:, :width], *both, *rotary, rows, eps)
    attention = attend(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(ops.swiglu(z[:, width:], rows, attention), block.linear_out)


def _parts(x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return x[: rows.txt], x[rows.txt :]


def _both(out: torch.Tensor, rows: Rows, matrices: tuple, inputs: tuple) -> None:
    """Text by the first matrix, image by the second, into one buffer."""
    for part, matrix, source in zip(_parts(out, rows), matrices, inputs, strict=True):
        torch.mm(source, matrix.t(), out=part)


def _embed_time(weights: Weights, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B] to [B, C]."""
    half = TIME_WIDTH // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = (1000.0 * timestep)[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    waves = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    return F.linear(F.silu(F.linear(waves, weights.time_in[0])), weights.time_in[1])


def _modulations(vec: torch.Tensor, weights: Weights) -> tuple[Modulation, Modulation]:
    """Of both halves of the double blocks."""
    lines = torch.stack((F.linear(vec, weights.txt_mod), F.linear(vec, weights.img_mod)))
    parts = lines.chunk(6, -1)  # each [2, B, C]
    return Modulation(*parts[:3]), Modulation(*parts[3:])


def _modulation(*parts: torch.Tensor) -> Modulation:
    return Modulation(*map(_pair, parts))


def _pair(table: torch.Tensor) -> torch.Tensor:
    """The same for text and for image: [B, C] to [2, B, C]."""
    return table.expand(2, -1, -1)


def rotary_table(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of every token's angles.

    Args:
        ids: [seq_len, 4] coordinates, text first.

    Returns:
        Two tables [seq_len, head_dim / 2] fp32.
    """
    angles = []
    for axis, width in enumerate(AXES):
        exponents = torch.linspace(
            0, (width - 2) / width, width // 2, dtype=torch.float64, device=ids.device
        )
        angles.append(ids[:, axis, None].double() / THETA**exponents)
    table = torch.cat(angles, -1)
    return table.cos().float(), table.sin().float()

"""One denoising step of FLUX.2-Klein over a plain record of weights; knows no host.

The same mathematics as the model of black-forest-labs/flux2, in an order that suits the card: text and image lie in one
buffer, and all that stands between two matrices is one operation (`fused/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .fused import reference
from .fused.matrix import Activations, Matrix, Quantised, Scaled, stack
from .fused.rows import Rows
from .step_weights import SingleBlock, Stream, Weights

THETA = 2000.0  # of the rotary embedding
AXES = (32, 32, 32, 32)  # numbers of a head that each of the four coordinates turns
TIME_WIDTH = 256
APART = 12288  # rows from which on a single block's first product, by far the largest, is made in two parts


@dataclass(frozen=True)
class Attend:
    """How attention is computed.

    Attributes:
        run: q, k, v [B, num_heads, seq_len, head_dim] to the shape of q.
        fp8: whether it takes and gives `Scaled`.
        any_length: whether q may have fewer tokens than k and v.
    """

    run: Callable[[Any, Any, Any], Any] = F.scaled_dot_product_attention
    fp8: bool = False
    any_length: bool = True


@dataclass(frozen=True)
class Modulation:
    """What a norm is followed by, and a result multiplied with; each [2, B, C], for text and for image."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor | None = None


TORCHS = Attend()


def denoise(
    weights: Weights,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timestep: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attend: Attend = TORCHS,
    ops: Any = reference,
    wanted_len: int | None = None,
) -> torch.Tensor:
    """Predict the velocity.

    What nobody reads is not computed: of the last block only the image tokens, of one picture only those that are wanted.

    Args:
        weights: the model's.
        latents: [B, img_len, 128] tokens, those of references behind the picture's own.
        prompt_embeds: [B, txt_len, context_dim].
        timestep: [B], 0 to 1.
        rotary: cos and sin, see `rotary_table`.
        attend: attention.
        ops: the operations between the matrices, see `fused/reference.py`.
        wanted_len: how many of the latent tokens, from the first, None for all; those of several pictures are all given.

    Returns:
        [B, img_len, 128], or [1, wanted_len, 128].
    """
    rows = Rows(len(latents), prompt_embeds.shape[1], latents.shape[1])
    picture = Rows(rows.batch, 0, wanted_len if wanted_len and rows.batch == 1 else rows.img_len)
    shown = slice(rows.txt, rows.txt + picture.count)
    step = _Step(weights, rows, rotary, attend, ops)
    x = stack(
        [(prompt_embeds.flatten(0, 1), weights.txt_in), (latents.flatten(0, 1), weights.img_in)]
    )
    vec = F.silu(_embed_time(weights, timestep, x.dtype))  # [B, C]
    first, second = _modulations(vec, weights)
    third = _modulation(*weights.single_mod(vec).chunk(3, -1))
    last = _modulation(*weights.final_mod(vec).chunk(2, -1))

    into = [streams[0].qkv for streams in weights.double]
    into.append(weights.single[0].linear_in)  # what each block's input goes into
    h = ops.modulate(x, first.shift, first.scale, rows, fp8=into[0].quantises)
    for number, streams in enumerate(weights.double, start=1):
        after = first if number < len(weights.double) else third
        h = step.double(x, h, streams, first, second, after, into[number].quantises)
    *blocks, final = weights.single
    for block, following in zip(blocks, weights.single[1:], strict=True):
        y = step.single(h, block)
        h = ops.modulate(x, third.shift, third.scale, rows, y, third.gate, following.linear_in.quantises)  # fmt: skip
    y = step.single(h, final, shown, picture)
    h = ops.modulate(x[shown], last.shift, last.scale, picture, y, third.gate)
    return weights.final(h).unflatten(0, (picture.batch, picture.img_len))


@dataclass(frozen=True)
class _Step:
    """What the blocks of one step have in common."""

    weights: Weights
    rows: Rows
    rotary: tuple[torch.Tensor, torch.Tensor]
    attend: Attend
    ops: Any

    def double(
        self,
        x: torch.Tensor,
        h: Activations,
        streams: tuple[Stream, Stream],
        first: Modulation,
        second: Modulation,
        after: Modulation,
        fp8_after: bool,
    ) -> Activations:
        """A double block: `h` is the residual `x` [count, C], modulated for it; returns it modulated for the next one."""
        txt, img = streams
        y = self._attended(h, txt, img, x.dtype)
        h = self.ops.modulate(x, second.shift, second.scale, self.rows, y, first.gate, img.mlp_in.quantises)  # fmt: skip
        h = self.ops.gated(
            self._parts(h, txt.mlp_in, img.mlp_in), self.rows, fp8=img.mlp_out.quantises
        )
        stack(self._parts(h, txt.mlp_out, img.mlp_out), y)
        return self.ops.modulate(x, after.shift, after.scale, self.rows, y, second.gate, fp8_after)  # fmt: skip

    def _attended(self, h: Activations, txt: Stream, img: Stream, dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
        """The first half of a double block; what it needs is free again before the second, which takes more memory."""
        qkv = stack(self._parts(h, txt.qkv, img.qkv))
        norms = torch.stack((txt.q_norm, img.q_norm)), torch.stack((txt.k_norm, img.k_norm))
        attention = self._rows(self._attend(qkv, norms, dtype, img.proj.quantises))
        if img.proj.quantises and not isinstance(attention, Quantised):
            attention = self.ops.quantise(attention)
        return stack(self._parts(attention, txt.proj, img.proj))

    def single(self, h: Activations, block: SingleBlock, shown: slice = slice(None), picture: Rows | None = None) -> torch.Tensor:  # fmt: skip
        """A single block: `h` is the residual modulated for it; returns what is to be added, [count, C].

        Args:
            h: [count, C].
            block: its weights.
            shown: rows that somebody reads; keys and values are of all.
            picture: what is where in them.
        """
        width, fp8 = 3 * block.linear_out.features, block.linear_out.quantises
        norms = (weight.expand(2, -1) for weight in (block.q_norm, block.k_norm))
        mlp_in = block.linear_in.part(width, block.linear_in.features)
        linear_out: Any = block.linear_out  # takes what it `quantises` to
        if picture is None and self.rows.count < APART and not self.ops.within(mlp_in):
            z = block.linear_in(h)
            attention = self._attend(z[:, :width], norms, z.dtype, fp8)
            return linear_out(self.ops.swiglu(z[:, width:], self.rows, attention, fp8))
        picture = picture or self.rows
        first = self.rows.txt_len - picture.txt_len
        qkv = block.linear_in.part(0, width)(h)
        attention = self._attend(qkv, norms, qkv.dtype, fp8, slice(first, first + picture.seq_len))
        del qkv  # what follows takes the most memory
        return linear_out(self.ops.gated([(h[shown], mlp_in)], picture, attention, fp8))

    def _attend(
        self,
        qkv: torch.Tensor,
        norms: Iterable[torch.Tensor],
        dtype: torch.dtype,
        fp8: bool,
        tokens: slice = slice(None),
    ) -> torch.Tensor | Scaled:
        """[count, 3 * C] to [B, seq_len, C], or some tokens' part of it; in fp8 if attention gives that and it is welcome."""
        fp8_qkv = self.attend.fp8
        q, k, v = self.ops.norm_rotate(qkv, *norms, *self.rotary, self.rows, self.weights.qk_eps, fp8_qkv)  # fmt: skip
        if self.attend.any_length:
            found = self.attend.run(q[:, :, tokens], k, v)
        else:
            found = self.attend.run(q, k, v)[:, :, tokens]
        if not fp8_qkv:
            return found.transpose(1, 2).flatten(2)
        flat = Scaled(found.data.transpose(1, 2).flatten(2).contiguous(), found.scale)
        return flat if fp8 else self.ops.widen(flat, dtype)

    def _rows(self, attention: torch.Tensor | Scaled) -> Activations:
        """[B, seq_len, C] to [count, C]."""
        if isinstance(attention, Scaled):
            return attention.by_rows(self.rows.to_rows(attention.data))
        return self.rows.to_rows(attention)

    def _parts(self, x: Activations, txt: Matrix, img: Matrix) -> list[tuple[Activations, Matrix]]:
        """What goes into the matrix of text, and of image."""
        return [(x[: self.rows.txt], txt), (x[self.rows.txt :], img)]


def _embed_time(weights: Weights, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B] to [B, C]."""
    half = TIME_WIDTH // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = (1000.0 * timestep)[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    waves = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    return weights.time_in[1](F.silu(weights.time_in[0](waves)))


def _modulations(vec: torch.Tensor, weights: Weights) -> tuple[Modulation, Modulation]:
    """Of both halves of the double blocks."""
    lines = torch.stack((weights.txt_mod(vec), weights.img_mod(vec)))
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

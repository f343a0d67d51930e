"""The weights of a Klein as plain records, by reference: what `step.py` computes with, whichever host they come from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .fused.matrix import Joined, Matrix, Plain


@dataclass(frozen=True)
class Stream:
    """One stream's half of a double block; the norms are [head_dim]."""

    qkv: Matrix
    proj: Matrix
    mlp_in: Matrix
    mlp_out: Matrix
    q_norm: torch.Tensor
    k_norm: torch.Tensor


@dataclass(frozen=True)
class SingleBlock:
    """Attention and MLP side by side: `linear_in` gives q, k, v and the MLP's halves, `linear_out` takes both results."""

    linear_in: Any  # a Plain or an Fp8
    linear_out: Matrix
    q_norm: torch.Tensor
    k_norm: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """All weights of a Klein, by reference.

    The matrices of the blocks may be of any precision (`fused/matrix.py`), those of both streams of a double block of the
    same one.

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

    img_in: Plain
    txt_in: Plain
    time_in: tuple[Plain, Plain]
    txt_mod: Plain
    img_mod: Plain
    single_mod: Plain
    double: Sequence[tuple[Stream, Stream]]
    single: Sequence[SingleBlock]
    final_mod: Plain | Joined
    final: Plain
    qk_eps: float

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where everything lies: the same while nothing was replaced."""
        blocks: list[Any] = [
            *(stream for streams in self.double for stream in streams),
            *self.single,
        ]
        parts = [getattr(block, field.name) for block in blocks for field in fields(block)]
        parts += [self.img_in, self.txt_in, *self.time_in, self.txt_mod, self.img_mod]
        parts += [self.single_mod, self.final_mod, self.final]
        tensors = (
            t for part in parts for t in getattr(part, "parts", [getattr(part, "weight", part)])
        )
        return tuple(tensor.data_ptr() for tensor in tensors)

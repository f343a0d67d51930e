"""What the autoencoder's layers are made of: plain records of weights, and how they may be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLOURS = 3


@dataclass(frozen=True)
class Choices:
    """How to compute what can be computed in more than one way.

    Attributes:
        fold: whether upsampling and its convolution are one convolution of the small picture, with 4/9 of the work.
        attention: "rows" multiplies some rows at a time and keeps their scores in fp32, "rows_half" in the dtype of the
            weights; "sdpa" is torch's.
        tune: whether cuDNN tries out its algorithms at each new size.
        band: pixels of a picture that a convolution sees at a time, None for all; what has to fit into memory shrinks
            to about a half.
    """

    fold: bool = True
    attention: str = "rows"
    tune: bool = False
    band: int | None = None


USUAL = Choices()


@dataclass(frozen=True)
class Norm:
    """A group norm: weight and bias [C] fp32."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Conv:
    """A convolution: weight [out, in, k, k], in memory [out, k, k, in]; bias [out] fp32.

    Attributes:
        folded: of one that follows upsampling see `fold`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    folded: torch.Tensor | None = None


@dataclass(frozen=True)
class Matrix:
    """A convolution of single pixels: weight [out, in]; bias [out] fp32."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Block:
    """A residual block; `shortcut` where its width changes."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Matrix | None


@dataclass(frozen=True)
class Attention:
    """A residual attention block of one head; `qkv` is [3 * C, C]."""

    norm: Norm
    qkv: Matrix
    out: Matrix


Middle = tuple[Block, Attention, Block]
Level = tuple[list[Block], Conv | None]  # blocks, and how the size changes after them


def fold(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a convolution that follows upsampling, for the small picture.

    Doubled pixels are read with the same numbers, so that of three lines two are one: an even line of the result sees the
    line before and its own, an odd one its own and the next.

    Args:
        weight: [out, in, 3, 3].

    Returns:
        [4 * out, in, 2, 2], for even and odd lines and in them even and odd columns; see `reference_pixels.interleave`.
    """
    wide = weight.float()

    def halves(w: torch.Tensor, dim: int) -> list[torch.Tensor]:
        a, b, c = w.unbind(dim)
        return [torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)]

    phases = [phase for lines in halves(wide, 2) for phase in halves(lines, 3)]
    return torch.cat(phases).to(weight.dtype)

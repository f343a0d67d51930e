"""The layers of FLUX.2's autoencoder, over plain records of weights; knows no host.

Pixels lie as [B, H, W, C], which the convolutions of a GPU read best. Convolutions add no bias: what is still to be added
to their result, a number for each channel, goes into the pass that reads it next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .fused import reference
from .pixel_layers import USUAL, Attention, Block, Choices, Conv, Middle, Norm

SCORES = 256 << 20  # bytes of attention scores at a time
Band = tuple[int, int]  # the first line and the one after the last


@dataclass(frozen=True)
class Pixels:
    """Pixels [B, H, W, C], what is still to be added to them ([C] fp32), and their moments, where known."""

    data: torch.Tensor
    shift: torch.Tensor | None = None
    moments: torch.Tensor | None = None

    @property
    def size(self) -> torch.Size:
        """Of the data."""
        return self.data.shape

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Some lines of the picture."""
        return self.data if bottom - top == self.size[1] else self.data[:, top:bottom]


@dataclass(frozen=True)
class Upsampled:
    """Pixels that are computed when they are asked for; see `Pixels`."""

    small: torch.Tensor
    conv: Conv
    network: Network
    moments: torch.Tensor | None = None

    @property
    def shift(self) -> torch.Tensor:
        """Still to be added."""
        return self.conv.bias

    @property
    def size(self) -> torch.Size:
        """[B, H, W, C]."""
        batch, height, width, _ = self.small.shape
        return torch.Size((batch, 2 * height, 2 * width, len(self.conv.bias)))

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Some lines of the picture."""
        first, last = max(0, top // 2 - 1), min(self.small.shape[1], (bottom + 1) // 2 + 1)
        found, _ = self.network.enlarge(self.small[:, first:last], self.conv)
        return found[:, top - 2 * first : bottom - 2 * first]


@dataclass(frozen=True)
class Network:
    """What both ways are made of.

    Args:
        operations: between the convolutions, see `fused/reference_pixels.py`.
        choices: how.
    """

    operations: Any = reference
    choices: Choices = USUAL

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:  # fmt: skip
        """A convolution without its bias; pixels in, pixels out."""
        x = x.permute(0, 3, 1, 2)
        if self.choices.tune:
            y = torch.cudnn_convolution(x, weight, [padding] * 2, [stride] * 2, [1, 1], 1, True, False, True)  # fmt: skip
        else:
            y = F.conv2d(x, weight, None, stride, padding)
        return y.permute(0, 2, 3, 1).contiguous()

    def enlarge(self, x: torch.Tensor, conv: Conv) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Twice the size, and the convolution that follows; and moments where they cost nothing."""
        if self.choices.fold and conv.folded is not None:
            return self.operations.interleave(self.convolve(x, conv.folded))
        x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        return self.convolve(x.permute(0, 2, 3, 1).contiguous(), conv.weight), None

    def bands(self, size: torch.Size) -> Iterator[Band]:
        """Lines that are computed at a time."""
        _, height, width, _ = size
        lines = max(8, self.choices.band // width) if self.choices.band else height
        for top in range(0, height, lines):
            yield top, min(height, top + lines)

    def factors(self, x: Pixels | Upsampled, norm: Norm) -> torch.Tensor:
        """What a norm makes of all of a picture."""
        moments = x.moments
        if moments is None:
            found = [self.operations.moments(x.rows(*band).contiguous()) for band in self.bands(x.size)]  # fmt: skip
            moments = found[0] if len(found) == 1 else torch.cat(found, 1)
        return self.operations.factors(moments, norm.weight, norm.bias, x.shift)

    def convolve_normed(self, x: Pixels | Upsampled, factors: torch.Tensor, conv: Conv, band: Band, last_use: bool = False) -> torch.Tensor:  # fmt: skip
        """Norm, SiLU and convolution, some lines of the result.

        Args:
            x: pixels.
            factors: of the norm.
            conv: of 3x3.
            band: first line, and the one after the last.
            last_use: whether x may be overwritten.
        """
        last_use &= band == (0, x.size[1])

        def work(part: torch.Tensor) -> torch.Tensor:
            return self.convolve(self.operations.normed(part, factors, True, last_use), conv.weight)

        return _with_more_lines(x, band, work)

    def to_colours(self, x: Pixels | Upsampled, factors: torch.Tensor, conv: Conv, band: Band) -> torch.Tensor:  # fmt: skip
        """As `convolve_normed`, to a picture in fp32, with the bias."""
        return _with_more_lines(x, band, lambda part: self.operations.to_colours(part, factors, conv.weight, conv.bias))  # fmt: skip

    def block(self, x: Pixels | Upsampled, block: Block) -> Pixels:
        """A residual block; what x lies in may become its result."""
        bands, size = list(self.bands(x.size)), (*x.size[:3], len(block.conv1.bias))
        factors = self.factors(x, block.norm1)
        inner = Pixels(collect(size, bands, lambda band: self.convolve_normed(x, factors, block.conv1, band)), block.conv1.bias)  # fmt: skip
        factors = self.factors(inner, block.norm2)

        def outer(band: Band) -> torch.Tensor:
            return self.convolve_normed(inner, factors, block.conv2, band, last_use=True)

        if block.shortcut is None:
            shift = block.conv2.bias if x.shift is None else block.conv2.bias + x.shift
            found = [self.operations.add(x.rows(*band), outer(band), shift) for band in bands]
            moments = found[0] if len(found) == 1 else torch.cat(found, 1)
            lasting: Any = x  # what has no shortcut is not computed on demand
            return Pixels(lasting.data, None, moments)
        weight, shift = block.shortcut.weight, block.conv2.bias + block.shortcut.bias
        if x.shift is not None:
            shift = shift + weight.float() @ x.shift

        def added(band: Band) -> torch.Tensor:
            found = outer(band)
            found.flatten(0, 2).addmm_(x.rows(*band).contiguous().flatten(0, 2), weight.T)
            return found

        return Pixels(collect(size, bands, added), shift)

    def attention(self, x: Pixels, layer: Attention) -> Pixels:
        """Each pixel sees all of its picture; what x lies in becomes the result."""
        h = self.operations.normed(x.data, self.factors(x, layer.norm), False)
        qkv = F.linear(
            h.flatten(1, 2), layer.qkv.weight, layer.qkv.bias.to(h.dtype)
        )  # [B, N, 3 * C]
        attended = torch.stack([self.attend(*one.chunk(3, -1)) for one in qkv])
        y = F.linear(attended, layer.out.weight).view(x.size)
        shift = layer.out.bias if x.shift is None else layer.out.bias + x.shift
        return Pixels(x.data, None, self.operations.add(x.data, y, shift))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of one head, all of them [N, C]."""
        kind, plain = self.choices.attention, not q.is_cuda or q.dtype == torch.float32
        if kind == "sdpa" or (kind == "rows" and not plain and not hasattr(torch.ops.aten.mm, "dtype")):  # fmt: skip
            q, k, v = (t[None, None] for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v)[0, 0]
        wide = kind == "rows" and not plain
        one = max(1, SCORES // (4 * len(q)))
        rows = one // 128 * 128 or one  # whole tiles of a matrix
        scale, out = q.shape[1] ** -0.5, torch.empty_like(q, memory_format=torch.contiguous_format)
        for part, target in zip(q.split(rows), out.split(rows), strict=True):
            scores = torch.mm(part, k.T, out_dtype=torch.float32) if wide else part @ k.T
            torch.mm(self.operations.softmax(scores, scale, q.dtype), v, out=target)
        return out

    def middle(self, x: Pixels, middle: Middle) -> Pixels:
        """The blocks of the smallest size."""
        first, attention, second = middle
        return self.block(self.attention(self.block(x, first), attention), second)

    def upsample(self, x: Pixels, conv: Conv, lasting: bool) -> Pixels | Upsampled:
        """Twice the size; in bands it is only computed when it is read, unless it is to last."""
        small = _settled(x)
        if self.choices.band is None:
            data, moments = self.enlarge(small, conv)
            return Pixels(data, conv.bias, moments)
        lazy = Upsampled(small, conv, self)
        if not lasting:
            return lazy
        bands = list(self.bands(lazy.size))
        return Pixels(collect(lazy.size, bands, lambda band: lazy.rows(*band)), conv.bias)

    def downsample(self, x: Pixels, conv: Conv) -> Pixels:
        """Half the size; a line of zeros below and one at the right.

        With two lines on all sides the result has a line and a column in front that nobody wants: to leave them out copies a
        quarter of what it would copy to put zeros on two sides only.
        """
        wider = self.convolve(_settled(x), conv.weight, stride=2, padding=2)
        return Pixels(wider[:, 1:, 1:].contiguous(), conv.bias)


def _with_more_lines(x: Pixels | Upsampled, band: Band, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Some lines of what a convolution of 3x3 makes, which reads one more at each cut."""
    top, bottom = band
    first, last = max(0, top - 1), min(x.size[1], bottom + 1)
    found = work(x.rows(first, last).contiguous())
    return found if last - first == bottom - top else found[:, top - first : bottom - first].contiguous()  # fmt: skip


def collect(size: Sequence[int], bands: list[Band], work: Callable[[Band], torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """What `work` makes of all bands: pixels of a size."""
    if len(bands) == 1:
        return work(bands[0])
    out: Any = None
    for top, bottom in bands:
        part = work((top, bottom))
        out = part.new_empty(size) if out is None else out
        out[:, top:bottom] = part
    return out


def _settled(x: Pixels) -> torch.Tensor:
    """The pixels with what was still to be added to them."""
    return x.data if x.shift is None else (x.data.float() + x.shift).to(x.data.dtype)

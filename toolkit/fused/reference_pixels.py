"""What is computed between the convolutions of the autoencoder, in plain torch; see `reference.py`.

Pixels lie as [B, H, W, C], contiguous. Statistics of a tensor are "moments", [B, parts, 3, C] fp32: of each part of a
picture how many pixels it has, and of each channel their mean and the sum of their squared distances from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUPS = 32
EPS = 1e-6


def moments(x: torch.Tensor) -> torch.Tensor:
    """The moments of pixels [B, H, W, C]."""
    wide = x.flatten(1, 2).float()
    mean = wide.mean(1)
    squares = (wide - mean[:, None]).square().sum(1)
    return torch.stack((torch.full_like(mean, wide.shape[1]), mean, squares), 1).unsqueeze(1)


def factors(
    moments: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Group norm as one multiplication and one addition for each channel.

    Args:
        moments: of the pixels, all parts of each picture.
        weight: [C] fp32, of the norm.
        bias: as `weight`.
        shift: [C] fp32, what is still to be added to the pixels before the norm; None for nothing.

    Returns:
        [B, 2, C] fp32, the factor and the addend.
    """
    count, mean, squares = moments.unbind(2)  # [B, parts, C] each
    if shift is not None:
        mean = mean + shift
    batch, parts, channels = count.shape
    count, mean, squares = (t.view(batch, parts, GROUPS, -1) for t in (count, mean, squares))
    total = count.sum((1, 3), keepdim=True)
    centre = (count * mean).sum((1, 3), keepdim=True) / total
    variance = (squares + count * (mean - centre).square()).sum((1, 3), keepdim=True) / total
    centre, scale = (
        t.expand(-1, -1, -1, channels // GROUPS).reshape(batch, channels)
        for t in (centre, (variance + EPS).rsqrt())
    )
    factor = scale * weight
    added = -centre if shift is None else shift - centre
    return torch.stack((factor, bias + added * factor), 1)


def normed(
    x: torch.Tensor, factors: torch.Tensor, silu: bool = True, in_place: bool = False
) -> torch.Tensor:
    """Apply `factors` to pixels [B, H, W, C].

    Args:
        x: the pixels.
        factors: see there.
        silu: whether SiLU follows.
        in_place: whether the result may take the place of x.
    """
    factor, addend = (t[:, None, None] for t in factors.unbind(1))
    result = x.float() * factor + addend
    result = (F.silu(result) if silu else result).to(x.dtype)
    return x.copy_(result) if in_place else result


def add(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Add y and a number for each channel to x, in place.

    Args:
        x: pixels [B, H, W, C].
        y: as x.
        shift: [C] fp32.

    Returns:
        The moments of the result.
    """
    x.copy_(x.float() + y.float() + shift)
    return moments(x)


def from_colours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A convolution without its bias, of a picture.

    Args:
        x: [B, H, W, colours], in any dtype; multiplied in that of the weight.
        weight: [C, colours, 3, 3].

    Returns:
        Pixels [B, H, W, C].
    """
    return F.conv2d(x.to(weight.dtype).movedim(-1, 1), weight, padding=1).movedim(1, -1).contiguous()  # fmt: skip


def to_colours(
    x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Norm, SiLU and a convolution that makes a picture.

    Args:
        x: pixels [B, H, W, C].
        factors: of the norm.
        weight: [colours, C, 3, 3].
        bias: [colours] fp32.

    Returns:
        [B, H, W, colours] fp32.
    """
    found = F.conv2d(normed(x, factors).movedim(-1, 1), weight, padding=1).movedim(1, -1)
    return found.contiguous().float() + bias


def interleave(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out what the folded upsampling convolution gave, see `pixel_layers.fold`.

    Args:
        x: [B, H + 1, W + 1, 4 * C]; the four stand for the even and odd rows, and in them the even and odd columns.

    Returns:
        Pixels [B, 2 * H, 2 * W, C] and their moments.
    """
    batch, height, width, channels = x.shape
    height, width, channels = height - 1, width - 1, channels // 4
    out = x.new_empty(batch, height, 2, width, 2, channels)
    for down in range(2):
        for across in range(2):
            phase = (2 * down + across) * channels
            out[:, :, down, :, across] = x[:, down : down + height, across : across + width, phase : phase + channels]  # fmt: skip
    out = out.view(batch, 2 * height, 2 * width, channels)
    return out, moments(out)


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Softmax of each row of `scale * scores`.

    Args:
        scores: [rows, columns].
        scale: of the scores.
        dtype: of the result.
    """
    return (scores.float() * scale).softmax(-1).to(dtype)
